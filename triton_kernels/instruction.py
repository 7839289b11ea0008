"""How kernels read an instruction: the words of pckernels.instructions.Instruction.encoded, and the operations by their numbers.

In every file of the machine `i` is a pointer to the instruction, `arena` to the program's arena [rows][LANES] of float32, and rows are
numbered as in instructions.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pckernels import instructions
from pckernels.instructions import Op

WORDS = tl.constexpr(instructions.WORDS)
OP, FIRST, BARRIER, ACCUMULATE, N, OUT, A, B, C, D, SLOT, SLOT2 = (tl.constexpr(k) for k in range(12))
P = tl.constexpr(13)
F = tl.constexpr(P.value + instructions.PARAMETERS)

LOAD, STORE, FILL, COPY = (tl.constexpr(int(op)) for op in (Op.LOAD, Op.STORE, Op.FILL, Op.COPY))
LINEAR, LINEAR_T = tl.constexpr(int(Op.LINEAR)), tl.constexpr(int(Op.LINEAR_T))
CONV, CONV_T = tl.constexpr(int(Op.CONV)), tl.constexpr(int(Op.CONV_T))
ACT, ACT_CHANGE, ACT_GRAD = (tl.constexpr(int(op)) for op in (Op.ACT, Op.ACT_CHANGE, Op.ACT_GRAD))
ADD, MUL, MUL_CHANGE, MUL_GRAD = (tl.constexpr(int(op)) for op in (Op.ADD, Op.MUL, Op.MUL_CHANGE, Op.MUL_GRAD))
MAXPOOL, MAXPOOL_CHANGE, MAXPOOL_GRAD = (tl.constexpr(int(op)) for op in (Op.MAXPOOL, Op.MAXPOOL_CHANGE, Op.MAXPOOL_GRAD))
AVGPOOL, AVGPOOL_T = tl.constexpr(int(Op.AVGPOOL)), tl.constexpr(int(Op.AVGPOOL_T))
LOSS, ERROR, MOVE, RELAX, NORM = (tl.constexpr(int(op)) for op in (Op.LOSS, Op.ERROR, Op.MOVE, Op.RELAX, Op.NORM))
CONV_LEARN, SUM_LEARN = tl.constexpr(int(Op.CONV_LEARN)), tl.constexpr(int(Op.SUM_LEARN))


@triton.jit
def factor(i, k):
    """f[k]."""
    return tl.load(i + F + k).to(tl.float32, bitcast=True)


@triton.jit
def address(table, slot):
    """The tensor of a slot: tables hold addresses, since there may be any number of tensors."""
    return tl.load(table + slot).to(tl.pointer_type(tl.float32))
