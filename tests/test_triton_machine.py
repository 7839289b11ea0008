"""The triton backend in Triton's interpreter against the float64 reference, as tests/test_backends.py does it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_backends as backends
import torch
from fast_interpreter import install
from torch import nn
from triton_case import DEVICE, require_a_way_to_run

import pckernels as pck
from pckernels.backends import triton

require_a_way_to_run()
if DEVICE == "cpu":
    install()

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="these compare tensors of the CPU; run them with TRITON_INTERPRET=1"),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture
def backend() -> str:
    assert pck.backends()["triton"].ok, pck.backends()["triton"].reason
    return "triton"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which variants ran."""
    seen: list[str] = []
    plan_for = triton.plan_for

    def planned(*arguments: object) -> object:
        found = plan_for(*arguments)
        seen.append(getattr(found, "variant", "refused"))
        return found

    monkeypatch.setattr(triton, "plan_for", planned)
    yield seen
    assert seen, "no kernel ran"


def rules(steps: int) -> list[pck.rules.Rule]:
    return [*backends.rules(steps), pck.ZeroDivergence()]


# The interpreter is slow: every rule on the cheap models. The others add instructions, not rules; strict dynamics run nearly all of them,
# and a sweep the rest, once with convolutions and once with gates.
STRICT, SWEEP = pck.Strict(2, 0.05, momentum=0.5), pck.ZeroDivergence()
EVERY = [(name, rule) for name in ("mlp", "skip") for rule in rules(2)]
EVERY += [("cnn", STRICT), ("cnn", SWEEP), ("residual", STRICT), ("rnn", STRICT), ("lstm", STRICT), ("gru", SWEEP)]
EVERY += [("rnn", rule) for rule in backends.nested(2)] + [("cnn", pck.FixedPrediction(2, 0.3, solver="iterate"))]


@pytest.mark.parametrize(("name", "rule"), EVERY, ids=lambda value: str(value).replace(" ", ""))
def test_rules_on_models(backend: str, name: str, rule: pck.rules.Rule, launches: list[str]) -> None:
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, name, rule, 17 if name in ("mlp", "skip") else 5)


@pytest.mark.parametrize("steps", [0, 1, 8, 64])
def test_every_number_of_steps(backend: str, steps: int, launches: list[str]) -> None:
    """At 64, which is slow, of one rule: the loop over steps is the same for all."""
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, "mlp8", pck.FixedPrediction(steps, 0.3, solver="iterate"), 3)
        if steps < 64:
            backends.assert_as_good(backend, "mlp8", pck.Strict(steps, 0.05, momentum=0.5), 3)


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 33])
def test_ragged_batches(backend: str, batch: int) -> None:
    loss = "cross_entropy" if batch == 15 else "squared_error"
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, "mlp", pck.Strict(2, 0.1, momentum=0.5), batch, loss)


@pytest.mark.parametrize("name", ["skip", "cnn"])
def test_a_tile_of_another_size_and_other_warps(backend: str, name: str, launches: list[str]) -> None:
    with triton.options(variant="scratch", lanes=32, warps=4):
        backends.assert_as_good(backend, name, pck.Strict(2, 0.05, momentum=0.5), 33)
        _, network = backends.networks(name)
        plan = network.infer(*backends.data(name, 33, "squared_error")).plan
    assert "32 samples in each of 2 tiles, 2 programs of 4 warps" in plan


@pytest.mark.parametrize("width", [8, 10, 64, 100, 129])
def test_ragged_widths(backend: str, width: int, launches: list[str]) -> None:
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, f"mlp{width}", pck.Strict(2, 0.1), 15)


def test_the_planner_takes_narrow_chains_on_the_chip(backend: str, launches: list[str]) -> None:
    for name, variant in (("mlp8", "on_chip"), ("mlp129", "scratch"), ("skip", "scratch")):
        _, network = backends.networks(name)
        network.backend, network.rule, network.loss = backend, pck.Strict(1, 0.1), "squared_error"
        assert f"{variant} variant" in network.infer(*backends.data(name, 3, "squared_error")).plan
        assert launches[-1] == variant


def test_two_runs_are_equal_bit_for_bit(backend: str) -> None:
    for name in ("mlp", "skip"):
        _, network = backends.networks(name)
        network.backend = backend
        first, second = (
            backends.run(network, pck.Strict(2, 0.1), "squared_error", *backends.data(name, 33, "squared_error")) for _ in range(2)
        )
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_hidden_errors_start_at_zero_bit_for_bit(backend: str) -> None:
    for name in ("mlp", "skip", "cnn"):
        _, network = backends.networks(name)
        network.backend, network.rule, network.loss = backend, pck.Strict(0, 0.1), "squared_error"
        inference = network.infer(*backends.data(name, 5, "squared_error"))
        assert all(not error.any() for vertex, error in inference.errors.items() if vertex != "output")


@pytest.mark.parametrize("variant", ["on_chip", "scratch"])
def test_rounded_operands(backend: str, variant: str) -> None:
    """Near the float32 answer, by no more than operands of half precision explain. (No kinks: a value beyond one is no rounding.)"""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 64), nn.Tanh(), nn.Linear(64, 40), nn.Sigmoid(), nn.Linear(40, 3))
    network = pck.PCNetwork(module, pck.Strict(4, 0.1), backend="reference")
    x, target = backends.data("mlp", 17, "squared_error")
    exact = backends.run(network, network.rule, "squared_error", x, target)
    network.backend = backend
    with triton.options(precision="fp16", variant=variant):
        rounded = backends.run(network, network.rule, "squared_error", x, target)
    off = max(backends.relative(rounded[key], exact[key]) for key in exact if exact[key].norm() > 0)
    assert 0 < off <= 4 * 2.0**-11 * 8, off


def test_refusals_are_sentences(backend: str) -> None:
    network = pck.PCNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), pck.Strict(2, 0.1), backend=backend)
    x, target = torch.randn(2, 3), torch.randn(2, 2)
    with triton.options(precision="bf16"), pytest.raises(pck.Unsupported, match="interpreter gets products of bf16 wrong"):
        network.infer(x, target)
    for name, value in (("precision", "int8"), ("variant", "fast"), ("lanes", 5), ("warps", 3)):
        with triton.options(**{name: value}), pytest.raises(ValueError, match=f"{name} must be one of"):
            network.infer(x, target)
    wide = pck.PCNetwork(nn.Sequential(nn.Linear(3, 200), nn.Tanh(), nn.Linear(200, 2)), pck.Strict(2, 0.1), backend=backend)
    with triton.options(variant="on_chip"), pytest.raises(pck.Unsupported, match="a layer of 200 nodes does not fit in registers"):
        wide.infer(x, target)
    with triton.options(variant="pinned"), pytest.raises(pck.Unsupported, match="in Gluon, which Triton's interpreter does not run"):
        wide.infer(x, target)
    with pytest.raises(pck.Unsupported, match="it runs float32 on the CPU in Triton's interpreter; this call has torch"):
        pck.PCNetwork(nn.Linear(3, 2).double(), pck.Strict(2, 0.1), backend=backend).infer(x.double(), target.double())


def test_divergence_leaves_everything_as_it_was(backend: str) -> None:
    _, network = backends.networks("mlp")
    network.backend, network.rule = backend, pck.Strict(15, 50.0)
    network.zero_grad()
    with pytest.raises(pck.InferenceDiverged, match=r"Inference diverged at step \d+, the largest error at .* Use a smaller rate than 50"):
        network.backward(*backends.data("mlp", 3, "squared_error"))
    assert all(parameter.grad is None for parameter in network.parameters())
