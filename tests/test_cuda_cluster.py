"""The cluster tier without a GPU: blocks that share a tile, on the CPU, one as far ahead as it can get, or all in a random order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cuda_emulated
import pytest
import test_backends as backends
import test_cuda_emulated as emulated
import torch
from native_case import Case
from test_cuda_emulated import of_native_ops, random
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import cuda
from pckernels.compiler import Compiled
from pckernels.engine import arguments
from pckernels.instructions import Code, Instruction, Op, Phase
from pckernels.memory import Memory
from pckernels.planner import Limits
from pckernels.sharding import sharded

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("emulator")]

LIMITS = Limits.of(90, 16)


def cut(lanes: int, cluster: int, precision: str = "fp32", blocks: int = 0) -> tuple[Any, ...]:
    return (lanes, precision, "cluster", blocks, 0, cluster)


# Instructions


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 7, 5), (3, 33, 17), (1, 129, 100)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_products(built: Any, positions: int, inputs: int, outputs: int, accumulate: bool) -> None:
    """From an operand that each block owns a part of, into one that is so: of each position, where there are several."""

    def make(batch: int) -> Case:
        case, p = Case(batch), (positions, inputs, outputs)
        w, bias = case.weight(torch.randn(outputs, inputs)), case.weight(torch.randn(outputs))
        x, out = case.load(random(batch, positions * inputs)), case.load(random(batch, positions * outputs))
        case.add(Op.ADD, n=positions * inputs, out=x, a=x, b=x, f=(0.5, 1.0))
        case.add(Op.LINEAR, out=out, a=x, slot=w, slot2=bias, p=p, accumulate=accumulate)
        case.add(Op.MUL, n=positions * outputs, out=out, a=out, b=out)
        case.add(Op.LINEAR_T, out=x, a=out, slot=w, p=p, accumulate=accumulate)
        case.store(out, positions * outputs)
        case.store(x, positions * inputs)
        return case

    tensor = [cut(16, 2, "tf32"), cut(8, 4, "bf16"), cut(16, 2, "fp16")]
    emulated.check(built, make, [cut(1, 2), cut(4, 4), cut(16, 2), cut(8, 8, blocks=8), *tensor], (1, 17))
    emulated.check(built, make, [cut(1, 16)], (2,))


@pytest.fixture
def on_clusters(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.check_native_ops_on(built, monkeypatch, [cut(1, 2), cut(8, 4), cut(16, 2)])


@pytest.mark.usefixtures("on_clusters")
class TestOperations:
    """Every operation that blocks can share but products, as the host engine's tests make them."""

    @pytest.mark.parametrize("accumulate", [False, True])
    def test_arithmetic(self, accumulate: bool) -> None:
        of_native_ops("test_arithmetic")(37, accumulate)

    def test_load_store_and_copy(self) -> None:
        of_native_ops("test_load_and_store_parts_of_rows")(33)
        of_native_ops("test_store_of_nothing_is_zero")()
        for p in ((4, 7, 9, 20), (20, 1, 3, 2)):
            of_native_ops("test_copy")(accumulate=True, p=p)

    def test_dynamics_and_sums(self) -> None:
        emulated.check_dynamics_and_sums()

    def test_activations(self) -> None:
        for kind in of_native_ops("Activation"):
            of_native_ops("test_activations")(kind, 1e-2)


# Whole calls


