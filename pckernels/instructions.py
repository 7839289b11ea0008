"""What a kernel executes: a flat list of instructions over an arena. The one vocabulary of every native backend.

An inference runs tile by tile: a tile is a group of samples ("lanes"). The arena is an array of rows; a row holds one
number for each lane, so a value node of n elements is n consecutive rows. Arrays start at multiples of 16 rows and own what
is left up to the next multiple. Operands `out, a, b, c, d` are the first rows of arrays (of COPY, of parts of them); ABSENT stands for an
operand that is not there (zeros, unless said otherwise). Outside the arena lie

* weights: contiguous tensors shared by all samples, read only, by `slot`;
* io: row-major tensors (B, n) with a row for each sample, by `slot`: inputs, targets, results;
* gradients: one buffer for each weight that learns inside the loop (CONV_LEARN, SUM_LEARN);
* energies: (steps + 1, slots) in float64, sums over the batch.

interpreter.py executes this list in plain PyTorch and is the specification of the native engine; csrc/engine/instruction.h
mirrors the encoding. Every geometry is that of one sample.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

ABSENT = -1
WORDS = 32  # int32 words of an encoded instruction
PARAMETERS, FACTORS = 16, 3


class Op(enum.IntEnum):
    """Operations. `acc` means: added to `out` where the instruction accumulates, otherwise written.

    Written below as out, a, b, c, d over n rows; p and f are the integer and float parameters.
    """

    # Between io and the arena. p0: elements of an io row; p1: where the n elements start in it.
    LOAD = 0  #          out = io[slot]
    STORE = 1  #         io[slot] = a + b, for the lanes that hold a sample
    FILL = 2  #          out = f0
    COPY = 3  #          p0 blocks of p1 rows, every p2 rows of out from every p3 rows of a, times f0; acc
    # Products. LINEAR: p0 positions, p1 = K inputs, p2 = N outputs; weights[slot] (N, K); weights[slot2] (N,) or ABSENT.
    LINEAR = 4  #        out (p0, N) = a (p0, K) W^T + bias; acc
    LINEAR_T = 5  #      out (p0, K) = a (p0, N) W; acc
    # CONV, as torch.conv2d: p = (C, H, W, C_out, kh, kw, sh, sw, ph, pw, dh, dw, groups, OH, OW); weights[slot] (C_out, C / groups, kh, kw)
    CONV = 6  #          out (C_out, OH, OW) = conv(a (C, H, W)) + bias weights[slot2]; acc
    CONV_T = 7  #        out (C, H, W) = the transpose of the same, of a (C_out, OH, OW); acc
    # Activations: p0 is an Activation, f its parameters. z is the feed-forward pre-activation, dz its change, m = f(z).
    ACT = 8  #           out = f(a)
    ACT_CHANGE = 9  #    out = f(a + b) - f(a) without cancellation: a = z, b = dz, c = m
    ACT_GRAD = 10  #     out = a * f'(b + c): a = the error behind, b = z, c = dz, d = m; acc. p1 = 1 (TANH, SIGMOID): b = m, c = its change
    # Element by element.
    ADD = 11  #          out = f0 a + f1 b; acc
    MUL = 12  #          out = a * b
    MUL_CHANGE = 13  #   out = (a + b)(c + d) - a c = a d + b c + b d: a, c the factors, b, d their changes
    MUL_GRAD = 14  #     out = a * (b + c); acc
    # Pooling: p as CONV without C_out and groups; p15 = 1 divides an average by the elements inside the image alone.
    MAXPOOL = 15  #      out (C, OH, OW) = max over each window of a (C, H, W); b: where (rows of int32), the first maximum
    MAXPOOL_CHANGE = 16  # out = max_j((a_j - M) + b_j): a = input, b = its change, c = M the maxima of a; d: where (written)
    MAXPOOL_GRAD = 17  # out (C, H, W) = sum over the windows w with b[w] here of a[w]; b: where; acc
    AVGPOOL = 18  #      out (C, OH, OW) = mean of each window of a; acc
    AVGPOOL_T = 19  #    out (C, H, W) = its transpose, of a (C, OH, OW); acc
    # The dynamics.
    # LOSS: out = -f0 dL/dmu, 0 in lanes without a sample; a = mu, b = its change, c = target; p0 is a Loss, p1 = C classes. f0 times the
    # batch sum of L goes to energies[t][slot]; each sample's L to io[slot2] (B, 1), unless ABSENT. Squared error: c has n rows.
    # Cross-entropy: n / C positions of C logits; c holds one class index for each position, as a float; a negative one is ignored.
    LOSS = 20
    ERROR = 21  #        out = a - b
    # MOVE: velocity = f1 c + (b - f2 a), kept in c unless ABSENT; out += f0 velocity. a = error, b = feedback; f: rate, momentum, precision
    MOVE = 22
    RELAX = 23  #        out = (1 - f0) out + f0 a: a = feedback
    NORM = 24  #         energies[t][slot] = f0 * sum over lanes and rows of a * b (b ABSENT: a * a)
    # Local updates inside the loop, summed over the samples, added to gradients[slot] times f0.
    CONV_LEARN = 25  #   (C_out, C / groups, kh, kw) += f0 sum a (C_out, OH, OW) (b + c) (C, H, W): a = error, b = input, c = its change
    SUM_LEARN = 26  #    (p1,) += f0 sum of a (p0, p1, p2) over p0 and p2: the bias of a convolution (p0 = 1) or of a product (p2 = 1)
    # Between the blocks of a cluster, which have an arena each (sharding.py); nothing where there is one.
    MEET = 27  #         all threads of all blocks
    GATHER = 28  #       n rows from out on, of positions of p0 rows from row a on: each block copies those that it does not own
    # Of the graph tier alone: the engines do not know them.
    # Where each sample rests by itself, it has three rows: 1 once it rests, how far it has gone in this step, and the steps that it took.
    MOVE_OR_REST = 29  # as MOVE, but by f0 velocity = 0 where d[0] = 1; d[1] = max(d[1], |f0 velocity| over the n rows)
    REST = 30  #         ends a step: out[2] += 1 - out[0]; out[0] = 1 unless out[1] > f0; out[1] = 0
    # Where weights move at every step: a copy of those that learn, or by an optimizer the parameters themselves.
    LINEAR_LEARN = 31  # gradients[slot] (N, K) += f0 sum over samples and positions of a (p0, N) b (p0, K): p as LINEAR
    MOVE_WEIGHTS = 32  # every weight that learns += f0 / divisor * what its gradient has gained since the last time


CONVOLUTIONS = (Op.CONV, Op.CONV_T, Op.CONV_LEARN)


def convolution_multiply_adds(p: Sequence[int]) -> int:
    """Of one sample, in one of CONVOLUTIONS with these parameters."""
    return p[3] * p[13] * p[14] * (p[0] // p[12]) * p[4] * p[5]


# Row by row: what happens to a row of n depends on the same row of every operand. A team shares out n rows in one way only, so that of two
# such instructions over the same n a thread has the same rows: between them no barrier is needed for arrays that begin at the same row.
ROWWISE = frozenset({Op.FILL, Op.ACT, Op.ACT_CHANGE, Op.ACT_GRAD, Op.ADD, Op.MUL, Op.MUL_CHANGE, Op.MUL_GRAD})
ROWWISE |= {Op.ERROR, Op.MOVE, Op.RELAX, Op.NORM}


class Activation(enum.IntEnum):
    """Activations and their f: what a new one needs is an entry here and in each backend's table of activations."""

    AFFINE = 0  #       f0 z + f1
    RELU = 1
    LEAKY_RELU = 2  #   z > 0 ? z : f0 z
    TANH = 3
    SIGMOID = 4
    GELU = 5  #         z Phi(z)
    GELU_TANH = 6  #    its tanh approximation
    HARDTANH = 7  #     min(max(z, f0), f1)
    SILU = 8  #         z sigmoid(z)


