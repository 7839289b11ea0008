"""The time of a step as the ledger predicts it: counts on paper, what one of each kind costs, and a prediction that follows the counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pckernels as pck
from pckernels.backends import cuda, selection
from pckernels.benchmarks import ceilings, curves, goals, ledger, models, runner, work
from pckernels.benchmarks.cases import EXACT, strict
from pckernels.benchmarks.probes import AS_MANY, MOST, STEPS, WORTH, Probes
from pckernels.benchmarks.work import BARRIER, INSTRUCTION, MOVED, Kind
from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.instructions import Activation, Instruction, Loss, Op
from pckernels.nn import MLPModule
from pckernels.planner import Limits, Plan

CPU = torch.device("cpu")
SETTING = runner.Setting(CPU, 1, ceilings.Ceilings(1e10, 1e10, 1e11, 1e11))
RELU, TANH = int(Activation.RELU), int(Activation.TANH)
SMALL = models.mlp((12, 20, 16, 3))


def tanh_model() -> models.Model:
    return models.Model("tanh", lambda: MLPModule((12, 20, 16, 3), "tanh"), (12,), (3,))


def code_of(model: models.Model, rule: pck.rules.Rule, batch: int) -> Compiled:
    module, (x, _) = model.build(), model.data(batch)
    code = selection.code_for(pck.PCNetwork(module, rule, **model.pc).trace(x), rule.dynamics, batch)
    assert isinstance(code, Compiled), code
    return code


# Counts


def test_a_step_of_the_perceptron_is_counted_on_paper() -> None:
    """Gram form: W2 W2^T forwards, the readout in both directions; the operands of every other instruction by hand."""
    found = work.work(code_of(models.mlp(), strict(20), 64), 64)
    assert found[Kind(Op.LINEAR, (1, 300, 300))] == 64 * 300 * 300
    assert found[Kind(Op.LINEAR, (1, 300, 10))] == found[Kind(Op.LINEAR_T, (1, 300, 10))] == 64 * 300 * 10
    # f' of the error: error, z, dz, mu -> one; two moves of v from v, eps, feedback; change of f from z, dz, mu; eps = v - mu; two
    # energies, one of them a product of two arrays; the loss from mu, its change, the target
    assert found[MOVED] == 64 * (300 * (5 + 2 * 4 + 4 + 3 + 1 + 2) + 10 * 4)
    assert found[Kind(Op.ACT_GRAD, (RELU,))] == found[Kind(Op.ACT_CHANGE, (RELU,))] == 64 * 300
    assert found[Kind(Op.NORM)] == 64 * 2 * 300
    assert found[Kind(Op.LOSS, (int(Loss.SQUARED_ERROR), 0))] == 64 * 10
    assert found[INSTRUCTION] == 8 and 1 <= found[BARRIER] <= 11


def test_transcendental_functions_are_counted_by_kind() -> None:
    found = work.work(code_of(tanh_model(), strict(20), 4), 4)
    changes = {kind.p[0]: count for kind, count in found.items() if kind.op is Op.ACT_CHANGE}
    assert changes == {TANH: 4 * 16}  # the first layer's input is clamped
    assert not [kind for kind in found if kind.op in (Op.ACT_CHANGE, Op.ACT_GRAD) and kind.p[0] == RELU]


def test_windows_of_a_pooling_are_counted() -> None:
    found = work.work(code_of(models.CNN, strict(20), 2), 2)
    pools = {kind.op: count for kind, count in found.items() if kind.op in ledger.POOLS}
    assert pools == dict.fromkeys((Op.MAXPOOL_CHANGE, Op.MAXPOOL_GRAD), 2 * 6 * 14 * 14 * 4)
    assert sum(count for kind, count in found.items() if kind.op in ledger.CONVOLUTIONS) == 2 * 2 * 16 * 10 * 10 * 6 * 25


def test_a_copy_moves_what_its_blocks_hold() -> None:
    copy = Instruction(Op.COPY, out=0, a=64, p=(3, 5, 8, 8), f=(1.0,))
    assert ledger.arena_elements(copy) == 2 * 15
    assert ledger.arena_elements(replace(copy, accumulate=True)) == 3 * 15
    assert ledger.arena_elements(Instruction(Op.SUM_LEARN, a=0, slot=0, p=(1, 4, 9))) == 36


def test_a_sweep_has_no_steps() -> None:
    assert not work.work(code_of(SMALL, EXACT, 4), 4)


# Probes


@pytest.mark.parametrize("model", [models.mlp(), models.CNN, tanh_model(), models.lstm(8, 3)], ids=lambda model: model.name)
def test_a_probe_executes_as_many_units_as_it_says(model: models.Model) -> None:
    """What a probe states by itself is what the ledger counts in its code: neither can be wrong alone."""
    batch = 4
    found = Probes.of(code_of(model, strict(4), batch), batch, CPU)
    assert {probe.kind for probe in found.probes} >= set(work.work(found.compiled, batch))
    for probe in found.probes:
        counted, times = work.work(found.code(probe, STEPS[0]), batch), probe.repeated(batch)
        expected = times if probe.kind in (INSTRUCTION, BARRIER) else batch * times * probe.units
        assert counted[probe.kind] == expected, probe.name
        if probe.moves:
            assert counted[MOVED] == batch * times * probe.moves, probe.name


def test_a_probe_is_repeated_until_it_can_be_measured() -> None:
    found = {probe.kind: probe for probe in Probes.of(code_of(models.mlp(), strict(4), 64), 64, CPU).probes}
    assert found[INSTRUCTION].repeated(64) == MOST
    wide = found[Kind(Op.LINEAR_T, (1, 300, 300))]
    assert wide.repeated(64) == round(WORTH / (64 * 300 * 300)) and wide.repeated(10**6) == 1
    assert found[MOVED].repeated(500) == round(WORTH / (500 * found[MOVED].units * AS_MANY)) > 1


def test_the_engine_executes_every_probe() -> None:
    found = Probes.of(code_of(models.CNN, strict(2), 2), 2, CPU)
    for run in found.runs().values():
        run()


def test_the_cost_of_a_unit_is_what_its_probe_takes_beside_the_others() -> None:
    """Times made of known costs give the costs back."""
    batch, costs = 64, {INSTRUCTION: 2e-5, BARRIER: 3e-5, MOVED: 1e-7}
    found = Probes.of(code_of(models.mlp(), strict(4), batch), batch, CPU)
    for k, probe in enumerate(found.probes):
        costs.setdefault(probe.kind, (k + 1) * 1e-8)
    assert found.costs(times_of(found, costs)) == pytest.approx(costs)


def times_of(found: Probes, costs: dict[Kind, float]) -> dict[str, list[float]]:
    """What the probes would take, by counts of their own."""
    times = {}
    for probe in found.probes:
        once = costs[BARRIER] * sum(i.barrier for i in probe.instructions)
        if probe.before:
            once += costs[INSTRUCTION] + found.batch * probe.moves * costs[MOVED]
        if probe.kind in (INSTRUCTION, BARRIER):
            once += costs[INSTRUCTION]
        elif probe.instruction.op in work.SHAPED:
            once += found.batch * probe.units * costs[probe.kind]
        else:
            own = probe.units * costs[probe.kind] if probe.kind != MOVED else 0.0
            moves = probe.units if probe.kind == MOVED else probe.moves
            once += costs[INSTRUCTION] + found.batch * (own + moves * costs[MOVED])
        for steps in STEPS:
            times[f"{probe.name}: {steps}"] = [5.0 + steps * probe.repeated(found.batch) * once]
    return times


def test_in_a_cluster_what_a_product_reads_is_written_before_it() -> None:
    """So that the blocks exchange it each time; what writing it takes is taken off."""
    code = code_of(SMALL, strict(3), 3)
    plan = cuda.plan(code.code, 3, Limits.of(90, 4), tier="cluster")
    assert isinstance(plan, Plan)
    found = Probes(code, 3, CPU, plan)
    products = [probe for probe in found.probes if probe.kind.op in ledger.LINEAR]
    assert products and all(len(probe.before) == 1 and probe.before[0].out == probe.instruction.a for probe in products)
    assert not any(probe.before for probe in Probes(code, 3, CPU, replace(plan, tier="stream")).probes)
    costs = {INSTRUCTION: 2e-5, BARRIER: 3e-5, MOVED: 1e-7}
    costs = {probe.kind: costs.get(probe.kind, 1e-8) for probe in found.probes}
    assert found.costs(times_of(found, costs)) == pytest.approx(costs)


# The prediction


@pytest.fixture
def priced() -> tuple[Probes, dict[str, list[float]]]:
    found = Probes.of(code_of(models.mlp(), strict(20), 64), 64, CPU)
    return found, times_of(found, {probe.kind: 1e-6 for probe in found.probes})


def test_the_prediction_is_each_count_times_its_cost(priced: Any) -> None:
    found, times = priced
    predicted = curves.predicted(found, times)
    assert predicted["predicted_ms_a_step"] == pytest.approx(1e-6 * sum(work.work(found.compiled, 64).values()))
    assert sum(part["ms"] for part in predicted["parts"]) == pytest.approx(predicted["predicted_ms_a_step"])


@pytest.mark.parametrize("count", ["multiply_adds", "arena_elements"])
def test_a_wrong_count_of_the_ledger_moves_the_prediction(priced: Any, monkeypatch: pytest.MonkeyPatch, count: str) -> None:
    found, times = priced
    right = curves.predicted(found, times)
    share = sum(part["ms"] for part in right["parts"] if part["what"].startswith("linear" if count == "multiply_adds" else "elements"))
    counted = getattr(ledger, count)
    monkeypatch.setattr(ledger, count, lambda i: 2 * counted(i))
    wrong = curves.predicted(found, times)
    assert wrong["predicted_ms_a_step"] - right["predicted_ms_a_step"] == pytest.approx(share)
    assert share > 0.01 * right["predicted_ms_a_step"]


def test_a_slope_is_measured_and_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    row = curves.slope(curves.Slope(SMALL, strict, (2, 4, 6)), SETTING, 0.05)
    assert set(row["ms"]) == {"2", "4", "6"} and row["rule"] == "strict" and row["predicted_ms_a_step"] > 0
    monkeypatch.setattr(Probes, "of", lambda *_: (_ for _ in ()).throw(Unsupported("there is no engine")))
    assert curves.slope(curves.Slope(SMALL, strict, (2, 4)), SETTING, 0.05)["not_measured"] == "there is no engine"


def test_a_line_and_what_lies_off_it() -> None:
    straight = curves.line_through({10: 3.0, 20: 5.0, 40: 9.0})
    assert straight["ms_a_step"] == pytest.approx(0.2) and straight["bend"] == pytest.approx(0.0, abs=1e-12)
    assert curves.line_through({10: 3.0, 20: 6.0, 40: 9.0})["bend"] > 0.1


@pytest.mark.parametrize(
    ("measured", "bend", "met"),
    [(1.0, 0.0, True), (1.19, 0.0, True), (0.81, 0.04, True), (1.21, 0.0, False), (0.79, 0.0, False), (1.0, 0.06, False)],
)
def test_a_slope_is_met_within_a_fifth_if_it_is_straight(measured: float, bend: float, met: bool) -> None:
    slope = {
        "model": "m",
        "batch": 1,
        "rule": "strict",
        "ms_a_step": measured,
        "predicted_ms_a_step": 1.0,
        "floor_ms_a_step": 0.5,
        "bend": bend,
    }
    record = {"suite": "cpu", "cases": [], "left_out": [], "curves": {"slopes": [slope, {**slope, "not_measured": "no engine"}]}}
    found, missing = goals.reached(record)
    assert found.met is met and found.floor == 0.5
    assert missing.met is None and missing.verdict == "not measured: no engine"
