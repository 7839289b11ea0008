"""CONV, CONV_T and CONV_LEARN as products over patches that are gathered as they are read. Reference: interpreter.py, _conv, _conv_t,
_conv_learn.

Columns are (pixel, sample) pairs, so that small tiles of samples fill a product too. p = (C, H, W, C_out, kh, kw, sh, sw, ph, pw, dh, dw,
groups, OH, OW); groups come one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .instruction import ACCUMULATE, OUT, SLOT, SLOT2, A, B, C, P, address, factor
from .products import multiply


@triton.jit
def before(i, coordinate, place, axis: tl.constexpr):
    """Where in the image an output's window has its element: coordinate of the output, place in the kernel. axis: 0 height, 1 width."""
    stride, pad, dilation = tl.load(i + P + 6 + axis), tl.load(i + P + 8 + axis), tl.load(i + P + 10 + axis)
    return coordinate * stride - pad + place * dilation


@triton.jit
def behind(i, coordinate, place, axis: tl.constexpr):
    """The output whose window has this pixel at this place, and whether there is one: the opposite of `before`."""
    stride, pad, dilation = tl.load(i + P + 6 + axis), tl.load(i + P + 8 + axis), tl.load(i + P + 10 + axis)
    reach = coordinate + pad - place * dilation
    output = reach // stride
    return output, (reach >= 0) & (output * stride == reach) & (output < tl.load(i + P + 13 + axis))


