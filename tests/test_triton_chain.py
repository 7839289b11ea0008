"""relax_mlp, which holds a chain in registers, against the float64 reference: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import rounded_case
import torch
from chain_case import Chosen, assert_as_good, code_of, memory_of, results
from fast_interpreter import install
from triton_case import DEVICE, relative_error, require_a_way_to_run

import pckernels as pck
from pckernels import dispatch, interpreter, triton_chain

require_a_way_to_run()

from pckernels.triton import relax_mlp  # noqa: E402

if DEVICE == "cpu":
    install()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    found = Chosen(relax_mlp.run)
    monkeypatch.setattr(dispatch, "choose", found.choose)
    return found


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan refuses for want of registers is right all the same."""
    for limits in (triton_chain.REGISTERS, triton_chain.WIDEST):
        for precision in limits:
            monkeypatch.setitem(limits, precision, 10_000)


# Every number of steps on the cheapest chain; on the others, which differ in widths alone, some that reach every layer.
STEPS = [("narrow", steps) for steps in (0, 1, 2, 8)] + [(name, 4) for name in ("wide", "widest", "shallow", "two")]


@pytest.mark.parametrize(("name", "steps"), STEPS)
@pytest.mark.parametrize("rule", ["strict", "momentum", "fixed"])
def test_every_rule(name: str, rule: str, steps: int, chosen: Chosen) -> None:
    rules = {
        "strict": pck.Strict(steps, 0.1),
        "momentum": pck.Strict(steps, 0.05, momentum=0.5),
        "fixed": pck.FixedPrediction(steps, 0.3, solver="iterate"),
    }
    assert_as_good(name, "tanh" if name == "narrow" else "relu", rules[rule], 17, device=DEVICE)
    assert chosen.runs == 1


def test_many_steps(chosen: Chosen) -> None:
    assert_as_good("narrow", "sigmoid", pck.Strict(64, 0.1, momentum=0.3), 3, device=DEVICE)


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "gelu", "leaky"])
@pytest.mark.parametrize("rule", [pck.Strict(3, 0.2), pck.FixedPrediction(3, 0.4, solver="iterate")], ids=["strict", "fixed"])
def test_every_activation(activation: str, rule: pck.rules.Rule, chosen: Chosen) -> None:
    assert_as_good("narrow", activation, rule, 5, device=DEVICE)


@pytest.mark.parametrize("batch", [1, 15, 16, 33])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_ragged_batches(batch: int, loss: str, chosen: Chosen) -> None:
    assert_as_good("narrow", "tanh", pck.Strict(3, 0.1), batch, loss, DEVICE)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("rule", [pck.Strict(8, 0.1, momentum=0.5), pck.FixedPrediction(8, 0.3, solver="iterate")], ids=["strict", "fixed"])
@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_rounded_operands(rule: pck.rules.Rule, precision: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, net = code_of("wide", "tanh", rule)
    memory = memory_of(compiled, net, 17, torch.float32, DEVICE)
    plan = relax_mlp.plan_chain
    monkeypatch.setattr(relax_mlp, "plan_chain", lambda *args: dataclasses.replace(plan(*args), held=held))
    relax_mlp.run(compiled, memory, 17, -0.5, precision)
    exact = memory_of(compiled, net, 17, torch.float64)
    rounded_case.execute(compiled.code, exact, 17, -0.5, precision)
    allowed = rounded_case.tolerance(compiled.code, 17, precision)
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected.reshape(ours.shape)) <= allowed


def test_a_call_that_does_not_learn_stores_errors_alone() -> None:
    compiled, net = code_of("narrow", "tanh", pck.Strict(2, 0.1), learn=False)
    memory, exact = memory_of(compiled, net, 5, torch.float32, DEVICE), memory_of(compiled, net, 5, torch.float64)
    relax_mlp.run(compiled, memory, 5, 1.0)
    interpreter.execute(compiled.code, exact, 5)
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected) < 1e-5
