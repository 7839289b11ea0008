"""relax_mlp, which holds a chain in registers, against the float64 reference: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from triton_case import DEVICE, relative_error, require_a_way_to_run

import pckernels as pck
from pckernels import dispatch, interpreter, triton_chain
from pckernels.backends import native, reference, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled, compile_steps
from pckernels.emitter import Objective
from pckernels.instructions import Loss
from pckernels.lowering import lower
from pckernels.memory import Memory

require_a_way_to_run()

from pckernels.triton import relax_mlp  # noqa: E402

UNIT = 2.0**-24
SIZES = {"narrow": (7, 8, 10, 3), "wide": (37, 100, 33, 64, 10), "widest": (20, 128, 128, 5), "shallow": (9, 6), "two": (5, 33, 12)}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "leaky": lambda: nn.LeakyReLU(0.2)}


class Chosen:
    """The kernel in the place of every backend but the reference, and how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    def choose(self, name: str, call: Call) -> tuple[str, Callable[[Call], Outcome], str]:
        if name == "reference":
            return name, reference.run, ""
        why = selection.refusal(call)
        assert why is None, why
        return "triton", lambda call: native.run(call, self.execute), ""

    def execute(self, compiled: Compiled, memory: Memory, batch: int, factor: float) -> None:
        if compiled.program is None:  # W W^T, by whoever runs the code: this kernel does not read it
            memory.gradients[0].fill_(float("nan"))
            return
        self.runs += 1
        poison(compiled, memory)
        relax_mlp.run(compiled, memory, batch, factor)


def poison(compiled: Compiled, memory: Memory) -> None:
    """Nothing unwritten can pass."""
    written = [tensor for place, tensor in zip(compiled.io, memory.io, strict=True) if place.is_result]
    for tensor in (*written, *memory.gradients, memory.energies):
        tensor.fill_(float("nan"))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    found = Chosen()
    monkeypatch.setattr(dispatch, "choose", found.choose)
    return found


