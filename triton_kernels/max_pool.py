"""Maxima of windows that lie side by side: how they change with their input, and where errors go back; each in one launch.

PyTorch takes an addition, a pooling, and copies for the first, and for the second zeros and a scatter: several passes over the larger side.
Here the input is read once, and the error written once. Reference: `maxima_change` and `maxima_feedback` of pckernels/tensor_operations.py.

An image is (height, width), one for each sample and channel; windows of (KH, KW) lie side by side from its corner on, and what is left
over at its far sides belongs to none. A place is the number of an element of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build

BLOCK = 1024  # elements that a program handles: of the maxima, or of the image
WARPS = 4
MOST = 2**31 - BLOCK  # elements of a tensor: their numbers are int32, since a division in 64 bits takes longer than the memory


@triton.jit
def change_of_maxima(
    x, dx, m, change, places, n, width, area, out_width, out_area, KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr
):
    """change = max_j((x_j - m) + dx_j) over each of n windows, and its place: the first, as PyTorch has it, or that of a NaN."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    image, inside = at // out_area, at % out_area
    corner = inside // out_width * KH * width + inside % out_width * KW
    largest = tl.load(m + at, mask=here, other=0.0)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = corner
    for j in tl.static_range(KH * KW):
        there = corner + j // KW * width + j % KW
        from_here = image * area + there
        value = tl.load(x + from_here, mask=here, other=0.0) - largest + tl.load(dx + from_here, mask=here, other=0.0)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        place = tl.where(better, there, place)
    tl.store(change + at, best, mask=here)
    tl.store(places + at, place.to(tl.int64), mask=here)


@triton.jit
def feedback_of_maxima(
    g, places, feedback, n, width, area, out_width, out_height, KH: tl.constexpr, KW: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    """feedback = g of the window that has its maximum here, and 0 elsewhere, for each of n elements of images; ADDS: plus what is there."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < n
    image, inside = at // area, at % area
    row, column = inside // width // KH, inside % width // KW
    read = here & (row < out_height) & (column < out_width)
    window = image * (out_height * out_width) + row * out_width + column
    place = tl.load(places + window, mask=read, other=-1)
    value = tl.where(place == inside, tl.load(g + window, mask=read, other=0.0), 0.0)
    if ADDS:
        value += tl.load(feedback + at, mask=here, other=0.0)
    tl.store(feedback + at, value, mask=here)


def maxima_change(
    size: Sequence[int], out_size: Sequence[int], kernel: Sequence[int], x: Tensor, dx: Tensor, m: Tensor, change: Tensor, places: Tensor
) -> None:
    """Write `change` and `places`, on the current stream.

    Args:
        size, out_size: (height, width) of an image, and of its maxima; kernel: of a window.
        x, dx: (B, channels * height * width), float32 and contiguous, as all are: the input of the pooling, and its change.
        m, change: (B, channels * out height * out width); m are the maxima of x. places: the same in int64.

    A tensor has MOST elements at most, here and in `maxima_feedback`.
    """
    if m.numel():
        grid = (triton.cdiv(m.numel(), BLOCK),)
        numbers = (m.numel(), size[1], size[0] * size[1], out_size[1], out_size[0] * out_size[1])
        change_of_maxima[grid](x, dx, m, change, places, *numbers, KH=kernel[0], KW=kernel[1], BLOCK=BLOCK, num_warps=WARPS)


def maxima_feedback(
    size: Sequence[int], out_size: Sequence[int], kernel: Sequence[int], g: Tensor, places: Tensor, feedback: Tensor, adds: bool
) -> None:
    """Write `feedback` (B, channels * height * width) from g and places, which are as in `maxima_change`; `adds`: plus what is there."""
    n = feedback.numel()
    if n:
        numbers = (n, size[1], size[0] * size[1], out_size[1], out_size[0])
        feedback_of_maxima[(triton.cdiv(n, BLOCK),)](
            g, places, feedback, *numbers, KH=kernel[0], KW=kernel[1], ADDS=adds, BLOCK=BLOCK, num_warps=WARPS
        )


def builds() -> Iterator[Build]:
    """Windows of (2, 2), which nearly all are, and of (3, 3)."""
    tensors = dict.fromkeys(("x", "dx", "m", "change", "g", "feedback"), "*fp32") | {"places": "*i64"}
    numbers = dict.fromkeys(("n", "width", "area", "out_width", "out_area", "out_height"), "i32")
    for size in (2, 3):
        window = {"KH": size, "KW": size, "BLOCK": BLOCK}
        for name, kernel, constants in (("change", change_of_maxima, window), ("feedback", feedback_of_maxima, {**window, "ADDS": True})):
            signature = {argument: kind for argument, kind in {**tensors, **numbers}.items() if argument in kernel.arg_names}
            yield Build(f"max_pool {name} {size}", kernel, signature, constants, {"num_warps": WARPS}, multiples=("n",))
