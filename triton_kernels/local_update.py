"""The local updates of linear weights: gradient (N, K) += coefficient * sum over rows of g^T x, and the sum of g for the bias.

Reference: OuterProduct in pckernels/instructions.py, `_learn` in pckernels/interpreter.py.

The rows (samples times positions) are cut into a fixed number of parts, which depends on the sizes alone; a program sums one part for one
tile of the weight, and tables.py adds the parts up in their order. So there are no atomics, and two runs are equal bit for bit.
g is read transposed from memory: Triton on Hopper has miscompiled a product whose operand is a transposed result of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from pckernels.instructions import ABSENT, OuterProduct

from .ahead_of_time import Build
from .products import multiply
from .tables import sum_parts

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # of operands
OUTPUTS, INPUTS, ROWS = 64, 64, 32  # of a tile
WARPS = 8
PARTS, ROWS_OF_A_PART = 64, 256  # at most so many parts, each of at least so many rows
PROGRAMS = 264  # two for each multiprocessor of an H100: with so many tiles the rows need no parts


@triton.jit
def outer_product(
    g,
    x,
    weight,
    bias,
    rows,
    positions,
    inputs,
    outputs,
    x_stride,
    x_offset,
    part_rows,
    scale,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One tile of scale * g^T x over one part of the rows, into weight[part] (N, K) and bias[part] (N,); ADD: added to what is there.

    g (rows, N); x: of a sample x_stride elements, its rows from x_offset on, K elements each. Grid: tiles of N, tiles of K, parts.
    """
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.program_id(1) * INPUTS + tl.arange(0, INPUTS)
    part = tl.program_id(2)
    begin = part * part_rows
    end = tl.minimum(begin + part_rows, rows)
    of_weight = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    of_bias = tl.zeros((OUTPUTS,), tl.float32)
    for first in tl.range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        places = n[:, None] + row.to(tl.int64)[None, :] * outputs
        errors = tl.load(g + places, mask=(n[:, None] < outputs) & (row[None, :] < end), other=0.0)
        if WEIGHT:
            start = (row // positions).to(tl.int64) * x_stride + (row % positions) * inputs + x_offset
            values = tl.load(x + start[:, None] + k[None, :], mask=(row[:, None] < end) & (k[None, :] < inputs), other=0.0)
            of_weight = multiply(errors, values, of_weight, PRECISION)
        if BIAS:
            of_bias += tl.sum(errors, 1)
    if WEIGHT:
        to = weight + part.to(tl.int64) * outputs * inputs + n.to(tl.int64)[:, None] * inputs + k[None, :]
        _put(to, scale * of_weight, (n[:, None] < outputs) & (k[None, :] < inputs), ADD)
    if BIAS and tl.program_id(1) == 0:
        _put(bias + part.to(tl.int64) * outputs + n, scale * of_bias, n < outputs, ADD)


@triton.jit
def _put(to, value, here, ADD: tl.constexpr):
    if ADD:
        value += tl.load(to, mask=here, other=0.0)
    tl.store(to, value, mask=here)


def learn(
    products: Sequence[OuterProduct], io: Sequence[Tensor], gradients: Sequence[Tensor], batch: int, factor: float, precision: str = "fp32"
) -> None:
    """All that code learns after its tiles: gradients = factor * what its products add up to, or what the loop left, plus that.

    Args:
        products: of the code, in order.
        io: by slot, each (B, elements), contiguous float32.
        gradients: by slot, contiguous float32. The first product of a slot overwrites it, later ones add.
        factor: what every product is multiplied by.
        precision: of the operands, one of PRECISIONS; sums are in float32.
    """
    begun: set[int] = set()
    for product in products:
        g, x = io[product.g_slot], io[product.x_slot]
        slots = (product.weight, product.bias)
        weight, bias = (gradients[slot] if slot != ABSENT else None for slot in slots)
        adds = [slot in begun for slot in slots]
        outer(product, g, x, weight, bias, batch, factor * product.coefficient, adds, precision)
        begun.update(slots)


def outer(
    product: OuterProduct,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    scale: float,
    adds: Sequence[bool],
    precision: str,
) -> None:
    """weight (N, K) = scale * sum of g^T x, bias (N,) = scale * sum of g; where `adds` (of weight, of bias) says so, added."""
    rows, n, k = batch * product.positions, product.outputs, product.inputs
    parts, part_rows = partition(rows, n, k if weight is not None else 0)
    alone = parts == 1 and (weight is None or bias is None or adds[0] == adds[1])
    to = [tensor if alone or tensor is None else tensor.new_empty(parts, tensor.numel()) for tensor in (weight, bias)]
    grid = (triton.cdiv(n, OUTPUTS), triton.cdiv(k, INPUTS) if weight is not None else 1, parts)
    add = alone and adds[0 if weight is not None else 1]
    sizes = (rows, product.positions, k, n, product.x_stride, product.x_offset, part_rows)
    outer_product[grid](
        g,
        x,
        to[0] if to[0] is not None else g,
        to[1] if to[1] is not None else g,
        *sizes,
        scale,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ADD=add,
        PRECISION=precision,
        OUTPUTS=OUTPUTS,
        INPUTS=INPUTS,
        ROWS=ROWS,
        num_warps=WARPS,
    )
    for out, part, added in zip((weight, bias), to, adds, strict=True):
        if not alone and out is not None:
            sum_parts(part, out, 1.0, added)


def partition(rows: int, outputs: int, inputs: int) -> tuple[int, int]:
    """How many parts, and rows of each (a multiple of ROWS): enough programs to fill a GPU, whichever GPU it is."""
    tiles = triton.cdiv(outputs, OUTPUTS) * max(1, triton.cdiv(inputs, INPUTS))
    wanted = max(1, min(PARTS, triton.cdiv(PROGRAMS, tiles), rows // ROWS_OF_A_PART))
    part_rows = triton.cdiv(triton.cdiv(max(1, rows), wanted), ROWS) * ROWS
    return max(1, triton.cdiv(rows, part_rows)), part_rows


def builds() -> Iterator[Build]:
    """The kernel with each precision."""
    pointers = dict.fromkeys(("g", "x", "weight", "bias"), "*fp32")
    integers = dict.fromkeys(("rows", "positions", "inputs", "outputs", "x_stride", "x_offset", "part_rows"), "i32")
    tile = {"OUTPUTS": OUTPUTS, "INPUTS": INPUTS, "ROWS": ROWS}
    for precision in PRECISIONS:
        constants = {"WEIGHT": True, "BIAS": True, "ADD": False, "PRECISION": precision, **tile}
        signature = {**pointers, **integers, "scale": "fp32"}
        yield Build(f"local_update {precision}", outer_product, signature, constants, {"num_warps": WARPS}, mma=precision != "fp32")
