"""Pooling. Reference: interpreter.py, _maxpool, _maxpool_change, _maxpool_grad, _avgpool, _avgpool_t.

A result is a pixel of a channel in a lane; each has one writer, which gathers: a window's elements, or the windows that hold a pixel.
p = (C, H, W, -, kh, kw, sh, sw, ph, pw, dh, dw, -, OH, OW, inside alone). Where a maximum came from is kept as the number of its row within
the input, an int32 in the place of a float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .convolution import before, behind
from .instruction import ACCUMULATE, MAXPOOL, OUT, A, B, C, D, P


@triton.jit
def geometry(i):
    """C, H, W, kh, kw, OH, OW."""
    channels, height, width = tl.load(i + P), tl.load(i + P + 1), tl.load(i + P + 2)
    return channels, height, width, tl.load(i + P + 4), tl.load(i + P + 5), tl.load(i + P + 13), tl.load(i + P + 14)


@triton.jit
def element(i, channel, oh, ow, k, height, width, kernel_w):
    """The row of a window's k-th element, and whether it lies in the image."""
    h, v = before(i, oh, k // kernel_w, 0), before(i, ow, k % kernel_w, 1)
    return (channel * height + h) * width + v, (h >= 0) & (h < height) & (v >= 0) & (v < width)


@triton.jit
def window(i, h, v, k, kernel_w):
    """The window that has a pixel for its k-th element, and whether there is one."""
    oh, in_height = behind(i, h, k // kernel_w, 0)
    ow, in_width = behind(i, v, k % kernel_w, 1)
    return oh, ow, in_height & in_width


@triton.jit
def maxpool(op, i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """MAXPOOL: the first maximum of each window of a, and where. MAXPOOL_CHANGE: the same of (a - M) + b, with M = c."""
    channels, height, width, kernel_h, kernel_w, out_h, out_w = geometry(i)
    changes = op != MAXPOOL
    b = tl.load(i + B)
    x, dx, maxima = arena + tl.load(i + A) * LANES, arena + b * LANES, arena + tl.load(i + C) * LANES
    out, where = arena + tl.load(i + OUT) * LANES, tl.load(i + D)
    if op == MAXPOOL:
        where = b
    count = channels * out_h * out_w * LANES
    for first in tl.range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        result, lane = item // LANES, item % LANES
        channel, oh, ow = result // (out_h * out_w), result // out_w % out_h, result % out_w
        top = tl.full([BLOCK], 0.0, tl.float32)
        if changes:
            top = tl.load(maxima + item, mask=item < count, other=0.0)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        place = tl.full([BLOCK], -1, tl.int32)
        for k in tl.range(0, kernel_h * kernel_w):
            row, inside = element(i, channel, oh, ow, k, height, width, kernel_w)
            there = (item < count) & inside
            value = tl.load(x + row * LANES + lane, mask=there, other=0.0) - top
            if changes and b >= 0:
                value += tl.load(dx + row * LANES + lane, mask=there, other=0.0)
            better = there & ((place < 0) | (value > best) | (value != value))  # the last NaN, as the engines take it
            best, place = tl.where(better, value, best), tl.where(better, row, place)
        tl.store(out + item, best, mask=item < count)
        if where >= 0:
            tl.store(arena + where * LANES + item, place.to(tl.float32, bitcast=True), mask=item < count)


@triton.jit
def maxpool_grad(i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out (C, H, W): each pixel gets a of the windows whose maximum came from it."""
    channels, height, width, kernel_h, kernel_w, out_h, out_w = geometry(i)
    g, where, out = arena + tl.load(i + A) * LANES, arena + tl.load(i + B) * LANES, arena + tl.load(i + OUT) * LANES
    count, accumulate = channels * height * width * LANES, tl.load(i + ACCUMULATE) != 0
    for first in tl.range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        pixel, lane = item // LANES, item % LANES
        channel, h, v = pixel // (height * width), pixel // width % height, pixel % width
        total = tl.full([BLOCK], 0.0, tl.float32)
        if accumulate:
            total = tl.load(out + item, mask=item < count, other=0.0)
        for k in tl.range(0, kernel_h * kernel_w):
            oh, ow, exists = window(i, h, v, k, kernel_w)
            there = (item < count) & exists
            at = ((channel * out_h + oh) * out_w + ow) * LANES + lane
            source = tl.load(where + at, mask=there, other=0.0).to(tl.int32, bitcast=True)
            total += tl.where(there & (source == pixel), tl.load(g + at, mask=there, other=0.0), 0.0)
        tl.store(out + item, total, mask=item < count)


@triton.jit
def avgpool(i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out (C, OH, OW) = the mean of each window of a."""
    channels, height, width, kernel_h, kernel_w, out_h, out_w = geometry(i)
    x, out = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES
    count, accumulate = channels * out_h * out_w * LANES, tl.load(i + ACCUMULATE) != 0
    for first in tl.range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        result, lane = item // LANES, item % LANES
        channel, oh, ow = result // (out_h * out_w), result // out_w % out_h, result % out_w
        total = tl.full([BLOCK], 0.0, tl.float32)
        for k in tl.range(0, kernel_h * kernel_w):
            row, inside = element(i, channel, oh, ow, k, height, width, kernel_w)
            total += tl.load(x + row * LANES + lane, mask=(item < count) & inside, other=0.0)
        total = total / (divisor(i, oh, height, 0) * divisor(i, ow, width, 1)).to(tl.float32)
        if accumulate:
            total += tl.load(out + item, mask=item < count, other=0.0)
        tl.store(out + item, total, mask=item < count)


@triton.jit
def avgpool_t(i, arena, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """out (C, H, W) = the transpose of the mean, of a (C, OH, OW)."""
    channels, height, width, kernel_h, kernel_w, out_h, out_w = geometry(i)
    g, out = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES
    count, accumulate = channels * height * width * LANES, tl.load(i + ACCUMULATE) != 0
    for first in tl.range(0, count, BLOCK):
        item = first + tl.arange(0, BLOCK)
        pixel, lane = item // LANES, item % LANES
        channel, h, v = pixel // (height * width), pixel // width % height, pixel % width
        total = tl.full([BLOCK], 0.0, tl.float32)
        if accumulate:
            total = tl.load(out + item, mask=item < count, other=0.0)
        for k in tl.range(0, kernel_h * kernel_w):
            oh, ow, exists = window(i, h, v, k, kernel_w)
            there = (item < count) & exists
            at = ((channel * out_h + oh) * out_w + ow) * LANES + lane
            among = tl.where(there, divisor(i, oh, height, 0) * divisor(i, ow, width, 1), 1)
            total += tl.load(g + at, mask=there, other=0.0) / among.to(tl.float32)
        tl.store(out + item, total, mask=item < count)


@triton.jit
def divisor(i, coordinate, extent, axis: tl.constexpr):
    """Elements of a window along an axis: inside the image alone (p15 = 1), or in its padding too, as torch.nn.functional.avg_pool2d."""
    kernel, pad = tl.load(i + P + 4 + axis), tl.load(i + P + 8 + axis)
    start = before(i, coordinate, 0, axis)
    outside = tl.where(tl.load(i + P + 15) == 1, 0, pad)
    end = tl.where(start + kernel < extent + outside, start + kernel, extent + outside)
    return end - tl.where(start > -outside, start, -outside)
