"""Adding local updates to `.grad` as loss.backward() would: parameter hooks run, and DistributedDataParallel averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pckernels.wrappers import uncompiled


def deposit(module: nn.Module, parameters: Sequence[Tensor], gradients: list[Tensor], good: Tensor | None = None) -> None:
    """Add each gradient to its parameter's `.grad`, all at once or, if a hook raises, none.

    The list of gradients is emptied: where nobody else holds one, it becomes the `.grad` without a copy. With `good`, a
    device flag, zeros are added where it is False.
    """
    if not parameters:
        return
    if good is not None:
        gradients[:] = [torch.where(good, gradient, 0.0) for gradient in gradients]
    before = [(parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone()) for parameter in _hooked(parameters)]
    try:
        with torch.enable_grad():
            torch.autograd.backward(_root(module, parameters, gradients))
    except BaseException:
        for parameter, grad, copy in before:
            if grad is not None and copy is not None:
                grad.copy_(copy)
            parameter.grad = grad
        raise


def _hooked(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The parameters to restore should a hook raise; nothing can raise without a hook."""
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    return parameters if hooked else ()


def _root(module: nn.Module, parameters: Sequence[Tensor], gradients: list[Tensor]) -> Tensor:
    """A scalar whose backward, run by the engine, is exactly one accumulation into each parameter's `.grad`."""
    module = uncompiled(module)
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return _Give.apply(gradients, *parameters)
    # The wrapper expects gradients only behind a forward of its own: give it one that computes nothing.
    inner = module.module
    module.module = _Giver(parameters, gradients)
    try:
        return module()
    finally:
        module.module = inner


class _Giver(nn.Module):
    def __init__(self, parameters: Sequence[Tensor], gradients: list[Tensor]):
        super().__init__()
        self.receivers, self.gradients = list(parameters), gradients

    def forward(self) -> Tensor:
        return _Give.apply(self.gradients, *self.receivers)


class _Give(torch.autograd.Function):
    """Of any parameters, some scalar; its gradients are the given ones."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_empty(())  # only its gradient is ever asked for, and backward does not look at it

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *gradients)
