"""The plans of the models that people use: what fits where, in numbers, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels import dispatch
from pckernels.backends import native, selection
from pckernels.compiler import Compiled
from pckernels.instructions import Code, Op
from pckernels.network import PCNetwork
from pckernels.planner import ARCHITECTURES, KIB, LANES, SUM_BYTES, WGMMA_LANES, Choice, Limits, Plan, deepest, panels, plan, table

pytestmark = pytest.mark.xdist_group("planner")  # what a model compiles to is found once

BATCHES = (1, 64, 256, 4096)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.layer, self.head = kind(inputs, hidden, batch_first=True), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))


def vgg5() -> nn.Module:
    channels = (3, 128, 256, 512, 512)
    blocks = [layer for a, b in pairwise(channels) for layer in (nn.Conv2d(a, b, 3, padding=1), nn.GELU(), nn.MaxPool2d(2))]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2048, 10))


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "MLP 784-300-300-10": (mlp, (784,), (10,)),
    "paper's CNN": (pck.nn.CNNModule, (3, 32, 32), (10,)),
    "RNN 256, 8 steps": (lambda: Recurrent(nn.RNN, 57, 256, 18), (8, 57), (8, 18)),
    "LSTM 256, 50 steps": (lambda: Recurrent(nn.LSTM, 65, 256, 65), (50, 65), (50, 65)),
    "VGG5": (vgg5, (3, 32, 32), (10,)),
}
SMALL = {"small MLP": (small_mlp, (784,), (10,))}  # where warpgroups have room for larger tiles
RULES = {"strict": pck.Strict(20, 0.1), "exact": pck.ZeroDivergence()}


class Found(Exception):
    pass


@lru_cache
def network_of(model: str) -> PCNetwork:
    """One for both rules: 50 time steps take seconds to trace."""
    torch.manual_seed(0)
    return PCNetwork((MODELS | SMALL)[model][0](), RULES["strict"], backend="host")


@lru_cache
def code(model: str, rule: str) -> Code:
    """What a call of the model under the rule compiles to. Nothing runs."""
    _, shape, target = (MODELS | SMALL)[model]
    network = network_of(model)
    network.rule = RULES[rule]

    def stop(compiled: Compiled, *_: Any) -> None:
        if compiled.code.instructions:  # not the W W^T of the Gram form, which has only a product
            raise Found(compiled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch._BACKENDS, "host", host_that(stop))
        with pytest.raises(Found) as found:
            network.backward(torch.randn(64, *shape), torch.randn(64, *target))
    return found.value.args[0].code


def host_that(execute: Any) -> dispatch.Backend:
    support = dispatch.Support(True, "for its code alone")
    return dispatch.Backend(support, lambda call: selection.refusal(call), lambda call: native.run(call, execute))


def test_the_table_of_plans(show: Callable[[str], None]) -> None:
    """Every plan fits, by its own arithmetic; every model that does not is refused in words."""
    for architecture in (80, 89, 90):
        limits = Limits.of(architecture)
        rows: list[tuple[str, int, Plan | str]] = []
        for model in MODELS:
            for rule in RULES:
                for batch in BATCHES:
                    found = plan(code(model, rule), batch, limits)
                    rows.append((f"{model}, {rule}", batch, found))
                    if isinstance(found, Plan):
                        check(found, code(model, rule), batch, limits)
        show(f"sm_{architecture}, {limits.shared_bytes // KIB} KiB a block\n{table(rows)}")


def check(found: Plan, code: Code, batch: int, limits: Limits) -> None:
    loop = [panel.of_block(found.cluster) for panel in panels(code, found.cluster) if panel.in_loop]
    weights = 0 if found.tier == "stream" else sum(panel.bytes(found.precision) for panel in loop)
    assert found.shared_bytes == SUM_BYTES + code.rows * found.lanes * 4 + weights <= limits.shared_bytes
    assert (found.product, found.staged) == ("simt", 0)
    assert found.lanes in LANES[found.precision]
    assert found.cluster <= found.blocks <= -(-batch // found.lanes) * found.cluster and found.blocks % found.cluster == 0
    assert found.blocks <= limits.multiprocessors or found.tier == "stream"


def test_shared_memory_of_the_architectures() -> None:
    assert {number: shared for number, (shared, _) in ARCHITECTURES.items()} == {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    assert Limits.of(87).shared_bytes == 99 * KIB and Limits.of(103).shared_bytes == 227 * KIB
    assert "compute capability 8.0; this GPU has 7.5" in str(plan(code("MLP 784-300-300-10", "strict"), 64, Limits.of(75)))


def test_what_fits_where() -> None:
    for limits, cnn_fits in ((Limits.of(90), True), (Limits.of(80), True), (Limits.of(89), False)):
        for batch in BATCHES:
            assert isinstance(plan(code("MLP 784-300-300-10", "strict"), batch, limits), Plan)
            assert isinstance(plan(code("paper's CNN", "strict"), batch, limits), Plan) is cnn_fits


@pytest.mark.parametrize("model", ["VGG5", "LSTM 256, 50 steps"])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_refusal_says_by_how_much(model: str, rule: str) -> None:
    found = plan(code(model, rule), 64, Limits.of(90))
    needs = SUM_BYTES + code(model, rule).rows * 4
    text = f"one sample in a block needs {needs / KIB:,.1f} KiB of shared memory and a block of this GPU (sm_90) has 227.0 KiB"
    assert isinstance(found, str) and text in found
    assert f"{needs / KIB - 227:,.1f} KiB too little" in found and 'use backend="graph", or the reference' in found


def test_small_batches_use_many_multiprocessors() -> None:
    few, many = (plan(code("MLP 784-300-300-10", "strict"), batch, Limits.of(90)) for batch in (64, 4096))
    assert isinstance(few, Plan) and isinstance(many, Plan)
    assert few.blocks >= 32 and few.lanes < many.lanes


def test_tensor_cores_need_eight_samples() -> None:
    found = plan(code("paper's CNN", "strict"), 64, Limits.of(90), "bf16")
    assert isinstance(found, str) and found.startswith("8 samples in a block need ")


def test_weights_stay_where_they_fit() -> None:
    """Of a small model, both directions of the weights that the loop reads; not those of the feed-forward pass alone."""
    module = nn.Sequential(nn.Linear(500, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    MODELS["small"] = (lambda: module, (500,), (10,))
    small = code("small", "strict")
    loop = [panel for panel in panels(small) if panel.in_loop]
    assert all(panel.depth != 500 for panel in loop) and any(panel.depth == 500 for panel in panels(small))
    found = plan(small, 64, Limits.of(90))
    assert isinstance(found, Plan) and found.tier == "resident"
    assert found.shared_bytes == SUM_BYTES + small.rows * found.lanes * 4 + sum(panel.bytes("fp32") for panel in loop)
    assert "weights in shared memory" in found.reason


def test_blocks_share_small_batches_and_large_weights() -> None:
    """784-300-300-10: each of 8 blocks keeps 48 of 300 columns of the hidden weight in both directions, and of the small one's."""
    mlp_code, limits = code("MLP 784-300-300-10", "strict"), Limits.of(90)
    found = plan(mlp_code, 64, limits, "bf16", cluster=8, lanes=8)
    assert isinstance(found, Plan) and (found.tier, found.cluster, found.blocks) == ("cluster", 8, 64)
    products = {
        (i.slot, i.op): i.p for phase in mlp_code.phases if phase.last > 0 for i in phase.instructions if i.op in (Op.LINEAR, Op.LINEAR_T)
    }
    tiles = 0  # of 16 columns and 16 rows, 512 bytes each
    for (_, op), (_, inputs, outputs) in products.items():
        depth, width = (inputs, outputs) if op is Op.LINEAR else (outputs, inputs)
        tiles += -(-depth // 16) * min(3, -(-width // 16))
    assert found.shared_bytes == SUM_BYTES + mlp_code.rows * 8 * 4 + tiles * 512
    assert "8 samples in each of 8 tiles, shared by 8 blocks" in found.reason and "weights in shared memory" in found.reason
    for batch, tier in ((1, "cluster"), (64, "cluster"), (4096, "stream")):
        chosen = plan(mlp_code, batch, limits)
        assert isinstance(chosen, Plan) and chosen.tier == tier, (batch, chosen)
        assert chosen.cluster in ((2, 4, 8) if tier == "cluster" else (1,))  # 16 has to be asked for


def test_where_there_are_no_clusters() -> None:
    mlp_code = code("MLP 784-300-300-10", "strict")
    for limits, settings, text in (
        (Limits.of(80), {"cluster": 8}, "clusters of blocks need compute capability 9.0; this GPU has 8.0"),
        (Limits.of(90, 8), {"cluster": 16}, "a cluster of 16 blocks needs as many multiprocessors; this GPU has 8"),
    ):
        assert text in str(plan(mlp_code, 64, limits, **settings))  # type: ignore[arg-type]
    assert "this program has CONV, " in str(plan(code("paper's CNN", "strict"), 64, Limits.of(90), tier="cluster"))
    for limits in (Limits.of(80), Limits.of(90, 1)):
        found = plan(mlp_code, 64, limits)
        assert isinstance(found, Plan) and found.cluster == 1


def test_a_choice_that_is_none_is_an_error() -> None:
    mlp_code = code("MLP 784-300-300-10", "strict")
    for settings, text in (
        ({"precision": "int8"}, "precision must be one of 'fp32', 'tf32', 'bf16', 'fp16'; got 'int8'"),
        ({"tier": "graph"}, "tier must be one of 'stream', 'resident', 'cluster'; got 'graph'"),
        ({"precision": "bf16", "lanes": 4}, "With bf16, lanes must be one of 8, 16; got 4"),
        ({"precision": "bf16", "lanes": 32}, "With bf16, lanes must be one of 8, 16; got 32"),
        ({"precision": "bf16", "lanes": 8, "product": "wgmma"}, "With bf16 and wgmma, lanes must be one of 16, 32; got 8"),
        ({"precision": "bf16", "lanes": 4, "product": "fastest"}, "With bf16, lanes must be one of 8, 16, 32; got 4"),
        ({"product": "dot"}, "product must be one of 'simt', 'mma', 'wgmma', 'fastest'; got 'dot'"),
        ({"product": "wgmma"}, "With fp32, product must be 'simt'; got 'wgmma'"),
        ({"precision": "tf32", "product": "simt"}, "With tf32, product must be 'mma' or 'wgmma'; got 'simt'"),
        ({"cluster": 3}, "cluster must be one of 2, 4, 8, 16; got 3"),
        ({"cluster": 2, "tier": "stream"}, "cluster= is of tier 'cluster'; with tier 'stream' a block has its tile to itself"),
        ({"precision": "bf16", "tier": "cluster", "product": "wgmma"}, "Product 'wgmma' is of tiers 'stream' and 'resident'; blocks of a"),
        ({"precision": "bf16", "cluster": 2, "product": "wgmma"}, "blocks of a cluster multiply by 'mma'"),
        ({"precision": "bf16", "tier": "cluster", "product": "fastest", "lanes": 32}, "With bf16, lanes must be one of 8, 16; got 32"),
    ):
        with pytest.raises(ValueError, match=text):
            plan(mlp_code, 64, Limits.of(90), **settings)  # type: ignore[arg-type]


def with_products(model: str, rule: str, product: str | None, **settings: Any) -> Plan:
    found = plan(code(model, rule), 4096, Limits.of(90), "bf16", product=product, **settings)
    assert isinstance(found, Plan), found
    return found


def test_warpgroup_products_are_taken_where_they_are_asked_for() -> None:
    """And named. No GPU has proved them: nothing else takes them."""
    for model in ("MLP 784-300-300-10", "small MLP"):
        for rule in RULES:
            usual, asked, fastest = (with_products(model, rule, product) for product in (None, "wgmma", "fastest"))
            assert (usual.product, usual.staged) == ("mma", 0) and "wgmma" not in usual.reason
            assert asked.product == "wgmma" and f"products by wgmma, {asked.staged} rows staged" in asked.reason
            assert asked.lanes in WGMMA_LANES and asked.staged % 64 == 0
            assert fastest in (usual, asked)
    fp32 = plan(code("small MLP", "strict"), 4096, Limits.of(90), product="fastest")
    assert isinstance(fp32, Plan) and fp32.product == "simt"


def test_the_fastest_product_by_the_count_of_cycles() -> None:
    """Large tiles of a small model go to warpgroups; where the arena leaves room for one tile of 64 rows alone, they do not pay."""
    small, large = with_products("small MLP", "strict", "fastest"), with_products("MLP 784-300-300-10", "strict", "fastest")
    assert (small.product, small.lanes) == ("wgmma", 32) and large.product == "mma"
    few = plan(code("small MLP", "strict"), 16, Limits.of(90), "bf16", product="fastest")
    assert isinstance(few, Plan) and few.product == "mma"
    assert with_products("small MLP", "strict", "fastest", tier="cluster").product == "mma"


def test_the_staging_buffer_is_what_there_is_room_for() -> None:
    mlp_code, limits = code("MLP 784-300-300-10", "strict"), Limits.of(90)
    assert deepest(mlp_code) == 300 and deepest(code("MLP 784-300-300-10", "exact")) == 784
    found = with_products("MLP 784-300-300-10", "strict", "wgmma")
    assert (found.lanes, found.staged) == (16, 64)
    assert found.shared_bytes == SUM_BYTES + mlp_code.rows * 16 * 4 + 64 * 16 * 2 <= limits.shared_bytes
    assert with_products("MLP 784-300-300-10", "exact", "wgmma").staged == 512
    refused = plan(mlp_code, 4096, limits, "bf16", lanes=32, product="wgmma")
    assert isinstance(refused, str) and refused.startswith("32 samples in a block need ")
    wide = Choice(code("small MLP", "strict"), 4096, limits, "tf32", "stream", 32, "wgmma")
    assert wide.shared_bytes == SUM_BYTES + wide.code.rows * 32 * 4 + wide.staged * 32 * 4


@pytest.mark.parametrize("architecture", [80, 89, 100, 120])
def test_other_architectures_have_no_warpgroup_products(architecture: int) -> None:
    limits = Limits.of(architecture)
    mlp_code = code("MLP 784-300-300-10", "exact")
    text = f"need compute capability 9.0, neither less nor more; this GPU has {architecture / 10:.1f}: use mma"
    for settings in ({"product": "wgmma"}, {"product": "fastest", "lanes": 32}):
        assert text in str(plan(mlp_code, 64, limits, "bf16", **settings))  # type: ignore[arg-type]
    fastest = plan(mlp_code, 64, limits, "bf16", product="fastest")
    assert isinstance(fastest, Plan) and fastest.product == "mma"


def test_a_panel_is_counted_once_for_each_direction() -> None:
    mlp_code = code("MLP 784-300-300-10", "strict")
    products = [i for i in mlp_code.instructions if i.op in (Op.LINEAR, Op.LINEAR_T)]
    assert len(panels(mlp_code)) == len({(i.slot, i.op) for i in products}) <= len(products)
    assert Choice(mlp_code, 64, Limits.of(90), "fp32", "stream", 8, "simt").tiles == 8
