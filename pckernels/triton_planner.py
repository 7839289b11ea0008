"""How code runs on the Triton kernels: which variant, how many samples in a tile, how many warps, and why. Without Triton itself.

Three variants. In each a program of the grid owns a tile of samples:

* on_chip (relax_mlp): a chain of narrow linear layers, whose nodes stay in registers for all steps;
* pinned (relax_mlp_pinned): a chain of linear layers whose nodes fit in shared memory, where they stay for all steps. Until a GPU has
  proved it (triton_pinned.PROVED) it is taken only where it is asked for;
* scratch (relax): everything, with the arena in global memory, where it stays in L1 and L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pckernels import triton_chain, triton_pinned
from pckernels.compiler import Compiled
from pckernels.instructions import Code
from pckernels.planner import ARCHITECTURES, KIB, Limits

PROGRAMS = 2  # of a multiprocessor, so that one works while another waits
VARIANTS = ("on_chip", "pinned", "scratch")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LANES, WARPS = (16, 32), (4, 8)  # what may be asked for, and is tried in tuning; Triton's products need 16 samples
MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What is asked of the planner: None leaves it the choice.

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


@dataclass(frozen=True)
class Shape:
    """The constants that the machine is compiled with, beside the precision.

    Attributes:
        lanes: samples of a tile.
        warps: of a program.
        block: elements of the arena that are handled at once.
        rows, depth: of the weight's part in a product.
        conv_rows, conv_columns: of the result's part in a convolution.
    """

    lanes: int
    warps: int
    block: int = 1024
    rows: int = 64
    depth: int = 32
    conv_rows: int = 32
    conv_columns: int = 32

    @property
    def constants(self) -> dict[str, int]:
        """As the kernel's arguments."""
        names = {"LANES": self.lanes, "BLOCK": self.block, "ROWS": self.rows, "DEPTH": self.depth}
        return {**names, "CONV_ROWS": self.conv_rows, "CONV_COLUMNS": self.conv_columns}


# What runs unless lanes or warps are asked for. Each row is compiled ahead of time and held against triton_kernels/budget.json. Nobody has
# timed them on a GPU yet: bench/gpu_tune.py does, and prints what belongs here.
TABLE = {
    "fp32": Shape(lanes=16, warps=8),
    "tf32": Shape(lanes=16, warps=8),
    "bf16": Shape(lanes=16, warps=8, depth=64),
    "fp16": Shape(lanes=16, warps=8, depth=64),
}


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        variant: of VARIANTS.
        programs: how many; each takes every programs-th tile of shape.lanes samples.
        shape: the kernel's constants; of chains, lanes and warps alone.
        precision: of the products' operands.
        reason: in words, why this and nothing else.
    """

    variant: str
    programs: int
    shape: Shape
    precision: str
    reason: str


def plan(compiled: Compiled, batch: int, limits: Limits, wanted: Options) -> Plan | str:
    """The plan, or a refusal in a sentence.

    Raises:
        ValueError: an option is none that there is.
    """
    _check(wanted)
    if limits.architecture < min(ARCHITECTURES):
        return f"the Triton kernels need compute capability 8.0; this GPU has {limits.architecture / 10:.1f}"
    not_on_chip, pinned = _not_on_chip(compiled, wanted), _pinned(compiled, batch, limits, wanted)
    if wanted.variant == "on_chip" and compiled.program is not None and not_on_chip:
        return f"the on_chip variant runs chains of narrow layers: {not_on_chip}"
    if wanted.variant == "pinned" and compiled.program is not None and isinstance(pinned, str):
        return f"the pinned variant runs chains of linear layers in shared memory: {pinned}"
    if wanted.variant in (None, "on_chip") and not_on_chip is None:
        return _on_chip(batch, wanted)
    proved = triton_pinned.is_proved(limits.architecture, wanted.precision)
    if isinstance(pinned, Plan) and (wanted.variant == "pinned" or (wanted.variant is None and proved)):
        return pinned
    why = not_on_chip if wanted.variant is None else "asked for"
    if isinstance(pinned, Plan) and wanted.variant is None:
        why = (
            f"{not_on_chip}; no GPU of compute capability {limits.architecture / 10:.1f} has proved the pinned variant, which runs where "
            "options(variant='pinned') asks for it"
        )
    return _scratch(compiled.code, batch, limits, wanted, why)


def _not_on_chip(compiled: Compiled, wanted: Options) -> str | None:
    if wanted.lanes not in (None, triton_chain.LANES) or wanted.warps not in (None, triton_chain.WARPS):
        return f"that variant has tiles of {triton_chain.LANES} samples and {triton_chain.WARPS} warps"
    return triton_chain.supports(compiled, wanted.precision)


def _on_chip(batch: int, wanted: Options) -> Plan:
    tiles = -(-batch // triton_chain.LANES)
    reason = f"on_chip variant: {triton_chain.LANES} samples in each of {tiles} programs, all nodes in registers for all steps"
    return Plan("on_chip", tiles, Shape(triton_chain.LANES, triton_chain.WARPS), wanted.precision, reason)


def _pinned(compiled: Compiled, batch: int, limits: Limits, wanted: Options) -> Plan | str:
    if not limits.shared_bytes:
        return "it is written in Gluon, which Triton's interpreter does not run"
    found = triton_pinned.plan_of_code(compiled, limits.shared_bytes, wanted.lanes, wanted.warps)
    if isinstance(found, str):
        return found
    tiles = -(-batch // found.lanes)
    reason = (
        f"pinned variant: {found.lanes} samples in each of {tiles} programs of {found.warps} warps, all nodes in "
        f"{found.shared_bytes / KIB:.1f} KiB of shared memory for all steps, weights from L2"
    )
    return Plan("pinned", tiles, Shape(found.lanes, found.warps), wanted.precision, reason)


def _scratch(code: Code, batch: int, limits: Limits, wanted: Options, why: str | None) -> Plan:
    row = TABLE[wanted.precision]
    shape = replace(row, lanes=wanted.lanes or row.lanes, warps=wanted.warps or row.warps)
    tiles = -(-batch // shape.lanes)
    programs = max(1, min(tiles, limits.multiprocessors * PROGRAMS))
    size = code.rows * shape.lanes * 4 * programs
    reason = (
        f"scratch variant ({why}): {shape.lanes} samples in each of {tiles} tiles, {programs} programs of {shape.warps} warps, "
        f"{size / MIB:,.1f} MiB of state in global memory, which L2 holds where it is no larger"
    )
    return Plan("scratch", programs, shape, wanted.precision, reason)


def _check(wanted: Options) -> None:
    for name, value, known in (
        ("precision", wanted.precision, PRECISIONS),
        ("variant", wanted.variant, VARIANTS),
        ("lanes", wanted.lanes, LANES),
        ("warps", wanted.warps, WARPS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")
