"""How code runs on a GPU: which tier, how many samples in a block, from shapes and the device's limits alone. Or why it cannot.

A block owns a tile: `lanes` samples, whose arena lies in its shared memory for the whole call. Tiers:

* stream: weights are read from L2 whenever they are used;
* resident: those that the loop reads are copied into shared memory once.

Products, see csrc/cuda/product_*.cuh:

* simt: in fp32 arithmetic;
* mma: of rounded operands on tensor cores, each warp by itself;
* wgmma: the same by warpgroups, of large tiles, on compute capability 9.0 alone. No GPU has proved these kernels yet, so a plan has them
  only where they are asked for. What they multiply is staged at the end of shared memory, `staged` rows at a time.

csrc/cuda computes the same sizes; tests hold the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from pckernels.instructions import Code, Instruction, Op

KIB = 1024
THREADS = 256  # of a block
SUM_BYTES = 3264  # shared memory that sums need: SumMemory in csrc/cuda/sums.cuh
LANES = {"fp32": (1, 2, 4, 8, 16), "tf32": (8, 16), "bf16": (8, 16), "fp16": (8, 16)}  # that there are kernels for
WGMMA_LANES = (16, 32)  # likewise, of wgmma
WGMMA_ARCHITECTURE = 90  # and none before or after
TIERS = ("stream", "resident")
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
        tier: "stream" or "resident".
        lanes: samples of a tile.
        threads: of a block.
        blocks: how many; a block takes every blocks-th tile.
        shared_bytes: dynamic shared memory of a block.
        precision: of the products' operands.
        product: "simt", "mma" or "wgmma".
        staged: rows of wgmma's staging buffer; otherwise 0.
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
    reason: str


def plan(
    code: Code,
    batch: int,
    limits: Limits,
    precision: str = "fp32",
    tier: str | None = None,
    lanes: int | None = None,
    product: str | None = None,
) -> Plan | str:
    """The fastest way that fits, by a rough count of cycles; `tier`, `lanes` and `product` force a choice. A refusal is a sentence.

    `product` None leaves out wgmma; FASTEST takes it where it is reckoned to be faster.

    Raises:
        ValueError: `precision`, `tier`, `lanes` or `product` is none that there is.
    """
    _check(precision, tier, lanes, product)
    if limits.architecture < min(ARCHITECTURES):
        return f"the CUDA engine needs compute capability 8.0; this GPU has {limits.architecture / 10:.1f}"
    choices = [
        Choice(code, batch, limits, precision, each_tier, each_lanes, each_product)
        for each_product in _possible(precision, product)
        if each_product != "wgmma" or limits.architecture == WGMMA_ARCHITECTURE
        for each_tier in ([tier] if tier else TIERS)
        for each_lanes in lanes_of(precision, each_product)
        if lanes in (None, each_lanes)
    ]
    if not choices:  # mma has a kernel for every other number of lanes
        return f"products by wgmma need compute capability 9.0, neither less nor more; this GPU has {limits.architecture / 10:.1f}: use mma"
    fitting = [choice for choice in choices if choice.shared_bytes <= limits.shared_bytes]
    if not fitting:
        return _refusal(min(choices, key=lambda choice: choice.shared_bytes))
    best = min(fitting, key=lambda choice: (choice.cycles, choice.shared_bytes))
    sizes = (best.tier, best.lanes, THREADS, best.blocks, best.shared_bytes)
    return Plan(*sizes, precision, best.product, best.staged, best.in_words)


def lanes_of(precision: str, product: str) -> tuple[int, ...]:
    """Samples of the tiles that there are kernels for."""
    return WGMMA_LANES if product == "wgmma" else LANES[precision]


def _possible(precision: str, wanted: str | None) -> list[str]:
    """Products to choose from, wherever they run."""
    if wanted is not None and wanted != FASTEST:
        return [wanted]
    if precision == "fp32":
        return ["simt"]
    return ["mma", "wgmma"] if wanted == FASTEST else ["mma"]


def _of_precision(precision: str) -> str:
    return "'simt'" if precision == "fp32" else "'mma' or 'wgmma'"


def _check(precision: str, tier: str | None, lanes: int | None, product: str | None) -> None:
    if precision not in LANES:
        raise ValueError(f"precision must be one of {', '.join(map(repr, LANES))}; got {precision!r}.")
    if tier is not None and tier not in TIERS:
        raise ValueError(f"tier must be one of {', '.join(map(repr, TIERS))}; got {tier!r}.")
    if product is not None and product not in (*PRODUCTS, FASTEST):
        raise ValueError(f"product must be one of {', '.join(map(repr, (*PRODUCTS, FASTEST)))}; got {product!r}.")
    if product in PRODUCTS and (product == "simt") != (precision == "fp32"):
        raise ValueError(f"With {precision}, product must be {_of_precision(precision)}; got {product!r}.")
    known = sorted({each for possible in _possible(precision, product) for each in lanes_of(precision, possible)})
    if lanes is not None and lanes not in known:
        of = f"{precision} and wgmma" if product == "wgmma" else precision
        raise ValueError(f"With {of}, lanes must be one of {', '.join(map(str, known))}; got {lanes!r}.")


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
    product: str

    @property
    def loop_bytes(self) -> int:
        return sum(panel.bytes(self.precision) for panel in panels(self.code) if panel.in_loop)

    @property
    def shared_bytes(self) -> int:
        return self._unstaged_bytes + self.staged * self._staged_row

    @property
    def _unstaged_bytes(self) -> int:
        return SUM_BYTES + self.code.rows * self.lanes * 4 + (self.loop_bytes if self.tier == "resident" else 0)

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
            return barrier + max(self._multiplying(i.p[0] * i.p[1] * i.p[2]), self._reading(i, in_loop)) + self._staging(i)
        if i.op in (Op.CONV, Op.CONV_T, Op.CONV_LEARN):
            work = i.p[3] * i.p[13] * i.p[14] * (i.p[0] // i.p[12]) * i.p[4] * i.p[5]
            return barrier + CONV_COST * work * self.lanes / FMAS
        return barrier + ELEMENT_COST * i.n * self.lanes / FMAS

    def _multiplying(self, multiplications: int) -> float:
        return multiplications * self.lanes / {"simt": FMAS, "mma": TENSOR_FMAS, "wgmma": WGMMA_FMAS}[self.product]

    def _staging(self, i: Instruction) -> float:
        """Two barriers for each piece; reading, rounding and writing v; and what the pieces after the first add to what the arena holds."""
        if self.product != "wgmma":
            return 0.0
        depth, width = (i.p[1], i.p[2]) if i.op is Op.LINEAR else (i.p[2], i.p[1])
        pieces = _up(depth, self.staged)
        moved = depth * (4 * self.lanes + self._staged_row) + (pieces - 1) * width * self.lanes * 8
        return i.p[0] * (pieces * 2 * BARRIER + moved / SHARED_BYTES)

    def _reading(self, i: Instruction, in_loop: bool) -> float:
        size = Panel(i.p[1], i.p[2], in_loop).bytes(self.precision)
        if self.tier == "resident" and in_loop:
            return size / SHARED_BYTES
        return max(size / L2_BYTES, size * self.busy / L2_BYTES_OF_ALL)

    @property
    def in_words(self) -> str:
        weights = "weights in shared memory" if self.tier == "resident" else "weights from L2"
        how = f"; products by wgmma, {self.staged} rows staged" if self.product == "wgmma" else ""
        return f"{self.tier} tier: {_samples(self.lanes)} in each of {self.tiles} tiles, {_kib(self.shared_bytes)} a block, {weights}{how}"


# Rough numbers of a multiprocessor and clock (sm_80 and later): they order the choices, no more.
FMAS, TENSOR_FMAS, WGMMA_FMAS = 128, 512, 1024
L2_BYTES, L2_BYTES_OF_ALL, SHARED_BYTES = 64.0, 2500.0, 128.0
CONV_COST, ELEMENT_COST, BARRIER = 3.0, 8.0, 40.0


def deepest(code: Code) -> int:
    """The depth of the deepest product that a loop executes; of all if none does; 0 without any."""
    found = [(in_loop, i.p[1] if i.op is Op.LINEAR else i.p[2]) for i, _, in_loop in _executed(code) if i.op in (Op.LINEAR, Op.LINEAR_T)]
    return max(found, default=(False, 0))[1]


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
