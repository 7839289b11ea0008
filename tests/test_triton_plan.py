"""Which kind of Triton kernel a call gets, and what the plan says about it. Needs neither Triton nor a GPU."""

from __future__ import annotations

from functools import lru_cache

import pytest
from chain_case import SIZES, code_of

import pckernels as pck
from pckernels import triton_pinned
from pckernels.compiler import Compiled
from pckernels.planner import KIB, Limits
from pckernels.rules import Rule
from pckernels.triton_pinned import plan_pinned
from pckernels.triton_planner import PRECISIONS, TABLE, Options, Plan, plan

RULES: dict[str, Rule] = {
    "strict": pck.Strict(2, 0.1),
    "momentum": pck.Strict(2, 0.1, momentum=0.5),
    "fixed": pck.FixedPrediction(2, 0.3, solver="iterate"),
    "red_black": pck.Strict(2, 0.1, sweep="red_black"),
}


@lru_cache
def code(name: str, rule: str) -> Compiled:
    return code_of(name, "relu", RULES[rule])[0]


def planned(name: str, rule: str = "strict", architecture: int = 90, batch: int = 64, **wanted: object) -> Plan:
    found = plan(code(name, rule), batch, Limits.of(architecture), Options(**wanted))  # type: ignore[arg-type]
    assert isinstance(found, Plan), found
    return found


def refused(name: str, rule: str = "strict", architecture: int = 90, **wanted: object) -> str:
    found = plan(code(name, rule), 64, Limits.of(architecture), Options(**wanted))  # type: ignore[arg-type]
    assert isinstance(found, str), found
    return found


def test_narrow_chains_stay_in_registers() -> None:
    assert planned("narrow").variant == "on_chip" and "all nodes in registers" in planned("narrow").reason
    assert planned("narrow", "red_black").variant == "scratch"


@pytest.mark.parametrize("architecture", [80, 90])
def test_no_gpu_has_proved_the_pinned_variant(architecture: int) -> None:
    """So that it is taken where it is asked for alone, and the plan says that it is there."""
    assert not triton_pinned.PROVED
    found = planned("benchmark", architecture=architecture)
    assert found.variant == "scratch"
    assert "a layer of 300 nodes does not fit in registers" in found.reason
    assert f"no GPU of compute capability {architecture / 10:.1f} has proved the pinned variant" in found.reason
    asked = planned("benchmark", architecture=architecture, variant="pinned")
    assert (asked.variant, asked.programs, asked.shape.lanes, asked.shape.warps) == ("pinned", 4, 16, 8)
    assert "pinned variant: 16 samples in each of 4 programs of 8 warps, all nodes in 114.0 KiB of shared memory" in asked.reason
    assert planned("narrow", variant="pinned").variant == "pinned"


def test_where_a_gpu_has_proved_it_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On that architecture, in that precision, for what does not fit in registers, and unless another one is asked for."""
    monkeypatch.setattr(triton_pinned, "PROVED", {"bf16": frozenset({90})})
    assert planned("benchmark", precision="bf16").variant == "pinned"
    assert planned("benchmark", precision="bf16", variant="scratch").variant == "scratch"
    assert planned("benchmark", precision="bf16", architecture=80).variant == "scratch"
    assert planned("benchmark", precision="fp16").variant == "scratch"
    assert planned("narrow", precision="bf16").variant == "on_chip"
    assert planned("benchmark", "red_black", precision="bf16").variant == "scratch"


def test_what_fits_in_shared_memory() -> None:
    """784-300-300-10: with momentum nearly all that sm_80 has; without, not what sm_89 has; 32 samples on sm_90 where errors move."""
    need = "its nodes need 114.0 KiB of shared memory for 16 samples, and a program on this GPU has 99.0"
    assert need in refused("benchmark", architecture=89, variant="pinned")
    assert "154.0 KiB" in planned("benchmark", "momentum", architecture=80, variant="pinned").reason
    assert "need 226.0 KiB" in refused("benchmark", architecture=80, variant="pinned", lanes=32)
    assert planned("benchmark", "fixed", variant="pinned", lanes=32).shape.lanes == 32
    assert planned("benchmark", architecture=89).variant == "scratch" and "has proved" not in planned("benchmark", architecture=89).reason
    for rule, moves in (("strict", (True, False)), ("momentum", (True, True)), ("fixed", (False, False))):
        widest = max(width for width in range(64, 4096, 64) if not isinstance(plan_pinned((width, width, 10), *moves, 227 * KIB), str))
        assert widest == {"strict": 640, "momentum": 448, "fixed": 832}[rule], (rule, widest)


def test_a_refusal_of_the_pinned_variant_is_a_sentence() -> None:
    text = "the pinned variant runs chains of linear layers in shared memory: the nodes of a chain move at once; this rule sweeps red_black"
    assert refused("narrow", "red_black", variant="pinned") == text


def test_the_interpreter_does_not_run_gluon() -> None:
    limits = Limits(80, 0, 2)
    assert "Gluon, which Triton's interpreter does not run" in str(plan(code("benchmark", "strict"), 3, limits, Options(variant="pinned")))
    usual = plan(code("benchmark", "strict"), 3, limits, Options())
    assert isinstance(usual, Plan) and usual.variant == "scratch" and "pinned" not in usual.reason


def test_every_precision_has_a_row_and_a_chunk_that_divides_a_block() -> None:
    assert set(TABLE) == set(PRECISIONS) == set(triton_pinned.CHUNK)
    assert all(4 * triton_pinned.WARP_COLUMNS % chunk == 0 for chunk in triton_pinned.CHUNK.values())
    assert SIZES["benchmark"] == (784, 300, 300, 10)
