"""The arguments of one call: flattened, checked, and what a trace depends on in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pckernels.errors import Unsupported


def batch_size(leaves: Iterable[Any], batch_dim: int) -> int | None:
    """The size at `batch_dim` of the first tensor that has such a dimension; None without one."""
    return next((leaf.shape[batch_dim] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > batch_dim), None)


def is_batched(leaf: Any, batch_dim: int, size: int | None) -> bool:
    """Whether an argument is a tensor that carries the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == size


def clamped(tensor: Tensor) -> Tensor:
    """An argument as a constant that autograd can save: tensors of inference mode have to be copied for that."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def broadcasts_to(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor broadcasts to this very shape."""
    try:
        return torch.broadcast_shapes(tensor.shape, shape) == torch.Size(shape)
    except RuntimeError:
        return False


class Arguments:
    """The arguments of one call, flattened.

    Attributes:
        size: the batch size, that of the first tensor with a dimension `batch_dim`; None without one.
        key: what a trace depends on: structure, dtypes, devices, and every size but the batch's.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int):
        self.args, self.kwargs, self.batch_dim = args, kwargs, batch_dim
        self.leaves, structure = _flattened(args, kwargs)
        self.size = batch_size(self.leaves, batch_dim)
        self.key = (structure, tuple(self._leaf_key(leaf) for leaf in self.leaves))

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def _leaf_key(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return repr(leaf)
        shape = list(leaf.shape)
        if is_batched(leaf, self.batch_dim, self.size):
            shape[self.batch_dim] = -1
        return (*shape, leaf.dtype, leaf.device)


def _flattened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """The leaves of a call's arguments, and their structure."""
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):  # flat as they are; a pytree takes ten times as long
        return list(args), len(args)
    return pytree.tree_flatten((args, kwargs))


def check_module(module: nn.Module) -> None:
    """Raise Unsupported where a module, or a part of it, has no forward in Python to be traced."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"Its part {name!r}" if name else "The module"
            raise Unsupported(f"{what} comes from torch.jit, whose code cannot be traced. Give the nn.Module that was scripted or traced.")


def _check_tensors(module: nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_inference():
            raise ValueError(
                f"{name!r} was made under torch.inference_mode, so that it can neither learn nor be written. Make the module outside of "
                "it, or give copy.deepcopy(module), taken outside of it."
            )


def check_inputs(module: nn.Module, arguments: Arguments) -> None:
    """Raise unless the module can be traced, and the arguments fit its signature and device, and carry a batch."""
    check_module(module)
    _check_tensors(module)
    try:
        inspect.signature(module.forward).bind(*arguments.args, **arguments.kwargs)
    except TypeError as error:
        raise TypeError(f"{type(module).__name__}.forward cannot take these inputs: {error}.") from None
    if not arguments.tensors:
        raise TypeError(f"{type(module).__name__} needs at least one tensor as input.")
    if arguments.size is None:
        raise ValueError(f"No input has a dimension {arguments.batch_dim} for the batch; give inputs with a batch, or another batch_dim.")
    for tensor in arguments.tensors:
        _check_tensor(module, tensor)


def _check_tensor(module: nn.Module, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError("Complex inputs are not supported; pass real and imaginary parts as two inputs.")
    if tensor.is_sparse:
        raise TypeError("Sparse inputs are not supported; pass x.to_dense().")
    parameter = next(module.parameters(), None)
    if parameter is not None and tensor.device != parameter.device:
        raise ValueError(f"An input is on {tensor.device}, the module on {parameter.device}. Move one with .to(device).")
