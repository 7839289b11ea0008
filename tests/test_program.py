"""Programs and their interpreter, the executable specification of the native engine, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from oracle.compare import assert_all_equal_up_to_cancellation
from oracle.random_modules import Description, RandomModule, descriptions, random_inputs, unpack
from torch import Tensor, nn

import pckernels as pck
from pckernels import dispatch, models
from pckernels.backends import native, reference, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled, compile_steps
from pckernels.emitter import Objective
from pckernels.instructions import WORDS, Loss, Op
from pckernels.interpreter import execute
from pckernels.lowering import lower
from pckernels.memory import Memory

STRICT = [
    pck.Strict(0, 0.1),
    pck.Strict(1, 0.1),
    pck.Strict(5, 0.2, momentum=0.5),
    pck.Strict(4, 0.1, sweep="top_down"),
    pck.Strict(4, 0.1, sweep="red_black", momentum=0.3),
]
FIXED = [
    pck.FixedPrediction(3, 0.4, solver="iterate"),
    pck.FixedPrediction(30, 1.3, solver="iterate"),
    pck.FixedPrediction(0, 0.4),
    pck.FixedPrediction(3, 0.4),
    pck.FixedPrediction(100, 0.1),
    pck.FixedPrediction(20, 1.0),
    pck.ZeroDivergence(),
]
NESTED = [
    pck.FixedPrediction(3, 0.4, solver="iterate", order="nested"),
    pck.FixedPrediction(3, 0.4, order="nested"),
    pck.FixedPrediction(200, 0.1, order="nested"),
]
LOWERED = ["mlp", "cnn", "rnn", "lstm", "gru", "densenet"]
CASES = [(name, rule) for name in LOWERED for rule in STRICT + FIXED + (NESTED if name in ("rnn", "lstm", "gru") else [])]


@dataclass
class Interpreted:
    """The interpreter in the place of every backend, and how often it ran."""

    runs: int = 0

    def choose(self, name: str, call: Call) -> tuple[str, Callable[[Call], Outcome], str]:
        if name == "reference":
            return name, reference.run, ""
        why = selection.refusal(call)
        if why is not None:
            raise pck.Unsupported(why)
        self.runs += 1
        return "interpreter", lambda call: native.run(call, interpret), ""


def interpret(compiled: Compiled, memory: Memory, batch: int, factor: float) -> None:
    for place, tensor in zip(compiled.io, memory.io, strict=True):
        if place.is_result:
            tensor.fill_(float("nan"))  # nothing unwritten can pass
    execute(compiled.code, memory, batch, factor)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    found = Interpreted()
    monkeypatch.setattr(dispatch, "choose", found.choose)
    return found


def assert_same(network: pck.PCNetwork, args: tuple[object, ...], target: object) -> None:
    """Values, errors, energies and gradients of the interpreter against the reference."""
    found = {}
    for backend in ("reference", "auto"):
        network.backend = backend
        network.zero_grad()
        inference = network.backward(*args, target=target)
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        found[backend] = (inference.values, inference.errors, gradients, {"energy": inference.energy, "loss": inference.loss})
    scale = max([1.0] + [float(value.abs().max()) for value in found["reference"][0].values() if value.numel()])
    for ours, theirs in zip(found["auto"], found["reference"], strict=True):
        # The reference subtracts predictions, and loses what the displacements of a program keep: units of the largest value.
        padded = {**theirs, "": torch.full((1,), scale)}
        assert_all_equal_up_to_cancellation({**ours, "": padded[""]}, padded, 1e-11, units=64)


@pytest.mark.parametrize(("name", "rule"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_models_of_verify(name: str, rule: pck.rules.Rule, interpreted: Interpreted) -> None:
    case, network = traced(name)
    network.rule = rule
    assert_same(network, (case.x,), case.target)
    assert interpreted.runs == 1


@lru_cache
def traced(name: str) -> tuple[models.Case, pck.PCNetwork]:
    """One network a model, so that it is traced once for each family of rules."""
    case = models.build(name)
    return case, pck.PCNetwork(case.module, pck.ZeroDivergence(), loss=case.loss)


@pytest.mark.parametrize("rule", [pck.Strict(3, 0.1), pck.ZeroDivergence()], ids=["strict", "exact"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batch_sizes_share_the_code(rule: pck.rules.Rule, batch: int, interpreted: Interpreted) -> None:
    case = models.build("cnn")
    network = pck.PCNetwork(case.module, rule, loss=case.loss)
    assert_same(network, (case.x[:batch],), case.target[:batch])


def activations() -> list[nn.Module]:
    return [
        nn.ReLU(),
        nn.LeakyReLU(0.2),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Hardtanh(-0.5, 0.7),
        nn.SiLU(),
        nn.ReLU6(),
        nn.Identity(),
    ]


@pytest.mark.parametrize("activation", activations(), ids=str)
def test_activations(activation: nn.Module, interpreted: Interpreted) -> None:
    module = nn.Sequential(nn.Linear(4, 9), activation, nn.Linear(9, 9), activation, nn.Linear(9, 2)).double()
    network = pck.PCNetwork(module, pck.Strict(6, 0.3, momentum=0.5))
    assert_same(network, (3 * torch.randn(5, 4).double(),), torch.randn(5, 2).double())
    assert interpreted.runs == 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(2, 4, (3, 2), dilation=2, groups=2),
        nn.Conv2d(2, 4, 3, padding=(0, 2), bias=False),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d((2, 3), dilation=(1, 2))),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, 2, 1)),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d((7, 1))),
    ],
    ids=str,
)
def test_convolution_and_pooling(layer: nn.Module, interpreted: Interpreted) -> None:
    head = [nn.ReLU(), nn.Conv2d(4 if isinstance(layer, nn.Conv2d) else 3, 3, 1), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)]
    module = nn.Sequential(nn.Conv2d(2, 2, 2), nn.ReLU(), layer, *head).double()
    x = torch.randn(4, 2, 9, 9).double()
    module(x)
    assert_same(pck.PCNetwork(module, pck.Strict(4, 0.1, momentum=0.5), value_nodes="op"), (x,), torch.randn(4, 3).double())
    assert interpreted.runs == 1


def test_sequences_and_batch_second(interpreted: Interpreted) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv1d(3, 4, 3, padding=1), nn.MaxPool1d(2)
            self.lstm = nn.LSTM(4, 5, 2, bidirectional=True)
            self.head = nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.pool(self.conv(x).relu()).permute(2, 0, 1))[0])

    x, target = torch.randn(4, 3, 6).double(), torch.randn(3, 4, 2).double()
    assert_same(pck.PCNetwork(Model().double(), pck.Strict(3, 0.1)), (x,), target)
    assert_same(pck.PCNetwork(Model().double(), pck.FixedPrediction(9, 0.3)), (x,), target)
    assert interpreted.runs == 2


def test_several_outputs_one_of_them_without_a_target(interpreted: Interpreted) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            h = self.a(x).tanh()
            return self.b(h), self.c(h), h

    x, target = torch.randn(5, 3).double(), (torch.randn(5, 2).double(), None, torch.randn(5, 4).double())
    for rule in (pck.Strict(4, 0.1), pck.ZeroDivergence(), pck.FixedPrediction(4, 0.3, solver="iterate")):
        assert_same(pck.PCNetwork(Model().double(), rule), (x,), target)
    assert interpreted.runs == 3


def test_frozen_weights_and_a_scale(interpreted: Interpreted) -> None:
    case = models.build("lstm")
    case.module.layer.weight_hh_l0.requires_grad_(False)
    case.module.head.bias.requires_grad_(False)
    assert_same(pck.PCNetwork(case.module, pck.Strict(3, 0.1), reduction="sum"), (case.x,), case.target)
    assert interpreted.runs == 1


@settings(max_examples=36)
@given(description=descriptions())
def check_random_module(description: Description) -> None:
    torch.manual_seed(0)
    module = RandomModule(description).double()
    inputs = random_inputs(description, 3, 0)
    target = [torch.randn_like(y) for y in unpack(module(*inputs))]
    found = Interpreted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "choose", found.choose)
        for rule in (
            pck.Strict(3, 0.03, momentum=0.5),
            pck.Strict(2, 0.03, sweep="red_black"),
            pck.FixedPrediction(11, 1.5),
            pck.ZeroDivergence(),
        ):
            network = pck.PCNetwork(module, rule)
            try:
                assert_same(network, inputs, _like(module(*inputs), target))
            except pck.Unsupported as error:
                assert any(
                    word in str(error)
                    for word in ("has no stage", "broadcasts", "order of a sample", "computed from a value", "one value for each")
                )
                refused.append(str(error))
    lowered.append(found.runs)


refused: list[str] = []
lowered: list[int] = []


def _like(output: object, targets: list[Tensor]) -> object:
    if isinstance(output, Tensor):
        return targets[0]
    return type(output)(zip(output, targets, strict=True)) if isinstance(output, dict) else type(output)(targets)


def test_random_modules() -> None:
    """And most of them are lowered: what the interpreter of instructions has not run proves nothing here."""
    check_random_module()
    assert sum(lowered) >= 60, (sum(lowered), len(refused))


# Lowering


def test_what_reads_clamped_inputs_alone_may_run_outside(interpreted: Interpreted) -> None:
    """Its prediction never changes, so that an operation without a stage costs nothing there."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    assert_same(pck.PCNetwork(module, pck.Strict(4, 0.1)), (torch.randn(5, 3).double(),), torch.randn(5, 2).double())
    assert interpreted.runs == 1


