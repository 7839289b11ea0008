"""How code runs on a GPU: which tier, how many samples in a block, from shapes and the device's limits alone. Or why it cannot.

A block owns a tile: `lanes` samples, whose arena lies in its shared memory for the whole call. Tiers:

* stream: weights are read from L2 whenever they are used;
* resident: those that the loop reads are copied into shared memory once.

csrc/cuda computes the same sizes; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pckernels.instructions import Code, Instruction, Op

KIB = 1024
THREADS = 256  # of a block
SUM_BYTES = 3264  # shared memory that sums need: SumMemory in csrc/cuda/sums.cuh
LANES = {"fp32": (1, 2, 4, 8, 16), "tf32": (8, 16), "bf16": (8, 16), "fp16": (8, 16)}  # that there are kernels for
TIERS = ("stream", "resident")

# Architecture: KiB of shared memory that a block may ask for, and multiprocessors of a common card.
ARCHITECTURES = {80: (163, 108), 86: (99, 84), 89: (99, 128), 90: (227, 132), 100: (227, 148), 120: (99, 170)}


@dataclass(frozen=True)
class Limits:
    """What a device has.

    Attributes:
        architecture: 90 for compute capability 9.0.
        shared_bytes: shared memory that one block may ask for.
        multiprocessors: how many blocks run at once, one on each.
    """

    architecture: int
    shared_bytes: int
    multiprocessors: int

    @staticmethod
    def of(architecture: int, multiprocessors: int | None = None) -> Limits:
        """Those of an architecture; one that is not in the table has what the next older one has."""
        known = max((number for number in ARCHITECTURES if number <= architecture), default=min(ARCHITECTURES))
        shared, usual = ARCHITECTURES[known]
        return Limits(architecture, shared * KIB, multiprocessors or usual)


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        tier: "stream" or "resident".
        lanes: samples of a tile.
        threads: of a block.
        blocks: how many; a block takes every blocks-th tile.
        shared_bytes: dynamic shared memory of a block.
        precision: of the products' operands.
        reason: in words, why this and nothing else.
    """

    tier: str
    lanes: int
    threads: int
    blocks: int
    shared_bytes: int
    precision: str
    reason: str


def plan(code: Code, batch: int, limits: Limits, precision: str = "fp32", tier: str | None = None, lanes: int | None = None) -> Plan | str:
    """The fastest way that fits, by a rough count of cycles; `tier` and `lanes` force a choice. A refusal is a sentence.

    Raises:
        ValueError: `precision`, `tier` or `lanes` is none that there is.
    """
    _check(precision, tier, lanes)
    if limits.architecture < min(ARCHITECTURES):
        return f"the CUDA engine needs compute capability 8.0; this GPU has {limits.architecture / 10:.1f}"
    choices = [
        Choice(code, batch, limits, precision, each_tier, each_lanes)
        for each_tier in ([tier] if tier else TIERS)
        for each_lanes in ([lanes] if lanes else LANES[precision])
    ]
    fitting = [choice for choice in choices if choice.shared_bytes <= limits.shared_bytes]
    if not fitting:
        return _refusal(min(choices, key=lambda choice: choice.shared_bytes))
    best = min(fitting, key=lambda choice: (choice.cycles, choice.shared_bytes))
    return Plan(best.tier, best.lanes, THREADS, best.blocks, best.shared_bytes, precision, best.in_words)


def _check(precision: str, tier: str | None, lanes: int | None) -> None:
    if precision not in LANES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, LANES))}; got {precision!r}.")
    if tier is not None and tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}; got {tier!r}.")
    if lanes is not None and lanes not in LANES[precision]:
        raise ValueError(f"With {precision}, lanes must be one of {', '.join(map(str, LANES[precision]))}; got {lanes!r}.")


def _refusal(choice: Choice) -> str:
    needs, limits = choice.shared_bytes, choice.limits
    return (
        f"{_samples(choice.lanes)} in a block {'needs' if choice.lanes == 1 else 'need'} {_kib(needs)} of shared memory and a block of "
        f"this GPU (sm_{limits.architecture}) has {_kib(limits.shared_bytes)}, {_kib(needs - limits.shared_bytes)} too little; a program "
        "of this size needs its state in device memory, which the reference backend has and a graph tier would"
    )


def _samples(lanes: int) -> str:
    return "one sample" if lanes == 1 else f"{lanes} samples"


def _kib(count: int) -> str:
    return f"{count / KIB:,.1f} KiB"


@dataclass(frozen=True)
class Panel:
    """A weight as one direction of its products reads it: see Panel in csrc/cuda/tables.h."""

    depth: int
    width: int
    in_loop: bool

    def bytes(self, precision: str) -> int:
        if precision == "fp32":
            return self.depth * _up(self.width, 4) * 16
        return _up(self.width, 16) * _up(self.depth, 8 if precision == "tf32" else 16) * 512


