"""Shared by the tests of the kernels of a chain: chains, calls that reach a kernel, and its code by itself."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import lru_cache

import test_backends as backends
import torch
from torch import Tensor, nn
from triton_case import relative_error

import pckernels as pck
from pckernels.backends import native, reference, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled, compile_steps
from pckernels.emitter import Objective
from pckernels.instructions import Loss
from pckernels.lowering import lower
from pckernels.memory import Memory

Run = Callable[[Compiled, Memory, int, float], None]
UNIT = 2.0**-24
SIZES = {
    "narrow": (7, 8, 10, 3),
    "wide": (37, 100, 33, 64, 10),
    "widest": (20, 128, 128, 5),
    "shallow": (9, 6),
    "two": (5, 33, 12),
    "ragged": (37, 100, 33, 129, 64, 10),
    "wide output": (20, 64, 70),
    "deep": (5,) * 7,
    "benchmark": (784, 300, 300, 10),
}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "hardtanh": nn.Hardtanh,
    "silu": nn.SiLU,
    "affine": nn.Identity,
}


class Chosen:
    """A kernel of chains in the place of every backend but the reference, and how often it ran."""

    def __init__(self, run: Run) -> None:
        self.run, self.runs = run, 0

    def choose(self, name: str, call: Call) -> tuple[str, Callable[[Call], Outcome], str]:
        if name == "reference":
            return name, reference.run, ""
        why = selection.refusal(call)
        assert why is None, why
        return "triton", lambda call: native.run(call, self.execute), ""

    def execute(self, compiled: Compiled, memory: Memory, batch: int, factor: float) -> None:
        if compiled.program is None:  # W W^T, by whoever runs the code: these kernels do not read it
            memory.gradients[0].fill_(float("nan"))
            return
        self.runs += 1
        poison(compiled, memory)
        self.run(compiled, memory, batch, factor)


def poison(compiled: Compiled, memory: Memory) -> None:
    """Nothing unwritten can pass."""
    written = [tensor for place, tensor in zip(compiled.io, memory.io, strict=True) if place.is_result]
    for tensor in (*written, *memory.gradients, memory.energies):
        tensor.fill_(float("nan"))


def module(sizes: tuple[int, ...], activation: str) -> nn.Module:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(sizes):
        layers += [nn.Linear(k, n, bias=len(layers) != 2), ACTIVATIONS[activation]()]  # one layer without a bias
    return nn.Sequential(*layers[:-1])


@lru_cache
def networks(name: str, activation: str, device: str) -> tuple[pck.PCNetwork, pck.PCNetwork]:
    """The same parameters in float64 and in float32."""
    net, rule = module(SIZES[name], activation), pck.Strict(1, 0.1)
    return pck.PCNetwork(copy.deepcopy(net).double(), rule), pck.PCNetwork(net.to(device), rule)


def data(name: str, batch: int, loss: str) -> tuple[Tensor, Tensor]:
    x, n = torch.randn(batch, SIZES[name][0]), SIZES[name][-1]
    if loss == "cross_entropy":
        labels = torch.randint(n, (batch,))
        return x, torch.where(torch.rand(batch) < 0.2, -100, labels)
    return x, torch.randn(batch, n)


def found_by(network: pck.PCNetwork, backend: str, rule: pck.rules.Rule, loss: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    network.backend = backend
    return {name: value.cpu() for name, value in backends.run(network, rule, loss, x, target).items()}


def assert_as_good(name: str, activation: str, rule: pck.rules.Rule, batch: int, loss: str = "squared_error", device: str = "cpu") -> None:
    wide, narrow = networks(name, activation, device)
    x, target = data(name, batch, loss)
    exact = found_by(wide, "reference", rule, loss, x.double(), target.double() if target.is_floating_point() else target)
    x, target = x.to(device), target.to(device)
    plain, ours = (found_by(narrow, backend, rule, loss, x, target) for backend in ("reference", "triton"))
    assert set(ours) == set(plain) == set(exact)
    slack = 8 * UNIT * max([1.0] + [float(value.abs().max()) for key, value in exact.items() if key.startswith("value")])
    for key, expected in exact.items():
        assert relative_error(ours[key], expected) <= 2 * relative_error(plain[key], expected) + slack, key


# The code by itself


def code_of(
    name: str, activation: str, rule: pck.rules.Rule, learn: bool = True, loss: Loss = Loss.SQUARED_ERROR
) -> tuple[Compiled, nn.Module]:
    net = module(SIZES[name], activation)
    network = pck.PCNetwork(net, rule)
    network.trace(torch.randn(2, SIZES[name][0]))
    program = lower(network.graph)
    learning = frozenset(info.name for info in program.weights) if learn else frozenset()
    objective = Objective(loss, SIZES[name][-1] if loss is Loss.CROSS_ENTROPY else 0)
    return compile_steps(program, network.graph, rule.dynamics, {"output": objective}, learning), net


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
