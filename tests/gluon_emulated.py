"""Gluon kernels on numpy, as far as relax_mlp_pinned.py uses the language: Triton has no interpreter for it.

The kernel's own source runs, function by function, with this file in the place of the language. A tensor is an array with the layout that
the language would give it. Shared memory is NaN until it is written. Two accesses of a block of shared memory, or of a tensor in global
memory that the kernel writes, of which one is a store, must have a barrier between them, unless both have the same layout: then every
element is touched by the same thread. Otherwise `Race` is raised. (Triton's compiler puts barriers of its own where it sees shared
memory used again; nothing here relies on them.) Programs run one after the other.

Not emulated: registers, banks, and whether the compiler accepts a layout; test_triton_build.py compiles the kernel.
"""

from __future__ import annotations

import ast
import inspect
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl

Edits = Sequence[tuple[str, str]]  # text and what takes its place


class Race(Exception):
    """What one thread has touched another one touches, with no barrier between."""


# Tensors

DTYPES = {tl.float64: np.float64, tl.float32: np.float32, tl.float16: np.float16, tl.int64: np.int64, tl.int32: np.int32}


class Tensor:
    """An array and its layout, which is None of a scalar."""

    __array_ufunc__ = None  # so that numpy's numbers leave operators to this class

    def __init__(self, array: Any, layout: Any = None) -> None:
        self.array, self.layout = np.asarray(array), layout

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        if dtype == tl.bfloat16:
            return Tensor(rounded(self.array, 16), self.layout)
        return Tensor(self.array.view(DTYPES[dtype]) if bitcast else self.array.astype(DTYPES[dtype]), self.layout)

    def __getitem__(self, index: tuple[Any, ...]) -> Tensor:
        """[:, None] and [None, :] of a slice."""
        axis = index.index(None)
        assert self.layout.dim == axis, f"{self.layout} has no axis {axis} to expand"
        return Tensor(np.expand_dims(self.array, axis), self.layout.parent)

    def __neg__(self) -> Tensor:
        return Tensor(-self.array, self.layout)


