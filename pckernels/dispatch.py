"""Which backend runs a call: the one asked for, else PCKERNELS_BACKEND, else the first that supports it. A refusal has a reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pckernels.backends import cuda, device_op, graph, host, reference, triton
from pckernels.call import Call, Outcome
from pckernels.errors import Unsupported

Run = Callable[[Call], Outcome]


@dataclass(frozen=True)
class Support:
    """Whether a backend is available, and why or why not."""

    ok: bool
    reason: str


@dataclass(frozen=True)
class Backend:
    """A backend: whether it is here, why it would refuse a call (None: it would not), how it runs one, and why "auto" would leave one that
    it can run to the next (None: it would not)."""

    support: Support
    refusal: Callable[[Call], str | None]
    run: Run
    reluctance: Callable[[Call], str | None] = lambda call: None


_BACKENDS: dict[str, Backend] = {
    "reference": Backend(Support(True, "pure PyTorch, on any device and in any floating dtype"), lambda call: None, reference.run),
    "host": Backend(Support(*host.availability()), host.refusal, host.run, host.reluctance),
    "graph": Backend(Support(*graph.availability()), graph.refusal, graph.run),
    "triton": Backend(Support(*triton.availability()), triton.refusal, triton.run),
    "cuda": Backend(Support(*cuda.availability()), cuda.refusal, cuda.run),
}
# "auto" tries these. Not "cuda" or "triton": their kernels have passed every test that needs no GPU, but none on one; ask for them by name.
# Nor "graph": on the CPU it is no faster than the reference, and on a GPU its recordings have not run yet.
_ORDER = ("host", "reference")
device_op.register()


def backends() -> dict[str, Support]:
    """The backends by name, each with whether it is available here and why."""
    return {name: backend.support for name, backend in _BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise unless `name` is "auto" or an available backend."""
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str; got {type(name).__name__}.")
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ['auto', *_BACKENDS]))}; got {name!r}.")
    if name != "auto" and not _BACKENDS[name].support.ok:
        raise Unsupported(f'backend {name!r} is not available: {_BACKENDS[name].support.reason}. Use backend="auto".')


def choose(name: str, call: Call) -> tuple[str, Run, str]:
    """The backend for a call: its name, how to run it, and why it was chosen over those before it.

    Raises:
        Unsupported: the backend that was asked for refuses the call; the text says why.
    """
    wanted = name if name != "auto" else os.environ.get("PCKERNELS_BACKEND", "auto") or "auto"
    check_backend(wanted)
    if wanted != "auto":
        refusal = _BACKENDS[wanted].refusal(call)
        if refusal is not None:
            raise Unsupported(f'The {wanted} backend cannot run this call: {refusal}. Use backend="auto".')
        return wanted, _BACKENDS[wanted].run, ""
    refusals: list[str] = []
    for candidate in _ORDER:
        backend = _BACKENDS[candidate]
        refusal = backend.refusal(call) or backend.reluctance(call) if backend.support.ok else None
        if backend.support.ok and refusal is None:
            return candidate, backend.run, "; ".join(refusals)
        if refusal is not None:
            refusals.append(f"not {candidate}: {refusal}")
    raise AssertionError("the reference backend refuses nothing")
