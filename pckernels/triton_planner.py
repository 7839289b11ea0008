"""How code runs on the Triton kernels: which variant, how many samples in a tile, how many warps, and why. Without Triton itself.

Two variants. In either a program of the grid owns a tile of samples:

* on_chip (relax_mlp): a chain of narrow linear layers, whose nodes stay in registers for all steps;
* scratch (relax): everything, with the arena in global memory, where it stays in L1 and L2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pckernels import triton_chain
from pckernels.compiler import Compiled
from pckernels.instructions import Code, Op
from pckernels.planner import ARCHITECTURES, Limits

VARIANTS = ("on_chip", "scratch")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LANES = (16,)
WARPS = (4, 8)
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
    """The constants that a kernel is compiled with, beside precision and lanes.

    Attributes:
        warps: of a program.
        block: elements of the arena that are handled at once.
        rows, depth: of the weight's part in a product.
        conv_rows, conv_columns: of the result's part in a convolution.
    """

    warps: int
    block: int
    rows: int
    depth: int
    conv_rows: int
    conv_columns: int

    @property
    def constants(self) -> dict[str, int]:
        """As the kernel's arguments."""
        names = {"BLOCK": self.block, "ROWS": self.rows, "DEPTH": self.depth}
        return {**names, "CONV_ROWS": self.conv_rows, "CONV_COLUMNS": self.conv_columns}


def _shapes() -> dict[tuple[str, int], Shape]:
    """Each row is compiled ahead of time and held against triton_kernels/budget.json. Nobody has timed them on a GPU yet."""
    table = {}
    for precision in PRECISIONS:
        for lanes in LANES:
            depth = 32 if precision in ("fp32", "tf32") else 64
            table[precision, lanes] = Shape(warps=8, block=1024, rows=64, depth=depth, conv_rows=32, conv_columns=32)
    return table


TABLE = _shapes()


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        variant: of VARIANTS.
        lanes: samples of a tile.
        programs: how many; each takes every programs-th tile.
        shape: the kernel's other constants.
        precision: of the products' operands.
        reason: in words, why this and nothing else.
    """

    variant: str
    lanes: int
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
    why_not = _not_on_chip(compiled, wanted)
    if wanted.variant == "on_chip" and compiled.program is not None and why_not:
        return f"the on_chip variant runs chains of narrow layers: {why_not}"
    if wanted.variant != "scratch" and why_not is None:
        return _on_chip(batch, wanted)
    return _scratch(compiled.code, batch, limits, wanted, why_not if wanted.variant is None else "asked for")


def _not_on_chip(compiled: Compiled, wanted: Options) -> str | None:
    if wanted.lanes not in (None, triton_chain.LANES) or wanted.warps not in (None, triton_chain.WARPS):
        return f"that variant has tiles of {triton_chain.LANES} samples and {triton_chain.WARPS} warps"
    return triton_chain.supports(compiled, wanted.precision)


def _on_chip(batch: int, wanted: Options) -> Plan:
    tiles = -(-batch // triton_chain.LANES)
    reason = f"on_chip variant: {triton_chain.LANES} samples in each of {tiles} programs, all nodes in registers for all steps"
    return Plan("on_chip", triton_chain.LANES, tiles, TABLE[wanted.precision, triton_chain.LANES], wanted.precision, reason)


def _scratch(code: Code, batch: int, limits: Limits, wanted: Options, why: str | None) -> Plan:
    candidates = [wanted.lanes] if wanted.lanes else LANES
    lanes = min(candidates, key=lambda lanes: cycles(code, batch, lanes, wanted.precision, limits))
    tiles = -(-batch // lanes)
    programs = max(1, min(tiles, limits.multiprocessors * PROGRAMS))
    shape = TABLE[wanted.precision, lanes]
    shape = replace(shape, warps=wanted.warps or shape.warps)
    size = code.rows * lanes * 4 * programs
    reason = (
        f"scratch variant ({why}): {lanes} samples in each of {tiles} tiles, {programs} programs of {shape.warps} warps, "
        f"{size / MIB:,.1f} MiB of state in global memory, which L2 holds where it is no larger"
    )
    return Plan("scratch", lanes, programs, shape, wanted.precision, reason)


def _check(wanted: Options) -> None:
    for name, value, known in (
        ("precision", wanted.precision, PRECISIONS),
        ("variant", wanted.variant, VARIANTS),
        ("lanes", wanted.lanes, LANES),
        ("warps", wanted.warps, WARPS),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}.")


# Rough numbers of a multiprocessor and clock (sm_80 and later): they order the choices, no more.
PROGRAMS = 2  # of a multiprocessor, so that one works while another waits
FMAS, TENSOR_FMAS, L2_BYTES, BARRIER, ELEMENT = 128, 512, 64.0, 200.0, 0.25


def cycles(code: Code, batch: int, lanes: int, precision: str, limits: Limits) -> float:
    """Of the slowest multiprocessor, roughly: products by their multiplications or their weights' bytes, the rest by elements."""
    tiles = -(-batch // lanes)
    rounds = -(-tiles // max(1, min(tiles, limits.multiprocessors)))
    fmas = FMAS if precision == "fp32" else TENSOR_FMAS
    total = 0.0
    for phase in code.phases:
        for i in phase.instructions:
            times = max(0, phase.last - max(phase.first, i.first) + 1)
            total += times * (BARRIER * i.barrier + ELEMENT * i.n * lanes)
            if i.op in (Op.LINEAR, Op.LINEAR_T):
                total += times * i.p[0] * i.p[1] * i.p[2] * max(lanes / fmas, 4.0 / L2_BYTES)
            elif i.op in (Op.CONV, Op.CONV_T, Op.CONV_LEARN):
                total += times * i.p[3] * i.p[13] * i.p[14] * (i.p[0] // i.p[12]) * i.p[4] * i.p[5] * lanes / fmas
    return rounds * total