@triton.jit
def block(unit, blocks, panels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The group, rows and columns of a result that are the unit-th to be computed."""
    row = unit // panels % blocks * ROWS + tl.arange(0, ROWS)
    return unit // panels // blocks, row, (unit % panels) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def conv(i, arena, weights, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out (C_out, OH, OW) = conv(a (C, H, W)) + bias."""
    height, width, kernel_h, kernel_w = tl.load(i + P + 1), tl.load(i + P + 2), tl.load(i + P + 4), tl.load(i + P + 5)
    groups, out_w, size = tl.load(i + P + 12), tl.load(i + P + 14), tl.load(i + P + 13) * tl.load(i + P + 14)
    inputs, outputs = tl.load(i + P) // groups, tl.load(i + P + 3) // groups
    depth, kernel = inputs * kernel_h * kernel_w, kernel_h * kernel_w
    weight, bias_slot = address(weights, tl.load(i + SLOT)), tl.load(i + SLOT2)
    source, target, accumulate = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES, tl.load(i + ACCUMULATE) != 0
    blocks, panels = (outputs + ROWS - 1) // ROWS, (size * LANES + COLUMNS - 1) // COLUMNS
    for unit in tl.range(0, groups * blocks * panels):
        group, row, column = block(unit, blocks, panels, ROWS, COLUMNS)
        pixel, lane = column // LANES, column % LANES
        oh, ow = pixel // out_w, pixel % out_w
        channel = group * outputs + row
        total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        for first in tl.range(0, depth, DEPTH):
            k = first + tl.arange(0, DEPTH)
            w = tl.load(weight + channel[:, None] * depth + k[None, :], mask=(row < outputs)[:, None] & (k < depth)[None, :], other=0.0)
            h = before(i, oh[None, :], (k % kernel // kernel_w)[:, None], 0)
            v = before(i, ow[None, :], (k % kernel_w)[:, None], 1)
            there = (k < depth)[:, None] & (pixel < size)[None, :] & (h >= 0) & (h < height) & (v >= 0) & (v < width)
            at = (((group * inputs + k // kernel)[:, None] * height + h) * width + v) * LANES + lane[None, :]
            total = multiply(w, tl.load(source + at, mask=there, other=0.0), total, PRECISION)
        if bias_slot >= 0:
            total += tl.load(address(weights, bias_slot) + channel, mask=row < outputs, other=0.0)[:, None]
        there = (row < outputs)[:, None] & (pixel < size)[None, :]
        put = target + channel[:, None] * size * LANES + column[None, :]
        if accumulate:
            total += tl.load(put, mask=there, other=0.0)
        tl.store(put, total, mask=there)


@triton.jit
def conv_t(i, arena, weights, LANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out (C, H, W) = the transpose of the convolution, of a (C_out, OH, OW)."""
    width, kernel_h, kernel_w = tl.load(i + P + 2), tl.load(i + P + 4), tl.load(i + P + 5)
    groups, out_w, out_size = tl.load(i + P + 12), tl.load(i + P + 14), tl.load(i + P + 13) * tl.load(i + P + 14)
    inputs, outputs = tl.load(i + P) // groups, tl.load(i + P + 3) // groups
    size, kernel = tl.load(i + P + 1) * width, kernel_h * kernel_w
    depth = outputs * kernel
    weight = address(weights, tl.load(i + SLOT))
    source, target, accumulate = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES, tl.load(i + ACCUMULATE) != 0
    blocks, panels = (inputs + ROWS - 1) // ROWS, (size * LANES + COLUMNS - 1) // COLUMNS
    for unit in tl.range(0, groups * blocks * panels):
        group, row, column = block(unit, blocks, panels, ROWS, COLUMNS)
        pixel, lane = column // LANES, column % LANES
        h, v = pixel // width, pixel % width
        total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        for first in tl.range(0, depth, DEPTH):
            k = first + tl.arange(0, DEPTH)
            channel = group * outputs + k // kernel
            of_weight = (channel * inputs * kernel + k % kernel)[None, :] + row[:, None] * kernel
            w = tl.load(weight + of_weight, mask=(row < inputs)[:, None] & (k < depth)[None, :], other=0.0)
            oh, in_height = behind(i, h[None, :], (k % kernel // kernel_w)[:, None], 0)
            ow, in_width = behind(i, v[None, :], (k % kernel_w)[:, None], 1)
            there = (k < depth)[:, None] & (pixel < size)[None, :] & in_height & in_width
            at = (channel[:, None] * out_size + oh * out_w + ow) * LANES + lane[None, :]
            total = multiply(w, tl.load(source + at, mask=there, other=0.0), total, PRECISION)
        there = (row < inputs)[:, None] & (pixel < size)[None, :]
        put = target + (group * inputs + row)[:, None] * size * LANES + column[None, :]
        if accumulate:
            total += tl.load(put, mask=there, other=0.0)
        tl.store(put, total, mask=there)


@triton.jit
def conv_learn(
    i,
    arena,
    gradient,
    samples,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """gradient (C_out, C / groups, kh, kw) += f0 * sum over samples and output pixels of a (C_out, OH, OW) (b + c) (C, H, W)."""
    height, width, kernel_h, kernel_w = tl.load(i + P + 1), tl.load(i + P + 2), tl.load(i + P + 4), tl.load(i + P + 5)
    groups, out_w, size = tl.load(i + P + 12), tl.load(i + P + 14), tl.load(i + P + 13) * tl.load(i + P + 14)
    inputs, outputs = tl.load(i + P) // groups, tl.load(i + P + 3) // groups
    depth, kernel = inputs * kernel_h * kernel_w, kernel_h * kernel_w
    change = tl.load(i + C)
    changing = tl.where(change >= 0, depth, 0)  # all of it, or none
    error, x, dx = arena + tl.load(i + A) * LANES, arena + tl.load(i + B) * LANES, arena + change * LANES
    blocks, panels = (outputs + ROWS - 1) // ROWS, (depth + COLUMNS - 1) // COLUMNS
    for unit in tl.range(0, groups * blocks * panels):
        group, row, k = block(unit, blocks, panels, ROWS, COLUMNS)
        channel = group * outputs + row
        total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
        for first in tl.range(0, size * LANES, DEPTH):
            item = first + tl.arange(0, DEPTH)
            pixel, lane = item // LANES, item % LANES
            counts = (pixel < size) & (lane < samples)
            g = tl.load(error + channel[:, None] * size * LANES + item[None, :], mask=(row < outputs)[:, None] & counts[None, :], other=0.0)
            h = before(i, (pixel // out_w)[:, None], (k % kernel // kernel_w)[None, :], 0)
            v = before(i, (pixel % out_w)[:, None], (k % kernel_w)[None, :], 1)
            there = counts[:, None] & (k < depth)[None, :] & (h >= 0) & (h < height) & (v >= 0) & (v < width)
            at = (((group * inputs + k // kernel)[None, :] * height + h) * width + v) * LANES + lane[:, None]
            value = tl.load(x + at, mask=there, other=0.0) + tl.load(dx + at, mask=there & (k < changing)[None, :], other=0.0)
            total = multiply(g, value, total, PRECISION)
        there = (row < outputs)[:, None] & (k < depth)[None, :]
        put = gradient + channel[:, None] * depth + k[None, :]
        tl.store(put, tl.load(put, mask=there, other=0.0) + factor(i, 0) * total, mask=there)


@triton.jit
def sum_learn(i, arena, gradient, samples, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """gradient (p1,) += f0 * the sum of a (p0, p1, p2) over samples, p0 and p2."""
    outer, size, inner = tl.load(i + P), tl.load(i + P + 1), tl.load(i + P + 2)
    source = arena + tl.load(i + A) * LANES
    for first in tl.range(0, size, 16):
        row = first + tl.arange(0, 16)
        total = tl.full([16, BLOCK // 16], 0.0, tl.float32)
        for start in tl.range(0, outer * inner * LANES, BLOCK // 16):
            item = start + tl.arange(0, BLOCK // 16)
            place, lane = item // LANES, item % LANES
            there = (row < size)[:, None] & ((place < outer * inner) & (lane < samples))[None, :]
            of_item = (place // inner * size * inner + place % inner) * LANES + lane
            total += tl.load(source + (row * inner * LANES)[:, None] + of_item[None, :], mask=there, other=0.0)
        put = gradient + row
        tl.store(put, tl.load(put, mask=row < size, other=0.0) + factor(i, 0) * tl.sum(total, 1), mask=row < size)
