"""What a trace depends on in a module, as a key to be compared at every call: whatever is cheap to see and may change what is traced.

Its layers and their names, modes, hooks and plain members (numbers, strings, functions, tuples of such), and of parameters and buffers
all but the values. What it does not see: what lies in lists, dicts and objects, tensors that are plain members, and globals.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

_PLAIN = (Number, str, bytes, Enum, type(None), type, FunctionType, BuiltinFunctionType, torch.Size, torch.dtype, torch.device)


def module_key(module: nn.Module) -> Any:
    """The key of a module, which is hashable. Raises ValueError where a lazy layer has no parameters yet."""
    try:
        return _module_key(module)
    except RuntimeError:  # of a parameter without a shape: to look for one at every call would cost more
        _check_initialized(module)
        raise


def _module_key(module: nn.Module) -> Any:
    found: list[Any] = [tuple(torch_module._global_forward_hooks), tuple(torch_module._global_forward_pre_hooks)]
    waiting, layers = [module], {id(module): 0}
    tensors: dict[int, int] = {}
    while waiting:  # by hand: module.modules() takes several times as long
        layer = waiting.pop()
        members = layer.__dict__
        found += (type(layer), _plain_members(members), _hooks(layer._forward_hooks), _hooks(layer._forward_pre_hooks))
        found += [_tensor_key(name, tensor, tensors) for name, tensor in layer._parameters.items()]
        found += [_tensor_key(name, tensor, tensors) for name, tensor in layer._buffers.items()]
        for name, child in layer._modules.items():
            known = len(layers)
            place = layers.setdefault(id(child), known)
            found.append((name, place))
            if place == known and child is not None:
                waiting.append(child)
    return tuple(found)


def _tensor_key(name: str, tensor: Any, tensors: dict[int, int]) -> Any:
    """A parameter or buffer but for its values; the number tells whether it is one that came before."""
    if tensor is None:
        return name
    place = tensors.setdefault(id(tensor), len(tensors))
    return name, place, tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_inference()


def _hooks(hooks: Mapping[int, Any]) -> Any:
    """Hooks by their handles' numbers, which torch never gives twice, with what they hold."""
    return tuple([(number, _plain_members(getattr(hook, "__dict__", {}))) for number, hook in hooks.items()]) if hooks else ()


def _plain_members(members: Mapping[str, Any]) -> Any:
    skipped, kinds = _OF_EVERY_MODULE, _KINDS
    return tuple([(name, value) for name, value in members.items() if name not in skipped and kinds[type(value)] and _is_plain(value)])


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if type(value) is tuple else _KINDS[type(value)]


class _Kinds(dict[type, bool]):
    """Type -> whether its values are plain, or may be; found out once for each type."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = plain = kind is tuple or (issubclass(kind, _PLAIN) and kind.__hash__ is not None)
        return plain


_KINDS = _Kinds()
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__) - {"training"}  # registries, which have entries of their own in the key


def _check_initialized(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if any(is_lazy(tensor) for tensor in [*layer._parameters.values(), *layer._buffers.values()]):
            raise ValueError(
                f"The {type(layer).__name__} {name!r} has no parameters before its first call. Call the module once: module(x)."
            )
