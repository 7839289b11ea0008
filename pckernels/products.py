"""Products with a weight on the CPU in float32: PyTorch's own, by whichever of its two libraries is faster.

PyTorch multiplies float32 matrices by BLAS. Where that is MKL on a processor of another maker, it runs at about half the
rate of oneDNN, which PyTorch carries as well and uses for convolutions and recurrent layers. Large products go there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_WORTH = 2**21  # multiply-adds; below, the call costs more than it saves


def _onednn() -> Any:
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return None if packet is None else packet.default


_LINEAR = _onednn()


def is_worth(rows: int, x: Tensor, weight: Tensor) -> bool:
    """Whether rows x inputs times inputs x outputs is large enough, and of a kind that oneDNN takes."""
    return (
        _LINEAR is not None
        and rows * weight.shape[0] * weight.shape[1] >= _WORTH
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    )


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for x (rows, inputs) and W (outputs, inputs); neither is differentiated for."""
    if is_worth(x.shape[0], x, weight):
        return _LINEAR(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x W^T + b, whose vector-Jacobian product for x runs by the same library. W and b are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return multiply(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        (error,) = errors
        rows = error.reshape(-1, error.shape[-1])
        return multiply(rows, weight.t()).reshape(*error.shape[:-1], -1), None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with W and b constant, in a result that can be differentiated for: its weights learn by outer products."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    z = _Linear.apply(x, weight, bias) if is_worth(rows, x, weight) else functional.linear(x, weight, bias)
    return z if z.requires_grad or not torch.is_grad_enabled() else z.requires_grad_()


def outer_product(errors: Tensor, inputs: Tensor) -> Tensor:
    """errors^T inputs, summed over the rows: (outputs, inputs)."""
    if errors.dtype == inputs.dtype and is_worth(errors.shape[1], errors, inputs):
        return multiply(errors.t(), inputs.t())
    return errors.t() @ inputs