def panels(code: Code) -> list[Panel]:
    """One for each weight, direction and shape in which it is read."""
    found: dict[tuple[int, bool, int, int], bool] = {}
    for phase in code.phases:
        for i in phase.instructions:
            if i.op in (Op.LINEAR, Op.LINEAR_T):
                key = (i.slot, i.op is Op.LINEAR, i.p[1], i.p[2])
                found[key] = found.get(key, False) or phase.last > phase.first
    return [Panel(*((k, n) if forward else (n, k)), in_loop) for (_, forward, k, n), in_loop in found.items()]


@dataclass(frozen=True)
class Choice:
    """One tier and number of lanes: what it takes, and about how long."""

    code: Code
    batch: int
    limits: Limits
    precision: str
    tier: str
    lanes: int

    @property
    def loop_bytes(self) -> int:
        return sum(panel.bytes(self.precision) for panel in panels(self.code) if panel.in_loop)

    @property
    def shared_bytes(self) -> int:
        return SUM_BYTES + self.code.rows * self.lanes * 4 + (self.loop_bytes if self.tier == "resident" else 0)

    @property
    def tiles(self) -> int:
        return _up(self.batch, self.lanes)

    @property
    def blocks(self) -> int:
        """A block that holds weights stays for as many tiles as come; otherwise the GPU deals out the tiles."""
        return self.busy if self.tier == "resident" else max(1, self.tiles)

    @property
    def busy(self) -> int:
        """Multiprocessors that work."""
        return max(1, min(self.tiles, self.limits.multiprocessors))

    @property
    def cycles(self) -> float:
        """Of the slowest multiprocessor. A tie, as where nothing is in the loop, goes to the tier that takes less."""
        rounds = _up(self.tiles, self.busy)
        copying = self.loop_bytes / L2_BYTES if self.tier == "resident" else 0.0
        return copying + rounds * sum(times * self._instruction(i, loop) for i, times, loop in _executed(self.code))

    def _instruction(self, i: Instruction, in_loop: bool) -> float:
        barrier = BARRIER if i.barrier else 0.0
        if i.op in (Op.LINEAR, Op.LINEAR_T):
            return barrier + max(self._multiplying(i.p[0] * i.p[1] * i.p[2]), self._reading(i, in_loop))
        if i.op in (Op.CONV, Op.CONV_T, Op.CONV_LEARN):
            work = i.p[3] * i.p[13] * i.p[14] * (i.p[0] // i.p[12]) * i.p[4] * i.p[5]
            return barrier + CONV_COST * work * self.lanes / FMAS
        return barrier + ELEMENT_COST * i.n * self.lanes / FMAS

    def _multiplying(self, multiplications: int) -> float:
        return multiplications * self.lanes / (FMAS if self.precision == "fp32" else TENSOR_FMAS)

    def _reading(self, i: Instruction, in_loop: bool) -> float:
        size = Panel(i.p[1], i.p[2], in_loop).bytes(self.precision)
        if self.tier == "resident" and in_loop:
            return size / SHARED_BYTES
        return max(size / L2_BYTES, size * self.busy / L2_BYTES_OF_ALL)

    @property
    def in_words(self) -> str:
        weights = "weights in shared memory" if self.tier == "resident" else "weights from L2"
        return f"{self.tier} tier: {_samples(self.lanes)} in each of {self.tiles} tiles, {_kib(self.shared_bytes)} a block, {weights}"


# Rough numbers of a multiprocessor and clock (sm_80 and later): they order the choices, no more.
FMAS, TENSOR_FMAS = 128, 512
L2_BYTES, L2_BYTES_OF_ALL, SHARED_BYTES = 64.0, 2500.0, 128.0
CONV_COST, ELEMENT_COST, BARRIER = 3.0, 8.0, 40.0


def _executed(code: Code) -> Iterator[tuple[Instruction, int, bool]]:
    """Instructions with how often they run, and whether that is in a loop."""
    for phase in code.phases:
        for i in phase.instructions:
            yield i, max(0, phase.last - max(phase.first, i.first) + 1), phase.last > phase.first


def _up(a: int, b: int) -> int:
    return -(-a // b)


def table(plans: Iterable[tuple[str, int, Plan | str]]) -> str:
    """Plans as lines: model, batch, tier, lanes, blocks, KiB of shared memory; or the refusal."""
    lines = [f"{'model':28} {'batch':>6} {'tier':9} {'lanes':>5} {'blocks':>6} {'shared':>12}"]
    for model, batch, found in plans:
        row = found if isinstance(found, str) else f"{found.tier:9} {found.lanes:5} {found.blocks:6} {_kib(found.shared_bytes):>12}"
        lines.append(f"{model:28} {batch:6} {row}")
    return "\n".join(lines)