@pytest.fixture
def backend(built: Any, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> str:
    cuda_emulated.install(built, monkeypatch, LIMITS)
    return "cuda"


RULES = [pck.Strict(3, 0.1, momentum=0.5), pck.FixedPrediction(6, 0.3, solver="iterate"), pck.ZeroDivergence()]


@pytest.mark.parametrize("name", ["mlp", "skip", "rnn"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'steps', '')}")
def test_every_rule(backend: str, name: str, rule: pck.rules.Rule) -> None:
    with cuda.options(cluster=2):
        backends.assert_as_good(backend, name, rule, 5)


@pytest.mark.parametrize("steps", [0, 1, 2, 8])
def test_steps_and_sweeps(backend: str, steps: int) -> None:
    with cuda.options(cluster=4, lanes=4):
        backends.assert_as_good(backend, "mlp64", pck.Strict(steps, 0.1), 5)
        backends.assert_as_good(backend, "mlp64", pck.Strict(steps, 0.1, sweep="red_black"), 5)


@pytest.mark.parametrize(("lanes", "cluster"), [(1, 2), (2, 4), (4, 2), (8, 4), (16, 8)])
def test_every_tile(backend: str, lanes: int, cluster: int) -> None:
    """Of ragged batches and widths; in some the last blocks own nothing."""
    with cuda.options(lanes=lanes, cluster=cluster):
        for batch, width in ((1, 10), (15, 129), (17, 8)):
            backends.assert_as_good(backend, f"mlp{width}", pck.Strict(2, 0.1), batch, "cross_entropy")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_bits_are_those_of_a_block_alone(backend: str, precision: str) -> None:
    """A warp sums a column as it would alone. Energies are summed in another order."""
    _, network = backends.networks("mlp64")
    x, target = backends.data("mlp64", 17, "squared_error")
    found = []
    for options in ({"tier": "resident"}, {"cluster": 2}, {"cluster": 4}):
        with cuda.options(precision, lanes=8, **options):  # type: ignore[arg-type]
            network.backend, network.rule, network.loss = backend, pck.Strict(3, 0.1), "squared_error"
            inference = network.backward(x, target)
            found.append([*inference.errors.values(), *inference.values.values()])
            network.zero_grad()
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_is_not_for_clusters_is_refused(built: Any, backend: str) -> None:
    _, network = backends.networks("cnn")
    network.backend, network.rule, network.loss = backend, pck.Strict(3, 0.1), "squared_error"
    with cuda.options(cluster=2), pytest.raises(pck.Unsupported, match=r"this program has CONV, .*"):
        network.infer(*backends.data("cnn", 3, "squared_error"))
    case = Case(1)
    case.add(Op.FILL, n=1, out=case.array(1), f=(1.0,))
    for wanted, text in (
        (cut(8, 3), "A cluster has 1, 2, 4, 8 or 16 blocks, not 3"),
        ((8, "fp32", "stream", 0, 0, 2), "'cluster' for a program that several blocks share; got 'stream'"),
        ((16, "bf16", "cluster", 0, 64, 2), "Blocks of a cluster multiply by simt or mma, not by wgmma"),
    ):
        with pytest.raises(ValueError, match=text):
            case.run(cuda_emulated.Engine(built, *wanted))


# Mutations


class Small:
    """Strict inference of a small MLP by clusters of 4 blocks, of which the last owns nothing but of the widest layer."""

    def __init__(self, built: Any):
        torch.manual_seed(0)
        self.built, self.batch = built, 2
        self.compiled = self._compiled()
        self.code = sharded(self.compiled.code, 4)
        self.weights = [0.2 * torch.randn(info.outputs * info.inputs) for info in self.compiled.weights]
        self.io = [torch.randn(self.batch, place.n) for place in self.compiled.io]

    def _compiled(self) -> Compiled:
        from test_sharding import code_of

        module = nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 3))
        return code_of(module, torch.randn(2, 20), pck.Strict(6, 0.1))

    def run(self, code: Code) -> list[Tensor]:
        io = [tensor.clone() for tensor in self.io]
        energies = torch.full((code.steps + 1, code.energies), float("nan"), dtype=torch.float64)
        memory = Memory(self.weights, io, [torch.zeros(size) for size in self.compiled.gradient_sizes], energies)
        program = self.built.Program(**arguments(replace(self.compiled, code=code)), cluster=4)
        pointers = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.io, memory.gradients))
        cuda_emulated.Program(program, ("cluster", 1, "fp32", 4, "", 0)).run(*pointers, energies.data_ptr(), self.batch)
        return [*io, *memory.gradients, energies]


def without(code: Code, number: int, instead: tuple[Instruction, ...]) -> Code:
    """The code with another thing in the place of its MEET of this number."""
    phases, seen = [], 0
    for phase in code.phases:
        instructions: list[Instruction] = []
        for i in phase.instructions:
            here = i.op is Op.MEET and seen == number
            seen += i.op is Op.MEET
            instructions += instead if here else [i]
        phases.append(Phase(tuple(instructions), phase.first, phase.last))
    return replace(code, phases=tuple(phases))


BARRIER = Instruction(Op.FILL, out=0, f=(0.0,), barrier=True)  # of a block, and nothing else


@pytest.mark.parametrize("instead", [(), (BARRIER,)], ids=["removed", "of the block alone"])
def test_every_meeting_is_needed(built: Any, instead: tuple[Instruction, ...]) -> None:
    small = Small(built)
    right = small.run(small.code)
    assert all(torch.equal(a, b) for a, b in zip(right, small.run(small.code), strict=True))
    meetings = sum(i.op is Op.MEET for i in small.code.instructions)
    assert meetings >= 6
    for number in range(meetings):
        wrong = without(small.code, number, instead)
        runs = (small.run(wrong) for _ in range(12))
        assert any(not torch.equal(a, b) for run in runs for a, b in zip(right, run, strict=True)), number


def test_every_gather_is_needed(built: Any) -> None:
    small = Small(built)
    right = small.run(small.code)
    gathers = [(p, k) for p, phase in enumerate(small.code.phases) for k, i in enumerate(phase.instructions) if i.op is Op.GATHER]
    for p, k in gathers:
        phase = small.code.phases[p]
        rest = (*phase.instructions[:k], *phase.instructions[k + 1 :])
        phases = (*small.code.phases[:p], replace(phase, instructions=rest), *small.code.phases[p + 1 :])
        wrong = small.run(replace(small.code, phases=phases))
        assert any(not torch.equal(a, b) for a, b in zip(right, wrong, strict=True)), (p, k)
