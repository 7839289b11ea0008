"""The order of a loop's instructions, and where their barriers are."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import pckernels as pck
from pckernels.arena import Array, Draft, Section, assemble
from pckernels.backends.selection import compiled
from pckernels.compiler import Compiled
from pckernels.emitter import Objective
from pckernels.instructions import Instruction, Loss, Op
from pckernels.ordering import dependences, order_loops, ordered


def barriers(*drafts: Draft) -> list[bool]:
    (phase,), _ = assemble([Section(0, 0, list(drafts))])
    return [instruction.barrier for instruction in phase.instructions]


def copy_of(a: Array, out: Array) -> Draft:
    return Draft(Op.ADD, out, a, n=out.n, f=(1.0, 0.0))


def test_rows_of_the_same_length_need_no_barrier() -> None:
    """A thread finds its own rows as it left them."""
    x, y, z = (Array(20) for _ in range(3))
    assert barriers(Draft(Op.FILL, x, n=20), copy_of(x, y), Draft(Op.ERROR, z, x, y, n=20), Draft(Op.NORM, a=z, n=20)) == [True] + 3 * [
        False
    ]


def test_a_product_meets_with_what_comes_before_and_after() -> None:
    x, y, z = Array(20), Array(20), Array(20)
    assert barriers(Draft(Op.FILL, x, n=20), Draft(Op.LINEAR, y, x, p=(1, 20, 20)), copy_of(y, z)) == [True, True, True]


def test_rows_that_are_shared_out_otherwise_need_a_barrier() -> None:
    """Parts of an array have rows of their own: a thread's share of the part is not its share of the whole."""
    whole = Array(64, parts=())
    half = Array(32, whole=whole, start=32)
    whole.parts = (Array(32, whole=whole, start=0), half)
    out = Array(32)
    assert barriers(Draft(Op.FILL, whole, n=64), copy_of(half, out)) == [True, True]


def test_a_copy_at_another_place_needs_a_barrier() -> None:
    x, y, z = Array(32), Array(32), Array(32)
    shifted = Draft(Op.COPY, y, x, p=(1, 16, 16, 16), f=(1.0,), out_at=16)
    assert barriers(Draft(Op.FILL, x, n=32), Draft(Op.FILL, y, n=32), shifted, copy_of(y, z)) == [True, False, True, True]


def test_rows_change_hands_behind_a_barrier_alone() -> None:
    """An array of another length, born where one has died, would be written by other threads."""
    x, y, z = Array(48), Array(32), Array(32)
    drafts = [Draft(Op.FILL, x, n=48), Draft(Op.NORM, a=x, n=48, slot=0), Draft(Op.FILL, y, n=32), copy_of(y, z)]
    (phase,), _ = assemble([Section(0, 0, drafts)])
    assert not overlaps(phase.instructions[0], 48, phase.instructions[2], 32) or phase.instructions[2].barrier


def overlaps(first: Instruction, rows: int, second: Instruction, others: int) -> bool:
    return first.out < second.out + others and second.out < first.out + rows


@pytest.mark.parametrize("seed", range(40))
def test_the_order_of_what_depends_on_each_other_stays(seed: int) -> None:
    draw = random.Random(seed)
    arrays = [Array(n) for n in (16, 16, 16, 32, 32, 48)]
    drafts = []
    for _ in range(25):
        out, a = draw.sample(arrays, 2)
        kind = draw.choice(["add", "linear", "norm", "fill"])
        if kind == "linear":
            drafts.append(Draft(Op.LINEAR, out, a, p=(1, a.n, out.n), accumulate=draw.random() < 0.5))
        elif kind == "norm":
            drafts.append(Draft(Op.NORM, a=a, n=a.n, slot=draw.randrange(3)))
        elif kind == "fill":
            drafts.append(Draft(Op.FILL, out, n=out.n, f=(0.0,)))
        else:
            drafts.append(Draft(Op.ADD, out, draw.choice([each for each in arrays if each.n == out.n]), n=out.n, f=(1.0, 0.0)))
    result = ordered(drafts)
    assert sorted(map(id, result)) == sorted(map(id, drafts))
    place = {id(draft): k for k, draft in enumerate(result)}
    for k, before in enumerate(dependences(drafts)):
        assert all(place[id(drafts[j])] < place[id(drafts[k])] for j in before)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_as_many_barriers_whatever_the_depth(momentum: float) -> None:
    """The layers of a Jacobi step are independent: all feedback products lie between two barriers, and all forward products."""
    found = []
    for depth in (3, 12):
        layers = [layer for _ in range(depth) for layer in (nn.Linear(20, 20), nn.Tanh())]
        network = pck.PCNetwork(nn.Sequential(*layers, nn.Linear(20, 5)), pck.Strict(4, 0.1, momentum))
        graph = network.trace(torch.randn(2, 20))
        code = compiled(graph, network.rule.dynamics, (("output", Objective(Loss.SQUARED_ERROR)),), frozenset())
        assert isinstance(code, Compiled)
        (loop,) = (phase for phase in code.code.phases if phase.last > phase.first)
        found.append(sum(instruction.barrier for instruction in loop.instructions))
    assert found == [5, 5]  # before f', the feedback products, the moves, the forward products, the errors


def test_a_norm_comes_right_behind_its_error() -> None:
    """While its rows are in the cache, not behind the products of the step."""
    d, change, eps, out = (Array(16) for _ in range(4))
    error, product, norm = (
        Draft(Op.ERROR, eps, d, change, n=16),
        Draft(Op.LINEAR, out, d, p=(1, 16, 16)),
        Draft(Op.NORM, a=eps, n=16, slot=0),
    )
    section = Section(1, 5, [error, product, norm])
    order_loops([section])
    assert section.drafts.index(norm) == section.drafts.index(error) + 1
    once = Section(0, 0, [error, product, norm])
    order_loops([once])
    assert once.drafts == [error, product, norm]
