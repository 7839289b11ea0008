"""The machine: all steps of one inference in one kernel, for every model and every rule. Reference: interpreter.py, execute.

What differs between models is data (instructions.py), so one compiled kernel serves them all. A program of the grid takes every
num_programs-th tile of LANES samples; its arena is a piece of global memory of its own, which stays in L1 and L2. Nothing that it computes
depends on how many programs there are, but the sums that CONV_LEARN and SUM_LEARN leave.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from pckernels.triton_planner import TABLE

from .ahead_of_time import Build
from .convolution import conv, conv_learn, conv_t, sum_learn
from .elementwise import elementwise
from .instruction import (
    ACT,
    AVGPOOL,
    AVGPOOL_T,
    BARRIER,
    CONV,
    CONV_LEARN,
    FILL,
    FIRST,
    LINEAR,
    LOAD,
    LOSS,
    MAXPOOL,
    MAXPOOL_GRAD,
    NORM,
    OP,
    SLOT,
    STORE,
    SUM_LEARN,
    WORDS,
)
from .loss import loss, norm
from .memory import copy, fill, load, store
from .pooling import avgpool, avgpool_t, maxpool, maxpool_grad
from .products import linear, linear_t


# One kernel for every model and batch: Triton would compile it anew for sizes of 1, and of multiples of 16, which takes half a minute.
@triton.jit(do_not_specialize=["phase_count", "rows", "learned_size", "energies_size", "slots", "batch"])
def relax(
    words,
    phases,
    phase_count,
    weights,
    io,
    arenas,
    rows,
    learned,
    learned_at,
    learned_size,
    energies,
    energies_size,
    slots,
    batch,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CONV_ROWS: tl.constexpr,
    CONV_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run code on a batch.

    Args:
        words, phases: the code, (instructions, WORDS) and (phases, 3) int32.
        weights, io: addresses of float32 tensors by slot, int64.
        arenas: (programs, rows, LANES) float32, anything.
        learned: (programs, learned_size) float32, zeros; learned_at: where in it a gradient slot has its sums, int32.
        energies: (tiles, steps + 1, slots) float64, zeros; energies_size = (steps + 1) * slots.
        LANES: samples of a tile, at least 16.
        BLOCK: elements of the arena that are handled at once.
        ROWS, DEPTH: of the weight's part in a product; CONV_ROWS, CONV_COLUMNS: of the result's part in a convolution.
        PRECISION: of the operands of products.
    """
    program = tl.program_id(0)
    arena = arenas + program.to(tl.int64) * rows * LANES
    learned += program.to(tl.int64) * learned_size
    for tile in tl.range(program, (batch + LANES - 1) // LANES, tl.num_programs(0)):
        sample = tile * LANES
        of_tile = energies + tl.cast(tile, tl.int64) * energies_size
        start = 0
        for phase in tl.range(0, phase_count):
            count, first, last = tl.load(phases + 3 * phase), tl.load(phases + 3 * phase + 1), tl.load(phases + 3 * phase + 2)
            for t in tl.range(first, last + 1):
                waits = 1  # one who is left out hands his barrier on
                for number in tl.range(start, start + count):
                    i = words + number * WORDS
                    waits = waits | tl.load(i + BARRIER)
                    if t >= tl.load(i + FIRST):
                        if waits != 0:
                            tl.debug_barrier()
                        waits = 0
                        run(
                            i,
                            arena,
                            weights,
                            io,
                            learned,
                            learned_at,
                            of_tile + t * slots,
                            sample,
                            batch - sample,
                            LANES,
                            BLOCK,
                            ROWS,
                            DEPTH,
                            CONV_ROWS,
                            CONV_COLUMNS,
                            PRECISION,
                        )
            start += count
        tl.debug_barrier()  # the next tile writes where this one reads


@triton.jit
def run(
    i,
    arena,
    weights,
    io,
    learned,
    learned_at,
    energies,
    sample,
    samples,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    CONV_ROWS: tl.constexpr,
    CONV_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One instruction. Operations are numbered so that most families lie together."""
    op = tl.load(i + OP)
    if op < LINEAR:
        if op == LOAD:
            load(i, arena, io, sample, samples, LANES, BLOCK)
        elif op == STORE:
            store(i, arena, io, sample, samples, LANES, BLOCK)
        elif op == FILL:
            fill(i, arena, LANES, BLOCK)
        else:
            copy(i, arena, LANES, BLOCK)
    elif op < CONV:
        if op == LINEAR:
            linear(i, arena, weights, LANES, ROWS, DEPTH, PRECISION)
        else:
            linear_t(i, arena, weights, LANES, ROWS, DEPTH, PRECISION)
    elif op < ACT:
        if op == CONV:
            conv(i, arena, weights, LANES, CONV_ROWS, CONV_COLUMNS, DEPTH, PRECISION)
        else:
            conv_t(i, arena, weights, LANES, CONV_ROWS, CONV_COLUMNS, DEPTH, PRECISION)
    elif op < MAXPOOL or (op > LOSS and op < NORM):
        elementwise(op, i, arena, LANES, BLOCK)
    elif op < MAXPOOL_GRAD:
        maxpool(op, i, arena, LANES, BLOCK)
    elif op == MAXPOOL_GRAD:
        maxpool_grad(i, arena, LANES, BLOCK)
    elif op == AVGPOOL:
        avgpool(i, arena, LANES, BLOCK)
    elif op == AVGPOOL_T:
        avgpool_t(i, arena, LANES, BLOCK)
    elif op == LOSS:
        loss(i, arena, io, energies, sample, samples, LANES, BLOCK)
    elif op == NORM:
        norm(i, arena, energies, samples, LANES, BLOCK)
    else:
        gradient = learned + tl.load(learned_at + tl.load(i + SLOT))
        if op == CONV_LEARN:
            tl.debug_barrier()  # of gradients nobody else takes care
            conv_learn(i, arena, gradient, samples, LANES, CONV_ROWS, CONV_COLUMNS, DEPTH, PRECISION)
        elif op == SUM_LEARN:
            tl.debug_barrier()
            sum_learn(i, arena, gradient, samples, LANES, BLOCK)


def builds() -> Iterator[Build]:
    """Every row of the default table."""
    pointers = {"words": "*i32", "phases": "*i32", "weights": "*i64", "io": "*i64", "arenas": "*fp32", "learned": "*fp32"}
    pointers |= {"learned_at": "*i32", "energies": "*fp64"}
    numbers = dict.fromkeys(("phase_count", "rows", "learned_size", "energies_size", "slots", "batch"), "i32")
    for precision, shape in TABLE.items():
        constants = {**shape.constants, "PRECISION": precision}
        options = {"num_warps": shape.warps}
        yield Build(f"relax {precision} {shape.lanes}", relax, {**pointers, **numbers}, constants, options, mma=precision != "fp32")