@pytest.mark.parametrize(
    ("module", "x", "reason"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)),
            torch.randn(2, 3),
            "softmax in vertex '1' has no stage",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
            torch.randn(2, 3),
            "layer_norm in vertex '1' has no",
        ),
    ],
)
def test_what_is_not_lowered_gets_a_reason(module: nn.Module, x: Tensor, reason: str) -> None:
    network = pck.PCNetwork(module, pck.Strict(2, 0.1))
    with pytest.raises(pck.Unsupported, match=reason):
        lower(network.trace(x))


@pytest.mark.parametrize(
    ("rule", "loss", "reason"),
    [
        (pck.ZeroDivergence(solver="iterate"), "squared_error", "literal zero-divergence"),
        (pck.Strict(2, 0.1), lambda y, t: (y - t).square().sum(1), "a loss of one's own"),
    ],
)
def test_what_code_cannot_do_gets_a_reason(rule: pck.rules.Rule, loss: object, reason: str, interpreted: Interpreted) -> None:
    network = pck.PCNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), rule, loss=loss)
    with pytest.raises(pck.Unsupported, match=reason):
        network.backward(torch.randn(2, 3), torch.randn(2, 2))


def test_a_parameter_of_a_convolution_and_a_linear_layer_is_refused(interpreted: Interpreted) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3))
    module[2].bias = module[0].bias
    with pytest.raises(pck.Unsupported, match="a convolution and a linear layer share a parameter"):
        pck.PCNetwork(module, pck.Strict(2, 0.1)).backward(torch.randn(2, 2, 4), torch.randn(2, 3))


