"""The ops: torch.ops.pckernels.{relax, predict_error, value_update, local_update}. Schemas, fakes and the guard, in one place.

None of them can be differentiated: predictive coding needs no gradient through its steps, so an input that requires one is
an error that says so, never a silent zero. All run under torch.compile(fullgraph=True) and have an out variant. No op waits for a device.

    relax(Tensor[] weights, Tensor[] inputs, int code, int batch, float factor) -> Tensor[]
        All steps of one inference in one call. `code`: a number from `number_of`; inputs: one tensor for each io slot that the
        code reads. The result, few tensors for the sake of the call's cost (pckernels.memory.Packed takes it apart): all losses,
        values and errors in one; what only the weight updates needed in another; one for each gradient; and the energies
        (steps + 1, slots) in float64, whose finiteness is the flag that something diverged.
    predict_error(Tensor x, Tensor weight, Tensor? bias, Tensor value, str activation) -> (Tensor prediction, Tensor error)
        x (B, D_in), weight (D_out, D_in): mu = f(x W^T + b), eps = v - mu.
    value_update(Tensor value, Tensor error, Tensor feedback, Tensor velocity, float rate, float momentum, float precision)
        -> (Tensor value, Tensor velocity): velocity <- momentum velocity + feedback - precision error; v <- v + rate velocity.
    local_update(Tensor error, Tensor x, float factor) -> (Tensor weight, Tensor bias)
        error (B, D_out) at the product's output, x (B, D_in): factor times eps^T x and the sum of eps; -1 gives dF/dW.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel

from pckernels import engine
from pckernels.compiler import Compiled
from pckernels.instructions import Activation
from pckernels.interpreter import activate
from pckernels.memory import Packed

LIBRARY = Library("pckernels", "FRAGMENT")
ACTIVATIONS = {
    "identity": (Activation.AFFINE, (1.0, 0.0)),
    "relu": (Activation.RELU, ()),
    "leaky_relu": (Activation.LEAKY_RELU, (0.01,)),
    "tanh": (Activation.TANH, ()),
    "sigmoid": (Activation.SIGMOID, ()),
    "gelu": (Activation.GELU, ()),
    "hardtanh": (Activation.HARDTANH, (-1.0, 1.0)),
    "silu": (Activation.SILU, ()),
}

_numbers: WeakKeyDictionary[Compiled, int] = WeakKeyDictionary()
_codes: WeakValueDictionary[int, Compiled] = WeakValueDictionary()
_next = itertools.count()


def number_of(code: Compiled) -> int:
    """The number by which `relax` knows a code, as long as somebody keeps the code."""
    if code not in _numbers:
        _numbers[code] = next(_next)
        _codes[_numbers[code]] = code
    return _numbers[code]


def code_of(number: int) -> Compiled:
    """The code with this number. Raises ValueError where there is none, or none any more."""
    code = _codes.get(number)
    if code is None:
        raise ValueError(f"There is no code number {number}. Keep the code for as long as its number is in use.")
    return code


def _new_results(weights: Sequence[Tensor], inputs: Sequence[Tensor], number: int, batch: int) -> list[Tensor]:
    """Tensors for everything that `relax` writes."""
    code, like = code_of(number), (*weights, *inputs)[0]
    sizes = [batch * code.kept_size, batch * code.scratch_size, *code.gradient_sizes]
    return [*(like.new_empty(size) for size in sizes), like.new_empty(code.code.steps + 1, code.code.energies, dtype=torch.float64)]


def _relax(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float) -> list[Tensor]:
    out = _new_results(weights, inputs, code, batch)
    torch.ops.pckernels.relax.out(weights, inputs, code, batch, factor, out=out)
    return out


def _relax_on_cpu(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float, *, out: list[Tensor]) -> None:
    found = code_of(code)
    engine.execute(found, Packed.of(found, batch, weights, inputs, out), batch, factor)


def _predict_error(x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}; got {activation!r}.")
    kind, f = ACTIVATIONS[activation]
    mu = activate(kind, f, torch.nn.functional.linear(x, weight, bias))
    if mu.shape != value.shape:
        raise ValueError(f"value must have the prediction's shape {tuple(mu.shape)}; got {tuple(value.shape)}.")
    return mu, value - mu


def _value_update(
    value: Tensor, error: Tensor, feedback: Tensor, velocity: Tensor, rate: float, momentum: float = 0.0, precision: float = 1.0
) -> tuple[Tensor, Tensor]:
    moved = momentum * velocity + (feedback - precision * error)
    return value + rate * moved, moved


def _local_update(error: Tensor, x: Tensor, factor: float = -1.0) -> tuple[Tensor, Tensor]:
    if error.dim() != 2 or x.dim() != 2 or len(error) != len(x):
        raise ValueError(f"error and x must be matrices with a row for each sample; got {tuple(error.shape)} and {tuple(x.shape)}.")
    return factor * (error.t() @ x), factor * error.sum(0)


# Definitions

_SCHEMAS = {
    "relax": "(Tensor[] weights, Tensor[] inputs, int code, int batch, float factor) -> Tensor[]",
    "relax.out": "(Tensor[] weights, Tensor[] inputs, int code, int batch, float factor, *, Tensor(a!)[] out) -> ()",
    "predict_error": "(Tensor x, Tensor weight, Tensor? bias, Tensor value, str activation) -> (Tensor, Tensor)",
    "predict_error.out": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor value, str activation, *, Tensor(a!) prediction, Tensor(b!) error) -> ()"
    ),
    "value_update": (
        "(Tensor value, Tensor error, Tensor feedback, Tensor velocity, float rate, float momentum=0.0, float precision=1.0)"
        " -> (Tensor, Tensor)"
    ),
    "value_update.out": (
        "(Tensor value, Tensor error, Tensor feedback, Tensor velocity, float rate, float momentum=0.0, float precision=1.0,"
        " *, Tensor(a!) new_value, Tensor(b!) new_velocity) -> ()"
    ),
    "local_update": "(Tensor error, Tensor x, float factor=-1.0) -> (Tensor, Tensor)",
    "local_update.out": "(Tensor error, Tensor x, float factor=-1.0, *, Tensor(a!) weight, Tensor(b!) bias) -> ()",
}


def _predict_error_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, activation: str, *, prediction: Tensor, error: Tensor
) -> None:
    _copy((prediction, error), _predict_error(x, weight, bias, value, activation))


def _value_update_out(
    value: Tensor,
    error: Tensor,
    feedback: Tensor,
    velocity: Tensor,
    rate: float,
    momentum: float = 0.0,
    precision: float = 1.0,
    *,
    new_value: Tensor,
    new_velocity: Tensor,
) -> None:
    _copy((new_value, new_velocity), _value_update(value, error, feedback, velocity, rate, momentum, precision))


def _local_update_out(error: Tensor, x: Tensor, factor: float = -1.0, *, weight: Tensor, bias: Tensor) -> None:
    _copy((weight, bias), _local_update(error, x, factor))


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _guarded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that refuses what would silently lose a gradient. Autograd falls through to it: one Python layer, not two."""
    packet = name.partition(".")[0]

    @functools.wraps(kernel)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and (_requires_grad(args) or _requires_grad(kwargs.values())):
            raise RuntimeError(
                f"torch.ops.pckernels.{packet} cannot be differentiated, and an input requires a gradient. Call it under torch.no_grad(), "
                "or detach the inputs."
            )
        return kernel(*args, **kwargs)

    return guarded


def _requires_grad(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, list) and _requires_grad(value):
            return True
    return False


_EVERYWHERE: dict[str, Callable[..., Any]] = {
    "relax": _relax,
    "predict_error": _predict_error,
    "predict_error.out": _predict_error_out,
    "value_update": _value_update,
    "value_update.out": _value_update_out,
    "local_update": _local_update,
    "local_update.out": _local_update_out,
}

for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(f"{_name}{_schema}")
    LIBRARY.impl(_name, fallthrough_kernel, "Autograd")
for _name, _kernel in _EVERYWHERE.items():
    LIBRARY.impl(_name, _guarded(_name, _kernel), "CompositeExplicitAutograd")
LIBRARY.impl("relax.out", _guarded("relax.out", _relax_on_cpu), "CPU")


@torch.library.register_fake("pckernels::relax", lib=LIBRARY)
def _(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float) -> list[Tensor]:
    return _new_results(weights, inputs, code, batch)


@torch.library.register_fake("pckernels::relax.out", lib=LIBRARY)
def _(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float, *, out: list[Tensor]) -> None:
    return None
