"""Triton's interpreter, a few times faster: for tests alone.

It replaces the functions of triton.language by its own at every call of a function inside of a kernel, and puts them back behind it,
which takes longer than all that most functions do. Here they are replaced once a launch; what a kernel computes stays the same.
"""

from __future__ import annotations

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