def test_recorded_steps_are_refused(interpreted: Interpreted) -> None:
    network = pck.PCNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), pck.Strict(2, 0.1))
    with pytest.raises(pck.Unsupported, match="record=True"):
        network.infer(torch.randn(2, 3), torch.randn(2, 2), record=True)


# Code


def mlp_code(steps: int = 5, gram: bool = False) -> Compiled:
    network = pck.PCNetwork(
        nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3)), pck.Strict(steps, 0.1)
    )
    graph = network.trace(torch.randn(2, 6))
    return compile_steps(lower(graph), graph, pck.Strict(steps, 0.1).dynamics, {"output": Objective(Loss.SQUARED_ERROR)}, frozenset(), gram)


def test_the_constant_first_product_is_not_in_the_loop() -> None:
    loop = mlp_code().code.phases[1]
    for op in (Op.LINEAR, Op.LINEAR_T):
        assert sorted(i.p[1] for i in loop.instructions if i.op is op) == [40, 50]


def test_the_gram_form_needs_one_product_in_place_of_two() -> None:
    loop = mlp_code(gram=True).code.phases[1]
    assert [i.p[1:3] for i in loop.instructions if i.op is Op.LINEAR] == [(40, 40), (40, 3)]
    assert [i.p[1:3] for i in loop.instructions if i.op is Op.LINEAR_T] == [(40, 3)]


