"""Every CUDA kernel, compiled by nvcc for each architecture: registers, spills, stack and shared memory within a committed budget."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"

# nvcc, on a busy machine; once.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("nvcc")]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resources", CUDA / "resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resources = load()
Compiled = tuple[dict[str, dict[str, int]], dict[str, str]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH to compile the CUDA kernels with")
    return resources.compile_all()


def test_every_kernel_is_within_its_budget(compiled: Compiled, show: Callable[[str], None]) -> None:
    found, _ = compiled
    show(resources.table(found))
    assert resources.complaints(found, json.loads(resources.BUDGET.read_text(encoding="utf-8"))) == []
    assert len(found) == len(resources.ARCHITECTURES) * (len(list(CUDA.glob("*.cu"))) - 1)  # all but the launcher


MMA = {
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
}


WGMMA = {
    "wgmma.mma_async.sync.aligned.m64n{}k8.f32.tf32.tf32",
    "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16",
    "wgmma.mma_async.sync.aligned.m64n{}k16.f32.f16.f16",
}


def test_ptx_for_newer_architectures_stops_in_place_of_warpgroup_products(tmp_path: Path) -> None:
    """It has no wgmma, which ptxas would refuse there; the launcher does not launch it."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH to compile the CUDA kernels with")
    target = tmp_path / "tile.ptx"  # not a pipe: nvcc has ptxas read it again
    command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_90", "-ptx", str(CUDA / "tile_wgmma_16.cu"), "-o", str(target)]
    subprocess.run(command, capture_output=True, check=True)
    ptx = target.read_text(encoding="utf-8")
    assert ".entry" in ptx and "trap" in ptx and "mma" not in re.sub(r"\w*execute_tiles\w*", "", ptx)


def test_tensor_cores_are_used_where_they_should_be(compiled: Compiled) -> None:
    _, ptx = compiled
    for name, text in ptx.items():
        assert set(re.findall(r"\bmma\.sync[\w.]+", text)) == (MMA if "_mma" in name else set()), name
        found = set(re.findall(r"wgmma\.mma_async[\w.]+", text))
        assert found == ({kind.format(name.split("_")[-1]) for kind in WGMMA} if "_wgmma" in name else set()), name


def test_the_arena_is_read_as_shared_memory(compiled: Compiled) -> None:
    """The compiler knows where the arena lies. Weights alone, 16 bytes at a time, may be in shared memory or not."""
    _, ptx = compiled
    for name, text in ptx.items():
        if name.startswith(("tile", "cluster")):
            shared, unknown = (len(re.findall(pattern, text)) for pattern in (r"\bld\.shared", r"\bld\.[fsu]\d"))
            assert shared > 100 and unknown <= 20, (name, shared, unknown)


def test_cmake_names_every_kernel() -> None:
    text = (CUDA / "CMakeLists.txt").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{source.name}\b", text) for source in CUDA.glob("*.cu"))


def test_what_is_over_budget_is_found() -> None:
    log = """
ptxas info    : Compiling entry function '_Z4slow' for 'sm_80'
ptxas info    : Function properties for _Z4slow
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 488 bytes cmem[0]
"""
    found = resources.parsed("slow", log)
    assert found == {"slow sm_80": {"stack": 8, "spills": 16, "registers": 40, "shared": 512}}
    warning = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to .. in function '_Z4slow'"
    assert resources.parsed("slow", warning + log)["slow sm_80"]["serialized products"] == 1
    assert "slow sm_80 takes 1 of serialized products; its budget is 0." in resources.complaints(
        resources.parsed("slow", warning + log), {}
    )
    budget = {"slow sm_80": {"registers": 39, "shared": 512}, "gone sm_80": {"registers": 1, "shared": 0}}
    assert sorted(resources.complaints(found, budget)) == [
        "gone sm_80 has a budget and is not compiled.",
        "slow sm_80 takes 16 of spills; its budget is 0.",
        "slow sm_80 takes 40 of registers; its budget is 39.",
        "slow sm_80 takes 8 of stack; its budget is 0.",
    ]
    assert "slow sm_80 has no row in budget.json." in resources.complaints(found, {})