def module(sizes: tuple[int, ...], activation: str) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(sizes):
        layers += [nn.Linear(k, n, bias=len(layers) != 2), ACTIVATIONS[activation]()]  # one layer without a bias
    return nn.Sequential(*layers[:-1])


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan refuses for want of registers is right all the same."""
    for limits in (triton_chain.REGISTERS, triton_chain.WIDEST):
        for precision in limits:
            monkeypatch.setitem(limits, precision, 10_000)


@lru_cache
def networks(name: str, activation: str) -> tuple[pck.PCNetwork, pck.PCNetwork]:
    """The same parameters in float64 and in float32."""
    net, rule = module(SIZES[name], activation), pck.Strict(1, 0.1)
    return pck.PCNetwork(copy.deepcopy(net).double(), rule), pck.PCNetwork(net.to(DEVICE), rule)


def data(name: str, batch: int, loss: str) -> tuple[Tensor, Tensor]:
    x, n = torch.randn(batch, SIZES[name][0]), SIZES[name][-1]
    if loss == "cross_entropy":
        labels = torch.randint(n, (batch,))
        return x, torch.where(torch.rand(batch) < 0.2, -100, labels)
    return x, torch.randn(batch, n)


def found_by(network: pck.PCNetwork, backend: str, rule: pck.rules.Rule, loss: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    network.backend, network.rule, network.loss = backend, rule, loss
    network.zero_grad()
    inference = network.backward(x, target)
    found = {f"value of {name}": value for name, value in inference.values.items() if value.is_floating_point()}
    found.update({f"error of {name}": error for name, error in inference.errors.items()})
    found.update({f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None})
    found.update({"energy": inference.energy, "loss": inference.loss})
    return {name: value.detach().double().cpu().clone() for name, value in found.items()}


def assert_as_good(name: str, activation: str, rule: pck.rules.Rule, batch: int, loss: str = "squared_error") -> None:
    wide, narrow = networks(name, activation)
    x, target = data(name, batch, loss)
    exact = found_by(wide, "reference", rule, loss, x.double(), target.double() if target.is_floating_point() else target)
    x, target = x.to(DEVICE), target.to(DEVICE)
    plain, ours = (found_by(narrow, backend, rule, loss, x, target) for backend in ("reference", "triton"))
    assert set(ours) == set(plain) == set(exact)
    slack = 8 * UNIT * max([1.0] + [float(value.abs().max()) for key, value in exact.items() if key.startswith("value")])
    for key, expected in exact.items():
        assert relative_error(ours[key], expected) <= 2 * relative_error(plain[key], expected) + slack, key


# Every number of steps on the cheapest chain; on the others, which differ in widths alone, some that reach every layer.
STEPS = [("narrow", steps) for steps in (0, 1, 2, 8)] + [(name, 4) for name in SIZES if name != "narrow"]


@pytest.mark.parametrize(("name", "steps"), STEPS)
@pytest.mark.parametrize("rule", ["strict", "momentum", "fixed"])
def test_every_rule(name: str, rule: str, steps: int, chosen: Chosen) -> None:
    rules = {
        "strict": pck.Strict(steps, 0.1),
        "momentum": pck.Strict(steps, 0.05, momentum=0.5),
        "fixed": pck.FixedPrediction(steps, 0.3, solver="iterate"),
    }
    assert_as_good(name, "tanh" if name == "narrow" else "relu", rules[rule], 17)
    assert chosen.runs == 1


def test_many_steps(chosen: Chosen) -> None:
    assert_as_good("narrow", "sigmoid", pck.Strict(64, 0.1, momentum=0.3), 3)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("rule", [pck.Strict(3, 0.2), pck.FixedPrediction(3, 0.4, solver="iterate")], ids=["strict", "fixed"])
def test_every_activation(activation: str, rule: pck.rules.Rule, chosen: Chosen) -> None:
    assert_as_good("narrow", activation, rule, 5)


@pytest.mark.parametrize("batch", [1, 15, 16, 33])
@pytest.mark.parametrize("loss", ["squared_error", "cross_entropy"])
def test_ragged_batches(batch: int, loss: str, chosen: Chosen) -> None:
    assert_as_good("narrow", "tanh", pck.Strict(3, 0.1), batch, loss)


# The code by itself


def code_of(
    name: str, activation: str, rule: pck.rules.Rule, loss: Loss = Loss.SQUARED_ERROR, learn: bool = True
) -> tuple[Compiled, nn.Module]:
    net = module(SIZES[name], activation)
    network = pck.PCNetwork(net, rule)
    network.trace(torch.randn(2, SIZES[name][0]))
    program = lower(network.graph)
    learning = frozenset(info.name for info in program.weights) if learn else frozenset()
    return compile_steps(program, network.graph, rule.dynamics, {"output": Objective(Loss.SQUARED_ERROR)}, learning), net


def memory_of(compiled: Compiled, net: nn.Module, batch: int, dtype: torch.dtype, device: str = "cpu") -> Memory:
    generator = torch.Generator().manual_seed(3)
    io = [torch.randn(batch, place.n, generator=generator).to(device, dtype) for place in compiled.io]
    weights = [p.detach().to(device, dtype) for p in net.parameters()]
    shapes = {info.name: p.shape for info, p in zip(compiled.weights, net.parameters(), strict=True)}
    gradients = [torch.empty(shapes[name], dtype=dtype, device=device) for name in compiled.gradients]
    energies = torch.empty(compiled.code.steps + 1, compiled.code.energies, dtype=torch.float64, device=device)
    memory = Memory(weights, io, gradients, energies)
    poison(compiled, memory)
    return memory


def results(compiled: Compiled, memory: Memory) -> list[Tensor]:
    written = [tensor for place, tensor in zip(compiled.io, memory.io, strict=True) if place.is_result]
    return [t.double().cpu() for t in (*written, *memory.gradients, memory.energies)]


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
    monkeypatch.setattr(interpreter, "Machine", Rounding if precision == "fp16" else interpreter.Machine)
    interpreter.execute(compiled.code, exact, 17, -0.5)
    allowed = 4 * 2.0**-11 * max(SIZES["wide"]) ** 0.5
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected.reshape(ours.shape)) <= allowed


class Rounding(interpreter.Machine):
    """Products whose operands are rounded to half precision."""

    def _linear(self, i, t):
        self._rounded(super()._linear, i, t)

    def _linear_t(self, i, t):
        self._rounded(super()._linear_t, i, t)

    def _rounded(self, product, i, t):
        weights, rows = self.memory.weights, self.rows
        self.memory.weights = [w if w.dim() == 1 else w.half().to(w.dtype) for w in weights]
        self.rows = lambda start, n: rows(start, n).half().to(self.dtype)
        try:
            product(i, t)
        finally:
            self.memory.weights = weights
            del self.rows


def test_a_call_that_does_not_learn_stores_errors_alone() -> None:
    compiled, net = code_of("narrow", "tanh", pck.Strict(2, 0.1), learn=False)
    memory, exact = memory_of(compiled, net, 5, torch.float32, DEVICE), memory_of(compiled, net, 5, torch.float64)
    relax_mlp.run(compiled, memory, 5, 1.0)
    interpreter.execute(compiled.code, exact, 5)
    for ours, expected in zip(results(compiled, memory), results(compiled, exact), strict=True):
        assert relative_error(ours, expected) < 1e-5
