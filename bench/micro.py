"""Single kernels of the host engine, and what a call of an op costs before it computes anything, by pytest-benchmark.

    python -m pytest bench/micro.py          (or: make bench-micro)

Each kernel runs many times inside one call of the engine, on a tile of 64 samples; its result is held against PyTorch's before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pckernels as pck
from pckernels import engine, ops
from pckernels.backends import host
from pckernels.compiler import Compiled
from pckernels.emitter import Place
from pckernels.instructions import Activation, Code, Instruction, Op, Phase
from pckernels.memory import Packed
from pckernels.program import WeightInfo

BATCH, TIMES = 64, 50
CONV = (6, 14, 14, 16, 5, 5, 1, 1, 0, 0, 1, 1, 1, 10, 10)  # the second convolution of the paper's CNN

pytestmark = pytest.mark.skipif(not host.availability()[0], reason=host.availability()[1])


@pytest.fixture(autouse=True)
def one_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def repeated(instruction: Instruction, inputs: int, outputs: int, weight: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A call that loads x, runs one instruction TIMES times from row 0 to the rows behind it, and stores what it wrote."""
    load = Instruction(Op.LOAD, n=inputs, out=0, slot=0, p=(inputs, 0), barrier=True)
    store = Instruction(Op.STORE, n=outputs, a=behind(inputs), slot=1, p=(outputs, 0), barrier=True)
    phases = (Phase((load,), 0, 0), Phase((instruction,), 1, TIMES), Phase((store,), TIMES, TIMES))
    weights = () if weight is None else (WeightInfo("w", weight.shape[0], weight[0].numel()),)
    code = Code(phases, behind(inputs) + behind(outputs), len(weights), 2, 0, TIMES, 0)
    compiled = Compiled(code, weights, (Place("input", "x", inputs), Place("value", "y", outputs)), (), {}, carried=True)
    tensors = [] if weight is None else [weight]

    def call(x: Tensor) -> Tensor:
        kept = torch.empty(len(x) * compiled.kept_size)
        energies = torch.empty(TIMES + 1, 0, dtype=torch.float64)
        engine.execute(compiled, Packed(compiled, len(x), tensors, [x], kept, torch.empty(0), [], energies), len(x), 1.0)
        return kept.view(len(x), outputs)

    return call


def behind(rows: int) -> int:
    """The first row behind an array: arrays begin at multiples of 16."""
    return -(-rows // 16) * 16


def linear() -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], int]:
    weight = torch.randn(300, 300)
    instruction = Instruction(Op.LINEAR, a=0, out=behind(300), slot=0, p=(1, 300, 300), barrier=True)
    return repeated(instruction, 300, 300, weight), torch.randn(BATCH, 300), lambda x: x @ weight.t(), 300 * 300


def linear_transposed() -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], int]:
    weight = torch.randn(300, 300)
    instruction = Instruction(Op.LINEAR_T, a=0, out=behind(300), slot=0, p=(1, 300, 300), barrier=True)
    return repeated(instruction, 300, 300, weight), torch.randn(BATCH, 300), lambda x: x @ weight, 300 * 300


def convolution() -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], int]:
    weight, image, maps = torch.randn(16, 6, 5, 5), 6 * 14 * 14, 16 * 10 * 10
    instruction = Instruction(Op.CONV, a=0, out=behind(image), slot=0, p=CONV, barrier=True)
    expected = lambda x: F.conv2d(x.view(-1, 6, 14, 14), weight).flatten(1)  # noqa: E731
    return repeated(instruction, image, maps, weight), torch.randn(BATCH, image), expected, maps * 6 * 25


def convolution_transposed() -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], int]:
    weight, image, maps = torch.randn(16, 6, 5, 5), 6 * 14 * 14, 16 * 10 * 10
    instruction = Instruction(Op.CONV_T, a=0, out=behind(maps), slot=0, p=CONV, barrier=True)
    expected = lambda g: F.conv_transpose2d(g.view(-1, 16, 10, 10), weight).flatten(1)  # noqa: E731
    return repeated(instruction, maps, image, weight), torch.randn(BATCH, maps), expected, maps * 6 * 25


def activation(kind: Activation, expected: Callable[[Tensor], Tensor]) -> Callable[[], tuple[object, ...]]:
    def made() -> tuple[Callable[[Tensor], Tensor], Tensor, Callable[[Tensor], Tensor], int]:
        instruction = Instruction(Op.ACT, n=300, a=0, out=behind(300), p=(int(kind),), barrier=True)
        return repeated(instruction, 300, 300, None), torch.randn(BATCH, 300), expected, 300

    return made


KERNELS = {
    "linear 300x300": linear,
    "linear 300x300, transposed": linear_transposed,
    "conv 6->16 5x5": convolution,
    "conv 6->16 5x5, transposed": convolution_transposed,
    "relu 300": activation(Activation.RELU, torch.relu),
    "tanh 300": activation(Activation.TANH, torch.tanh),
    "gelu 300": activation(Activation.GELU, F.gelu),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel(benchmark, name: str) -> None:
    call, x, expected, work = KERNELS[name]()
    torch.testing.assert_close(call(x), expected(x), atol=1e-3, rtol=1e-4)
    benchmark(call, x)
    if benchmark.stats is not None:
        benchmark.extra_info["billion multiply-adds or elements a second, with packing"] = (
            BATCH * TIMES * work / benchmark.stats["median"] / 1e9
        )


def smallest() -> tuple[Compiled, Packed]:
    """One inference step of a network of three numbers, with its tensors."""
    found: list[tuple[Compiled, Packed]] = []
    execute = host.execute

    def keep(code: Compiled, memory: Packed, batch: int, factor: float) -> None:
        found.append((code, memory))
        execute(code, memory, batch, factor)

    module = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
    host.execute = keep
    try:
        pck.PCNetwork(module, pck.Strict(1, 0.1), backend="host").backward(torch.ones(1, 1), torch.ones(1, 1))
    finally:
        host.execute = execute
    return found[-1]


def test_overhead_of_the_engine(benchmark) -> None:
    code, memory = smallest()
    benchmark(engine.execute, code, memory, 1, 1.0)


def test_overhead_of_relax(benchmark) -> None:
    code, memory = smallest()
    number = ops.number_of(code)
    with torch.no_grad():
        benchmark(lambda: torch.ops.pckernels.relax.out(memory.weights, memory.inputs, number, 1, 1.0, out=memory.written))


def test_overhead_of_a_whole_call(benchmark) -> None:
    network = pck.PCNetwork(nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), pck.Strict(1, 0.1), backend="host")
    x = torch.ones(1, 1)
    network.backward(x, x)
    benchmark(network.backward, x, x)


@pytest.mark.parametrize("name", ["value_update", "local_update", "predict_error"])
@pytest.mark.parametrize("how", ["op", "its PyTorch operations alone"])
def test_overhead_of_an_op(benchmark, name: str, how: str) -> None:
    x, v, w = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    arguments = {"value_update": (v, v, v, v, 0.1), "local_update": (v, x), "predict_error": (x, w, None, v, "tanh")}[name]
    function = getattr(torch.ops.pckernels, name) if how == "op" else getattr(ops, f"_{name}")
    with torch.no_grad():
        benchmark(function, *arguments)
