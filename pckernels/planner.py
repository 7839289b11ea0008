"""How code runs on a GPU: which tier, how many samples in a block, from shapes and the device's limits alone. Or why it cannot.

A block owns a tile: `lanes` samples, whose arena lies in its shared memory for the whole call. Tiers:

* stream: weights are read from L2 whenever they are used;
* resident: those that the loop reads are copied into shared memory once;
* cluster: the blocks of a thread-block cluster share a tile, and those weights with it: each has the rows and columns that it owns
  (sharding.py). For batches that are too small to keep the GPU busy otherwise, and for weights that are too large for one block.

Products, see csrc/cuda/product_*.cuh:

* simt: in fp32 arithmetic;
* mma: of rounded operands on tensor cores, each warp by itself;
* wgmma: the same by warpgroups, of large tiles, on compute capability 9.0 alone. No GPU has proved these kernels yet, so a plan has them
  only where they are asked for. What they multiply is staged at the end of shared memory, `staged` rows at a time.

csrc/cuda computes the same sizes; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from pckernels import sharding
from pckernels.instructions import CONVOLUTIONS, Code, Instruction, Op, Phase, convolution_multiply_adds

KIB = 1024
THREADS = 256  # of a block
SUM_BYTES = 3264  # shared memory that sums need: SumMemory in csrc/cuda/sums.cuh
LANES = {"fp32": (1, 2, 4, 8, 16), "tf32": (8, 16), "bf16": (8, 16), "fp16": (8, 16)}  # that there are kernels for
WGMMA_LANES = (16, 32)  # likewise, of wgmma
WGMMA_ARCHITECTURE = 90  # and none before or after
TIERS = ("stream", "resident", "cluster")
WITH_CLUSTERS = 90  # the first architecture that has them
CLUSTERS = (2, 4, 8, 16)  # blocks
PORTABLE = 8  # blocks that a cluster may have on every GPU that has clusters; one of more has to be asked for
PRODUCTS = ("simt", "mma", "wgmma")
FASTEST = "fastest"  # asks for the fastest product, unproved ones too
STAGED_ROWS, MOST_STAGED_ROWS = 64, 512  # a staging buffer holds a multiple of the first

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
        product: "simt", "mma" or "wgmma".
        staged: rows of wgmma's staging buffer; otherwise 0.
        cluster: blocks that share a tile.
        reason: in words, why this and nothing else.
    """

    tier: str
    lanes: int
    threads: int
    blocks: int
    shared_bytes: int
    precision: str
    product: str
    staged: int
    cluster: int
    reason: str


def lanes_of(precision: str, product: str, tier: str | None = None) -> tuple[int, ...]:
    """Samples of the tiles that there are kernels for: none by wgmma in clusters."""
    if product == "wgmma":
        return () if tier == "cluster" else WGMMA_LANES
    return LANES[precision]


def products_of(precision: str) -> tuple[str, ...]:
    """What multiplies operands of a precision."""
    return ("simt",) if precision == "fp32" else ("mma", "wgmma")


def products_on(limits: Limits, precision: str) -> tuple[str, ...]:
    """Those that a device has."""
    return tuple(each for each in products_of(precision) if each != "wgmma" or limits.architecture == WGMMA_ARCHITECTURE)


def tiers_on(limits: Limits) -> tuple[str, ...]:
    """The tiers that a device has."""
    return tuple(each for each in TIERS if each != "cluster" or limits.architecture >= WITH_CLUSTERS)


