"""What "equal" means in the tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; where the expected norm is 0 the found one must be 0 too (else infinite)."""
    difference, size = float((found - expected).norm()), float(expected.norm())
    if size > 0:
        return difference / size
    return 0.0 if difference == 0 else float("inf")


def assert_equal(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(found.detach(), expected.detach())
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def assert_all_equal(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """The same names, and every tensor within the tolerance of its own norm."""
    assert set(found) == set(expected), f"names differ: {sorted(set(found) ^ set(expected))}"
    for name, value in expected.items():
        one = found[name]
        assert one is not None, f"{name} is None"
        assert_equal(one, value, tolerance, name)


def assert_all_equal_up_to_cancellation(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor], tolerance: float, units: int = 16
) -> None:
    """As above, plus some units of rounding of the largest tensor: random models have gradients that cancel to nothing."""
    assert set(found) == set(expected), f"names differ: {sorted(set(found) ^ set(expected))}"
    rounding = units * torch.finfo(torch.float64).eps * max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        one = found[name]
        assert one is not None, f"{name} is None"
        difference = float((one - value).norm())
        assert difference <= tolerance * float(value.norm()) + rounding, f"{name}: off by {difference:.2e} of {float(value.norm()):.2e}"
