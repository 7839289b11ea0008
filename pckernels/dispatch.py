"""Which backend runs a call: the one asked for, else PCKERNELS_BACKEND, else the first that supports it. A refusal has a reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pckernels.backends import reference
from pckernels.call import Call, Outcome
from pckernels.errors import Unsupported

Run = Callable[[Call], Outcome]


@dataclass(frozen=True)
class Support:
    """Whether a backend is available, and why or why not."""

    ok: bool
    reason: str


_ABSENT = Support(False, "not part of this release; the reference backend runs everything")
_BACKENDS: dict[str, tuple[Support, Run | None]] = {
    "reference": (Support(True, "pure PyTorch, on any device and in any floating dtype"), reference.run),
    "host": (_ABSENT, None),
    "triton": (_ABSENT, None),
    "cuda": (_ABSENT, None),
}


def backends() -> dict[str, Support]:
    """The backends by name, each with whether it is available here and why."""
    return {name: support for name, (support, _) in _BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise unless `name` is "auto" or an available backend."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str; got {type(name).__name__}.")
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ['auto', *_BACKENDS]))}; got {name!r}.")
    if name != "auto" and not _BACKENDS[name][0].ok:
        raise Unsupported(f'backend {name!r} is not available: {_BACKENDS[name][0].reason}. Use backend="auto".')


def choose(name: str) -> tuple[str, Run]:
    """The backend for a call: its name and how to run it."""
    wanted = name if name != "auto" else os.environ.get("PCKERNELS_BACKEND", "auto") or "auto"
    check_backend(wanted)
    candidates = [wanted] if wanted != "auto" else list(_BACKENDS)
    for candidate in candidates:
        run = _BACKENDS[candidate][1]
        if run is not None:
            return candidate, run
    raise Unsupported("No backend is available.")
