"""What `step` asks of an optimizer: that it steps without a closure, and holds what the network learns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache

from torch import Tensor
from torch.optim import Optimizer

from pckernels.errors import Unsupported


def check_optimizer(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise unless the optimizer steps without a closure, and holds one or more of a network's parameters.

    Raises:
        Unsupported: it needs a closure, as LBFGS does.
        ValueError: it is over other parameters.
    """
    if _needs_closure(type(optimizer).step):
        raise Unsupported(
            f"{type(optimizer).__name__} evaluates a closure several times a step, which predictive coding has none for. "
            "Use an optimizer that steps by .grad alone, such as SGD or Adam."
        )
    held = _held(optimizer)
    if not any(id(parameter) in held for parameter in parameters):
        raise ValueError("The optimizer holds no parameter of this network. Make it over network.parameters().")


def check_holds(optimizer: Optimizer, learned: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the optimizer holds all of these, which a network has learned beside its module's parameters."""
    held = _held(optimizer) if learned else set()
    missing = [name for name, parameter in learned.items() if id(parameter) not in held]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"The optimizer does not hold {missing[0]!r}{more}, made at the first trace, and would never move it. "
            "Call network.trace(x) before you make the optimizer over network.parameters(); or add network.extra_parameters().values() "
            "by add_param_group, or let them not require grad."
        )


@cache
def _needs_closure(step: Callable[..., object]) -> bool:
    closure = inspect.signature(step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
