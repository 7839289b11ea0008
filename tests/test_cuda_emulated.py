"""The CUDA kernels without a GPU: the very same code on the CPU, threads in a random order, against the interpreter and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_emulated
import extra_case
import pytest
import test_backends as backends
import torch
from native_case import Case
from torch import Tensor

import pckernels as pck
from pckernels import planner
from pckernels.backends import cuda, selection
from pckernels.benchmarks import probes
from pckernels.compiler import Compiled
from pckernels.instructions import Instruction, Loss, Op, OuterProduct
from pckernels.memory import Packed
from pckernels.planner import LANES, SUM_BYTES, WGMMA_LANES, Choice, Limits

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("emulator")]  # the first of them compiles it

LIMITS = Limits.of(90, 4)
# Largest error against float64, relative to the largest entry, for each operand: what rounding both operands of 100 products allows.
TOLERANCE = {"fp32": 4e-6, "tf32": 4 * 2.0**-11 * 10, "bf16": 4 * 2.0**-8 * 10, "fp16": 4 * 2.0**-11 * 10}


def check(built: Any, make: Callable[[int], Case], cuts: list[tuple[Any, ...]], batches: tuple[int, ...] = (1, 9, 17)) -> None:
    """The outcome is that of the interpreter; threads in another order give the same bits."""
    for batch in batches:
        torch.manual_seed(batch)
        case = make(batch)
        expected = case.expected(2.0)
        for cut in cuts:
            first, again = (case.run(cuda_emulated.Engine(built, *cut), factor=2.0) for _ in range(2))
            precision = cut[1] if len(cut) > 1 else "fp32"
            for got, same, want in zip(first, again, expected, strict=True):
                assert torch.equal(got, same), cut
                size = float(want.abs().max()) if want.numel() else 0.0
                assert float((got.double() - want).abs().max()) <= TOLERANCE[precision] * (size + 1e-30), (cut, batch)


def random(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape)


EVERY = [(lanes,) for lanes in LANES["fp32"]]
TENSOR = [(lanes, precision) for precision in ("tf32", "bf16", "fp16") for lanes in LANES[precision]]


def products(positions: int, inputs: int, outputs: int, accumulate: bool) -> Callable[[int], Case]:
    """Both directions of a weight, and its gradient."""

    def make(batch: int) -> Case:
        case, p = Case(batch), (positions, inputs, outputs)
        w, bias = case.weight(torch.randn(outputs, inputs)), case.weight(torch.randn(outputs))
        x, out = case.load(random(batch, positions * inputs)), case.load(random(batch, positions * outputs))
        g, back = case.load(random(batch, positions * outputs)), case.load(random(batch, positions * inputs))
        case.add(Op.LINEAR, out=out, a=x, slot=w, slot2=bias, p=p, accumulate=accumulate)
        case.add(Op.LINEAR_T, out=back, a=g, slot=w, p=p, accumulate=accumulate)
        case.store(out, positions * outputs)
        case.store(back, positions * inputs)
        weight, error_sum = case.gradient(outputs, inputs), case.gradient(outputs)
        errors = case.tensor(random(batch, positions * outputs))
        wide = case.tensor(random(batch, positions * inputs + 5))
        case.products.append(OuterProduct(weight, error_sum, errors, wide, positions, inputs, outputs, positions * inputs + 5, 3, 0.7))
        return case

    return make


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 7, 5), (3, 33, 17), (1, 129, 100), (2, 1, 64)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(built: Any, positions: int, inputs: int, outputs: int, accumulate: bool) -> None:
    check(built, products(positions, inputs, outputs, accumulate), [*EVERY, *TENSOR, (8, "fp32", "stream", 2)])


# Ragged depths and widths; a warpgroup without columns, one with a single block of 16, and more units than warpgroups; v in up to 3 pieces.
@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 7, 5), (3, 33, 17), (1, 70, 130), (2, 150, 64)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products_of_warpgroups(built: Any, positions: int, inputs: int, outputs: int, accumulate: bool) -> None:
    cuts = [(lanes, precision, "stream", 0, 64) for precision in ("tf32", "bf16", "fp16") for lanes in WGMMA_LANES]
    check(built, products(positions, inputs, outputs, accumulate), [*cuts, (16, "bf16", "stream", 1, 192)], (1, 17))


def of_native_ops(name: str) -> Any:
    """A test of test_native_ops, with its parameters; it is run on the emulated kernels."""
    return getattr(pytest.importorskip("test_native_ops", reason="the native engine is not built"), name, None)


def check_native_ops_on(built: Any, monkeypatch: pytest.MonkeyPatch, cuts: list[tuple[Any, ...]]) -> None:
    """From here on, tests of test_native_ops check the emulated kernels, cut as these say."""
    module = pytest.importorskip("test_native_ops", reason="the native engine is not built")

    def check_here(make: Callable[[int], Case], tolerance: float = 0.0, learns: bool = False) -> None:
        check(built, make, cuts, (1, 17))

    monkeypatch.setattr(module, "check", check_here)


def check_dynamics_and_sums() -> None:
    for flag in (False, True):
        of_native_ops("test_dynamics")(flag)
        of_native_ops("test_norm")(100, flag)
        of_native_ops("test_squared_error")(flag)
    of_native_ops("test_cross_entropy")(9)


@pytest.fixture
def on_emulated_kernels(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_native_ops_on(built, monkeypatch, [(1,), (4,), (8,), (16,), (8, "fp32", "stream", 1)])


@pytest.mark.usefixtures("on_emulated_kernels")
class TestOperations:
    """Every operation but products, as the host engine's tests make them."""

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_arithmetic(self, accumulate: bool) -> None:
        of_native_ops("test_arithmetic")(37, accumulate)

    def test_load_and_store(self) -> None:
        of_native_ops("test_load_and_store_parts_of_rows")(33)
        of_native_ops("test_store_of_nothing_is_zero")()

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_copy(self, accumulate: bool) -> None:
        for p in ((4, 7, 9, 20), (20, 1, 3, 2)):
            of_native_ops("test_copy")(accumulate=accumulate, p=p)

    def test_dynamics_and_sums(self) -> None:
        check_dynamics_and_sums()

    @pytest.mark.parametrize("size", [1e-2, 5.0])
    def test_activations(self, size: float) -> None:
        for kind in of_native_ops("Activation"):
            of_native_ops("test_activations")(kind, size)

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 5])  # the one left out is too large for an emulated block
    def test_convolution(self, number: int) -> None:
        for accumulate in (False, True):
            of_native_ops("test_convolution")(of_native_ops("CONVS")[number], accumulate)

    @pytest.mark.parametrize("number", range(3))
    def test_pooling(self, number: int) -> None:
        shape = of_native_ops("POOLS")[number]
        of_native_ops("test_max_pooling")(shape, False)
        of_native_ops("test_max_pooling")(shape, True)
        of_native_ops("test_average_pooling")(shape, 1, True)
        of_native_ops("test_average_pooling")(shape, 0, False)

    def test_learning(self) -> None:
        of_native_ops("test_sums_learned_in_the_loop")()
        of_native_ops("test_outer_products")()


