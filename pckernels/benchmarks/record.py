"""The JSON of a run: what tables, figures, the page and the guard read, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = 1
Record = dict[str, Any]


def read(path: str | Path) -> Record:
    """A record from a file.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not one that `pckernels bench` of this version wrote.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; `pckernels bench --json {path}` writes it.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); `pckernels bench --json {path}` writes it anew.") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or "cases" not in found:
        raise ValueError(f"{path} is not a record of `pckernels bench` (schema {SCHEMA}); run it again with --json {path}.")
    return found


def timed(record: Record) -> list[Record]:
    """The cases whose numbers agreed."""
    return [case for case in record["cases"] if "refused" not in case]


def refused(record: Record) -> list[Record]:
    """The others."""
    return [case for case in record["cases"] if "refused" in case]


def in_float32(name: str) -> bool:
    """Whether a contender multiplies in float32, as all rivals do."""
    return not name.endswith(("tf32", "bf16"))


def fastest_of_ours(case: Record) -> Record:
    """The contender that stands for pckernels in plots: the fastest in float32 on as many threads as the run.

    "auto" only where it took a backend that has no times of its own: else it is that backend, drawn twice.
    """
    own = {c["name"] for c in case["contenders"] if c["ours"]}
    ours = [c for c in case["contenders"] if c["ours"] and in_float32(c["name"])]
    ours = [c for c in ours if c["name"] != "auto" or c["plan"].split(":")[0] not in own]
    least = min(c["threads"] for c in ours)
    return min((c for c in ours if c["threads"] == least), key=lambda c: float(c["ms"]["median"]))


def contender(case: Record, name: str) -> Record | None:
    """By name, or None."""
    return next((c for c in case["contenders"] if c["name"] == name), None)


def memories(record: Record) -> list[Record]:
    """The rows of memory in T; older records hold one alone."""
    found: list[Record] | Record = record["curves"].get("memory") or []
    return [found] if isinstance(found, dict) else found
