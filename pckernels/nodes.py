"""Single nodes of a live autograd graph: which of them do arithmetic, and the vector-Jacobian product of one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

# A node, and which of the outputs of its forward operation a consumer has read.
Edge = tuple[Node, int]

# Nodes of one input that hand it on and do no arithmetic: torch's view operations, casts and device moves, and copies that
# change the memory layout alone (whether `reshape` and `contiguous` copy depends on strides, so a copy must not count).
# Joins (cat, stack), gathers (index, gather), repeats (repeat, pad, flip, roll) and in-place writes into a view count 1.
VIEWS = frozenset(
    name + "Backward"
    for name in (
        *("Alias", "AsStrided", "Clone", "Diagonal", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split"),
        *("SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "Unfold", "UnsafeSplit", "UnsafeSplitWithSizes"),
        *("UnsafeView", "Unsqueeze", "View", "ViewAsComplex", "ViewAsReal"),
    )
)
# Functions that torch inserts to watch a graph. Output i is input i; calling them outside the engine runs their side effects.
OBSERVERS = frozenset({"BackwardHookFunctionBackward", "_DDPSinkBackward"})
# Functions that only the engine may differentiate, and what to do about it.
OPAQUE = {
    "CheckpointFunctionBackward": "checkpoint(use_reentrant=True) writes .grad each time it is differentiated; pass use_reentrant=False",
    "CompiledFunctionBackward": "a torch.compile'd region can be differentiated once only; run it without torch.compile",
}


def kind(node: Node) -> str:
    """The node's class without the number of its overload: SqueezeBackward1 is "SqueezeBackward"."""
    return type(node).__name__.rstrip("0123456789")


def is_leaf(node: Node) -> bool:
    """Whether the node adds into the `.grad` of a leaf tensor."""
    return type(node).__name__ == "AccumulateGrad"


def is_view(node: Node) -> bool:
    """Whether the node hands its input on, so that entering it adds nothing to a path's length."""
    return kind(node) in VIEWS or kind(node) in OBSERVERS


def under_view(node: Node, output: int) -> Edge:
    """What output `output` of a view node is a view of."""
    return node.next_functions[output if kind(node) in OBSERVERS else 0]  # type: ignore[return-value]


def gradient_edge(tensor: Tensor) -> Edge:
    """The node that made `tensor`, and which of its outputs it is; AccumulateGrad for a leaf."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def output_count(node: Node) -> int:
    """How many outputs the node's forward operation has, those that take no gradient included."""
    return len(_metadata(node))


def vjp(node: Node, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The node's vector-Jacobian product, with no hooks run and nothing written. Call it under `torch.no_grad()`.

    Args:
        node: any node but AccumulateGrad.
        gradients: one for each output of the node, in the output's shape; None means zero.

    Returns:
        One gradient for each of `node.next_functions`, in the shape and dtype of what it belongs to; None means zero.
    """
    returned = _call(node, gradients)
    edges = node.next_functions
    return [_conform(g, producer, nr) if producer is not None else None for g, (producer, nr) in zip(returned, edges, strict=True)]


def _call(node: Node, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    if kind(node) in OBSERVERS:
        return gradients
    if isinstance(node, BackwardCFunction):
        return _call_python(node, gradients)
    return _as_tuple(node(*gradients))  # type: ignore[operator]


def _call_python(node: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Call a custom autograd.Function; it answers for every argument of its forward, also for those with no edge.

    Undefined gradients become zeros, as the engine makes them. A function that asked for None in their place means zero
    by it, so it gives the same answer.
    """
    filled = [_zeros(meta) if g is None else g for g, meta in zip(gradients, _metadata(node), strict=True)]
    returned = iter([g for g, needed in zip(_as_tuple(node.apply(*filled)), node.needs_input_grad, strict=False) if needed])
    return [None if producer is None else next(returned, None) for producer, _ in node.next_functions]


def _conform(gradient: Tensor | None, producer: Node, output: int) -> Tensor | None:
    """Bring a returned gradient to its tensor's shape, dtype and device, as the engine does between two nodes."""
    if gradient is None or is_leaf(producer):
        return gradient
    meta = _metadata(producer)[output]
    if gradient.is_complex() and not meta.dtype.is_complex:
        gradient = gradient.real
    if gradient.shape != torch.Size(meta.shape):
        gradient = gradient.sum_to_size(meta.shape)
    return gradient.to(device=meta.device, dtype=meta.dtype)


def _metadata(node: Node) -> Sequence[Any]:
    return node._input_metadata  # shape, dtype and device of each forward output


def _zeros(meta: Any) -> Tensor:
    return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)


def _as_tuple(returned: Any) -> tuple[Tensor | None, ...]:
    return returned if isinstance(returned, tuple) else (returned,)