def test_more_sums_in_a_step_than_one_barrier_serves(built: Any) -> None:
    """And of two with one slot the later one stands."""

    def make(batch: int) -> Case:
        case = Case(batch)
        case.energies = 19
        out = case.array(5)
        mu, target = case.load(random(batch, 5)), case.load(random(batch, 5))
        for slot in [*range(19), 3, 17, 18]:
            case.add(Op.LOSS, n=5, out=out, a=mu, c=target, slot=slot, p=(int(Loss.SQUARED_ERROR), 0), f=(1.0,))
            case.add(Op.ADD, n=5, out=mu, a=out, b=target, f=(0.5, 1.0))
        return case

    check(built, make, [(4,), (16,)])


def test_sums_that_no_barrier_parts(built: Any) -> None:
    """A warp may be ahead by all the sums that one barrier serves while another still adds up those before."""

    def make(batch: int) -> Case:
        case = Case(batch)
        case.energies, n = 20, 40  # rows, for which all warps have work
        rows = [case.load(random(batch, n)) for _ in range(case.energies)]
        for slot, row in enumerate(rows):
            case.instructions.append(Instruction(Op.NORM, n=n, a=row, slot=slot, f=(0.5,), barrier=slot == 0))
        return case

    check(built, make, [(8,), (16,)], (9, 16, 33))


# Whole calls


