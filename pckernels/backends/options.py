"""What a caller asks of a backend's planner, for the calls inside of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

Options = TypeVar("Options")


class Scope(Generic[Options]):
    """The options of one backend, a frozen dataclass with defaults: `with scope(precision="tf32"): ..` sets them, `get` reads them."""

    def __init__(self, kind: type[Options]):
        self._kind, self._default = kind, kind()
        self._current: ContextVar[Options] = ContextVar(f"options in {kind.__module__}", default=self._default)

    def get(self) -> Options:
        return self._current.get()

    @contextmanager
    def __call__(self, *args: Any, **options: Any) -> Iterator[None]:
        token = self._current.set(self._kind(*args, **options))
        try:
            yield
        finally:
            self._current.reset(token)
