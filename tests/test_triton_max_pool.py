"""Maxima of windows side by side: their change and the way back, against PyTorch's passes. In the interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from fast_interpreter import install
from torch import Tensor
from torch.nn import functional as F
from triton_case import DEVICE, require_a_way_to_run

from pckernels import tensor_operations as operations
from pckernels.interpreter import PoolShape

require_a_way_to_run()

from pckernels.triton import max_pool  # noqa: E402

if DEVICE == "cpu":
    install()

SHAPES = [((2, 2), (6, 8)), ((2, 2), (7, 5)), ((3, 2), (10, 9)), ((1, 3), (2, 11)), ((4, 4), (4, 4))]  # windows, images; some are left over


def case(kernel: tuple[int, int], size: tuple[int, int], batch: int = 3, channels: int = 5) -> tuple[PoolShape, Tensor, Tensor, Tensor]:
    """Geometry, input, its change, and its maxima; some elements are equal, and one is NaN."""
    x = torch.randn(batch, channels, *size).mul(2).round().div(2)
    dx = torch.randn_like(x).mul(2).round().div(4)
    dx[-1, -1, 0, 0] = float("nan")
    m = F.max_pool2d(x, kernel)
    shape = PoolShape([channels, *size, 0, *kernel, *kernel, 0, 0, 1, 1, 0, *m.shape[2:], 0])
    return shape, x.flatten(1), dx.flatten(1), m.flatten(1)


def sizes(shape: PoolShape) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    return (shape.height, shape.width), (shape.out_h, shape.out_w), shape.kernel


@pytest.mark.parametrize(("kernel", "size"), SHAPES)
def test_maxima_change(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    """Bit for bit, places too: the first of equals."""
    shape, *inputs = case(kernel, size)
    values, places = operations.maxima_change(shape, *inputs)
    change = torch.full_like(values, float("nan"), device=DEVICE)
    where = torch.full_like(places, -7, device=DEVICE)
    max_pool.maxima_change(*sizes(shape), *(tensor.to(DEVICE) for tensor in inputs), change, where)
    assert torch.equal(change.cpu().nan_to_num(99.0), values.nan_to_num(99.0)) and values.isnan().any()
    assert torch.equal(where.cpu(), places)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("kernel", "size"), SHAPES)
def test_maxima_feedback(kernel: tuple[int, int], size: tuple[int, int], adds: bool) -> None:
    shape, x, dx, m = case(kernel, size)
    _, places = operations.maxima_change(shape, x, dx.nan_to_num(0.0), m)
    g, before = torch.randn_like(m), torch.randn_like(x)
    wanted = operations.maxima_feedback(shape, g, places) + (before if adds else 0.0)
    found = (before if adds else torch.full_like(before, float("nan"))).to(DEVICE)
    max_pool.maxima_feedback(*sizes(shape), g.to(DEVICE), places.to(DEVICE), found, adds)
    assert torch.equal(found.cpu(), wanted)


def test_more_than_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(max_pool, "BLOCK", 16)
    test_maxima_change((2, 2), (7, 5))
    test_maxima_feedback((2, 2), (7, 5), True)


def test_nothing_is_done_for_an_empty_batch() -> None:
    shape, x, dx, m = (value[:0].to(DEVICE) if isinstance(value, Tensor) else value for value in case((2, 2), (4, 4)))
    max_pool.maxima_change(*sizes(shape), x, dx, m, m, m.long())
    max_pool.maxima_feedback(*sizes(shape), m, m.long(), x, False)
