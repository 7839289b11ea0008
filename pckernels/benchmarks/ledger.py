"""What a call has to do, counted by hand from its code: products, and bytes by where they lie.

Levels, from far to near: device memory; L2 (on a CPU, the caches behind the core), from which a tile reads weights that it does
not hold; the chip (a block's shared memory, a core's own cache), where a tile keeps its arena for all T steps. Counts are of the
whole batch, of what the algorithm moves at least: padding, repacking and what a cache loses are what the measured time shows beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pckernels.compiler import Compiled
from pckernels.instructions import ABSENT, CONVOLUTIONS, Instruction, Op, OuterProduct, Phase

FLOAT, DOUBLE = 4, 8
LINEAR = (Op.LINEAR, Op.LINEAR_T)
POOLS = (Op.MAXPOOL, Op.MAXPOOL_CHANGE, Op.MAXPOOL_GRAD, Op.AVGPOOL, Op.AVGPOOL_T)


@dataclass(frozen=True)
class Count:
    """Of something that is executed once.

    Attributes:
        products: multiply-adds of products with a weight.
        chip: bytes of the arena read and written. weights: bytes of weights that every tile reads, wherever they lie.
        device: bytes of device memory read and written.
    """

    products: float = 0.0
    chip: float = 0.0
    weights: float = 0.0
    device: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.products + other.products, self.chip + other.chip, self.weights + other.weights, self.device + other.device)

    def times(self, factor: float) -> Count:
        return Count(factor * self.products, factor * self.chip, factor * self.weights, factor * self.device)


@dataclass(frozen=True)
class Ledger:
    """Of one call on a batch.

    Attributes:
        step: one inference step, once the light cone has passed: everything that the loop runs.
        loop: all T steps, with what the light cone leaves out. once: the rest, feed-forward pass and local updates.
        arena: bytes of one sample's state on the chip.
        tiles: how often a weight is read in a step.
    """

    step: Count
    loop: Count
    once: Count
    arena: int
    tiles: int

    @property
    def total(self) -> Count:
        return self.loop + self.once

    def leaving(self, resident: bool) -> float:
        """Bytes that leave the chip in one inference step: energies, and weights unless they are held on the chip too."""
        return self.step.device + (0.0 if resident else self.step.weights)


def ledger(compiled: Compiled, batch: int, tile: int) -> Ledger:
    """Count a call of `batch` samples, cut into tiles of `tile`.

    Raises:
        ValueError: there are no samples in a tile.
    """
    if tile < 1:
        raise ValueError(f"A tile must hold 1 sample or more; got {tile}.")
    code, tiles = compiled.code, -(-batch // tile)
    loops = [phase for phase in code.phases if phase.last > phase.first]
    others = [phase for phase in code.phases if phase.last <= phase.first]
    step = _sum(of(i, batch, tiles) for phase in loops for i in phase.instructions)
    loop = _sum(of(i, batch, tiles).times(executions(phase, i)) for phase in loops for i in phase.instructions)
    once = _sum(of(i, batch, tiles) for phase in others for i in phase.instructions)
    once += _sum(_outer(product, batch) for product in code.products) + _weights(compiled) + _grams(compiled)
    return Ledger(step, loop, once, FLOAT * code.rows, tiles)


def of(i: Instruction, batch: int, tiles: int) -> Count:
    """One execution of an instruction on the whole batch, of which every tile reads the weights by itself."""
    weights = FLOAT * weight_elements(i) * tiles
    return Count(batch * multiply_adds(i), FLOAT * batch * arena_elements(i), weights, _device(i, batch, tiles))


def multiply_adds(i: Instruction) -> int:
    """Of one sample."""
    if i.op in LINEAR:
        return i.p[0] * i.p[1] * i.p[2]
    if i.op in CONVOLUTIONS:
        return i.p[13] * i.p[14] * weight_elements(i)
    return 0


def weight_elements(i: Instruction) -> int:
    """Elements of the weight and bias that an instruction reads, or of the gradient that it adds to."""
    bias = 0 if i.slot2 == ABSENT or i.op in (Op.LOSS, Op.LINEAR_T, Op.CONV_T) else 1
    if i.op in LINEAR:
        return i.p[2] * (i.p[1] + bias)
    if i.op in CONVOLUTIONS:
        return i.p[3] * (i.p[0] // i.p[12] * i.p[4] * i.p[5] + bias)
    return 0


def arena_elements(i: Instruction) -> int:
    """Elements of one sample's arena that an instruction reads and writes."""
    again = 2 if i.accumulate else 1
    if i.op in LINEAR:
        inputs, outputs = i.p[0] * i.p[1], i.p[0] * i.p[2]
        return inputs + again * outputs if i.op is Op.LINEAR else outputs + again * inputs
    if i.op in CONVOLUTIONS:
        image, maps = i.p[0] * i.p[1] * i.p[2], i.p[3] * i.p[13] * i.p[14]
        if i.op is Op.CONV_LEARN:
            return maps + image * (2 if i.c != ABSENT else 1)
        return image + again * maps if i.op is Op.CONV else maps + again * image
    if i.op in POOLS:
        return _pool(i, again)
    if i.op is Op.COPY:
        return i.p[0] * i.p[1] * (1 + again)
    if i.op is Op.SUM_LEARN:
        return i.p[0] * i.p[1] * i.p[2]
    reads = sum(operand != ABSENT for operand in (i.a, i.b, i.c, i.d)) + (i.op in (Op.MOVE, Op.RELAX)) + (again - 1)
    writes = (i.out != ABSENT) + (i.op is Op.MOVE and i.c != ABSENT)
    return i.n * (reads + writes)


def _pool(i: Instruction, again: int) -> int:
    image, maps = i.p[0] * i.p[1] * i.p[2], i.p[0] * i.p[13] * i.p[14]
    if i.op in (Op.MAXPOOL_GRAD, Op.AVGPOOL_T):
        return again * image + maps * (2 if i.op is Op.MAXPOOL_GRAD else 1)
    return {Op.MAXPOOL: image + 2 * maps, Op.MAXPOOL_CHANGE: 2 * image + 3 * maps}.get(i.op, image + again * maps)


def _device(i: Instruction, batch: int, tiles: int) -> float:
    if i.op in (Op.LOAD, Op.STORE):
        return FLOAT * batch * i.n
    return DOUBLE * tiles if i.op in (Op.LOSS, Op.NORM) else 0.0


def executions(phase: Phase, i: Instruction) -> int:
    """How often an instruction of a phase runs: not before the light cone lets it."""
    return max(0, phase.last - max(phase.first, i.first) + 1)


def _outer(product: OuterProduct, batch: int) -> Count:
    rows, gradient = batch * product.positions, product.inputs * product.outputs
    return Count(products=rows * gradient, device=FLOAT * (rows * (product.inputs + product.outputs) + gradient))


def _weights(compiled: Compiled) -> Count:
    """Every weight comes from device memory once."""
    return Count(device=FLOAT * sum(info.outputs * info.inputs for info in compiled.weights))


def _grams(compiled: Compiled) -> Count:
    """W W^T, once a call."""
    inputs = {info.name: info.inputs for info in compiled.weights if not info.gram}
    grams = [(info.outputs, inputs[info.name]) for info in compiled.weights if info.gram]
    products = sum(outputs * outputs * k for outputs, k in grams)
    return Count(products=products, device=FLOAT * sum(outputs * (outputs + 2 * k) for outputs, k in grams))


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        total += count
    return total
