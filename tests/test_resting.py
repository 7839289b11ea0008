"""tolerance= in the graph tier: each sample rests by itself, and what a call then finds is what the reference finds."""

from __future__ import annotations

import re

import pytest
import torch
from test_backends import MODELS, data, networks
from test_graph_tier import found, recording  # noqa: F401
from test_program import interpret

import pckernels as pck
from pckernels import dispatch, tensor_machine
from pckernels.backends import native, selection
from pckernels.instructions import Op
from pckernels.tensor_layout import Stage

RULES = [
    pck.Strict(40, 0.1, tolerance=1e-2),
    pck.Strict(40, 0.1, momentum=0.5, tolerance=1e-2),
    pck.Strict(30, 0.1, sweep="top_down", tolerance=1e-2),
    pck.Strict(30, 0.1, sweep="red_black", momentum=0.3, tolerance=1e-2),
    pck.Strict(30, 0.1, nudge=("centered", 0.4), tolerance=1e-2),
    pck.Strict(6, 0.1, tolerance=1e-9),  # nothing rests
    pck.Strict(1, 0.1, tolerance=3e-2),
    pck.Strict(0, 0.1, tolerance=3e-2),
    pck.Strict(9, 0.1, tolerance=1e9),  # everything rests after a step
]


def both(name: str, rule: pck.rules.Rule, batch: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    x, target = (tensor.double() for tensor in data(name, batch, "squared_error"))
    network, results = networks(name)[0], []
    network.rule, network.loss = rule, "squared_error"
    for network.backend in ("graph", "reference"):
        results.append(found(network, x, target))
    return results[0], results[1]


def assert_equal(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(reference)
    for key, expected in reference.items():
        assert ours[key].shape == expected.shape, key
        torch.testing.assert_close(ours[key], expected, rtol=1e-11, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("name", "rule"), [(name, rule) for name in ("mlp", "skip", "cnn", "lstm") for rule in RULES[:: 4 if name == "lstm" else 1]], ids=str
)
def test_it_is_the_reference(name: str, rule: pck.rules.Rule) -> None:
    assert_equal(*both(name, rule, 9))


@pytest.mark.parametrize("rule", [RULES[0], RULES[3], pck.Relaxed(RULES[0], "learned", derivative=False)], ids=str)
def test_precisions_learn_from_the_last_step_taken(rule: pck.rules.Rule) -> None:
    x, target = (tensor.double() for tensor in data("mlp", 9, "squared_error"))
    network, results = pck.PCNetwork(networks("mlp")[0].module, rule, precision={"0": "learned"}), []
    for network.backend in ("graph", "reference"):
        network.zero_grad()
        network.backward(x, target)
        results.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    assert "pc.log_precision.0" in results[0]
    assert_equal(*results)


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_few_samples(batch: int) -> None:
    assert_equal(*both("mlp", RULES[0], batch))


def test_samples_rest_one_after_the_other() -> None:
    """So that the tests above can tell a sample's own rest from that of all."""
    x, target = (tensor.double() for tensor in data("mlp", 9, "squared_error"))
    network = networks("mlp")[0]
    network.backend = "reference"
    for network.rule in RULES[:4]:
        alone = {len(network.infer(x[b, None], target[b, None]).energy) for b in range(9)}
        assert len(alone) > 2 and max(alone) <= network.rule.dynamics.steps


def test_the_cpu_stops_when_all_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[bool] = []
    step = tensor_machine.Machine.step

    def counted(machine: tensor_machine.Machine, stage: Stage) -> None:
        steps.append(stage.repeats)
        step(machine, stage)

    monkeypatch.setattr(tensor_machine.Machine, "step", counted)
    network = pck.PCNetwork(MODELS["mlp"].build(), pck.Strict(400, 0.1, tolerance=3e-2), backend="graph")
    inference = network.infer(*data("mlp", 5, "squared_error"))
    assert sum(steps) == len(inference.energy) - 1 < 400
    assert "400 steps at most" in inference.plan


def test_replayed_steps_wait_for_nothing(recording: list) -> None:  # noqa: F811
    """All steps run, as on a GPU, where a look would cost more than they do; what rests stands still."""
    module, rule = MODELS["mlp"].build().double(), pck.Strict(60, 0.1, momentum=0.5, tolerance=5e-2)
    network, plain = pck.PCNetwork(module, rule, backend="graph"), pck.PCNetwork(module, rule, backend="reference")
    lengths = set()
    for call in range(4):
        torch.manual_seed(call)
        x, target = torch.randn(5, 7).double(), torch.randn(5, 3).double()
        ours, expected = found(network, x, target), found(plain, x, target)
        assert_equal(ours, expected)
        lengths.add(len(ours["energy"]))
    assert len(lengths) > 1 and max(lengths) < 61
    assert any(recorded.launches for recorded in recording)


@pytest.mark.parametrize("rule", RULES[:4], ids=str)
def test_the_instructions_mean_this(monkeypatch: pytest.MonkeyPatch, rule: pck.rules.Rule) -> None:
    """The interpreter, whose rows lie in an arena; and no Gram form, in which displacements are not what they are compared as."""
    backend = dispatch.Backend(dispatch.Support(True, ""), selection.refusal, lambda call: native.run(call, interpret))
    monkeypatch.setitem(dispatch._BACKENDS, "graph", backend)
    assert_equal(*both("mlp", rule, 9))


def test_it_is_compiled_without_the_gram_form() -> None:
    network = pck.PCNetwork(MODELS["mlp129"].build(), RULES[0])
    graph = network.trace(torch.randn(2, 7))
    code = selection.code_for(graph, RULES[0].dynamics, 10_000)
    plain = selection.code_for(graph, pck.Strict(40, 0.1).dynamics, 10_000)
    assert plain.gram_width and not code.gram_width
    assert {Op.REST, Op.MOVE_OR_REST} <= {instruction.op for instruction in code.code.instructions}


def test_engines_refuse_and_name_who_does_not() -> None:
    module, call = MODELS["mlp"].build(), data("mlp", 3, "squared_error")
    with pytest.raises(pck.Unsupported, match=re.escape('which backend="graph" does, and the reference')):
        pck.PCNetwork(module, RULES[0], backend="host").backward(*call)
    assert 'backend="graph"' in pck.PCNetwork(module, RULES[0]).backward(*call).plan


def test_divergence_is_said_of_the_same_step() -> None:
    complaints: list[str] = []
    for backend in ("graph", "reference"):
        torch.manual_seed(0)
        network = pck.PCNetwork(MODELS["mlp"].build().double(), pck.Strict(200, 5.0, tolerance=1e-3), backend=backend)
        with pytest.raises(pck.InferenceDiverged) as raised:
            network.backward(*(tensor.double() for tensor in data("mlp", 3, "squared_error")))
        complaints.append(str(raised.value))
    assert complaints[0] == complaints[1]


def test_a_deferred_check_is_good_beyond_the_stop() -> None:
    network = pck.PCNetwork(MODELS["mlp"].build(), pck.Strict(100, 0.1, tolerance=3e-2), backend="graph", check="deferred")
    inference = network.backward(*data("mlp", 3, "squared_error"))
    assert len(inference.energy) < 101 and inference.loss.isfinite()
