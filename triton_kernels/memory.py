"""LOAD, STORE, FILL and COPY: between io and the arena, and inside of it. Reference: interpreter.py, _load, _store, _fill, _copy.

io is row-major, a row for each sample; the arena has a row for each element. So a tile turns while it passes through registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .instruction import ACCUMULATE, OUT, SLOT, A, B, N, P, address, factor


@triton.jit
def load(i, arena, io, sample, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out = io[slot]; lanes without a sample hold 0."""
    n, width, start = tl.load(i + N), tl.load(i + P), tl.load(i + P + 1)
    lane, inside = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES)
    rows = address(io, tl.load(i + SLOT)) + tl.cast(sample, tl.int64) * width + start
    out = arena + tl.load(i + OUT) * LANES
    for first in tl.range(0, n, BLOCK // LANES):
        row = first + inside
        there = (row < n)[:, None]
        value = tl.load(rows + lane[None, :] * width + row[:, None], mask=there & (lane < samples)[None, :], other=0.0)
        tl.store(out + row[:, None] * LANES + lane[None, :], value, mask=there)


@triton.jit
def store(i, arena, io, sample, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """io[slot] = a + b for the lanes that hold a sample."""
    n, width, start = tl.load(i + N), tl.load(i + P), tl.load(i + P + 1)
    a, b = tl.load(i + A), tl.load(i + B)
    lane, inside = tl.arange(0, LANES), tl.arange(0, BLOCK // LANES)
    rows = address(io, tl.load(i + SLOT)) + tl.cast(sample, tl.int64) * width + start
    for first in tl.range(0, n, BLOCK // LANES):
        row = first + inside
        there = (row < n)[:, None]
        at = row[:, None] * LANES + lane[None, :]
        value = tl.full([BLOCK // LANES, LANES], 0.0, tl.float32)
        if a >= 0:
            value += tl.load(arena + a * LANES + at, mask=there, other=0.0)
        if b >= 0:
            value += tl.load(arena + b * LANES + at, mask=there, other=0.0)
        tl.store(rows + lane[None, :] * width + row[:, None], value, mask=there & (lane < samples)[None, :])


@triton.jit
def fill(i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out = f0."""
    n, out = tl.load(i + N) * LANES, arena + tl.load(i + OUT) * LANES
    value = tl.full([BLOCK], 0.0, tl.float32) + factor(i, 0)
    for first in tl.range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(out + at, value, mask=at < n)


@triton.jit
def copy(i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """p0 blocks of p1 rows, every p2 rows of out from every p3 rows of a, times f0."""
    run = tl.load(i + P + 1) * LANES
    count, out_step, step = tl.load(i + P) * run, tl.load(i + P + 2) * LANES, tl.load(i + P + 3) * LANES
    source, out = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES
    scale, accumulate = factor(i, 0), tl.load(i + ACCUMULATE) != 0
    for first in tl.range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        block, inside = item // run, item % run
        value = scale * tl.load(source + block * step + inside, mask=item < count, other=0.0)
        target = out + block * out_step + inside
        if accumulate:
            value += tl.load(target, mask=item < count, other=0.0)
        tl.store(target, value, mask=item < count)
