"""The triton backend on a GPU, against the reference in float64 on the CPU. Skipped, with the reason, where there is none.

test_triton_kernels.py, test_triton_step.py and test_triton_chain.py run their kernels on a GPU, too, where there is one.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import gpu
import pytest
import test_backends as backends
import torch
from torch import nn

import pckernels as pck
from pckernels.backends import device_op, triton

SUPPORT = pck.backends()["triton"]
pytestmark = [
    pytest.mark.skipif(not (SUPPORT.ok and torch.cuda.is_available()), reason=f"triton: {SUPPORT.reason}"),
    pytest.mark.skipif(triton.interpreted(), reason="TRITON_INTERPRET=1 is set: test_triton_machine.py is for that"),
    pytest.mark.usefixtures("poisoned"),
]
RULES = [
    pck.Strict(8, 0.1),
    pck.Strict(64, 0.05, momentum=0.5),
    pck.Strict(2, 0.1, sweep="red_black"),
    pck.FixedPrediction(8, 0.3),
    pck.FixedPrediction(8, 0.3, solver="iterate"),
    pck.ZeroDivergence(),
]
UNIT = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}


moved, on_gpu, assert_as_good = (partial(function, "triton") for function in (gpu.moved, gpu.on_gpu, gpu.assert_as_good))


@pytest.mark.parametrize("name", backends.KINDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule).replace(" ", ""))
def test_every_rule_on_every_model(name: str, rule: pck.rules.Rule) -> None:
    with triton.options(variant="scratch"):
        assert_as_good(name, rule, 17)


@pytest.mark.parametrize("batch", [0, 1, 15, 16, 33, 5000])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_ragged_batches(name: str, batch: int) -> None:
    """5000: more tiles than programs."""
    assert_as_good(name, pck.Strict(3, 0.1, momentum=0.5), batch)
    assert_as_good(name, pck.ZeroDivergence(), batch, "cross_entropy")


@pytest.mark.parametrize("width", [8, 10, 64, 100, 129])
def test_ragged_widths(width: int) -> None:
    assert_as_good(f"mlp{width}", pck.Strict(8, 0.1), 15)


PINNED = [pck.Strict(8, 0.1), pck.Strict(64, 0.05, momentum=0.5), pck.FixedPrediction(8, 0.3, solver="iterate")]


@pytest.mark.parametrize("rule", PINNED, ids=lambda rule: str(rule).replace(" ", ""))
def test_chains_pinned_in_shared_memory(rule: pck.rules.Rule) -> None:
    """What puts an architecture into PROVED of pckernels/triton_pinned.py, with test_precisions, if it is fast: bench/gpu_triton.py."""
    with triton.options(variant="pinned"):
        assert_as_good("mlp129", rule, 17)


@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_ragged_batches_of_pinned_chains(loss: str) -> None:
    """One kernel for all of them."""
    with triton.options(variant="pinned"):
        for batch in (0, 1, 15, 16, 33, 5000):
            assert_as_good("mlp", pck.Strict(3, 0.1, momentum=0.5), batch, loss)


@pytest.mark.parametrize("variant", ["on_chip", "pinned", "scratch"])
@pytest.mark.parametrize("precision", list(UNIT))
def test_precisions(variant: str, precision: str) -> None:
    """Near the float32 answer, by no more than rounded operands explain. (No kinks: a value beyond one is no rounding.)"""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 64), nn.Tanh(), nn.Linear(64, 40), nn.Sigmoid(), nn.Linear(40, 3))
    network = pck.PCNetwork(module, pck.Strict(8, 0.1), backend="reference")
    x, target = backends.data("mlp", 33, "squared_error")
    exact = backends.run(network, network.rule, "squared_error", x, target)
    with triton.options(precision=precision, variant=variant):
        rounded = on_gpu(network, network.rule, "squared_error", x, target)
    off = max(backends.relative(rounded[key], exact[key]) for key in exact if exact[key].norm() > 0)
    assert 0 < off <= 4 * UNIT[precision] * 64**0.5, off


def test_hidden_errors_start_at_zero_bit_for_bit() -> None:
    for name in backends.KINDS:
        on = moved(backends.networks(name)[1])
        on.rule, on.loss = pck.Strict(0, 0.1), "squared_error"
        errors = on.infer(*(tensor.cuda() for tensor in backends.data(name, 5, "squared_error"))).errors
        assert all(not error.any() for vertex, error in errors.items() if vertex != "output")


def test_two_runs_are_equal_bit_for_bit() -> None:
    for name, variant in (("mlp", None), ("mlp", "pinned"), ("mlp10", None), ("cnn", None), ("lstm", None)):
        x, target = backends.data(name, 300, "squared_error")
        with triton.options(variant=variant):
            first, second = (
                on_gpu(backends.networks(name)[1], pck.Strict(6, 0.1, momentum=0.5), "squared_error", x, target) for _ in range(2)
            )
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "variant"), [("mlp10", "on_chip"), ("mlp", "pinned"), ("mlp", "scratch")])
def test_launched_without_waiting_and_captured_in_a_cuda_graph(name: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with triton.options(variant=variant):
        launch_and_capture(name, monkeypatch)


def launch_and_capture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    launch = triton.launch

    def remember(*arguments: Any) -> None:
        seen.append(arguments)
        launch(*arguments)

    network = pck.PCNetwork(copy.deepcopy(backends.networks(name)[1].module).cuda(), pck.Strict(6, 0.1), backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(triton, "launch", remember)
        network.backward(*(tensor.cuda() for tensor in backends.data(name, 33, "squared_error")))
    memory = seen[-1][1]
    expected = memory.energies.clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(*seen[-1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*seen[-1])
    memory.energies.fill_(float("nan"))
    graph.replay()
    assert torch.equal(memory.energies, expected)


def test_the_op_runs_without_the_native_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from pckernels.backends import cuda

    network = pck.PCNetwork(copy.deepcopy(backends.networks("mlp")[1].module).cuda(), pck.Strict(6, 0.1), backend="triton")
    x, target = (tensor.cuda() for tensor in backends.data("mlp", 33, "squared_error"))
    expected = network.infer(x, target).energy
    choice = device_op.Choice(triton.launch, "for this test")
    monkeypatch.setattr(device_op, "choice", lambda: choice)
    monkeypatch.setattr(triton, "launch", cuda.execute)  # which calls the op
    assert torch.equal(network.infer(x, target).energy, expected)