def operation(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Element by element; layouts must be the same, as the language wants it."""

    def applied(*operands: Any) -> Any:
        if any(isinstance(operand, Pointer) for operand in operands):
            return NotImplemented
        layouts = [operand.layout for operand in operands if isinstance(operand, Tensor) and operand.layout is not None]
        assert all(layout == layouts[0] for layout in layouts), f"operands of different layouts: {layouts}"
        with np.errstate(all="ignore"):
            return Tensor(apply(*map(plain, operands)), layouts[0] if layouts else None)

    return applied


def plain(value: Any) -> Any:
    return value.array if isinstance(value, Tensor) else value


for name in ("add", "sub", "mul", "truediv", "floordiv", "and_", "or_", "lshift", "rshift"):
    method, function = name.rstrip("_"), getattr(operator, name)
    setattr(Tensor, f"__{method}__", operation(function))
    setattr(Tensor, f"__r{method}__", operation(lambda a, b, function=function: function(b, a)))
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{name}__", operation(getattr(operator, name)))


def rounded(array: np.ndarray, dropped: int) -> np.ndarray:
    """float32 without its last bits, to nearest even."""
    bits = array.astype(np.float32).view(np.uint32)
    half = np.uint32((1 << (dropped - 1)) - 1) + ((bits >> np.uint32(dropped)) & np.uint32(1))
    return ((bits + half) & np.uint32((0xFFFFFFFF << dropped) & 0xFFFFFFFF)).view(np.float32)


# Memory


@dataclass
class Accesses:
    """Since the last barrier: by which layouts."""

    stored: list[Any] = field(default_factory=list)
    loaded: list[Any] = field(default_factory=list)

    def store(self, layout: Any) -> None:
        self._check(self.stored + self.loaded, layout)
        self.stored.append(layout)

    def load(self, layout: Any) -> None:
        self._check(self.stored, layout)
        self.loaded.append(layout)

    def _check(self, others: Sequence[Any], layout: Any) -> None:
        for other in others:
            if other != layout:
                raise Race(f"{layout} follows {other} with no barrier between")

    def clear(self) -> None:
        self.stored.clear()
        self.loaded.clear()


@dataclass
class Program:
    """The one that runs: its number, and what it has touched."""

    number: int = 0
    touched: list[Accesses] = field(default_factory=list)
    shared_bytes: int = 0

    def watched(self) -> Accesses:
        self.touched.append(Accesses())
        return self.touched[-1]

    def barrier(self) -> None:
        for accesses in self.touched:
            accesses.clear()


@dataclass
class Shared:
    """Blocks of shared memory, or some columns of one."""

    array: np.ndarray
    accesses: list[Accesses]

    def index(self, k: int) -> Shared:
        assert 0 <= k < len(self.array), f"block {k} of {len(self.array)}"
        return Shared(self.array[k], [self.accesses[k]])

    def slice(self, start: int, length: int, dim: int) -> Shared:
        assert dim == 1 and start + length <= self.array.shape[1]
        return Shared(self.array[:, start : start + length], self.accesses)

    def load(self, layout: Any) -> Tensor:
        (accesses,) = self.accesses
        accesses.load(layout)
        return Tensor(self.array.copy(), layout)

    def store(self, value: Tensor) -> None:
        (accesses,) = self.accesses
        accesses.store(value.layout)
        assert value.array.shape == self.array.shape and value.array.dtype == self.array.dtype
        self.array[...] = value.array


class Pointer:
    """Into a tensor of PyTorch: the tensor and places in it."""

    def __init__(self, array: np.ndarray, accesses: Accesses, at: Tensor) -> None:
        self.array, self.accesses, self.at = array, accesses, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.array, self.accesses, self.at + more)

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Those that a mask leaves, and the mask."""
        mask = np.broadcast_to(True if mask is None else plain(mask), self.at.array.shape)
        return self.at.array[mask], mask


# The language


class Language:
    """Functions of gl and tl; what is the same there, such as dtypes and layouts, comes from Gluon itself."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __getattr__(self, name: str) -> Any:
        if name in ("constexpr", "SliceLayout") or isinstance(getattr(gl, name), tl.dtype):
            return getattr(gl, name)
        raise NotImplementedError(f"this stand-in has no {name}")

    static_range = staticmethod(range)
    where = staticmethod(operation(lambda *operands: np.where(*typed(*operands))))
    abs = staticmethod(operation(np.abs))
    floor = staticmethod(operation(np.floor))

    def program_id(self, axis: int) -> Tensor:
        return Tensor(np.int32(self.program.number))

    def debug_barrier(self) -> None:
        self.program.barrier()

    def arange(self, start: int, end: int, layout: Any) -> Tensor:
        return Tensor(np.arange(start, end, dtype=np.int32), layout)

    def full(self, shape: Sequence[int], value: float, dtype: Any, layout: Any) -> Tensor:
        return Tensor(np.full(shape, value, DTYPES[dtype]), layout)

    def zeros(self, shape: Sequence[int], dtype: Any, layout: Any) -> Tensor:
        return self.full(shape, 0.0, dtype, layout)

    def sum(self, value: Tensor, axis: int) -> Tensor:
        return Tensor(value.array.sum(axis), sliced(value.layout, axis))

    def max(self, value: Tensor, axis: int) -> Tensor:
        return Tensor(value.array.max(axis), sliced(value.layout, axis))

    def convert_layout(self, value: Tensor, layout: Any) -> Tensor:
        return Tensor(value.array, layout)

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        array = np.full(shape, np.nan, DTYPES[dtype])
        self.program.shared_bytes += array.nbytes
        return Shared(array, [self.program.watched() for _ in range(shape[0])])

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
        pointer.accesses.load(pointer.at.layout)
        places, there = pointer.places(mask)
        found = np.full(pointer.at.array.shape, other, pointer.array.dtype)
        assert not places.size or 0 <= places.min() <= places.max() < len(pointer.array), "a load beyond the tensor"
        found[there] = pointer.array[places]
        return Tensor(found, pointer.at.layout)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        if pointer.at.layout is not None:  # a number is stored by one thread
            pointer.accesses.store(pointer.at.layout)
        places, there = pointer.places(mask)
        assert not places.size or 0 <= places.min() <= places.max() < len(pointer.array), "a store beyond the tensor"
        pointer.array[places] = np.broadcast_to(plain(value), there.shape)[there]

    def dot_fma(self, a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        assert isinstance(total.layout, gl.BlockedLayout)
        return product(a, b, total)

    def mma_v2(self, a: Tensor, b: Tensor, total: Tensor, input_precision: str | None = None) -> Tensor:
        assert isinstance(total.layout, gl.NVMMADistributedLayout)
        if input_precision == "tf32":
            a, b = (Tensor(rounded(operand.array, 13), operand.layout) for operand in (a, b))
        return product(a, b, total)


def product(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    for number, operand in enumerate((a, b)):
        assert (operand.layout.operand_index, operand.layout.parent) == (number, total.layout)
    with np.errstate(all="ignore"):
        return Tensor(total.array + a.array.astype(np.float32) @ b.array.astype(np.float32), total.layout)


def sliced(layout: Any, axis: int) -> Any:
    return gl.SliceLayout(axis, layout) if getattr(layout, "rank", 1) > 1 else None


def typed(condition: Any, *values: Any) -> list[Any]:
    """Numbers take the type of the tensors beside them."""
    kinds = [value.dtype for value in values if isinstance(value, np.ndarray | np.generic)]
    return [condition, *(np.asarray(value, kinds[0]) if kinds else np.asarray(value, np.float32) for value in values)]


# Kernels


def source_of(module: ModuleType, language: Language, known: dict[str, Any], edits: Edits = ()) -> dict[str, Any]:
    """The kernels of a module as functions of Python, with edits in its text, each of which must be there to be made."""
    if module.__name__ in known:
        return known[module.__name__]
    text = inspect.getsource(module)
    for old, new in edits:
        assert old in text, f"there is no {old!r} in {module.__name__}"
        text = text.replace(old, new, 1)
    scope: dict[str, Any] = {}
    known[module.__name__] = scope
    for name, value in vars(module).items():
        scope[name] = replaced(name, value, language, known)
    kernels = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.decorator_list]
    for node in kernels:
        node.decorator_list = []
    exec(compile(ast.Module([*ANNOTATIONS, *kernels], []), str(module.__file__), "exec"), scope)
    return scope


ANNOTATIONS = ast.parse("from __future__ import annotations").body


def replaced(name: str, value: Any, language: Language, known: dict[str, Any]) -> Any:
    """What a global name of a kernel stands for here."""
    if value in (tl, gl) or name == "mma_v2":
        return getattr(language, name) if name == "mma_v2" else language
    if isinstance(value, tl.constexpr):
        return value.value
    home = getattr(value, "__module__", "")
    if hasattr(value, "arg_names") and home.startswith("pckernels.triton."):
        return lambda *arguments: source_of(sys.modules[home], language, known)[name](*arguments)
    return value


class Emulated:
    """In the place of a kernel: kernel[grid](*arguments, **constants), on tensors of the CPU."""

    def __init__(self, module: ModuleType, name: str, edits: Edits = ()) -> None:
        self.program, self.runs, self.warps = Program(), 0, 0
        self.kernel = source_of(module, Language(self.program), {}, edits)[name]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            self.warps = num_warps
            for number in range(grid[0]):
                self.program.number, self.program.shared_bytes = number, 0
                self.program.touched.clear()
                self.kernel(*(self._argument(argument) for argument in arguments), **constants)
                self.runs += 1

        return launch

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(map(self._argument, argument))
        if isinstance(argument, torch.Tensor):
            return Pointer(flat(argument), self.program.watched(), Tensor(np.int64(0)))
        return np.float32(argument) if isinstance(argument, float) else argument


def flat(tensor: torch.Tensor) -> np.ndarray:
    """Its own memory; of bfloat16, which numpy does not have, a copy to read."""
    assert tensor.is_contiguous()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().view(-1).numpy()
