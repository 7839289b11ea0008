"""Chains whose nodes stay in shared memory: what relax_mlp_pinned.py can run, in how many bytes, and where a GPU has proved it.

Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from pckernels.compiler import Compiled
from pckernels.planner import KIB
from pckernels.rules import Dynamics
from pckernels.triton_chain import chain_of_code

# Architectures (90 for compute capability 9.0) on which tests/test_triton_gpu.py has run the kernel and found it right, and
# bench/gpu_triton.py has found it faster than the scratch variant, by the operands' precision. None yet: it runs where it is asked for.
PROVED: Mapping[str, frozenset[int]] = {}
LANES, WARPS = 16, 8  # unless others are asked for. Nobody has timed them on a GPU yet: bench/gpu_tune.py --variant pinned does
WARP_COLUMNS = 8  # of a block, that one warp has: those of one instruction of a tensor core
CHUNK = {"fp32": 16, "tf32": 32, "fp16": 32, "bf16": 32}  # rows of a weight that are multiplied at a time, at most a block's columns
SUM_BYTES = 2 * KIB  # shared memory beside the arrays: sums pass through it from warp to warp


@dataclass(frozen=True)
class Plan:
    """How a chain runs.

    Attributes:
        lanes: samples of a tile, which one program relaxes.
        warps: of a program.
        columns: nodes of a block.
        starts: the first block of each layer, and how many blocks there are.
        shared_bytes: shared memory of a program, an upper bound.
    """

    lanes: int
    warps: int
    columns: int
    starts: tuple[int, ...]
    shared_bytes: int


def plan_pinned(
    widths: tuple[int, ...], strict: bool, momentum: bool, shared_bytes: int, lanes: int | None = None, warps: int | None = None
) -> Plan | str:
    """How a chain of these widths runs on a GPU that gives a program so much shared memory, or by how much it does not fit."""
    lanes, warps = lanes or LANES, warps or WARPS
    columns = WARP_COLUMNS * warps
    starts = (0, *accumulate(-(-width // columns) for width in widths))
    needed = SUM_BYTES + sum(arrays(starts, strict, momentum).values()) * lanes * columns * 4
    if needed > shared_bytes:
        return (
            f"its nodes need {needed / KIB:,.1f} KiB of shared memory for {lanes} samples, and a program on this GPU has "
            f"{shared_bytes / KIB:.1f}"
        )
    return Plan(lanes, warps, columns, starts, needed)


def arrays(starts: tuple[int, ...], strict: bool, momentum: bool) -> dict[str, int]:
    """Blocks of the kernel's arrays, which its head describes."""
    hidden, total = starts[-2], starts[-1]
    first = starts[1] if hidden else 0
    found = {"d": max(1, hidden), "z": total - first, "g": total - first, "out": total - hidden}
    if strict:
        found["eps"] = max(1, hidden - first)
    if momentum:
        found["velocity"] = max(1, hidden)
    return found


def moves(dynamics: Dynamics) -> tuple[bool, bool]:
    """Whether values move (otherwise errors do), and whether with momentum."""
    return dynamics.moves == "values", dynamics.momentum != 0.0


def plan_of_code(compiled: Compiled, shared_bytes: int, lanes: int | None = None, warps: int | None = None) -> Plan | str:
    """How code runs, or why relax_mlp_pinned cannot run it."""
    chain = chain_of_code(compiled)
    if isinstance(chain, str):
        return chain
    assert compiled.dynamics is not None
    return plan_pinned(chain.widths, *moves(compiled.dynamics), shared_bytes, lanes, warps)


def is_proved(architecture: int, precision: str) -> bool:
    """Whether a GPU of this architecture has proved the kernel."""
    return architecture in PROVED.get(precision, frozenset())
