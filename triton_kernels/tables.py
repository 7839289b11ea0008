"""What surrounds the machine: addresses into its tables, and sums of what its programs left."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build

ADDRESSES = 16  # that a launch of write_addresses takes
BLOCK = 1024  # elements that a program of add_up sums


@triton.jit
def write_addresses(
    table,
    first,
    count,
    a0: tl.int64,
    a1: tl.int64,
    a2: tl.int64,
    a3: tl.int64,
    a4: tl.int64,
    a5: tl.int64,
    a6: tl.int64,
    a7: tl.int64,
    a8: tl.int64,
    a9: tl.int64,
    a10: tl.int64,
    a11: tl.int64,
    a12: tl.int64,
    a13: tl.int64,
    a14: tl.int64,
    a15: tl.int64,
):
    """table[first : first + count] = the addresses. As arguments of a launch they need no copy to the device that would have to wait."""
    k = tl.arange(0, 16)
    low = tl.where(k == 0, a0, tl.where(k == 1, a1, tl.where(k == 2, a2, a3)))
    low = tl.where(k < 4, low, tl.where(k == 4, a4, tl.where(k == 5, a5, tl.where(k == 6, a6, a7))))
    high = tl.where(k == 8, a8, tl.where(k == 9, a9, tl.where(k == 10, a10, a11)))
    high = tl.where(k < 12, high, tl.where(k == 12, a12, tl.where(k == 13, a13, tl.where(k == 14, a14, a15))))
    tl.store(table + first + k, tl.where(k < 8, low, high), mask=k < count)


@triton.jit
def add_up(parts, result, count, stride, size, scale, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """result (size,) = scale * the sum of `count` arrays of parts, `stride` elements apart, in order; ADD: plus what is there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + at, mask=at < size, other=0.0)
    for k in tl.range(1, count):
        total += tl.load(parts + tl.cast(k, tl.int64) * stride + at, mask=at < size, other=0.0)
    total = scale * total
    if ADD:
        total += tl.load(result + at, mask=at < size, other=0.0)
    tl.store(result + at, total, mask=at < size)


def sum_parts(parts: Tensor, result: Tensor, scale: float, add: bool) -> None:
    """result = scale * parts (count, ..) summed over count, in order; `add`: plus what is there."""
    size = result.numel()
    if size:
        add_up[(triton.cdiv(size, BLOCK),)](parts, result, len(parts), parts.stride(0), size, scale, ADD=add, BLOCK=BLOCK)


def builds() -> Iterator[Build]:
    """All kernels of this file."""
    numbers = {"first": "i32", "count": "i32", **{f"a{k}": "i64" for k in range(ADDRESSES)}}
    yield Build("write_addresses", write_addresses, {"table": "*i64", **numbers}, {}, mma=None)
    for kind in ("fp32", "fp64"):
        for add in (False, True):
            signature = {"parts": f"*{kind}", "result": f"*{kind}", "count": "i32", "stride": "i32", "size": "i32", "scale": "fp32"}
            name = f"add_up {kind}{' more' if add else ''}"
            yield Build(name, add_up, signature, {"ADD": add, "BLOCK": BLOCK}, apart=("parts",), mma=None)
