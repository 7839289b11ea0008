"""What a run was made on: processor, memory, GPU, versions, and how busy the machine was."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pckernels.benchmarks.contenders import engines
from pckernels.info import versions

PEERS = ("jax", "pcx", "fabricpc")


def describe(threads: int) -> dict[str, Any]:
    """Hardware and versions, as plain data."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "gpu": _gpu(),
        "versions": {**versions(), **_libraries()},
        "engines": engines(),
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; empty where the system has none. The run itself counts for one thread or so."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return []


def other_work(before: list[float], after: list[float], threads: int) -> bool:
    """Whether the load averages speak of more than this run: over 0.5 when it began, or a whole core more than its own when it ended."""
    return bool(before and after) and (before[0] > 0.5 or after[0] > threads + 1.0)


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    return {
        "name": found.name,
        "capability": capability,
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
    }


def _libraries() -> dict[str, str]:
    found = {}
    for name in ("numpy", *PEERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
