"""Every Triton kernel, compiled without a GPU for each architecture: within a committed budget, on the units that it should run on."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import util
from pathlib import Path

import oldest_triton
import ptx
import pytest
from pckernels.triton import ahead_of_time
from pckernels.triton.ahead_of_time import Build, Result

from pckernels.triton_pinned import SUM_BYTES, Plan, plan_pinned

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = util.find_spec("triton") is not None
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
    assert ahead_of_time.complaints(found, ahead_of_time.read_budget(ahead_of_time.release())) == []
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


PLANNED = {
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "fp16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
}


def builds_of(kernel: str) -> list[Build]:
    return [build for build in ahead_of_time.builds() if build.name.split()[0] == kernel] if INSTALLED else []


CHAINS, PINNED = builds_of("relax_mlp"), builds_of("relax_mlp_pinned")


@pytest.mark.parametrize("build", CHAINS, ids=lambda build: build.name)
@pytest.mark.parametrize("architecture", list(ahead_of_time.ARCHITECTURES))
def test_a_chain_stays_on_the_chip(build: Build, architecture: str, compiled: Results) -> None:
    """In the loop over steps: products on the units that were planned for, and of global memory nothing but weights, where registers do
    not hold them, and energies."""
    text = compiled[f"{build.name} {architecture}"].ptx
    of = ptx.sources(text, ptx.parameters(build.kernel.arg_names, build.signature))
    (steps,) = [loop for loop in ptx.loops(text) if any(access.store for access in ptx.accesses(loop, of))]
    products = set(re.findall(r"\b(?:wg)?mma\.[\w.]+", "\n".join(steps)))
    assert products == ({PLANNED[build.constants["PRECISION"]]} if build.mma else set())

    layers = len(build.constants["WIDTHS"])
    found = ptx.accesses(steps, of)
    loaded = {argument for access in found if not access.store for argument in access.arguments}
    assert loaded == (set() if build.constants["HELD"] else {f"weights[{k}]" for k in range(1, layers)})
    stored = [access.arguments for access in found if access.store]
    # One number for each layer; under fixed prediction the loss stays as it was.
    assert stored == [{"energies"}] * (layers if build.constants["VALUES_MOVE"] else layers - 1)


@pytest.mark.parametrize("build", PINNED, ids=lambda build: build.name)
@pytest.mark.parametrize("architecture", list(ahead_of_time.ARCHITECTURES))
def test_a_pinned_chain_stays_in_shared_memory(build: Build, architecture: str, compiled: Results) -> None:
    """In the loop over steps: of global memory nothing but weights, energies and once the feed-forward losses. In the loops of products no
    barrier, and nothing stored: a warp reads what it multiplies at its own pace."""
    result = compiled[f"{build.name} {architecture}"]
    of = ptx.sources(result.ptx, ptx.parameters(build.kernel.arg_names, build.signature))
    (steps,) = [loop for loop in ptx.loops(result.ptx) if any("energies" in access.arguments for access in ptx.accesses(loop, of))]
    products = set(re.findall(r"\b(?:wg)?mma\.[\w.]+", "\n".join(steps)))
    assert products == ({PLANNED[build.constants["PRECISION"]]} if build.mma else set())

    strict, layers = build.constants["VALUES_MOVE"], len(build.constants["WIDTHS"])
    found = ptx.accesses(steps, of)
    assert set().union(*(a.arguments for a in found if not a.store)) == {f"weights[{k}]" for k in range(1, layers)}
    stored = [name for access in found if access.store for name in access.arguments]
    assert set(stored) == ({"energies", "losses"} if strict else {"energies"})
    assert stored.count("energies") == (layers if strict else layers - 1)

    free = [loop for loop in map("\n".join, ptx.innermost(steps)) if "ld.global" in loop and not re.search(r"\bst\.|\bbar\.", loop)]
    widths, columns = build.constants["WIDTHS"], build.constants["COLUMNS"]
    read = [*widths[1:], *(widths[:-1] if strict else ())]  # by the feedback, and by the predictions
    assert len(free) == sum(width > columns for width in read)  # one of a single block is no loop


@pytest.mark.parametrize("build", PINNED, ids=lambda build: build.name)
@pytest.mark.parametrize("architecture", list(ahead_of_time.ARCHITECTURES))
def test_a_pinned_chain_takes_the_shared_memory_of_its_plan(build: Build, architecture: str, compiled: Results) -> None:
    strict = build.constants["VALUES_MOVE"]
    plan = plan_pinned(build.constants["WIDTHS"], strict, build.constants["MOMENTUM"], ahead_of_time.SHARED_BYTES[architecture])
    assert isinstance(plan, Plan)
    taken = compiled[f"{build.name} {architecture}"].resources["shared"]
    assert plan.shared_bytes - SUM_BYTES < taken <= plan.shared_bytes


LOOP = """
  ld.param.b64 %rd1, [k_param_1];
  ld.param.b64 %rd2, [k_param_0];
  ld.global.b32 %r1, [%rd2];
