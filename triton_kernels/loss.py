"""LOSS and NORM: what an output is wrong by, and the sums that make up the energy. Reference: interpreter.py, _loss, _norm.

Sums are in float64, in a fixed order. Lanes without a sample count nothing, and their error is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pckernels.instructions import Loss

from .functions import exponential, logarithm
from .instruction import OUT, SLOT, SLOT2, A, B, C, N, P, address, factor

SQUARED_ERROR = tl.constexpr(int(Loss.SQUARED_ERROR))


@triton.jit
def loss(i, arena, io, energies, sample, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out = -f0 dL/dmu; energies[slot] = f0 times the sum of L; io[slot2] (B, 1) takes each sample's L, unless it is absent."""
    if tl.load(i + P) == SQUARED_ERROR:
        losses = squared_error(i, arena, samples, LANES, BLOCK)
    else:
        losses = cross_entropy(i, arena, samples, LANES, BLOCK)
    of_lanes = tl.sum(losses, 0)
    slot, lane = tl.load(i + SLOT2), tl.arange(0, LANES)
    if slot >= 0:
        tl.store(address(io, slot) + sample + lane, of_lanes.to(tl.float32), mask=lane < samples)
    tl.store(energies + tl.load(i + SLOT), factor(i, 0).to(tl.float64) * tl.sum(of_lanes, 0))


@triton.jit
def operands(i, arena, LANES: tl.constexpr):
    """mu, its change (which is not to be read where it is absent), the target, and where the error goes."""
    mu, dmu = arena + tl.load(i + A) * LANES, arena + tl.load(i + B) * LANES
    return mu, dmu, arena + tl.load(i + C) * LANES, arena + tl.load(i + OUT) * LANES


@triton.jit
def squared_error(i, arena, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Halves of squares, summed into [BLOCK / LANES][LANES]. mu + dmu is one after the other: a small change keeps its digits."""
    n, b = tl.load(i + N), tl.load(i + B)
    mu, dmu, target, out = operands(i, arena, LANES)
    lane = tl.arange(0, LANES)[None, :]
    total = tl.full([BLOCK // LANES, LANES], 0.0, tl.float64)
    for first in tl.range(0, n, BLOCK // LANES):
        row = first + tl.arange(0, BLOCK // LANES)[:, None]
        at, counts = row * LANES + lane, (row < n) & (lane < samples)
        error = tl.load(target + at, mask=counts, other=0.0) - tl.load(mu + at, mask=counts, other=0.0)
        if b >= 0:
            error -= tl.load(dmu + at, mask=counts, other=0.0)
        tl.store(out + at, factor(i, 0) * error, mask=row < n)
        wide = error.to(tl.float64)
        total += 0.5 * (wide * wide)
    return total


@triton.jit
def cross_entropy(i, arena, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """log sum exp - logit of the class, of each position; the error is one_hot - softmax. A negative class: the position is not read."""
    classes, b = tl.load(i + P + 1), tl.load(i + B)
    positions = tl.load(i + N) // classes
    mu, dmu, target, out = operands(i, arena, LANES)
    lane = tl.arange(0, LANES)[None, :]
    total = tl.full([BLOCK // LANES, LANES], 0.0, tl.float64)
    for start in tl.range(0, positions, BLOCK // LANES):
        position = start + tl.arange(0, BLOCK // LANES)[:, None]
        counts = (position < positions) & (lane < samples)
        wanted = tl.load(target + position * LANES + lane, mask=counts, other=-1.0)
        at = position * classes * LANES + lane
        top = tl.full([BLOCK // LANES, LANES], float("-inf"), tl.float32)
        for k in tl.range(0, classes):
            logit = logits(mu, dmu, at + k * LANES, counts, b)
            top = tl.where(logit <= top, top, logit)
        above_of_class = tl.full([BLOCK // LANES, LANES], 0.0, tl.float32)
        sum_of_all = tl.full([BLOCK // LANES, LANES], 0.0, tl.float32)
        for k in tl.range(0, classes):
            above = logits(mu, dmu, at + k * LANES, counts, b) - top
            sum_of_all += exponential(above)
            above_of_class = tl.where(wanted == k, above, above_of_class)
        for k in tl.range(0, classes):
            softmax = exponential(logits(mu, dmu, at + k * LANES, counts, b) - top) / sum_of_all
            error = factor(i, 0) * tl.where(wanted == k, 1.0 - softmax, -softmax)
            tl.store(out + at + k * LANES, tl.where(wanted < 0.0, 0.0, error), mask=position < positions)
        total += tl.where(wanted < 0.0, 0.0, logarithm(sum_of_all) - above_of_class).to(tl.float64)
    return total


@triton.jit
def logits(mu, dmu, at, counts, b):
    value = tl.load(mu + at, mask=counts, other=0.0)
    if b >= 0:
        value += tl.load(dmu + at, mask=counts, other=0.0)
    return value


@triton.jit
def norm(i, arena, energies, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """energies[slot] = f0 * the sum of a * b, b = a where it is absent."""
    n, a, b = tl.load(i + N) * LANES, tl.load(i + A), tl.load(i + B)
    other = tl.where(b >= 0, b, a)
    total = tl.full([BLOCK], 0.0, tl.float64)
    for first in tl.range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        counts = (at < n) & (at % LANES < samples)
        of_a = tl.load(arena + a * LANES + at, mask=counts, other=0.0).to(tl.float64)
        total += of_a * tl.load(arena + other * LANES + at, mask=counts, other=0.0).to(tl.float64)
    tl.store(energies + tl.load(i + SLOT), factor(i, 0).to(tl.float64) * tl.sum(total, 0))
