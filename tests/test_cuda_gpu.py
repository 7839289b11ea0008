"""The cuda backend on a GPU, against the reference in float64 on the CPU. Skipped, with the reason, where there is none."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import gpu
import pytest
import test_backends as backends
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import cuda
from pckernels.planner import CLUSTERS, LANES, TIERS, WGMMA_LANES, lanes_of, products_on, tiers_on

SUPPORT = pck.backends()["cuda"]
pytestmark = [
    pytest.mark.skipif(not (SUPPORT.ok and torch.cuda.is_available()), reason=f"cuda: {SUPPORT.reason}"),
    pytest.mark.usefixtures("poisoned"),
]
KINDS = backends.KINDS
RULES = [
    pck.Strict(8, 0.1),
    pck.Strict(64, 0.05, momentum=0.5),
    pck.Strict(2, 0.1, sweep="top_down"),
    pck.Strict(2, 0.1, sweep="red_black"),
    pck.FixedPrediction(8, 0.3),
    pck.FixedPrediction(8, 0.3, solver="iterate"),
    pck.ZeroDivergence(),
]
NAMES = [f"{type(rule).__name__}{k}" for k, rule in enumerate(RULES)]


moved, on_gpu, assert_as_good = (partial(function, "cuda") for function in (gpu.moved, gpu.on_gpu, gpu.assert_as_good))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_every_rule_on_every_model(name: str, rule: pck.rules.Rule) -> None:
    assert_as_good(name, rule, 17)


@pytest.mark.parametrize("batch", [0, 1, 2, 15, 16, 33, 300])
@pytest.mark.parametrize("name", ["mlp", "cnn", "lstm"])
def test_ragged_batches(name: str, batch: int) -> None:
    assert_as_good(name, pck.Strict(3, 0.1, momentum=0.5), batch)
    assert_as_good(name, pck.ZeroDivergence(), batch, "cross_entropy")


@pytest.mark.parametrize("width", [8, 10, 64, 100, 129])
def test_ragged_widths(width: int) -> None:
    assert_as_good(f"mlp{width}", pck.Strict(8, 0.1), 15)


def needs(tier: str, product: str = "mma") -> None:
    limits = cuda.limits(torch.device("cuda", 0))
    has = f"this GPU has {limits.architecture / 10}"
    if tier not in tiers_on(limits):
        pytest.skip(f"clusters of blocks begin with compute capability 9.0; {has}")
    if product not in products_on(limits, "bf16"):
        pytest.skip(f"wgmma is an instruction of compute capability 9.0; {has}")


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("lanes", LANES["fp32"])
def test_every_tier_and_tile(tier: str, lanes: int) -> None:
    needs(tier)
    with cuda.options(tier=tier, lanes=lanes):
        for name in ("mlp", "mlp10", "skip"):
            assert_as_good(name, pck.Strict(8, 0.1), 33)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("lanes", LANES["fp32"])
def test_every_cluster(cluster: int, lanes: int) -> None:
    """Of 4 blocks and more, with more tiles than there are clusters at once, too."""
    needs("cluster")
    widest = "mlp129" if lanes <= 4 else "mlp64"  # that fits
    with cuda.options(lanes=lanes, cluster=cluster):
        for name, batch in (("mlp", 1), (widest, 17), ("mlp64", 40 * lanes), ("skip", 15)):
            assert_as_good(name, pck.Strict(16, 0.05, momentum=0.5), batch)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_clusters_give_the_same_bits_every_time(cluster: int) -> None:
    """Those of a block alone, but for the energies, which are summed in another order."""
    needs("cluster")
    _, network = backends.networks("mlp129")
    x, target = backends.data("mlp129", 300, "squared_error")
    with cuda.options(tier="stream", lanes=4):
        alone = on_gpu(network, pck.Strict(64, 0.1), "squared_error", x, target)
    with cuda.options(cluster=cluster, lanes=4):
        runs = [on_gpu(network, pck.Strict(64, 0.1), "squared_error", x, target) for _ in range(8)]
    for run in runs:
        assert all(torch.equal(run[key], runs[0][key]) for key in run)
        assert all(torch.equal(run[key], alone[key]) for key in run if not key.startswith(("energy", "loss"))), set(run)


def smooth() -> nn.Module:
    """Without kinks: a value that lands on the other side of one has not been rounded, but changed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 64), nn.Tanh(), nn.Linear(64, 64), nn.Sigmoid(), nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 3))


ROUNDED = [("tf32", 2.0**-11), ("bf16", 2.0**-8), ("fp16", 2.0**-11)]
WAYS = [(tier, product) for tier in TIERS for product in ("mma", "wgmma") if lanes_of("bf16", product, tier)]


@pytest.mark.parametrize(("tier", "product"), WAYS)
@pytest.mark.parametrize(("precision", "unit"), ROUNDED)
def test_precisions(tier: str, precision: str, unit: float, product: str) -> None:
    needs(tier, product)
    network = pck.PCNetwork(smooth(), pck.ZeroDivergence(), backend="reference")
    x, target = backends.data("mlp", 33, "squared_error")
    for rule in (pck.Strict(8, 0.1), pck.ZeroDivergence()):
        exact = backends.run(network, rule, "squared_error", x, target)
        for lanes in lanes_of(precision, product, tier):
            with cuda.options(precision, tier, lanes, product):
                rounded = on_gpu(network, rule, "squared_error", x, target)
            off = max(backends.relative(rounded[key], exact[key]) for key in exact if exact[key].norm() > 0)
            assert 0 < off <= 4 * unit * 64**0.5, off


