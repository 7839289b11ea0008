"""Putting parameters, their `.grad` and an optimizer back, where several of its steps are one change that may fail."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Rollback:
    """A context: if anything is raised in it, parameters, `.grad` and the optimizer's state are as they were on entering."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.parameters = list(dict.fromkeys([*module.parameters(), *grouped]))

    def __enter__(self) -> Rollback:
        self.tensors = [Saved(parameter.detach()) for parameter in self.parameters]
        self.grads = [None if parameter.grad is None else Saved(parameter.grad) for parameter in self.parameters]
        self.state = {key: {name: Saved(value) for name, value in own.items()} for key, own in self.optimizer.state.items()}
        self.options = [{name: Saved(value) for name, value in _options(group).items()} for group in self.optimizer.param_groups]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            with torch.no_grad():
                self._restore()

    def _restore(self) -> None:
        for parameter, tensor, grad in zip(self.parameters, self.tensors, self.grads, strict=True):
            tensor.restored()
            parameter.grad = None if grad is None else grad.restored()
        self.optimizer.state.clear()
        self.optimizer.state.update({key: {name: value.restored() for name, value in own.items()} for key, own in self.state.items()})
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update({name: value.restored() for name, value in options.items()})


class Saved:
    """A value, with what to put back into it: a tensor stays the same object."""

    def __init__(self, value: Any):
        self.value = value
        self.copy = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    def restored(self) -> Any:
        return self.value.copy_(self.copy) if isinstance(self.value, Tensor) else self.copy


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}
