"""Adding local updates to `.grad` as loss.backward() would: parameter hooks run, and DistributedDataParallel averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def deposit(module: nn.Module, gradients: Sequence[tuple[Tensor, Tensor]], good: Tensor | None = None) -> None:
    """Add each gradient to its parameter's `.grad`, all at once or, if a hook raises, none.

    With `good`, a device flag, zeros are added where it is False.
    """
    if not gradients:
        return
    parameters = [parameter for parameter, _ in gradients]
    values = [value if good is None else torch.where(good, value, 0.0) for _, value in gradients]
    before = [(parameter, parameter.grad, None if parameter.grad is None else parameter.grad.clone()) for parameter in _hooked(parameters)]
    try:
        with torch.enable_grad():
            torch.autograd.backward(_roots(module, parameters), values)
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


def _roots(module: nn.Module, parameters: Sequence[Tensor]) -> list[Tensor]:
    """An alias of each parameter: the engine's backward through it is exactly one accumulation into `.grad`."""
    aliases = _Aliases(parameters)
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return aliases()
    # The wrapper expects gradients only behind a forward of its own: give it one that computes nothing.
    inner = module.module
    module.module = aliases
    try:
        return module()
    finally:
        module.module = inner


class _Aliases(nn.Module):
    def __init__(self, parameters: Sequence[Tensor]):
        super().__init__()
        self.held = list(parameters)

    def forward(self) -> list[Tensor]:
        return [parameter.view_as(parameter) for parameter in self.held]
