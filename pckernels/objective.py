"""The loss of one call at the output vertices: target checked and matched to the outputs by structure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pckernels.arguments import Arguments, clamped
from pckernels.clamps import Held, target_mask
from pckernels.graph import Trace
from pckernels.losses import IGNORE_INDEX, Loss, check_classes, check_target, losses_and_errors


class Objective:
    """Predictions of the output vertices -> the loss of each sample (B,), and each output's error -dL/dmu.

    L is the loss summed over the batch. Outputs whose target is None carry no loss and have no error, nor have entries
    of an output that a mask leaves unknown.
    """

    def __init__(self, loss: Loss, traced: Trace, target: Any, arguments: Arguments, check_values: bool, mask: Any = None):
        self.loss, self.trace, self.size, self.batch_dim = loss, traced, arguments.size, arguments.batch_dim
        self.target = _constant(target, arguments.device) if isinstance(target, Tensor) else _constants(target, arguments.device)
        if isinstance(loss, str):
            self.targets = _matched(traced, self.target)
            for name, leaf in self.targets.items():
                self._check_batch(name)
                self._check(loss, name, leaf, check_values)
        self.known = {} if mask is None else self._masks(mask, arguments.device)

    def _check_batch(self, name: str) -> None:
        """Raise where an output cannot have the inputs' batch: its samples, or what they were folded to, are not as many."""
        shape, size = self.trace.output_shape(name, self.size), self.size or 0
        if self.trace.batched:
            has_batch = any(not isinstance(length, int) for length in self.trace.output_shapes[name])
        else:  # an output of a fixed size: all that can be seen is whether it could be
            has_batch = any(length == size or (size > 0 and length > 0 and length % size == 0) for length in shape)
        if not has_batch:
            raise ValueError(
                f"{name!r} has shape {tuple(shape)}, in which the batch of {size} samples is missing: dimension {self.batch_dim} of the "
                "inputs is taken for the batch. Give inputs with a batch there, say batch_dim=, or return an output for each sample."
            )

    def _check(self, loss: str, name: str, target: Any, check_values: bool) -> None:
        vertex = self.trace.graph[name]
        shape = self.trace.output_shape(name, self.size)
        if loss == "cross_entropy" and not shape:
            raise ValueError(f"cross_entropy needs logits with the classes last; {name!r} has no dimension.")
        check_target(loss, shape, vertex.dtype or torch.float32, target, name)
        if loss == "cross_entropy" and check_values:
            check_classes(shape[-1], target, name)

    def _masks(self, mask: Any, device: torch.device) -> dict[str, Tensor]:
        """Output vertex -> where its target is known."""
        if self.loss != "squared_error":
            remedy = f"give the class {IGNORE_INDEX} to what is unknown" if self.loss == "cross_entropy" else "let target= hold the mask"
            raise ValueError(f"target_mask is for the squared error; with this loss, {remedy}.")
        found = _matched(self.trace, mask, "target_mask")
        for name in found:
            if name not in self.targets:
                raise ValueError(f"target_mask has a mask for {name!r}, whose target is None; give None there.")
        return {name: target_mask(name, leaf, self.trace.output_shape(name, self.size), device) for name, leaf in found.items()}

    @property
    def clamped(self) -> dict[str, Held]:
        """The values of outputs that the target clamps: those of the squared error."""
        return {name: Held(target, self.known.get(name)) for name, target in self.targets.items()} if self.loss == "squared_error" else {}

    def __call__(self, mu: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._named(mu) if isinstance(self.loss, str) else self._custom(mu)

    def _named(self, mu: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(self.loss, str)
        total: Tensor | None = None
        errors = {}
        for name, target in self.targets.items():
            if name in self.known:  # what is unknown is as predicted
                target = Held(target, self.known[name]).over(mu[name])
            losses, errors[name] = losses_and_errors(self.loss, mu[name], target, self.trace.graph[name].batch_axis or 0)
            total = losses if total is None else total + losses
        assert total is not None
        return total, errors

    def _custom(self, mu: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.detach().requires_grad_() for name, value in mu.items()}
        results = [leaves[where] if kind == "vertex" else where if kind == "constant" else None for kind, where in self.trace.results]
        with torch.enable_grad():
            losses = self.loss(pytree.tree_unflatten(results, self.trace.output_spec), self.target)  # type: ignore[operator]
            _check_losses(losses, self.size)
            gradients = (
                torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
                if losses.requires_grad
                else [None] * len(leaves)
            )
        return losses.detach(), {name: -gradient for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _check_losses(losses: Any, size: int | None) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"The loss function must return a tensor (B,); got {type(losses).__name__}.")
    if not losses.is_floating_point():
        raise TypeError(f"The loss function must return floating-point losses; got {losses.dtype}.")
    if losses.dim() != 1 or (size is not None and len(losses) != size):
        raise ValueError(f"The loss function must return one loss for each of the {size} samples; got shape {tuple(losses.shape)}.")


def _matched(traced: Trace, target: Any, what: str = "target") -> dict[str, Any]:
    """Output vertex -> its target (or mask)."""
    if isinstance(target, Tensor) and traced.output_spec.is_leaf() and traced.results[0][0] == "vertex":
        return {traced.results[0][1]: target}
    try:
        leaves = traced.output_spec.flatten_up_to(target)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"The {what} must be structured as the module's output: {error}") from None
    found = {}
    for (kind, name), leaf in zip(traced.results, leaves, strict=True):
        if kind == "vertex" and leaf is not None:
            found[name] = leaf
        elif kind != "vertex" and isinstance(leaf, Tensor):
            raise ValueError(f"The {what} has a tensor where the module's output carries no gradient; give None there.")
    if not found:
        raise ValueError(f"The {what} is None for every output; give one for at least one.")
    return found


def _constants(target: Any, device: torch.device) -> Any:
    return pytree.tree_map(lambda leaf: _constant(leaf, device), target)


def _constant(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.device != device:
        raise ValueError(f"A target is on {leaf.device}, the inputs on {device}. Move one with .to(device).")
    return clamped(leaf)