$L__BB0_1: // the loop over steps
  mad.wide.s32 %rd3, %r1, 4, %rd1;
$L__BB0_2:
  @%p1 ld.global.v2.b32 { %r2, %r3 }, [ %rd3 + 16 ];
  @%p2 bra $L__BB0_2;
  mov.b64 %rd4, %rd3;
  @!%p3 bra $L__BB0_3;
  cp.async.cg.shared.global [ %r4 + 0 ], [ %rd2 + 0 ], 0x10, %r5;
$L__BB0_3:
  st.shared.b32 [ %r4 ], %r2;
  st.global.b64 [ %rd4 + 0 ], { %rd9 };
  bra.uni $L__BB0_1;
  st.global.b32 [%rd2], %r1;
"""


def test_what_a_loop_touches_is_found() -> None:
    names = ptx.parameters(["a", "N", "b"], {"a": "*fp32", "b": ("*fp32",)})
    (loop,) = ptx.loops(LOOP)
    found = ptx.accesses(loop, ptx.sources(LOOP, names))
    assert [(access.store, set(access.arguments)) for access in found] == [(False, {"b[0]"}), (False, {"a"}), (True, {"b[0]"})]
    with pytest.raises(ValueError, match="whose memory is this"):
        ptx.accesses(["st.global.b32 [%rd8], %r1;"], {})
    with pytest.raises(ValueError, match="which memory does this touch"):
        ptx.accesses(["st.b32 [%rd8], %r1;"], {})


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


def test_the_oldest_and_the_pinned_triton_have_budgets_of_the_same_rows() -> None:
    """This file runs with the one that constraints.txt pins; oldest_triton.py runs it with the other."""
    pytest.importorskip("triton", reason="Triton is not installed", exc_type=ImportError)
    names = {build.name for build in ahead_of_time.builds()}
    pinned = re.search(r"^triton==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    for release in (pinned[1], oldest_triton.oldest()):
        rows = ahead_of_time.read_budget(release)
        assert rows.keys() == {f"{name} {architecture}" for name in names for architecture in ahead_of_time.ARCHITECTURES}, release


def test_a_triton_without_a_budget_is_told_so() -> None:
    with pytest.raises(ValueError, match=r"has rows for Triton 3.6 and 3.9, and none for 3.1. Install one of these, or look at what"):
        ahead_of_time.read_budget("3.1")


def test_a_budget_widens_and_forgets_kernels_that_are_gone() -> None:
    before = {"a sm_80": {"registers": 40, "shared": 100}, "gone sm_80": {"registers": 8, "shared": 0}}
    found = {"a sm_80": {"registers": 33, "stack": 0, "shared": 300}, "b sm_90": {"registers": 17, "stack": 0, "shared": 0}}
    wanted = {"a sm_80": {"registers": 40, "shared": 300}, "b sm_90": {"registers": 24, "shared": 0}}
    assert ahead_of_time.widened(before, found, ["a", "b"]) == wanted
