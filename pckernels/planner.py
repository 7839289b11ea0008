"""How code runs on a GPU: which tier, how many samples in a block, from shapes and the device's limits alone. Or why it cannot.

A block owns a tile: `lanes` samples, whose arena lies in its shared memory for the whole call. Tiers:

* stream: weights are read from L2 whenever they are used;
* resident: those that the loop reads are copied into shared memory once;
* cluster: the blocks of a thread-block cluster share a tile, and those weights with it: each has the rows and columns that it owns
  (sharding.py). For batches that are too small to keep the GPU busy otherwise, and for weights that are too large for one block.

csrc/cuda computes the same sizes; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pckernels import sharding
from pckernels.instructions import Code, Instruction, Op, Phase

KIB = 1024
THREADS = 256  # of a block
SUM_BYTES = 3264  # shared memory that sums need: SumMemory in csrc/cuda/sums.cuh
LANES = {"fp32": (1, 2, 4, 8, 16), "tf32": (8, 16), "bf16": (8, 16), "fp16": (8, 16)}  # that there are kernels for
LANES_OF_CLUSTERS = {"fp32": (1, 2, 4, 8, 16), "tf32": (8, 16), "bf16": (8, 16), "fp16": (8, 16)}
TIERS = ("stream", "resident", "cluster")
WITH_CLUSTERS = 90  # the first architecture that has them
CLUSTERS = (2, 4, 8, 16)  # blocks
PORTABLE = 8  # blocks that a cluster may have on every GPU that has clusters; one of more has to be asked for

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
        tier: "stream", "resident" or "cluster".
        lanes: samples of a tile.
        threads: of a block.
        blocks: how many; a block takes every blocks-th tile.
        shared_bytes: dynamic shared memory of a block.
        precision: of the products' operands.
        reason: in words, why this and nothing else.
        cluster: blocks that share a tile.
    """

    tier: str
    lanes: int
    threads: int
    blocks: int
    shared_bytes: int
    precision: str
    reason: str
    cluster: int = 1


def lanes_of(tier: str | None, precision: str) -> tuple[int, ...]:
    """Numbers of samples of a tile that a tier's kernels have."""
    return (LANES_OF_CLUSTERS if tier == "cluster" else LANES)[precision]


def tiers_on(limits: Limits) -> tuple[str, ...]:
    """The tiers that a device has."""
    return TIERS if limits.architecture >= WITH_CLUSTERS else tuple(tier for tier in TIERS if tier != "cluster")


def plan(
    code: Code,
    batch: int,
    limits: Limits,
    precision: str = "fp32",
    tier: str | None = None,
    lanes: int | None = None,
    cluster: int | None = None,
) -> Plan | str:
    """The fastest way that fits, by a rough count of cycles; `tier`, `lanes` and `cluster` force a choice. A refusal is a sentence.

    Raises:
        ValueError: `precision`, `tier`, `lanes` or `cluster` is none that there is.
    """
    tier = "cluster" if cluster is not None and tier is None else tier
    _check(precision, tier, lanes, cluster)
    if limits.architecture < min(ARCHITECTURES):
        return f"the CUDA engine needs compute capability 8.0; this GPU has {limits.architecture / 10:.1f}"
    apart = _why_apart(code, limits, cluster or min(CLUSTERS))
    if tier == "cluster" and apart is not None:
        return apart
    choices = [
        Choice(code, batch, limits, precision, each_tier, each_lanes, blocks)
        for each_tier in ([tier] if tier else TIERS)
        if each_tier != "cluster" or apart is None
        for blocks in _clusters(each_tier, limits, cluster)
        for each_lanes in ([lanes] if lanes else lanes_of(each_tier, precision))
    ]
    fitting = [choice for choice in choices if choice.shared_bytes <= limits.shared_bytes]
    if not fitting:
        return _refusal(min(choices, key=lambda choice: choice.shared_bytes))
    best = min(fitting, key=lambda choice: (choice.cycles, choice.shared_bytes))
    return Plan(best.tier, best.lanes, THREADS, best.blocks, best.shared_bytes, precision, best.in_words, best.cluster)


