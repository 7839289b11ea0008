"""Products with a weight on the CPU in float32: PyTorch's own, by whichever of its two libraries is faster.

PyTorch multiplies float32 matrices by BLAS. Where that is MKL on an AMD processor with AVX-512, it runs at about half the
rate of oneDNN, which PyTorch carries as well and uses for convolutions and recurrent layers. Large products go there. On
AMD processors without AVX-512 and on Intel's the two are equally fast, and products stay where PyTorch puts them.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

_WORTH = 2**21  # multiply-adds; below, the call costs more than it saves
_WORTH_DIFFERENTIATING = 2**23  # likewise of a function that autograd must call back


def _onednn() -> Any:
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return None if packet is None else packet.default


_LINEAR = _onednn()


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Told from the processor, not from a clock: the choice changes roundings, and a resumed run has to make it again."""
    if _LINEAR is None or not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def is_worth(rows: int, x: Tensor, weight: Tensor, least: int = _WORTH) -> bool:
    """Whether rows x inputs times inputs x outputs is large enough, and of a kind that oneDNN takes."""
    return bool(
        onednn_is_faster()
        and rows * weight.shape[0] * weight.shape[1] >= least
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


class _Operand:
    """A weight that is used over and over in one call, as every time step of a recurrent network uses it.

    oneDNN rearranges a weight before it multiplies. From the second use on, that is done once, for each direction.
    """

    def __init__(self, weight: Tensor):
        self.weight, self.version = weight.detach(), weight._version
        self.uses = [0, 0]
        self.packed: list[Tensor | None] = [None, None]

    def multiply(self, x: Tensor, bias: Tensor | None, backward: bool) -> Tensor:
        """x W^T + b, or x W backward."""
        if not is_worth(x.shape[0], x, self.weight):
            return functional.linear(x, self.weight.t() if backward else self.weight, bias)
        return _LINEAR(x, self._arranged(x.shape[0], backward), bias, "none", [], "")

    def _arranged(self, rows: int, backward: bool) -> Tensor:
        weight = self.weight.t() if backward else self.weight
        self.uses[backward] += 1
        if self.uses[backward] == 2:
            self.packed[backward] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        packed = self.packed[backward]
        return weight if packed is None else packed


_OPERANDS: Any = WeakTensorKeyDictionary()  # as long-lived as the weights that a call reads


def _operand(weight: Tensor) -> _Operand:
    operand = _OPERANDS.get(weight)
    if operand is None or operand.version != weight._version:
        operand = _OPERANDS[weight] = _Operand(weight)
    return operand


class _Linear(torch.autograd.Function):
    """x W^T + b, whose vector-Jacobian product for x runs by the same library. W and b are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operand: _Operand, bias: Tensor | None) -> Tensor:
        ctx.operand = operand
        return operand.multiply(x.reshape(-1, x.shape[-1]), bias, False).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None, None]:
        (error,) = errors
        rows = error.reshape(-1, error.shape[-1])
        return ctx.operand.multiply(rows, None, True).reshape(*error.shape[:-1], -1), None, None


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """x W^T + b, or with `transposed` x W, of rows x: a plain product, by whichever library is faster."""
    if not is_worth(len(x), x, weight):
        return functional.linear(x, weight.t() if transposed else weight, bias)
    return _operand(weight).multiply(x, bias, transposed)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with W and b constant, in a result that can be differentiated for: its weights learn by outer products."""
    constant = None if bias is None else bias.detach()
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    fast = is_worth(rows, x, weight, _WORTH_DIFFERENTIATING)
    z = _Linear.apply(x, _operand(weight), constant) if fast else functional.linear(x, weight.detach(), constant)
    return z if z.requires_grad or not torch.is_grad_enabled() else z.requires_grad_()


def stacked(errors: Sequence[Tensor]) -> Tensor:
    """Errors (samples, outputs), below one another, laid out in memory as the library that multiplies them reads them best."""
    if len(errors) > 1 and onednn_is_faster():
        return torch.cat([error.t() for error in errors], 1).t()
    return errors[0] if len(errors) == 1 else torch.cat(list(errors))


def outer_products(errors: Tensor, inputs: Tensor, factor: float | Tensor) -> Tensor:
    """factor errors^T inputs, the sum of the samples' outer products: (outputs, inputs)."""
    if errors.dtype == inputs.dtype and is_worth(errors.shape[1], errors, inputs):
        return _LINEAR(errors.t(), inputs.t(), None, "none", [], "").mul_(factor)
    if isinstance(factor, Tensor):
        return (errors.t() @ inputs).mul_(factor)
    return torch.addmm(inputs.new_empty(()), errors.t(), inputs, beta=0, alpha=factor)  # BLAS scales for nothing
