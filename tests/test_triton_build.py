"""Every Triton kernel, compiled without a GPU for each architecture: within a committed budget, on the units that it should run on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import pytest
from pckernels.triton import ahead_of_time
from pckernels.triton.ahead_of_time import Result

Results = dict[str, Result]

pytestmark = [pytest.mark.timeout(1200), pytest.mark.xdist_group("triton")]  # compilers, on a busy machine; once


@pytest.fixture(scope="module")
def compiled() -> Results:
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing")
    return ahead_of_time.compile_all()


def test_every_kernel_is_within_its_budget(compiled: Results, show: Callable[[str], None]) -> None:
    found = {key: result.resources for key, result in compiled.items()}
    show(ahead_of_time.table(found))
    assert ahead_of_time.complaints(found, ahead_of_time.read_budget()) == []
    assert len(found) == len(ahead_of_time.ARCHITECTURES) * len(list(ahead_of_time.builds()))


def test_tensor_cores_are_used_where_they_should_be(compiled: Results) -> None:
    seen = set()
    for build in ahead_of_time.builds():
        for architecture in ahead_of_time.ARCHITECTURES:
            mma = re.findall(r"\bw?g?mma(?:\.\w+)*", compiled[f"{build.name} {architecture}"].ptx)
            if build.mma is not None:
                assert bool(mma) is build.mma, (build.name, architecture)
                seen.add(build.mma)
    assert seen == {True, False}


def test_what_is_over_budget_is_found() -> None:
    usage = "Function k:\n  REG:40 STACK:8 SHARED:512 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
    assert ahead_of_time.parsed(usage) == {"registers": 40, "stack": 8}
    found = {"slow sm_80": {"registers": 40, "stack": 8, "shared": 200_000}, "loose sm_90": {"registers": 1, "stack": 16, "shared": 0}}
    row = {"registers": 39, "shared": 200_000}
    budget = {"slow sm_80": row, "loose sm_90": {"registers": 8, "stack": 16, "shared": 0}, "gone sm_80": row}
    assert ahead_of_time.complaints(found, budget) == [
        "gone sm_80 has a budget and is not compiled.",
        "slow sm_80 takes 200000 of shared; the chip has 166912.",
        "slow sm_80 takes 40 of registers; its budget is 39.",
        "slow sm_80 takes 8 of stack; its budget is 0.",
    ]
    assert ahead_of_time.complaints({"loose sm_90": found["loose sm_90"]}, budget, ["loose"]) == []
    assert "slow sm_80 has no row in budget.json." in ahead_of_time.complaints(found, {})


def test_a_budget_widens_and_forgets_kernels_that_are_gone() -> None:
    before = {"a sm_80": {"registers": 40, "shared": 100}, "gone sm_80": {"registers": 8, "shared": 0}}
    found = {"a sm_80": {"registers": 33, "stack": 0, "shared": 300}, "b sm_90": {"registers": 17, "stack": 0, "shared": 0}}
    wanted = {"a sm_80": {"registers": 40, "shared": 300}, "b sm_90": {"registers": 24, "shared": 0}}
    assert ahead_of_time.widened(before, found, ["a", "b"]) == wanted