def _clusters(tier: str, limits: Limits, cluster: int | None) -> Iterable[int]:
    if tier != "cluster":
        return (1,)
    return (cluster,) if cluster else [blocks for blocks in CLUSTERS if blocks <= min(PORTABLE, limits.multiprocessors)]


def _why_apart(code: Code, limits: Limits, cluster: int) -> str | None:
    """Why blocks of this GPU cannot share a tile of this code, or None."""
    if limits.architecture < WITH_CLUSTERS:
        return f"clusters of blocks need compute capability 9.0; this GPU has {limits.architecture / 10:.1f}"
    if cluster > limits.multiprocessors:
        return f"a cluster of {cluster} blocks needs as many multiprocessors; this GPU has {limits.multiprocessors}"
    return sharding.refusal(code)


def _check(precision: str, tier: str | None, lanes: int | None, cluster: int | None) -> None:
    if precision not in LANES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, LANES))}; got {precision!r}.")
    if tier is not None and tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}; got {tier!r}.")
    if lanes is not None and lanes not in lanes_of(tier, precision):
        raise ValueError(f"With {precision}, lanes must be one of {', '.join(map(str, lanes_of(tier, precision)))}; got {lanes!r}.")
    if cluster is not None and cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {', '.join(map(str, CLUSTERS))}; got {cluster!r}.")
    if cluster is not None and tier != "cluster":
        raise ValueError(f"cluster= is of tier 'cluster'; with tier {tier!r} a block has its tile to itself.")


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

    def of_block(self, cluster: int) -> Panel:
        """The columns that the first block of a cluster owns: no other has more."""
        return replace(self, width=_share(self.width, cluster))


def _share(n: int, cluster: int) -> int:
    """Of n rows or columns, those of a cluster's first block."""
    return min(n, sharding.share(n, cluster))


def panels(code: Code, cluster: int = 1) -> list[Panel]:
    """One for each weight, direction and shape in which it is read."""
    found: dict[tuple[int, bool, int, int], bool] = {}
    for phase in code.phases:
        for i in phase.instructions:
            if i.op in (Op.LINEAR, Op.LINEAR_T):
                key = (i.slot, i.op is Op.LINEAR, i.p[1], i.p[2])
                runs = cluster == 1 or i.first <= phase.last  # clusters have no code that never runs
                found[key] = found.get(key, False) or (runs and _is_loop(phase, cluster))
    return [Panel(*((k, n) if forward else (n, k)), in_loop) for (_, forward, k, n), in_loop in found.items()]


def _is_loop(phase: Phase, cluster: int) -> bool:
    """Whether a phase's weights are worth keeping. (Clusters' loops are cut into phases, some of them of a single step.)"""
    return phase.last > (0 if cluster > 1 else phase.first)


