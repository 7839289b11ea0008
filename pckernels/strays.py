"""Tensors that require grad, but that a trace can only take for constants: they would silently never learn."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from pckernels.errors import Unsupported


class RefuseStrays(TorchFunctionMode):
    """Raises Unsupported when forward differentiates through a tensor that is none of the traced module's own.

    While a module is traced, its inputs, parameters and buffers are stand-ins without storage. A tensor with storage that requires
    grad was reached by another way: a compiled function, a list, a view that was kept. What autograd would not follow either, as
    `.detach()` or a size, is left alone.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(leaf.requires_grad for leaf in _tensors(result)):
            for leaf in _tensors((args, kwargs)):
                if leaf.requires_grad and not is_fake(leaf):
                    raise Unsupported(_complaint(self.module, leaf))
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _complaint(module: nn.Module, stray: Tensor) -> str:
    place = stray.untyped_storage().data_ptr()
    owner = next((name for name, p in module.named_parameters() if place and p.untyped_storage().data_ptr() == place), None)
    if owner is None:
        return (
            f"forward reads a tensor of shape {tuple(stray.shape)} that requires grad, but is not a parameter of {type(module).__name__}: "
            "it would not learn. Register it (nn.Parameter, nn.ParameterList, nn.ModuleList), or read its .detach()."
        )
    return (
        f"forward reads the parameter {owner!r} of {type(module).__name__} other than from its module (by a function compiled or kept from "
        "elsewhere, a list, a view made earlier): the trace would hold it constant, and it would not learn. Read it from its module in "
        "forward, or use pck.backward(loss), which needs no trace."
    )
