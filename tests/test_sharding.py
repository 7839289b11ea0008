"""Code for a cluster: when its blocks meet, and that each of them has what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import test_backends as backends
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends.selection import compiled
from pckernels.compiler import Compiled
from pckernels.emitter import Objective
from pckernels.instructions import Code, Instruction, Loss, Op, Phase
from pckernels.interpreter import execute
from pckernels.memory import Memory
from pckernels.sharding import _reads, _writes, refusal, runs_whole, sharded, share


def code_of(module: nn.Module, x: Tensor, rule: pck.rules.Rule, loss: Loss = Loss.SQUARED_ERROR, classes: int = 0) -> Compiled:
    graph = pck.PCNetwork(module, rule).trace(x)
    learning = frozenset(name for name, _ in module.named_parameters())
    found = compiled(graph, rule.dynamics, (("output", Objective(loss, classes)),), learning)
    assert isinstance(found, Compiled)
    return found


def deep(depth: int, width: int = 20) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 5))


def count(phase: Phase, op: Op) -> int:
    return sum(i.op is op for i in phase.instructions)


@pytest.mark.parametrize(("depth", "momentum"), [(2, 0.0), (3, 0.5), (12, 0.0)])
@pytest.mark.parametrize("loss", [Loss.SQUARED_ERROR, Loss.CROSS_ENTROPY])
def test_blocks_meet_twice_a_jacobi_step_whatever_the_depth(depth: int, momentum: float, loss: Loss) -> None:
    found = code_of(deep(depth), torch.randn(2, 20), pck.Strict(40, 0.1, momentum), loss, 5)
    for blocks in (2, 8, 16):
        phases = [phase for phase in sharded(found.code, blocks).phases if phase.first > 0]
        loop = max(phases, key=lambda phase: phase.last - phase.first)
        assert loop.last - loop.first > 20
        assert count(loop, Op.MEET) == 2
        assert count(loop, Op.GATHER) == 2 * depth  # the errors behind f', the output's with them, and the values


def test_shares_are_whole_groups_of_rows() -> None:
    for n in (1, 10, 16, 17, 100, 129, 300):
        for blocks in (2, 4, 8, 16):
            assert share(n, blocks) % 16 == 0 and (share(n, blocks) - 16) * blocks < n <= share(n, blocks) * blocks


def owned(code: Code, blocks: int) -> None:
    """Walk the phases and check, row by row, that nothing is read where it is not: an account of its own, kept by block."""
    has = torch.zeros(blocks, code.rows, dtype=torch.bool)
    written = torch.zeros(code.rows, dtype=torch.bool)
    for phase in code.phases:
        for _ in range(3 if phase.last > phase.first else 1):
            for i in phase.instructions:
                if i.op is Op.GATHER:
                    rows = torch.arange(i.out, i.out + i.n)
                    assert has[(rows - i.a) % i.p[0] // share(i.p[0], blocks), rows].all()
                    has[:, rows] = True
                if i.op in (Op.GATHER, Op.MEET):
                    continue
                for operand in _reads(i):
                    assert (has[:, operand.index] | ~written[operand.index] | ~those_of(operand, blocks)).all(), i
                for operand in _writes(i):
                    written[operand.index] = True
                    has[:, operand.index] = those_of(operand, blocks)


def those_of(operand: Any, blocks: int) -> Tensor:
    """(blocks, rows): whether a block touches the row."""
    owners = torch.from_numpy(operand.owners(blocks))
    return (owners == torch.arange(blocks)[:, None]) | (not operand.own)


MODELS = ["mlp", "mlp129", "skip", "rnn"]
RULES = [pck.Strict(9, 0.1, momentum=0.5), pck.Strict(2, 0.1, sweep="red_black"), pck.FixedPrediction(6, 0.3, solver="iterate")]


CASES = [*((name, rule) for name in MODELS for rule in RULES), ("lstm", RULES[0])]


@pytest.mark.parametrize(
    ("name", "rule"), CASES, ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}{value.steps}"
)
def test_every_block_has_what_it_reads(name: str, rule: pck.rules.Rule) -> None:
    _, network = backends.networks(name)
    x, _ = backends.data(name, 3, "squared_error")
    code = code_of(network.module, x, rule).code
    for blocks in (2, 8):
        owned(sharded(code, blocks), blocks)


@pytest.mark.parametrize("name", MODELS)
def test_on_one_arena_nothing_changes(name: str) -> None:
    """Cutting a loop where the light cone lets instructions in, and running some of them early, changes no bit."""
    _, network = backends.networks(name)
    x, _ = backends.data(name, 3, "squared_error")
    found = code_of(network.module, x, pck.Strict(9, 0.1))
    torch.manual_seed(0)
    weights = [0.2 * torch.randn(info.outputs * info.inputs, dtype=torch.float64) for info in found.weights]
    io = [torch.randn(3, place.n, dtype=torch.float64) for place in found.io]
    results = []
    for code in (found.code, sharded(found.code, 4)):
        gradients = [torch.zeros(size, dtype=torch.float64) for size in found.gradient_sizes]
        memory = Memory(
            weights, [tensor.clone() for tensor in io], gradients, torch.zeros(code.steps + 1, code.energies, dtype=torch.float64)
        )
        execute(code, memory, 3)
        results.append([*memory.io, *memory.gradients, memory.energies])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_blocks_cannot_share_is_refused() -> None:
    _, network = backends.networks("cnn")
    code = code_of(network.module, backends.data("cnn", 2, "squared_error")[0], pck.Strict(2, 0.1)).code
    assert "this program has CONV, " in str(refusal(code))
    with pytest.raises(ValueError, match=r"share products and row-by-row instructions alone; this program has CONV"):
        sharded(code, 2)


def test_an_owner_waits_for_those_who_still_gather() -> None:
    """A write after the gathering of the same rows, with nothing in between that made the blocks meet."""
    fill, product = Instruction(Op.FILL, n=40, out=0, f=(1.0,)), Instruction(Op.LINEAR, out=48, a=0, slot=0, p=(1, 40, 40))
    (phase,) = sharded(Code((Phase((fill, product, fill), 0, 0),), 96, 1, 0, 0, 0, 0), 2).phases
    assert [i.op for i in phase.instructions] == [Op.FILL, Op.MEET, Op.GATHER, Op.LINEAR, Op.MEET, Op.FILL]
    assert [i.barrier for i in phase.instructions] == [True, False, False, True, False, False]


def test_rows_that_change_hands_from_turn_to_turn_are_whole_before() -> None:
    """Written as 40 rows before the loop, as two positions of 20 inside, and read first by a product."""
    fill = Instruction(Op.FILL, n=40, out=0, f=(1.0,))
    read, write = Instruction(Op.LINEAR, out=48, a=0, slot=0, p=(1, 40, 40)), Instruction(Op.LINEAR, out=0, a=48, slot=1, p=(2, 20, 20))
    code = sharded(Code((Phase((fill,), 0, 0), Phase((read, write), 1, 3)), 96, 2, 0, 0, 3, 0), 2)
    assert [{i.op for i in phase.instructions} for phase in code.phases[:2]] == [{Op.FILL}, {Op.MEET, Op.GATHER}]
    owned(code, 2)


def test_a_loss_of_one_block_is_not_whole() -> None:
    squared, logits = (int(Loss.SQUARED_ERROR), 0), (int(Loss.CROSS_ENTROPY), 10)
    assert not runs_whole(Instruction(Op.LOSS, n=10, p=logits)) and not runs_whole(Instruction(Op.LOSS, n=40, p=squared))
    assert runs_whole(Instruction(Op.LOSS, n=20, p=logits)) and runs_whole(Instruction(Op.LOSS, n=40, slot2=0, p=squared))
