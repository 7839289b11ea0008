"""pckernels without Triton: all of it but the triton backend, which says why it is absent."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = None  # as if it were not installed: finding and importing it fail
import torch
import pckernels as pck
support = pck.backends()["triton"]
assert (support.ok, support.reason) == (False, "Triton is not installed: `pip install triton`"), support
x, target = torch.randn(3, 4), torch.randn(3, 2)
try:
    pck.PCNetwork(torch.nn.Linear(4, 2), pck.Strict(2, 0.1), backend="triton")
except pck.Unsupported as error:
    print(error)
else:
    raise AssertionError("nothing was refused")
pck.PCNetwork(torch.nn.Linear(4, 2), pck.Strict(2, 0.1)).backward(x, target)
import pckernels.triton, pckernels.triton.ahead_of_time, pckernels.triton_chain, pckernels.triton_pinned, pckernels.triton_planner
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_pckernels_works_without_triton() -> None:
    assert "backend 'triton' is not available: Triton is not installed: `pip install triton`." in run(CODE)


def test_importing_pckernels_imports_no_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import pckernels; print(before or 'triton' not in sys.modules)"
    assert run(code) == "True\n"