def plan(
    code: Code,
    batch: int,
    limits: Limits,
    precision: str = "fp32",
    tier: str | None = None,
    lanes: int | None = None,
    product: str | None = None,
    cluster: int | None = None,
) -> Plan | str:
    """The fastest way that fits, by a rough count of cycles; what is not None forces a choice. A refusal is a sentence.

    `product` None leaves out wgmma; FASTEST takes it where it is reckoned to be faster.

    Raises:
        ValueError: `precision`, `tier`, `lanes`, `product` or `cluster` is none that there is.
    """
    tier = "cluster" if cluster is not None and tier is None else tier
    _check(precision, tier, lanes, product, cluster)
    if limits.architecture < min(ARCHITECTURES):
        return f"the CUDA engine needs compute capability 8.0; this GPU has {limits.architecture / 10:.1f}"
    apart = _why_apart(code, limits, cluster or min(CLUSTERS))
    if tier == "cluster" and apart is not None:
        return apart
    choices = [
        Choice(code, batch, limits, precision, each_tier, each_lanes, each_product, blocks)
        for each_product in _possible(precision, product)
        if each_product in products_on(limits, precision)
        for each_tier in ([tier] if tier else TIERS)
        if each_tier != "cluster" or apart is None
        for blocks in _clusters(each_tier, limits, cluster)
        for each_lanes in lanes_of(precision, each_product, each_tier)
        if lanes in (None, each_lanes)
    ]
    if not choices:  # mma has a kernel for every other number of lanes
        return f"products by wgmma need compute capability 9.0, neither less nor more; this GPU has {limits.architecture / 10:.1f}: use mma"
    fitting = [choice for choice in choices if choice.shared_bytes <= limits.shared_bytes]
    if not fitting:
        return _refusal(min(choices, key=lambda choice: choice.shared_bytes))
    best = min(fitting, key=lambda choice: (choice.cycles, choice.shared_bytes))
    sizes = (best.tier, best.lanes, THREADS, best.blocks, best.shared_bytes)
    return Plan(*sizes, precision, best.product, best.staged, best.cluster, best.in_words)


def _possible(precision: str, wanted: str | None) -> tuple[str, ...]:
    """Products to choose from, wherever they run."""
    if wanted in PRODUCTS:
        return (wanted,)
    return products_of(precision) if wanted == FASTEST else products_of(precision)[:1]


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


def _check(precision: str, tier: str | None, lanes: int | None, product: str | None, cluster: int | None) -> None:
    if precision not in LANES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, LANES))}; got {precision!r}.")
    if tier is not None and tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}; got {tier!r}.")
    if product is not None and product not in (*PRODUCTS, FASTEST):
        raise ValueError(f"product must be one of {', '.join(map(repr, (*PRODUCTS, FASTEST)))}; got {product!r}.")
    if product in PRODUCTS and product not in products_of(precision):
        raise ValueError(f"With {precision}, product must be {' or '.join(map(repr, products_of(precision)))}; got {product!r}.")
    if cluster is not None and cluster not in CLUSTERS:
        raise ValueError(f"cluster must be one of {', '.join(map(str, CLUSTERS))}; got {cluster!r}.")
    if cluster is not None and tier != "cluster":
        raise ValueError(f"cluster= is of tier 'cluster'; with tier {tier!r} a block has its tile to itself.")
    if product == "wgmma" and tier == "cluster":
        raise ValueError("Product 'wgmma' is of tiers 'stream' and 'resident'; blocks of a cluster multiply by 'mma'.")
    known = sorted({each for possible in _possible(precision, product) for each in lanes_of(precision, possible, tier)})
    if lanes is not None and lanes not in known:
        of = f"{precision} and wgmma" if product == "wgmma" else precision
        raise ValueError(f"With {of}, lanes must be one of {', '.join(map(str, known))}; got {lanes!r}.")


