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

State is float32. What products read and write (feedback, dz, g, rounded) may be float32, float16 or bfloat16. Each call is one formula
(pckernels/formula.py) in one launch (rows.py). The graph tier makes its formulas out of instructions (pckernels/tensor_fusion.py) and
launches the same kernel; here are the formulas of one vertex, for whoever writes the loop by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from pckernels import interpreter
from pckernels.formula import BY_VALUE, NONE, PARTS, Operation, Sheet, Written
from pckernels.instructions import Activation

from . import rows
from .ahead_of_time import Build
from .tables import sum_parts


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
    asked = _Asked(
        vertex.activation,
        vertex.factors,
        moves_values=vertex.d is not None,
        children=len(feedback),
        rounds=vertex.rounded is not None,
        observes=parts is not None,
        changes=dz is not None,
        sends=vertex.g is not None,
    )
    written = _written(asked, pace)
    if written.stores:
        tensors = {**vars(vertex), **{f"fed{k}": fed for k, fed in enumerate(feedback)}, "dz": dz}
        loads, stores = ([tensors[name] for name in names] for names in (written.loads, written.stores))
        rows.run(written, loads, stores, [] if parts is None else [parts])


@dataclass(frozen=True)
class _Asked:
    """What a formula depends on beside the pace."""

    activation: Activation
    factors: tuple[float, float]
    moves_values: bool = True
    children: int = 0
    rounds: bool = False
    observes: bool = False
    changes: bool = False
    sends: bool = False


@lru_cache(maxsize=256)
def _written(asked: _Asked, pace: Pace) -> Written[str]:
    """The formula of a call, over the names of its tensors."""
    sheet: Sheet[str] = Sheet()
    stores = (_move(sheet, asked, pace) if asked.children else []) + (_observe(sheet, asked, pace) if asked.observes else [])
    return sheet.finished(list(dict.fromkeys(stores)))


def _move(sheet: Sheet[str], asked: _Asked, pace: Pace) -> list[str]:
    fed, error = sheet.load("fed0"), sheet.load("error")
    if asked.children == 2:
        fed = sheet.add(fed, sheet.load("fed1"))
    if not asked.moves_values:
        sheet.put("error", sheet.add(error, fed, 1.0 - pace.rate * pace.precision, pace.rate))
        return ["error"]
    speed = sheet.add(fed, error, 1.0, -pace.precision)
    if pace.momentum:
        speed = sheet.add(sheet.load("velocity"), speed, pace.momentum)
        sheet.put("velocity", speed)
    moved = sheet.add(sheet.load("d"), speed, 1.0, pace.rate)
    sheet.put("d", moved)
    sheet.put("rounded", moved)
    return ["d", *(["velocity"] if pace.momentum else []), *(["rounded"] if asked.rounds else [])]


def _observe(sheet: Sheet[str], asked: _Asked, pace: Pace) -> list[str]:
    kind, f = asked.activation, asked.factors
    change, mu, z = NONE, NONE, sheet.load("z")
    if asked.changes:
        if kind in BY_VALUE:
            mu = sheet.term(Operation.ACT, z, kind=kind, f=f)
        change = sheet.term(Operation.CHANGE, z, sheet.load("dz"), mu, kind, f)
        sheet.put("error", sheet.add(sheet.load("d"), change, 1.0, -1.0))
    elif asked.moves_values:
        sheet.put("error", sheet.load("d"))
    error = sheet.load("error")
    sheet.sum(error, error, 0.5 * pace.precision)
    if not asked.sends:
        return ["error"]
    if asked.changes and kind in BY_VALUE:
        slope = sheet.term(Operation.SLOPE_OF_VALUE, sheet.add(mu, change), kind=kind, f=f)
    else:
        slope = sheet.term(Operation.SLOPE, sheet.add(z, sheet.load("dz")) if asked.changes else z, kind=kind, f=f)
    sheet.put("g", sheet.scale(sheet.mul(error, slope), pace.precision))
    return ["error", "g"]


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
    gelu, none = Activation.GELU, (0.0, 0.0)
    asked = {
        "move": (_Asked(gelu, none, children=2), Pace(0.1, 0.5)),
        "observe": (_Asked(gelu, none, observes=True, changes=True, sends=True), Pace(0.1)),
        "fixed": (_Asked(gelu, none, moves_values=False, children=1, observes=True, sends=True), Pace(0.1)),
    }
    for dtype in ("fp32", "fp16", "bf16"):
        for name, (what, pace) in asked.items():
            written = _written(replace(what, rounds=dtype != "fp32" and name == "move"), pace)
            of_products = [k for k, place in enumerate((*written.loads, *written.stores)) if place not in ("z", "d", "error", "velocity")]
            yield rows.build(f"step_update {name} {dtype}", written.formula, dtype, of_products)