@dataclass(frozen=True)
class Choice:
    """One tier, number of lanes and of blocks to a cluster: what it takes, and about how long."""

    code: Code
    batch: int
    limits: Limits
    precision: str
    tier: str
    lanes: int
    cluster: int = 1

    @property
    def holds_weights(self) -> bool:
        return self.tier != "stream"

    @property
    def loop_bytes(self) -> int:
        """Of a block."""
        return sum(panel.of_block(self.cluster).bytes(self.precision) for panel in panels(self.code, self.cluster) if panel.in_loop)

    @property
    def shared_bytes(self) -> int:
        return SUM_BYTES + self.code.rows * self.lanes * 4 + (self.loop_bytes if self.holds_weights else 0)

    @property
    def tiles(self) -> int:
        return _up(self.batch, self.lanes)

    @property
    def blocks(self) -> int:
        """A block that holds weights stays for as many tiles as come; otherwise the GPU deals out the tiles."""
        return self.busy if self.holds_weights else max(1, self.tiles)

    @property
    def busy(self) -> int:
        """Multiprocessors that work: whole clusters of them."""
        return max(1, min(self.tiles, self.limits.multiprocessors // self.cluster)) * self.cluster

    @property
    def cycles(self) -> float:
        """Of the slowest multiprocessor. A tie, as where nothing is in the loop, goes to the tier that takes less."""
        rounds = _up(self.tiles * self.cluster, self.busy)
        copying = self.loop_bytes / L2_BYTES if self.holds_weights else 0.0
        code = self.code if self.cluster == 1 else sharding.sharded(self.code, self.cluster)
        return copying + rounds * sum(times * self._instruction(i, loop) for i, times, loop in _executed(code, self.cluster))

    def _instruction(self, i: Instruction, in_loop: bool) -> float:
        barrier = BARRIER if i.barrier else 0.0
        if i.op in (Op.LINEAR, Op.LINEAR_T):
            depth, width = i.p[1:3] if i.op is Op.LINEAR else (i.p[2], i.p[1])
            panel = Panel(depth, width, in_loop).of_block(self.cluster)
            return barrier + max(self._multiplying(i.p[0] * panel.depth * panel.width), self._reading(panel))
        if i.op is Op.MEET:
            return MEETING
        if i.op is Op.GATHER:
            return barrier + i.n * self.lanes * 4 / PEER_BYTES
        if i.op in (Op.CONV, Op.CONV_T, Op.CONV_LEARN):
            work = i.p[3] * i.p[13] * i.p[14] * (i.p[0] // i.p[12]) * i.p[4] * i.p[5]
            return barrier + CONV_COST * work * self.lanes / FMAS
        rows = i.n if sharding.runs_whole(i) else _share(i.n, self.cluster)
        return barrier + ELEMENT_COST * rows * self.lanes / FMAS

    def _multiplying(self, multiplications: int) -> float:
        return multiplications * self.lanes / (FMAS if self.precision == "fp32" else TENSOR_FMAS)

    def _reading(self, panel: Panel) -> float:
        size = panel.bytes(self.precision)
        if self.holds_weights and panel.in_loop:
            return size / SHARED_BYTES
        return max(size / L2_BYTES, size * self.busy / L2_BYTES_OF_ALL)

    @property
    def in_words(self) -> str:
        weights = "weights in shared memory" if self.holds_weights else "weights from L2"
        together = f", shared by {self.cluster} blocks" if self.cluster > 1 else ""
        tiles = f"{_samples(self.lanes)} in each of {self.tiles} tiles{together}"
        return f"{self.tier} tier: {tiles}, {_kib(self.shared_bytes)} a block, {weights}"


# Rough numbers of a multiprocessor and clock (sm_80 and later): they order the choices, no more.
FMAS, TENSOR_FMAS = 128, 512
L2_BYTES, L2_BYTES_OF_ALL, SHARED_BYTES = 64.0, 2500.0, 128.0
CONV_COST, ELEMENT_COST, BARRIER = 3.0, 8.0, 40.0
MEETING, PEER_BYTES = 400.0, 32.0  # of a cluster, and from the shared memory of its other blocks


def _executed(code: Code, cluster: int) -> Iterator[tuple[Instruction, int, bool]]:
    """Instructions with how often they run, and whether that is in a loop."""
    for phase in code.phases:
        for i in phase.instructions:
            yield i, max(0, phase.last - max(phase.first, i.first) + 1), _is_loop(phase, cluster)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _tier(found: Plan) -> str:
    return found.tier if found.cluster == 1 else f"{found.tier} {found.cluster}"


def table(plans: Iterable[tuple[str, int, Plan | str]]) -> str:
    """Plans as lines: model, batch, tier, lanes, blocks, KiB of shared memory; or the refusal. A cluster's size stands behind its tier."""
    lines = [f"{'model':28} {'batch':>6} {'tier':10} {'lanes':>5} {'blocks':>6} {'shared':>12}"]
    for model, batch, found in plans:
        row = found if isinstance(found, str) else f"{_tier(found):10} {found.lanes:5} {found.blocks:6} {_kib(found.shared_bytes):>12}"
        lines.append(f"{model:28} {batch:6} {row}")
    return "\n".join(lines)
