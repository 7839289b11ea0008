"""The options of a network: what each may be, and attributes that hold them, which check what they are set to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, overload

from torch import nn

from pckernels.dispatch import check_backend
from pckernels.losses import check_loss
from pckernels.match import check_match
from pckernels.placement import check_value_nodes
from pckernels.precision import check_precision
from pckernels.rules import Rule, require_choice

Kind = TypeVar("Kind")


class Option(Generic[Kind]):
    """An option of a network as an attribute. To set it is to check it, as the constructor does; what is refused changes nothing.

    Options lie in the network's `_options`, and so in none of the registries that the network shares with its module.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, network: None, owner: type) -> Option[Kind]: ...

    @overload
    def __get__(self, network: nn.Module, owner: type) -> Kind: ...

    def __get__(self, network: nn.Module | None, owner: type) -> Option[Kind] | Kind:
        return self if network is None else network.__dict__["_options"][self.name]

    def __set__(self, network: Any, value: Kind) -> None:
        network._change_option(self.name, value)


def changed(options: Mapping[str, Any], changes: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The options of a network over this module with these changes.

    Raises:
        TypeError, ValueError: one of the wrong type or value, or that does not go with the others.
        Unsupported: the backend is not available.
    """
    for name, value in changes.items():
        _CHECKS[name](value, module)
    together = {**options, **changes}
    check_match(together["match"], together["rule"], together["loss"], together["reduction"])
    if not isinstance(together["value_nodes"], str):
        together["value_nodes"] = tuple(together["value_nodes"])
    return together


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a rule such as pckernels.Strict(steps=20, rate=0.1); got {type(rule).__name__}.")


def _check_batch_dim(batch_dim: Any) -> None:
    if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
        raise TypeError(f"batch_dim must be an int; got {type(batch_dim).__name__}.")
    if batch_dim < 0:
        raise ValueError(f"batch_dim must be 0 or more; got {batch_dim}.")


_CHECKS: dict[str, Callable[[Any, nn.Module], None]] = {
    "rule": lambda value, module: _check_rule(value),
    "loss": lambda value, module: check_loss(value),
    "reduction": lambda value, module: require_choice("reduction", value, ("mean", "sum")),
    "value_nodes": lambda value, module: check_value_nodes(value, [name for name, _ in module.named_modules()]),
    "batch_dim": lambda value, module: _check_batch_dim(value),
    "backend": lambda value, module: check_backend(value),
    "check": lambda value, module: require_choice("check", value, ("sync", "deferred")),
    "precision": lambda value, module: check_precision(value),
    "match": lambda value, module: None,  # in any case, with the rule, the loss and the reduction
}
