"""The losses of design: per sample, batch first; and the errors they put at the output vertices, -dL/dmu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Loss = str | Callable[[Any, Any], Tensor]
NAMES = ("squared_error", "cross_entropy")
IGNORE_INDEX = -100


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is the name of a loss or a function."""
    if isinstance(loss, str):
        if loss not in NAMES:
            raise ValueError(f"loss must be one of {', '.join(map(repr, NAMES))} or a function (output, target) -> (B,); got {loss!r}.")
    elif not callable(loss):
        raise TypeError(f"loss must be a str or a function (output, target) -> (B,); got {type(loss).__name__}.")


def check_target(loss: str, shape: Sequence[int], dtype: torch.dtype, target: Any, name: str = "output") -> None:
    """Raise unless `target` fits an output of this shape and dtype."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target of {name!r} must be a tensor; got {type(target).__name__}.")
    if loss == "squared_error":
        if not target.is_floating_point():
            raise TypeError(
                f"target of {name!r} must be floating point for squared_error; got {target.dtype}. Convert it (classes to one-hot vectors)."
            )
        if tuple(target.shape) != tuple(shape):
            raise ValueError(f"target of {name!r} must have the output's shape {tuple(shape)}; got {tuple(target.shape)}.")
    else:
        if target.dtype != torch.int64:
            raise TypeError(f"target of {name!r} must be int64 class indices for cross_entropy; got {target.dtype}.")
        if tuple(target.shape) != tuple(shape[:-1]):
            raise ValueError(
                f"target of {name!r} must have shape {tuple(shape[:-1])} (the logits' without the classes); got {tuple(target.shape)}."
            )


def check_classes(classes: int, target: Tensor, name: str = "output") -> None:
    """Raise if a class index lies outside 0 .. classes - 1 (and is not the ignored one). Reads the target on the host."""
    bad = (target != IGNORE_INDEX) & ((target < 0) | (target >= classes))
    if bool(bad.any()):
        raise ValueError(
            f"target of {name!r} has class {int(target[bad][0])}; the output has classes 0 to {classes - 1} ({IGNORE_INDEX} is ignored)."
        )


def squared_error(output: Tensor, target: Tensor, axis: int = 0) -> Tensor:
    """1/2 ||target - output||^2 of each sample: (B,)."""
    return 0.5 * _per_sample((target - output).square(), axis)


def cross_entropy(output: Tensor, target: Tensor, axis: int = 0) -> Tensor:
    """-log softmax(output)[target] of each sample, summed over positions: (B,). Classes are last; -100 is ignored."""
    rows = functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return _per_sample(rows.reshape(target.shape), axis)


def _per_sample(values: Tensor, axis: int) -> Tensor:
    others = [d for d in range(values.dim()) if d != axis]
    wide = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    return wide.sum(others) if others else wide


def per_sample(loss: str, output: Tensor, target: Tensor, axis: int = 0) -> Tensor:
    """A named loss of each sample (B,), with the batch at `axis` of the output."""
    return (squared_error if loss == "squared_error" else cross_entropy)(output, target, axis)


def losses_and_errors(loss: str, mu: Tensor, target: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The loss of each sample, and the output's error -dL/dmu with L summed over the batch."""
    if loss == "squared_error":
        error = target - mu
        return 0.5 * _per_sample(error.square(), axis), error
    leaf = mu.detach().requires_grad_()
    with torch.enable_grad():
        losses = cross_entropy(leaf, target, axis)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), -gradient
