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
    inputs, outputs, bias_slot = tl.load(i + P + 1), tl.load(i + P + 2), tl.load(i + SLOT2)
    product(i, arena, weights, outputs, inputs, inputs, 1, bias_slot, LANES, ROWS, DEPTH, PRECISION)


@triton.jit
def linear_t(i, arena, weights, LANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """out (p0, K) = a (p0, N) W, W (N, K)."""
    inputs, outputs = tl.load(i + P + 1), tl.load(i + P + 2)
    product(i, arena, weights, inputs, outputs, 1, inputs, -1, LANES, ROWS, DEPTH, PRECISION)


@triton.jit
def product(
    i, arena, weights, rows, depth, row_step, depth_step, bias_slot,
    LANES: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (p0, rows) = a (p0, depth) times the weight, whose rows and depth are so far apart, plus the bias; bias_slot < 0: none."""
    positions, weight = tl.load(i + P), address(weights, tl.load(i + SLOT))
    source, out, accumulate = arena + tl.load(i + A) * LANES, arena + tl.load(i + OUT) * LANES, tl.load(i + ACCUMULATE) != 0
    lane = tl.arange(0, LANES)[None, :]
    blocks = (rows + ROWS - 1) // ROWS
    for unit in tl.range(0, positions * blocks):
        position = unit // blocks
        row = (unit % blocks) * ROWS + tl.arange(0, ROWS)
        x = source + position * depth * LANES
        there = (row < rows)[:, None]
        total = tl.full([ROWS, LANES], 0.0, tl.float32)
        for first in tl.range(0, depth, DEPTH):
            k = first + tl.arange(0, DEPTH)
            w = tl.load(weight + row[:, None] * row_step + k[None, :] * depth_step, mask=there & (k < depth)[None, :], other=0.0)
            total = multiply(w, tl.load(x + k[:, None] * LANES + lane, mask=(k < depth)[:, None], other=0.0), total, PRECISION)
        if bias_slot >= 0:
            total += tl.load(address(weights, bias_slot) + row, mask=row < rows, other=0.0)[:, None]
        target = out + (position * rows + row)[:, None] * LANES + lane
        if accumulate:
            total += tl.load(target, mask=there, other=0.0)
        tl.store(target, total, mask=there)