def _refusal(choice: Choice) -> str:
    needs, limits = choice.shared_bytes, choice.limits
    return (
        f"{_samples(choice.lanes)} in a block {'needs' if choice.lanes == 1 else 'need'} {_kib(needs)} of shared memory and a block of "
        f"this GPU (sm_{limits.architecture}) has {_kib(limits.shared_bytes)}, {_kib(needs - limits.shared_bytes)} too little; a program "
        'of this size needs its state in device memory: use backend="graph", or the reference'
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
    """One tier, number of lanes, product and number of blocks to a cluster: what it takes, and about how long."""

    code: Code
    batch: int
    limits: Limits
    precision: str
    tier: str
    lanes: int
    product: str
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
        return self._unstaged_bytes + self.staged * self._staged_row

    @property
    def _unstaged_bytes(self) -> int:
        return SUM_BYTES + self.code.rows * self.lanes * 4 + (self.loop_bytes if self.holds_weights else 0)

    @property
    def _staged_row(self) -> int:
        return self.lanes * (4 if self.precision == "tf32" else 2)

    @cached_property
    def staged(self) -> int:
        """Rows of the staging buffer: the deepest product of the loop in one piece, or what there is room for; never less than a step."""
        if self.product != "wgmma":
            return 0
        room = (self.limits.shared_bytes - self._unstaged_bytes) // self._staged_row // STAGED_ROWS * STAGED_ROWS
        return max(STAGED_ROWS, min(_up(deepest(self.code), STAGED_ROWS) * STAGED_ROWS, MOST_STAGED_ROWS, room))

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
            panel = Panel(*_matrix(i), in_loop).of_block(self.cluster)
            multiplying = self._multiplying(i.p[0] * panel.depth * panel.width)
            return barrier + max(multiplying, self._reading(panel)) + self._staging(i.p[0], panel)
        if i.op is Op.MEET:
            return MEETING
        if i.op is Op.GATHER:
            return barrier + i.n * self.lanes * 4 / PEER_BYTES
        if i.op in CONVOLUTIONS:
            return barrier + CONV_COST * convolution_multiply_adds(i.p) * self.lanes / FMAS
        rows = i.n if sharding.runs_whole(i) else _share(i.n, self.cluster)
        return barrier + ELEMENT_COST * rows * self.lanes / FMAS

    def _multiplying(self, multiplications: int) -> float:
        return multiplications * self.lanes / {"simt": FMAS, "mma": TENSOR_FMAS, "wgmma": WGMMA_FMAS}[self.product]

    def _staging(self, positions: int, panel: Panel) -> float:
        """Two barriers for each piece; reading, rounding and writing v; and what the pieces after the first add to what the arena holds."""
        if self.product != "wgmma":
            return 0.0
        pieces = _up(panel.depth, self.staged)
        moved = panel.depth * (4 * self.lanes + self._staged_row) + (pieces - 1) * panel.width * self.lanes * 8
        return positions * (pieces * 2 * BARRIER + moved / SHARED_BYTES)

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
        how = f"; products by wgmma, {self.staged} rows staged" if self.product == "wgmma" else ""
        return f"{self.tier} tier: {tiles}, {_kib(self.shared_bytes)} a block, {weights}{how}"


# Rough numbers of a multiprocessor and clock (sm_80 and later): they order the choices, no more.
FMAS, TENSOR_FMAS, WGMMA_FMAS = 128, 512, 1024
L2_BYTES, L2_BYTES_OF_ALL, SHARED_BYTES = 64.0, 2500.0, 128.0
CONV_COST, ELEMENT_COST, BARRIER = 3.0, 8.0, 40.0
MEETING, PEER_BYTES = 400.0, 32.0  # of a cluster, and from the shared memory of its other blocks


def _matrix(i: Instruction) -> tuple[int, int]:
    """Depth and width of what a product multiplies by."""
    return (i.p[1], i.p[2]) if i.op is Op.LINEAR else (i.p[2], i.p[1])


def deepest(code: Code) -> int:
    """The depth of the deepest product that a loop executes; of all if none does; 0 without any."""
    found = [(in_loop, _matrix(i)[0]) for i, _, in_loop in _executed(code) if i.op in (Op.LINEAR, Op.LINEAR_T)]
    return max(found, default=(False, 0))[1]


def _executed(code: Code, cluster: int = 1) -> Iterator[tuple[Instruction, int, bool]]:
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