class Loss(enum.IntEnum):
    SQUARED_ERROR = 0
    CROSS_ENTROPY = 1


def is_rowwise(op: Op, p: tuple[int, ...]) -> bool:
    """Whether an operation with these parameters is one of ROWWISE, or a LOSS whose positions are rows."""
    return op in ROWWISE or (op is Op.LOSS and p[0] == Loss.SQUARED_ERROR)


@dataclass(frozen=True)
class Instruction:
    """One instruction; see Op.

    Attributes:
        first: it is left out before step t = first (the light cone: what it computes is zero until then).
        barrier: the threads of a team must meet before it, since it reads or writes what others wrote or read (others: see ROWWISE).
            Where it is left out, its barrier passes to the next instruction that runs.
        accumulate: add to `out` in place of writing it.
    """

    op: Op
    n: int = 0
    out: int = ABSENT
    a: int = ABSENT
    b: int = ABSENT
    c: int = ABSENT
    d: int = ABSENT
    slot: int = ABSENT
    slot2: int = ABSENT
    p: tuple[int, ...] = ()
    f: tuple[float, ...] = ()
    accumulate: bool = False
    first: int = 0
    barrier: bool = False

    def encoded(self) -> list[int]:
        """WORDS int32: op, first, barrier, accumulate, n, out, a, b, c, d, slot, slot2, 0, p[16], f[3] (bits of float32)."""
        head = [int(self.op), self.first, int(self.barrier), int(self.accumulate), self.n, self.out]
        head += [self.a, self.b, self.c, self.d, self.slot, self.slot2, 0]
        parameters = [*self.p, *[0] * (PARAMETERS - len(self.p))]
        factors = [*self.f, *[0.0] * (FACTORS - len(self.f))]
        return head + parameters + [struct.unpack("<i", struct.pack("<f", factor))[0] for factor in factors]


