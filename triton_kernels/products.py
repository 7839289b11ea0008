"""LINEAR and LINEAR_T: products with a weight. Reference: interpreter.py, _linear, _linear_t.

The weight stands on the left and samples are columns, so that a product has ROWS rows however few samples a tile has. Tiles are read
by run-time loops. PRECISION is that of the operands; sums are always float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .instruction import ACCUMULATE, OUT, SLOT, SLOT2, A, P, address


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b, with operands rounded to PRECISION: "fp32", "tf32", "fp16" or "bf16"."""
    if PRECISION == "fp16":
        total = tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    elif PRECISION == "bf16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    elif PRECISION == "tf32":
        total = tl.dot(a, b, total, input_precision="tf32")
    else:
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def linear(i, arena, weights, LANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out (p0, N) = a (p0, K) W^T + bias, W (N, K)."""
    positions, inputs, outputs = tl.load(i + P), tl.load(i + P + 1), tl.load(i + P + 2)
    weight, bias_slot = address(weights, tl.load(i + SLOT)), tl.load(i + SLOT2)
    source, out, accumulate = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES, tl.load(i + ACCUMULATE) != 0
    lane = tl.arange(0, LANES)[None, :]
    blocks = (outputs + ROWS - 1) // ROWS
    for unit in tl.range(0, positions * blocks):
        position = unit // blocks
        row = (unit % blocks) * ROWS + tl.arange(0, ROWS)
        x = source + position * inputs * LANES
        there = (row < outputs)[:, None]
        total = tl.full([ROWS, LANES], 0.0, tl.float32)
        for first in tl.range(0, inputs, DEPTH):
            k = first + tl.arange(0, DEPTH)
            w = tl.load(weight + row[:, None] * inputs + k[None, :], mask=there & (k < inputs)[None, :], other=0.0)
            total = multiply(w, tl.load(x + k[:, None] * LANES + lane, mask=(k < inputs)[:, None], other=0.0), total, PRECISION)
        if bias_slot >= 0:
            total += tl.load(address(weights, bias_slot) + row, mask=row < outputs, other=0.0)[:, None]
        target = out + (position * outputs + row)[:, None] * LANES + lane
        if accumulate:
            total += tl.load(target, mask=there, other=0.0)
        tl.store(target, total, mask=there)


@triton.jit
def linear_t(i, arena, weights, LANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out (p0, K) = a (p0, N) W, W (N, K)."""
    positions, inputs, outputs = tl.load(i + P), tl.load(i + P + 1), tl.load(i + P + 2)
    weight = address(weights, tl.load(i + SLOT))
    source, out, accumulate = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES, tl.load(i + ACCUMULATE) != 0
    lane = tl.arange(0, LANES)[None, :]
    blocks = (inputs + ROWS - 1) // ROWS
    for unit in tl.range(0, positions * blocks):
        position = unit // blocks
        row = (unit % blocks) * ROWS + tl.arange(0, ROWS)
        g = source + position * outputs * LANES
        there = (row < inputs)[:, None]
        total = tl.full([ROWS, LANES], 0.0, tl.float32)
        for first in tl.range(0, outputs, DEPTH):
            n = first + tl.arange(0, DEPTH)
            w = tl.load(weight + n[None, :] * inputs + row[:, None], mask=there & (n < outputs)[None, :], other=0.0)
            total = multiply(w, tl.load(g + n[:, None] * LANES + lane, mask=(n < outputs)[:, None], other=0.0), total, PRECISION)
        target = out + (position * inputs + row)[:, None] * LANES + lane
        if accumulate:
            total += tl.load(target, mask=there, other=0.0)
        tl.store(target, total, mask=there)
