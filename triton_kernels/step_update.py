"""What happens to one vertex between two products, in one pass over memory: for networks whose state is too large for a chip.

A step of inference is products, by whoever is fastest at them, and this. Of vertex i, with d_i its displacement, z_i the feed-forward
pre-activation and f_i its activation (section 2 of the design), in this order, each part if it is asked for:

    move      drive = (sum of the feedback of one or two children) - precision eps,
              velocity <- momentum velocity + drive,  d <- d + rate velocity;
              where errors move, eps <- (1 - rate precision) eps + rate (feedback);
    observe   eps = d - (f(z + dz) - f(z)), without cancellation,  g = precision eps f'(z + dz),  1/2 precision ||eps||^2.

A vertex with free parents moves, then its parents' moved displacements are multiplied into dz, then it is observed: two calls a step. One
whose parents are all clamped, and all of fixed prediction, has no dz: one call. An output with the squared error is a vertex that never
moves, with d = target - f(z).

State is float32. What products read and write (feedback, dz, g, rounded) may be float32, float16 or bfloat16. Energies are summed over a
fixed number of programs and added up in their order: two runs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pckernels import interpreter
from pckernels.instructions import Activation

from .activations import SIGMOID, TANH, act, act_change, act_grad, act_grad_of_value
from .ahead_of_time import Build
from .tables import sum_parts

BLOCK = 1024  # elements that a program handles at once
PARTS = 528  # programs at most: four for each multiprocessor of an H100, and the same everywhere, for the sake of the sums
WARPS = 4


@triton.jit(do_not_specialize=["stride"])
def vertex_update(
    z,
    d,
    error,
    velocity,
    fed0,
    fed1,
    dz,
    g,
    rounded,
    parts,
    stride,
    n,
    rate,
    momentum,
    precision,
    f0,
    f1,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    CHILDREN: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ROUNDS: tl.constexpr,
    OBSERVES: tl.constexpr,
    CHANGES: tl.constexpr,
    SENDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All n elements of a vertex. Pointers whose part is not asked for are not read. parts: float64, one for each program, so far apart."""
    total = tl.full([BLOCK], 0.0, tl.float64)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    for first in tl.range(begin, n, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        here = at < n
        eps = tl.load(error + at, mask=here, other=0.0)
        if VALUES:
            place = tl.load(d + at, mask=here, other=0.0)
        if CHILDREN > 0:
            fed = tl.load(fed0 + at, mask=here, other=0.0).to(tl.float32)
            if CHILDREN == 2:
                fed += tl.load(fed1 + at, mask=here, other=0.0).to(tl.float32)
            if VALUES:
                speed = fed - precision * eps
                if MOMENTUM:
                    speed = momentum * tl.load(velocity + at, mask=here, other=0.0) + speed
                    tl.store(velocity + at, speed, mask=here)
                place += rate * speed
                tl.store(d + at, place, mask=here)
                if ROUNDS:
                    tl.store(rounded + at, place, mask=here)
            else:
                eps = (1.0 - rate * precision) * eps + rate * fed
        if OBSERVES:
            if CHANGES or SENDS:
                before = tl.load(z + at, mask=here, other=0.0)
            if CHANGES:
                step = tl.load(dz + at, mask=here, other=0.0).to(tl.float32)
                mu = act(KIND, before, f0, f1)
                dmu = act_change(KIND, before, step, mu, f0, f1)
                eps = place - dmu
            elif VALUES:
                eps = place
            if SENDS:
                if CHANGES and (KIND == TANH or KIND == SIGMOID):
                    slope = act_grad_of_value(KIND, mu + dmu)
                elif CHANGES:
                    slope = act_grad(KIND, before + step, f0, f1)
                else:
                    slope = act_grad(KIND, before, f0, f1)
                tl.store(g + at, precision * (eps * slope), mask=here)
            wide = tl.where(here, eps, 0.0).to(tl.float64)
            total += wide * wide
        if OBSERVES or not VALUES:
            tl.store(error + at, eps, mask=here)
    if OBSERVES:
        tl.store(parts + tl.program_id(0) * stride, 0.5 * tl.cast(precision, tl.float64) * tl.sum(total, 0))


@dataclass(frozen=True)
class Vertex:
    """The tensors of one vertex, (B, ..) each and contiguous, and its activation.

    Attributes:
        z: feed-forward pre-activation.
        d: displacement, which moves; None where errors move.
        error: eps.
        velocity: with momentum.
        g: where the error at the product's output goes; None: nobody reads it.
        rounded: where d goes once more, as the operand of a product in another dtype.
        activation, factors: f and its parameters.
    """

    z: Tensor
    d: Tensor | None
    error: Tensor
    velocity: Tensor | None = None
    g: Tensor | None = None
    rounded: Tensor | None = None
    activation: Activation = Activation.AFFINE
    factors: tuple[float, float] = (1.0, 0.0)


@dataclass(frozen=True)
class Pace:
    """How far a vertex moves in a step, and what its error weighs."""

    rate: float
    momentum: float = 0.0
    precision: float = 1.0


def new_parts(steps: int, slots: int, device: torch.device | str) -> Tensor:
    """Sums that energies are made of, (PARTS, steps + 1, slots) in float64: of `step_update`, parts[:, t, slot]."""
    return torch.zeros(PARTS, steps + 1, slots, dtype=torch.float64, device=device)


def energies_of(parts: Tensor) -> Tensor:
    """(steps + 1, slots): the parts added up in order."""
    energies = parts.new_empty(parts.shape[1:])
    sum_parts(parts, energies, 1.0, add=False)
    return energies


def step_update(vertex: Vertex, pace: Pace, feedback: Sequence[Tensor] = (), dz: Tensor | None = None, parts: Tensor | None = None) -> None:
    """Move a vertex, observe it, or both, in place, on the current stream.

    Args:
        vertex: its tensors; state in float32.
        pace: rate, momentum, precision.
        feedback: what each of one or two children sends, (B, ..); none: the vertex does not move.
        dz: the change of z since the feed-forward pass; None: it has none.
        parts: where its energy goes, (PARTS,) float64, a place of `new_parts`; None: it is not observed.

    Raises:
        ValueError: the tensors do not fit each other, or what is asked for makes no step; the text says what does.
        TypeError: state is not float32.
    """
    _check(vertex, pace, feedback, dz, parts)
    n, error = vertex.error.numel(), vertex.error
    if n == 0:
        return
    fed = [*feedback, error, error]
    vertex_update[(min(PARTS, triton.cdiv(n, BLOCK)),)](
        vertex.z,
        error if vertex.d is None else vertex.d,
        error,
        error if vertex.velocity is None else vertex.velocity,
        fed[0],
        fed[1],
        error if dz is None else dz,
        error if vertex.g is None else vertex.g,
        error if vertex.rounded is None else vertex.rounded,
        error if parts is None else parts,
        1 if parts is None else parts.stride(0),
        n,
        pace.rate,
        pace.momentum,
        pace.precision,
        *vertex.factors,
        **_constants(vertex, pace, len(feedback), dz is not None, parts is not None),
        num_warps=WARPS,
    )


def _constants(vertex: Vertex, pace: Pace, children: int, changes: bool, observes: bool) -> dict[str, object]:
    return {
        "KIND": int(vertex.activation),
        "VALUES": vertex.d is not None,
        "CHILDREN": children,
        "MOMENTUM": pace.momentum != 0.0,
        "ROUNDS": vertex.rounded is not None,
        "OBSERVES": observes,
        "CHANGES": changes,
        "SENDS": vertex.g is not None,
        "BLOCK": BLOCK,
    }


def _check(vertex: Vertex, pace: Pace, feedback: Sequence[Tensor], dz: Tensor | None, parts: Tensor | None) -> None:
    if len(feedback) > 2:
        raise ValueError(f"A step takes the feedback of two children at most; got {len(feedback)}. Add the others to one of these first.")
    if feedback and dz is not None:
        raise ValueError("A vertex moves, and its parents too, before dz is computed: move it in one call, and observe it in another.")
    if dz is not None and vertex.d is None:
        raise ValueError("Where errors move, predictions stand still and there is no dz; with a dz the vertex needs a displacement d.")
    if pace.momentum and (vertex.d is None or vertex.velocity is None):
        raise ValueError("momentum needs a velocity, and values that move; give the vertex both, or set momentum to 0.")
    state = [tensor for tensor in (vertex.z, vertex.d, vertex.error, vertex.velocity) if tensor is not None]
    others = [tensor for tensor in (*feedback, dz, vertex.g, vertex.rounded) if tensor is not None]
    if any(tensor.dtype is not torch.float32 for tensor in state):
        raise TypeError("The state of a vertex (z, d, error, velocity) is float32; g, rounded, dz and feedback may be of half precision.")
    if any(tensor.shape != vertex.error.shape or not tensor.is_contiguous() for tensor in (*state, *others)):
        raise ValueError(f"Every tensor of a vertex must be contiguous and have its error's shape, {tuple(vertex.error.shape)}.")
    if parts is not None and (parts.shape != (PARTS,) or parts.dtype is not torch.float64):
        raise ValueError(f"parts must be one place of new_parts, ({PARTS},) in float64; got {tuple(parts.shape)} in {parts.dtype}.")


def plain_step_update(
    vertex: Vertex, pace: Pace, feedback: Sequence[Tensor] = (), dz: Tensor | None = None, parts: Tensor | None = None
) -> None:
    """The reference: the same in plain PyTorch, in any floating dtype; all of the energy in parts[0]."""
    z, kind, f = vertex.z, vertex.activation, vertex.factors
    if feedback:
        drive = sum(feedback) - pace.precision * vertex.error
        if vertex.velocity is not None:
            drive = vertex.velocity.copy_(pace.momentum * vertex.velocity + drive)
        (vertex.error if vertex.d is None else vertex.d).add_(pace.rate * drive)
        if vertex.rounded is not None and vertex.d is not None:
            vertex.rounded.copy_(vertex.d)
    if parts is None:
        return
    moved = z if dz is None else z + dz
    if vertex.d is not None:
        vertex.error.copy_(vertex.d if dz is None else vertex.d - interpreter.change(kind, f, z, dz))
    if vertex.g is not None:
        vertex.g.copy_(pace.precision * vertex.error * interpreter.slope(kind, f, moved))
    parts[0] = 0.5 * pace.precision * vertex.error.square().sum()


def builds() -> Iterator[Build]:
    """A vertex of two children moves, one is observed after the product, one of fixed prediction does both: with products in each dtype."""
    parts: dict[str, dict[str, object]] = {
        "move": {"CHILDREN": 2, "OBSERVES": False, "CHANGES": False, "SENDS": False, "VALUES": True, "MOMENTUM": True},
        "observe": {"CHILDREN": 0, "OBSERVES": True, "CHANGES": True, "SENDS": True, "VALUES": True, "MOMENTUM": False},
        "fixed": {"CHILDREN": 1, "OBSERVES": True, "CHANGES": False, "SENDS": True, "VALUES": False, "MOMENTUM": False},
    }
    state = dict.fromkeys(("z", "d", "error", "velocity"), "*fp32")
    numbers = {"stride": "i32", "n": "i32", **dict.fromkeys(("rate", "momentum", "precision", "f0", "f1"), "fp32")}
    for dtype in ("fp32", "fp16", "bf16"):
        products = dict.fromkeys(("fed0", "fed1", "dz", "g", "rounded"), f"*{dtype}")
        for name, part in parts.items():
            constants = {**part, "KIND": int(Activation.GELU), "ROUNDS": dtype != "fp32", "BLOCK": BLOCK}
            signature = {**state, **products, "parts": "*fp64", **numbers}
            yield Build(f"step_update {name} {dtype}", vertex_update, signature, constants, {"num_warps": WARPS}, apart=("parts",))