@pytest.mark.parametrize("lanes", WGMMA_LANES)
@pytest.mark.parametrize(("precision", "unit"), ROUNDED)
def test_warpgroups_multiply_as_warps_do(precision: str, unit: float, lanes: int) -> None:
    """The same rounded operands, added up in another order: products in one piece, in pieces, of ragged sizes, of several time steps."""
    needs("stream", "wgmma")
    torch.manual_seed(0)
    deep = pck.PCNetwork(
        nn.Sequential(nn.Linear(700, 100), nn.Tanh(), nn.Linear(100, 33), nn.Tanh(), nn.Linear(33, 3)), pck.ZeroDivergence()
    )
    cases = [(deep, torch.randn(300, 700), torch.randn(300, 3))]
    cases += [(backends.networks("rnn")[1], *backends.data("rnn", 50, "squared_error"))]
    for network, x, target in cases:
        for rule in (pck.Strict(0, 0.1), pck.Strict(3, 0.1), pck.ZeroDivergence()):
            with cuda.options(precision, product="mma"):
                expected = on_gpu(network, rule, "squared_error", x, target)
            with cuda.options(precision, "stream", lanes, "wgmma"):
                found, again = (on_gpu(network, rule, "squared_error", x, target) for _ in range(2))
            for key, value in expected.items():
                assert torch.equal(found[key], again[key]), key
                assert backends.relative(found[key], value) <= unit, (key, backends.relative(found[key], value))


def test_hidden_errors_start_at_zero_bit_for_bit() -> None:
    for name in KINDS:
        _, network = backends.networks(name)
        on = moved(network)
        on.rule, on.loss = pck.Strict(0, 0.1), "squared_error"
        x, target = backends.data(name, 5, "squared_error")
        errors = on.infer(x.cuda(), target.cuda()).errors
        assert all(not error.any() for vertex, error in errors.items() if vertex != "output")


def test_two_runs_are_equal_bit_for_bit() -> None:
    for name in ("mlp", "cnn", "lstm"):
        _, network = backends.networks(name)
        x, target = backends.data(name, 300, "squared_error")
        first, second = (on_gpu(network, pck.Strict(6, 0.1, momentum=0.5), "squared_error", x, target) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_stream_of_ones_own() -> None:
    _, network = backends.networks("mlp")
    x, target = backends.data("mlp", 33, "squared_error")
    plain = on_gpu(network, pck.Strict(6, 0.1), "squared_error", x, target)
    with torch.cuda.stream(torch.cuda.Stream()):
        other = on_gpu(network, pck.Strict(6, 0.1), "squared_error", x, target)
    assert all(torch.equal(plain[key], other[key]) for key in plain)


class Engine:
    """One inference of a network as the backend runs it, with memory of its own, to be launched again and again."""

    def __init__(self, network: pck.PCNetwork, x: Tensor, target: Tensor, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[Any, ...]] = []

        def remember(*arguments: Any) -> None:
            self.seen.append(arguments)
            cuda.launch(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(cuda, "execute", remember)
            network.infer(x, target)

    def launch(self) -> None:
        for arguments in self.seen:
            cuda.launch(*arguments)


def test_it_can_be_captured_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    network = pck.PCNetwork(copy.deepcopy(backends.networks("mlp")[1].module).cuda(), pck.Strict(6, 0.1), backend="cuda")
    x, target = (tensor.cuda() for tensor in backends.data("mlp", 33, "squared_error"))
    engine = Engine(network, x, target, monkeypatch)
    expected = engine.seen[-1][1].energies.clone()
    engine.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        engine.launch()
    engine.seen[-1][1].energies.fill_(float("nan"))
    graph.replay()
    assert torch.equal(engine.seen[-1][1].energies, expected)


def test_kernels_launch_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    network = pck.PCNetwork(copy.deepcopy(backends.networks("mlp")[1].module).cuda(), pck.Strict(6, 0.1), backend="cuda")
    engine = Engine(network, *(tensor.cuda() for tensor in backends.data("mlp", 33, "squared_error")), monkeypatch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_plans_fit_this_gpu_and_refusals_have_reasons() -> None:
    limits = cuda.limits(torch.device("cuda", 0))
    assert limits.shared_bytes == getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", limits.shared_bytes)
    module = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten()).cuda()
    with pytest.raises(pck.Unsupported, match="too little"):
        pck.PCNetwork(module, RULES[0], backend="cuda").infer(torch.randn(2, 3, 32, 32).cuda(), torch.randn(2, 57600).cuda())


def test_tensors_on_the_cpu_are_refused() -> None:
    _, network = backends.networks("mlp")
    network.backend = "cuda"
    with pytest.raises(pck.Unsupported, match=r"it runs float32 on a CUDA device; this call has torch\.float32 on cpu"):
        network.infer(*backends.data("mlp", 3, "squared_error"))


def test_the_plan_is_told() -> None:
    _, network = backends.networks("mlp")
    on = pck.PCNetwork(copy.deepcopy(network.module).cuda(), pck.Strict(3, 0.1), backend="cuda")
    inference = on.infer(*(tensor.cuda() for tensor in backends.data("mlp", 33, "squared_error")))
    assert inference.backend == "cuda" and "tier: " in inference.plan
