"""Triton's interpreter, a few times faster: for tests alone.

It replaces the functions of triton.language by its own at every call of a function inside of a kernel, and puts them back behind it,
which takes longer than all that most functions do. Here they are replaced once a launch. It looks for overflow behind every sum and product
of integers, which takes a third of the time, and here does not: no size in a test is large. What a kernel computes stays the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any


def install() -> None:
    """Once is enough, and more does no harm."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._patch_lang
    if isinstance(original, _PatchOnce):
        return
    interpreter._patch_lang = _PatchOnce(original, SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    of_any, of_scalar = interpreter._get_np_dtype, lru_cache(interpreter._get_np_dtype)  # which makes a table at each call
    interpreter._get_np_dtype = lambda kind: of_scalar(kind) if type(kind) is tl.dtype else of_any(kind)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


class _PatchOnce:
    """The outermost call patches, for functions of either module; those inside of it do nothing."""

    def __init__(self, original: Any, everything: Any):
        self.original, self.everything, self.depth = original, everything, 0
        self.scope: Any = None

    def __call__(self, fn: Any) -> _PatchOnce:
        if self.depth == 0:
            self.scope = self.original(self.everything)
        self.depth += 1
        return self

    def restore(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.scope.restore()
