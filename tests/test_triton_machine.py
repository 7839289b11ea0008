"""The triton backend in Triton's interpreter against the float64 reference, as tests/test_backends.py does it."""

from __future__ import annotations

from collections.abc import Iterator

import extra_case
import pytest
import rounded_case
import test_backends as backends
import torch
from fast_interpreter import install
from torch import nn
from triton_case import DEVICE, relative_error, require_a_way_to_run

import pckernels as pck
from pckernels.backends import triton
from pckernels.compiler import Compiled
from pckernels.memory import Memory, Packed

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


# The interpreter is slow: small models, and of two tiles of samples those that take least. In two steps errors reach no convolution.
EVERY = [(name, rule) for name in backends.KINDS for rule in rules(2)]
EVERY += [(name, rule) for name in ("rnn", "lstm", "gru") for rule in backends.nested(2)]
EVERY += [(name, pck.Strict(2, 0.1, nudge=("centered", 0.2))) for name in ("mlp", "cnn", "lstm")]
EVERY += [(name, pck.Strict(4, 0.05, momentum=0.5)) for name in ("cnn", "residual")]


@pytest.mark.parametrize(("name", "rule"), EVERY, ids=lambda value: str(value).replace(" ", ""))
def test_every_rule_on_every_model(backend: str, name: str, rule: pck.rules.Rule, launches: list[str]) -> None:
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, f"small {name}", rule, 17 if name in ("mlp", "skip") else 3)


ROUNDED = [(name, pck.Strict(2, 0.05, momentum=0.5)) for name in backends.KINDS]
ROUNDED += [(name, pck.ZeroDivergence()) for name in backends.KINDS]


@pytest.mark.parametrize(("name", "rule"), ROUNDED, ids=lambda value: str(value).replace(" ", ""))
def test_rounded_operands(backend: str, name: str, rule: pck.rules.Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a launch writes, against the float64 reference whose operands are rounded likewise."""
    launch, compared = triton.launch, 0

    def compare(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
        nonlocal compared
        launch(compiled, memory, batch, factor)
        parts = ([tensor.double() for tensor in tensors] for tensors in (memory.weights, memory.io, memory.gradients))
        exact = Memory(*parts, memory.energies.clone())
        rounded_case.execute(compiled.code, exact, batch, factor, "fp16")
        allowed = rounded_case.tolerance(compiled.code, batch, "fp16")
        pairs = [*zip(memory.io, exact.io, strict=True), *zip(memory.gradients, exact.gradients, strict=True)]
        for found, wanted in (*pairs, (memory.energies, exact.energies)):
            assert relative_error(found, wanted) <= allowed
            compared += 1

    monkeypatch.setattr(triton, "launch", compare)
    _, network = backends.networks(f"small {name}")
    network.backend = backend
    with triton.options(precision="fp16", variant="scratch"):
        backends.run(network, rule, "squared_error", *backends.data(f"small {name}", 3, "squared_error"))
    assert compared


def test_backward_weights_and_precisions(backend: str, launches: list[str]) -> None:
    """Narrow chains too: on the chip they have neither."""
    rule = pck.Relaxed(pck.Strict(2, 0.1), "learned", False)
    extra_case.assert_as_good(backend, "small cnn", rule, 5, "elements")
    extra_case.assert_as_good(backend, "small lstm", rule, 5, "several")
    extra_case.assert_as_good(backend, "mlp8", rule, 5)
    extra_case.assert_as_good(backend, "mlp8", pck.Strict(2, 0.1), 5, "learned")
    assert set(launches) == {"scratch"}


@pytest.mark.parametrize("steps", [0, 1, 8, 64])
def test_every_number_of_steps(backend: str, steps: int, launches: list[str]) -> None:
    """At 64, which is slow, of one rule: the loop over steps is the same for all."""
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, "small pair", pck.FixedPrediction(steps, 0.3, solver="iterate"), 3)
        if steps < 64:
            backends.assert_as_good(backend, "small mlp", pck.Strict(steps, 0.05, momentum=0.5), 3)


@pytest.mark.parametrize(("batch", "other"), [(0, "lstm"), (1, "cnn"), (15, "lstm"), (16, "lstm"), (33, "cnn")])
def test_ragged_batches(backend: str, batch: int, other: str) -> None:
    loss = "cross_entropy" if batch == 15 else "squared_error"
    with triton.options(variant="scratch"):
        backends.assert_as_good(backend, "small mlp", pck.Strict(2, 0.1, momentum=0.5), batch, loss)
        backends.assert_as_good(backend, f"small {other}", pck.ZeroDivergence(), batch, loss)


@pytest.mark.parametrize("name", ["small skip", "small cnn"])
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
    for name in ("small mlp", "small cnn"):
        _, network = backends.networks(name)
        network.backend = backend
        first, second = (
            backends.run(network, pck.Strict(2, 0.1), "squared_error", *backends.data(name, 17, "squared_error")) for _ in range(2)
        )
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_hidden_errors_start_at_zero_bit_for_bit(backend: str) -> None:
    for name in (f"small {kind}" for kind in backends.KINDS):
        _, network = backends.networks(name)
        network.backend, network.rule, network.loss = backend, pck.Strict(0, 0.1), "squared_error"
        inference = network.infer(*backends.data(name, 5, "squared_error"))
        assert all(not error.any() for vertex, error in inference.errors.items() if vertex != "output")


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