@pytest.mark.parametrize("rule", [pck.Strict(1, 0.2), pck.Strict(7, 0.2, momentum=0.6)], ids=str)
def test_the_gram_form_computes_the_same(rule: pck.Strict, monkeypatch: pytest.MonkeyPatch, interpreted: Interpreted) -> None:
    module = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    for pays in (False, True):
        monkeypatch.setattr(selection, "cheapest", lambda key, size, pays=pays: selection.compiled(*key, gram=pays))
        assert_same(pck.PCNetwork(module, rule), (torch.randn(4, 6).double(),), torch.randn(4, 3).double())
    assert interpreted.runs == 2


class LastState(nn.Module):
    """A recurrent layer whose width lets products of different time steps lie one after the other."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3)], ids=["rnn", "lstm", "gru"])
def test_all_time_steps_multiply_at_once(kind: type[nn.RNNBase], gates: int, interpreted: Interpreted) -> None:
    module = LastState(kind).double()
    network = pck.PCNetwork(module, pck.Strict(5, 0.1, momentum=0.5))
    assert_same(network, (torch.randn(3, 5, 4).double(),), torch.randn(3, 3).double())
    assert_same(
        pck.PCNetwork(module, pck.FixedPrediction(9, 0.3, solver="iterate")), (torch.randn(3, 5, 4).double(),), torch.randn(3, 3).double()
    )
    compiled = selection.compiled(network.graph, network.rule.dynamics, (("output", Objective(Loss.SQUARED_ERROR)),), frozenset())
    assert isinstance(compiled, Compiled) and interpreted.runs == 2
    for op in (Op.LINEAR, Op.LINEAR_T):
        positions = [i.p[0] for i in compiled.code.phases[1].instructions if i.op is op and i.p[2] == 16]
        assert positions == [4] * gates


def test_the_light_cone_delays_what_is_zero() -> None:
    loop = mlp_code().code.phases[1]
    assert {i.p[1]: i.first for i in loop.instructions if i.op is Op.LINEAR_T} == {40: 1, 50: 2}
    assert {i.p[1]: i.first for i in loop.instructions if i.op is Op.LINEAR} == {40: 1, 50: 2}


def test_memory_does_not_grow_with_the_steps() -> None:
    assert mlp_code(2).code.rows == mlp_code(200).code.rows


def test_rows_are_used_again() -> None:
    case = models.build("cnn")
    network = pck.PCNetwork(case.module, pck.ZeroDivergence(), loss=case.loss)
    program = lower(network.trace(case.x))
    compiled = selection.compiled(network.graph, None, (), frozenset())
    assert isinstance(compiled, Compiled)
    assert compiled.code.rows < sum(buffer.size for buffer in program.buffers)


def test_no_rows_are_shared_by_what_lives_at_once(interpreted: Interpreted) -> None:
    """Every instruction's operands, when it runs, hold what was last written to them: rows reused too early would not."""
    compiled = mlp_code()
    for instruction in compiled.code.instructions:
        starts = [start for start in (instruction.out, instruction.a, instruction.b, instruction.c, instruction.d) if start >= 0]
        assert all(0 <= start < compiled.code.rows and start % 16 == 0 for start in starts)
        if instruction.op in (Op.ACT_CHANGE, Op.ACT_GRAD, Op.ERROR):
            assert len(set(starts)) == len(starts)


def test_encoding() -> None:
    compiled = mlp_code()
    words, phases = compiled.code.encoded()
    assert words.shape == (len(compiled.code.instructions), WORDS) and words.dtype == torch.int32
    assert int(phases[:, 0].sum()) == len(words)
    move = next(k for k, i in enumerate(compiled.code.instructions) if i.op is Op.MOVE)
    assert words[move, 29:32].view(torch.float32).tolist() == pytest.approx([0.1, 0.0, 1.0])
