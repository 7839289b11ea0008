"""The truth is a loop in extended precision.

Errors far from the output are tiny, and v - mu loses their leading digits in float64 whoever subtracts. So what is allowed
beside 1e-12 of the extended loop is a few times what the same loop in float64 is off.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from oracle.layers import Array
from oracle.strict import Trajectory

TOLERANCE, SLACK = 1e-12, 8


class Expected:
    """Compares with the extended loop; `plain` is the float64 one. `rounding`: as in compare_all, of errors and gradients."""

    def __init__(self, exact: Trajectory, plain: Trajectory, rounding: float = 0.0):
        self.exact, self.plain, self.rounding = exact, plain, rounding

    def energies(self, found: Tensor) -> None:
        compare(found, np.array(self.exact.energies), np.array(self.plain.energies), "energy")

    def state(self, values: dict[str, Tensor], errors: dict[str, Tensor], t: int) -> None:
        assert set(values) == set(errors) == set(self.exact.errors[t])
        hidden = {name: value for name, value in values.items() if name != "output"}
        compare_all(hidden, self.exact.values[t], self.plain.values[t], f"value at step {t}")
        compare_all(errors, self.exact.errors[t], self.plain.errors[t], f"error at step {t}", self.rounding)

    def gradients(self, found: dict[str, Tensor | None]) -> None:
        compare_all(found, self.exact.gradients, self.plain.gradients, "gradient", self.rounding)


def compare_all(
    found: Mapping[str, Tensor | None], exact: Mapping[str, Array], plain: Mapping[str, Array], what: str, rounding: float = 0.0
) -> None:
    """`rounding`: by how much each may be off besides, where it is 0 as a difference of larger numbers."""
    assert set(found) == set(exact)
    for name, tensor in found.items():
        assert tensor is not None, f"{what} of {name} is None"
        compare(tensor, exact[name], plain[name], f"{what} of {name}", rounding)


def compare(found: Tensor, exact: Array, plain: Array, what: str, rounding: float = 0.0) -> None:
    assert found.shape == exact.shape, what
    error, size = float(np.linalg.norm(found.numpy() - exact)), float(np.linalg.norm(exact))
    allowed = TOLERANCE * size + SLACK * float(np.linalg.norm(plain - exact)) + rounding
    assert error <= allowed, f"{what}: off by {error:.2e} of {size:.2e}, allowed {allowed:.2e}"
