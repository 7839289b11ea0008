"""The shadow of a module: what gets traced in its place, so that the user's module is never touched."""

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pckernels.cells import UNROLLED, mark
from pckernels.wrappers import ORIGINAL, is_compiled


def shadow_of(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of the module tree with the same parameters and buffers; recurrent layers unrolled, outputs of `names` marked."""
    copies: dict[int, nn.Module] = {}
    shadow = _copy(module, "", copies)
    for name in names:
        target = shadow.get_submodule(name)
        target.register_forward_hook(_OutputMarker(name))
    return shadow


def _copy(module: nn.Module, path: str, copies: dict[int, nn.Module]) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    kind = Eager if is_compiled(module) else type(module)
    shadow = copies[id(module)] = object.__new__(kind)  # some classes, as fx.GraphModule, make another class in their __new__
    dropped = ("forward", "_forward") if kind is Eager else ()
    shadow.__dict__ = {key: _own(value, module, shadow) for key, value in module.__dict__.items() if key not in dropped}
    shadow.training = module.training
    if type(module) in UNROLLED:
        shadow.__class__ = UNROLLED[type(module)]
        shadow.path, shadow.calls = path, 0  # type: ignore[assignment]
    for name, child in module._modules.items():
        if child is not None:
            shadow._modules[name] = _copy(child, _path_to(path, name, shadow), copies)
    return shadow


class Eager(nn.Module):
    """The shadow of what torch.compile returns: its forward, an attribute, runs the user's own module; this one the shadow's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules[ORIGINAL](*args, **kwargs)  # type: ignore[misc]


def _own(value: Any, module: nn.Module, shadow: nn.Module) -> Any:
    """A member of a module as its shadow's: registries are copied; methods set on the module, as .compile() does, become the shadow's."""
    if isinstance(value, dict):
        return copy.copy(value)
    written = getattr(value, "_torchdynamo_orig_callable", value)
    if isinstance(written, MethodType) and written.__self__ is module:
        return MethodType(written.__func__, shadow)
    return value


def _path_to(path: str, name: str, shadow: nn.Module) -> str:
    """The path of a child; compiling a module does not change its name."""
    if isinstance(shadow, Eager):
        return path
    return f"{path}.{name}" if path else name


class _OutputMarker:
    """A forward hook that marks what a named submodule returns: `name`, `name#2` at its second call, `name.0` in a tuple."""

    def __init__(self, name: str):
        self.name, self.calls = name, 0

    def __call__(self, shadow: nn.Module, args: Any, output: Any) -> Any:
        self.calls += 1
        name = self.name if self.calls == 1 else f"{self.name}#{self.calls}"
        leaves, spec = pytree.tree_flatten(output)
        several = sum(map(_can_be_marked, leaves)) > 1
        names = [f"{name}.{k}" if several else name for k in range(len(leaves))]
        marked = [mark(leaf, own, -1) if _can_be_marked(leaf) else leaf for leaf, own in zip(leaves, names, strict=True)]
        return pytree.tree_unflatten(marked, spec)


def _can_be_marked(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