@pytest.fixture
def backend(built: Any, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The cuda backend on the CPU's tensors and the emulated kernels, results poisoned with NaN."""
    cuda_emulated.install(built, monkeypatch, LIMITS)
    return "cuda"


RULES = [
    pck.Strict(3, 0.1, momentum=0.5),
    pck.Strict(9, 0.1),
    pck.Strict(2, 0.1, sweep="red_black"),
    pck.FixedPrediction(6, 0.3),
    pck.FixedPrediction(6, 0.3, solver="iterate"),
    pck.ZeroDivergence(),
]


@pytest.mark.parametrize("name", ["mlp", "skip", "cnn", "residual", "rnn", "lstm", "gru"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'steps', '')}")
def test_every_rule_on_every_model(backend: str, name: str, rule: pck.rules.Rule) -> None:
    backends.assert_as_good(backend, name, rule, 5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_backward_weights_and_precisions(backend: str, name: str) -> None:
    for rule in (pck.Relaxed(pck.Strict(3, 0.1, momentum=0.5), "learned", False), pck.FixedPrediction(4, 0.3, solver="iterate")):
        extra_case.assert_as_good(backend, name, rule, 5, "elements")
    extra_case.assert_as_good(backend, name, pck.Relaxed(pck.ZeroDivergence(), "learned", False), 5)


@pytest.mark.parametrize("tier", ["stream", "resident"])
@pytest.mark.parametrize("lanes", LANES["fp32"])
def test_every_tier_and_tile(backend: str, tier: str, lanes: int) -> None:
    with cuda.options(tier=tier, lanes=lanes):
        for name in ("mlp", "mlp10", "skip"):
            backends.assert_as_good(backend, name, pck.Strict(4, 0.1), 17, "cross_entropy")


def smooth() -> torch.nn.Module:
    """Without kinks: a value on the other side of one is no rounding."""
    torch.manual_seed(0)
    widths = [torch.nn.Linear(7, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Sigmoid(), torch.nn.Linear(64, 40)]
    return torch.nn.Sequential(*widths, torch.nn.Linear(40, 3))


def assert_rounded(network: pck.PCNetwork, rule: pck.rules.Rule, name: str, *wanted: Any) -> None:
    """Under these options, near the float32 answer, by no more than rounded operands explain."""
    x, target = backends.data(name, 17, "squared_error")
    exact = backends.run(network, rule, "squared_error", x, target)
    with cuda.options(*wanted):
        rounded = backends.run(network, rule, "squared_error", x, target)
        assert (wanted[-1] == "wgmma") == ("products by wgmma" in network.infer(x, target).plan)
    unit = {"tf32": 2.0**-11, "bf16": 2.0**-8, "fp16": 2.0**-11}[wanted[0]]
    off = max(backends.relative(rounded[key], exact[key]) for key in exact if exact[key].norm() > 0)
    assert 0 < off <= 4 * unit * 8, off


@pytest.mark.parametrize("product", ["mma", "wgmma"])
@pytest.mark.parametrize("tier", ["stream", "resident"])
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_precisions(backend: str, tier: str, precision: str, product: str) -> None:
    network = pck.PCNetwork(smooth(), pck.ZeroDivergence(), backend=backend)
    for rule in (pck.Strict(4, 0.1), pck.ZeroDivergence()):
        assert_rounded(network, rule, "mlp", precision, tier, None, product)


@pytest.mark.parametrize(("precision", "lanes"), [("bf16", 16), ("fp16", 32)])
def test_warpgroups_take_all_time_steps(backend: str, precision: str, lanes: int) -> None:
    """Products over several positions, which are staged one after the other."""
    network = backends.networks("rnn")[1]
    network.backend = backend
    assert_rounded(network, pck.Strict(3, 0.1, momentum=0.5), "rnn", precision, "stream", lanes, "wgmma")


def test_a_piece_of_the_depth_at_a_time(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A staging buffer that is less deep than the products: the parts of a sum are added up in another order, and that is all."""
    network = backends.networks("mlp129")[1]
    network.backend, network.rule, network.loss = backend, pck.Strict(2, 0.1), "squared_error"
    found = []
    for rows in (192, 64):
        monkeypatch.setattr(planner, "MOST_STAGED_ROWS", rows)
        cuda._planned.cache_clear()
        with cuda.options("bf16", "stream", 16, "wgmma"):
            inference = network.infer(*backends.data("mlp129", 17, "squared_error"))
        assert f"{rows} rows staged" in inference.plan
        found.append(inference.errors)
    cuda._planned.cache_clear()
    for name, error in found[1].items():
        torch.testing.assert_close(error, found[0][name], rtol=1e-3, atol=1e-3 * float(error.abs().max()))


@pytest.mark.parametrize(("tier", "lanes", "cluster"), [("stream", 4, None), ("resident", 8, None), ("cluster", 1, 2)])
def test_a_benchmarks_probes_run_as_their_code_is_planned(
    backend: str, monkeypatch: pytest.MonkeyPatch, tier: str, lanes: int, cluster: int | None
) -> None:
    """What predicts the time of a step: single instructions in place of the loop, with arrays behind the code's own."""
    monkeypatch.setattr(probes, "MOST", 1)
    monkeypatch.setattr(probes, "STEPS", (1, 2))
    rule, module = pck.Strict(3, 0.1), pck.nn.MLPModule((12, 20, 16, 3))
    code = selection.code_for(pck.PCNetwork(module, rule).trace(torch.randn(9, 12)), rule.dynamics, 9)
    assert not isinstance(code, str)
    with cuda.options(tier=tier, lanes=lanes, cluster=cluster):
        found = probes.Probes.of(code, 9, torch.device("cpu"))
    launched, execute = [], cuda.execute

    def watched(code: Compiled, memory: Packed, batch: int, factor: float) -> None:
        launched.append(cuda.plan_for(code, batch, torch.device("cpu")))
        execute(code, memory, batch, factor)

    monkeypatch.setattr(cuda, "execute", watched)
    for run in found.runs().values():
        run()
    assert len(launched) == 2 * len(found.probes) > 10
    assert {(plan.tier, plan.lanes) for plan in launched} == {(tier, lanes)}


def test_a_program_that_does_not_fit_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "limits", lambda device: Limits(90, 4 * 1024, 4))
    _, network = backends.networks("cnn")
    network.backend, network.rule, network.loss = backend, pck.Strict(3, 0.1), "squared_error"
    with pytest.raises(pck.Unsupported, match=r"one sample in a block needs .* KiB of shared memory .* has 4\.0 KiB, .* too little"):
        network.infer(*backends.data("cnn", 3, "squared_error"))


def test_the_planner_knows_what_sums_take(built: Any) -> None:
    case = Case(1)
    case.add(Op.FILL, n=1, out=case.array(1), f=(1.0,))
    assert case.program(cuda_emulated.Engine(built, 8)).program.shared_bytes("stream", 8) == SUM_BYTES + 32
    assert Choice(case.code, 1, LIMITS, "fp32", "stream", 8, "simt").shared_bytes == SUM_BYTES + 32


@pytest.mark.parametrize("capability", ["80", "100", "120"])
def test_warpgroups_need_their_architecture(built: Any, monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    monkeypatch.setenv("PCKERNELS_EMULATED_CAPABILITY", capability)
    case = Case(1)
    case.add(Op.FILL, n=1, out=case.array(1), f=(1.0,))
    has = f"{capability[:-1]}.{capability[-1]}"
    with pytest.raises(ValueError, match=f"wgmma needs compute capability 9.0 .*; this GPU has {has} .* mma runs here"):
        case.run(cuda_emulated.Engine(built, 16, "bf16", "stream", 0, 64))


def test_refusals_of_the_extension(built: Any) -> None:
    case = Case(1)
    case.add(Op.FILL, n=1, out=case.array(1), f=(1.0,))
    for cut, text in (
        ((5,), "There is no kernel with 5 samples"),
        ((1, "bf16"), "there are those with 8"),
        ((8, "int8"), "precision must"),
        ((8, "bf16", "stream", 0, 64), "There is no kernel with 8 samples .*; there are those with 16, 32"),
        ((16, "bf16", "stream", 0, 65), "wgmma stages a multiple of 64 rows, and no other product any; got 65"),
        ((16, "fp32", "stream", 0, 64), "Products of operands in fp32 are simt"),
    ):
        with pytest.raises(ValueError, match=text):
            case.run(cuda_emulated.Engine(built, *cut))
    with pytest.raises(ValueError, match="The workspace has 0 bytes"):
        case.program(cuda_emulated.Engine(built, 8)).program.run([], [], [], 0, 1, 1.0, 0, 0, 0, "stream", 8)
