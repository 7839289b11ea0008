"""What each kind of stage computes, as drafts of instructions: feed-forward, the change of its output, and its feedback.

The change is the difference from the feed-forward pass, formed without cancellation: value nodes are kept as displacements.
"""

from __future__ import annotations

from dataclasses import dataclass

from pckernels.arena import Array, Draft
from pckernels.instructions import Activation, Op
from pckernels.program import Kind, Stage


@dataclass(frozen=True)
class Operands:
    """The arrays of a stage: inputs and output as the feed-forward pass left them, and their changes (None: unchanged).

    `where`: of a max-pooling, the places of the maxima.
    """

    inputs: tuple[Array, ...]
    output: Array
    changes: tuple[Array | None, ...] = ()
    change: Array | None = None
    where: Array | None = None


def forward(stage: Stage, arrays: Operands, accumulate: bool) -> Draft:
    """The output from the inputs. `accumulate`: another stage has begun the sum."""
    a, out = arrays.inputs[0], arrays.output
    match stage.kind:
        case Kind.LINEAR | Kind.CONV:
            return Draft(_PRODUCT[stage.kind], out, a, slot=stage.weight, slot2=stage.bias, p=stage.p, accumulate=accumulate)
        case Kind.ACTIVATION:
            return Draft(Op.ACT, out, a, n=out.n, p=stage.p, f=stage.f)
        case Kind.ADD:
            return Draft(Op.ADD, out, a, arrays.inputs[1], n=out.n, f=stage.f)
        case Kind.MULTIPLY:
            return Draft(Op.MUL, out, a, arrays.inputs[1], n=out.n)
        case Kind.COPY:
            return _copy(stage, out, a)
        case Kind.MAXPOOL:
            return Draft(Op.MAXPOOL, out, a, arrays.where, p=stage.p)
        case Kind.AVGPOOL:
            return Draft(Op.AVGPOOL, out, a, p=stage.p)


def changed(stage: Stage, arrays: Operands, accumulate: bool) -> Draft:
    """The change of the output from those of the inputs, at least one of which there is."""
    out, first = arrays.change, arrays.changes[0]
    match stage.kind:
        case Kind.LINEAR | Kind.CONV:
            return Draft(_PRODUCT[stage.kind], out, first, slot=stage.weight, p=stage.p, accumulate=accumulate)
        case Kind.ACTIVATION if stage.p[0] == Activation.AFFINE:
            return Draft(Op.ADD, out, first, n=arrays.output.n, f=(stage.f[0], 0.0))
        case Kind.ACTIVATION:
            return Draft(Op.ACT_CHANGE, out, arrays.inputs[0], first, arrays.output, n=arrays.output.n, p=stage.p, f=stage.f)
        case Kind.ADD:
            return Draft(Op.ADD, out, first, arrays.changes[1], n=arrays.output.n, f=stage.f)
        case Kind.MULTIPLY:
            return Draft(Op.MUL_CHANGE, out, arrays.inputs[0], first, arrays.inputs[1], arrays.changes[1], n=arrays.output.n)
        case Kind.COPY:
            return _copy(stage, out, first)
        case Kind.MAXPOOL:
            return Draft(Op.MAXPOOL_CHANGE, out, arrays.inputs[0], first, arrays.output, arrays.where, p=stage.p)
        case Kind.AVGPOOL:
            return Draft(Op.AVGPOOL, out, first, p=stage.p)


def feedback(stage: Stage, arrays: Operands, which: int, error: Array, target: Array) -> Draft:
    """(d output / d inputs[which])^T error, into `target`, at the inputs as they are now; writes all of `target` but for COPY."""
    match stage.kind:
        case Kind.LINEAR | Kind.CONV:
            return Draft(_TRANSPOSED[stage.kind], target, error, slot=stage.weight, p=stage.p)
        case Kind.ACTIVATION if stage.p[0] == Activation.AFFINE:
            return Draft(Op.ADD, target, error, n=target.n, f=(stage.f[0], 0.0))
        case Kind.ACTIVATION if stage.p[0] in (Activation.TANH, Activation.SIGMOID):
            p = (stage.p[0], 1)  # from the value: an exponential less
            return Draft(Op.ACT_GRAD, target, error, arrays.output, arrays.change, n=target.n, p=p, f=stage.f)
        case Kind.ACTIVATION:
            change = arrays.changes[0] if arrays.changes else None
            return Draft(Op.ACT_GRAD, target, error, arrays.inputs[0], change, arrays.output, n=target.n, p=stage.p, f=stage.f)
        case Kind.ADD:
            return Draft(Op.ADD, target, error, n=target.n, f=(stage.f[which], 0.0))
        case Kind.MULTIPLY:
            other = 1 - which
            change = arrays.changes[other] if arrays.changes else None
            return Draft(Op.MUL_GRAD, target, error, arrays.inputs[other], change, n=target.n)
        case Kind.COPY:
            blocks, run, out_stride, stride, out_at, at = stage.p
            return Draft(Op.COPY, target, error, p=(blocks, run, stride, out_stride), f=stage.f, out_at=at, a_at=out_at)
        case Kind.MAXPOOL:
            return Draft(Op.MAXPOOL_GRAD, target, error, arrays.where, p=stage.p)
        case Kind.AVGPOOL:
            return Draft(Op.AVGPOOL_T, target, error, p=stage.p)


_PRODUCT = {Kind.LINEAR: Op.LINEAR, Kind.CONV: Op.CONV}
_TRANSPOSED = {Kind.LINEAR: Op.LINEAR_T, Kind.CONV: Op.CONV_T}


def _copy(stage: Stage, out: Array | None, a: Array | None) -> Draft:
    blocks, run, out_stride, stride, out_at, at = stage.p
    return Draft(Op.COPY, out, a, p=(blocks, run, out_stride, stride), f=stage.f, out_at=out_at, a_at=at)


def passes_on(stage: Stage, which: int) -> bool:
    """Whether the feedback into inputs[which] is the error at the output, as it is."""
    return (stage.kind is Kind.ADD and stage.f[which] == 1.0) or (
        stage.kind is Kind.ACTIVATION and stage.p[0] == Activation.AFFINE and stage.f[0] == 1.0
    )


def covers(stage: Stage, size: int) -> bool:
    """Whether the feedback of a stage writes all `size` elements of its input."""
    return stage.kind is not Kind.COPY or stage.p[0] * stage.p[1] == size