@dataclass(frozen=True)
class Phase:
    """Instructions that run once for each t = first, .., last."""

    instructions: tuple[Instruction, ...]
    first: int
    last: int


@dataclass(frozen=True)
class OuterProduct:
    """Part of a weight's gradient after all tiles: gradients[weight] += coefficient * sum over rows of g^T x.

    Rows are samples times positions. x is io[x_slot], of which a sample's row has `x_stride` elements and the part starts at
    `x_offset`; g is io[g_slot] (B, positions * outputs). `bias`: the gradient that sums g itself, or ABSENT.
    """

    weight: int
    bias: int
    g_slot: int
    x_slot: int
    positions: int
    inputs: int
    outputs: int
    x_stride: int
    x_offset: int
    coefficient: float = 1.0


@dataclass(frozen=True)
class Code:
    """Everything that one kind of call executes, for any batch size.

    Attributes:
        phases: in order; the first is the feed-forward pass (t = 0).
        rows: of the arena. Rows hold anything before the first instruction.
        weights, io, gradients: how many there are.
        steps, energies: the shape (steps + 1, energies) of the energies.
        products: what remains to be learned when all tiles are done, in order.
    """

    phases: tuple[Phase, ...]
    rows: int
    weights: int
    io: int
    gradients: int
    steps: int
    energies: int
    products: tuple[OuterProduct, ...] = field(default=())

    @cached_property
    def instructions(self) -> list[Instruction]:
        return [instruction for phase in self.phases for instruction in phase.instructions]

    def encoded(self) -> tuple[Tensor, Tensor]:
        """(instructions, WORDS) int32 of all phases in a row, and (phases, 3) int32: how many, first t, last t."""
        words = _matrix([instruction.encoded() for instruction in self.instructions], WORDS)
        return words, _matrix([[len(phase.instructions), phase.first, phase.last] for phase in self.phases], 3)


def _matrix(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, columns)
