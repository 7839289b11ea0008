"""Shared by the tests that run Triton kernels: in the interpreter (TRITON_INTERPRET=1, in a process of their own) or on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def require_a_way_to_run() -> None:
    """Skip the module where kernels can neither be interpreted nor run."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU these tests need TRITON_INTERPRET=1", allow_module_level=True)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||a - b|| / ||b|| in float64; where ||b|| = 0, a must be 0."""
    a, b = found.double().cpu(), wanted.double().cpu()
    assert a.shape == b.shape
    difference, size = (a - b).norm().item(), b.norm().item()
    return difference / size if size else difference
