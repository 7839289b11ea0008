"""What a caller asks of a backend's planner, for the calls inside of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """None leaves the choice to the planner.

    Attributes:
        precision: of the products' operands: "fp32", "tf32", "bf16", "fp16". Sums are in float32.
        variant: which kind of kernel.
        lanes: samples of a tile.
        warps: of a program, of 32 threads each.
    """

    precision: str = "fp32"
    variant: str | None = None
    lanes: int | None = None
    warps: int | None = None


_DEFAULT = Options()


class Scope:
    """The options of one backend: `with scope(precision="tf32"): ..` sets them, `scope.get()` reads them."""

    def __init__(self, name: str):
        self._current: ContextVar[Options] = ContextVar(f"options of the {name} backend", default=_DEFAULT)

    def get(self) -> Options:
        return self._current.get()

    @contextmanager
    def __call__(
        self, precision: str = "fp32", variant: str | None = None, lanes: int | None = None, warps: int | None = None
    ) -> Iterator[None]:
        token = self._current.set(Options(precision, variant, lanes, warps))
        try:
            yield
        finally:
            self._current.reset(token)
