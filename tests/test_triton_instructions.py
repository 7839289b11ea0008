"""Each instruction of the machine in every variant, in code made by hand, against the interpreter in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import rounded_case
import torch
from fast_interpreter import install
from native_case import Case
from torch import Tensor
from triton_case import DEVICE, require_a_way_to_run

from pckernels.backends import triton
from pckernels.compiler import Compiled
from pckernels.instructions import Activation, Code, Loss, Op, OuterProduct, Phase
from pckernels.program import WeightInfo

require_a_way_to_run()
if DEVICE == "cpu":
    install()

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="these compare tensors of the CPU; run them with TRITON_INTERPRET=1")

LONG, SHORT = 70, 5  # rows: more and fewer than a kernel handles at once
BATCH, SUMMED, FEW = 18, 33, 3  # samples: two tiles; three, of which one program takes two; one tile, where that is slow
FACTOR = 2.0


def run(case: Case, precision: str = "fp32") -> list[Tensor]:
    """What the kernel makes of a case."""
    memory = case.memory(torch.float32)
    learned = tuple(WeightInfo(str(k), gradient.numel(), 1) for k, gradient in enumerate(memory.gradients))
    compiled = Compiled(case.code, learned, (), tuple(info.name for info in learned), {}, carried=True)
    with triton.options(variant="scratch", precision=precision):
        triton.launch(compiled, memory, case.batch, FACTOR)
    return case.outcome(memory)


def expected(case: Case, precision: str = "fp32") -> list[Tensor]:
    memory = case.memory(torch.float64)
    rounded_case.execute(case.code, memory, case.batch, FACTOR, precision)
    return case.outcome(memory)


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Of each result, the largest error relative to the largest element."""
    return [float((a.double() - b).abs().max() / (b.abs().max() + 1e-30)) for a, b in zip(found, wanted, strict=True)]


class Variants(Case):
    """A case in which each instruction has a result of its own. Those from `loop` on run at t = 1, 2 and 3."""

    loop: int | None = None

    def random(self, n: int) -> int:
        return self.load(torch.randn(self.batch, n))

    def put(self, op: Op, n: int, **operands: Any) -> int:
        """An instruction whose n rows of `out` hold something before it, and are stored after it."""
        out = self.random(n)
        self.add(op, n=n, out=out, **operands)
        self.store(out, n)
        return out

    @property
    def code(self) -> Code:
        code = super().code
        if self.loop is None:
            return code
        phases = (Phase(tuple(self.instructions[: self.loop]), 0, 0), Phase(tuple(self.instructions[self.loop :]), 1, 3))
        return replace(code, phases=phases, steps=3)

    def norm(self, a: int, n: int, **operands: Any) -> None:
        """Into an energy of its own."""
        slot = self.energies
        self.energies += 1
        self.add(Op.NORM, n=n, a=a, slot=slot, **operands)


def moves(n: int) -> Case:
    """Of rows between io and the arena, and inside of it."""
    case, f = Variants(BATCH), 0.5 if n == LONG else -1.5
    source, result, row = case.tensor(torch.randn(BATCH, n + 9)), case.result(n + 7), case.array(n)
    case.io[result].zero_()
    case.add(Op.LOAD, n=n, out=row, slot=source, p=(n + 9, 4))
    case.add(Op.STORE, n=n, a=row, b=case.random(n), slot=result, p=(n + 7, 3))
    case.add(Op.STORE, n=n, b=row, slot=case.result(n), p=(n, 0))
    case.add(Op.STORE, n=n, slot=case.result(n), p=(n, 0))
    case.put(Op.FILL, n, f=(f,))
    a = case.random(3 * n)
    for accumulate in (False, True):
        case.put(Op.COPY, 2 * n, a=a, p=(1, n, n, n), f=(f,), accumulate=accumulate)
        case.put(Op.COPY, 2 * n, a=a, p=(n // 3, 2, 5, 7), f=(f,), accumulate=accumulate)
    return case


def arithmetic(n: int) -> Case:
    case, f = Variants(BATCH), (0.5, -2.0) if n == LONG else (1.5, 0.25)
    a, b, c, d = (case.random(n) for _ in range(4))
    for accumulate in (False, True):
        case.put(Op.ADD, n, a=a, b=b, f=f, accumulate=accumulate)
        case.put(Op.ADD, n, a=a, f=f, accumulate=accumulate)
        case.put(Op.MUL_GRAD, n, a=a, b=b, c=c, accumulate=accumulate)
        case.put(Op.MUL_GRAD, n, a=a, b=b, accumulate=accumulate)
    case.put(Op.MUL, n, a=a, b=b)
    case.put(Op.MUL_CHANGE, n, a=a, b=b, c=c, d=d)
    case.put(Op.MUL_CHANGE, n, a=a, c=c, d=d)
    case.put(Op.MUL_CHANGE, n, a=a, b=b, c=c)
    return case


def dynamics(n: int) -> Case:
    """Of nodes, and what counts into the energy: sums over all tiles."""
    case, f = Variants(SUMMED), (0.1, 0.9, 1.5) if n == LONG else (0.3, 0.5, 0.7)
    a, b, velocity = (case.random(n) for _ in range(3))
    case.put(Op.ERROR, n, a=a, b=b)
    case.put(Op.MOVE, n, a=a, b=b, c=velocity, f=f)
    case.store(velocity, n)
    case.put(Op.MOVE, n, a=a, b=b, f=f)
    case.put(Op.RELAX, n, a=b, f=f[:1])
    case.norm(a, n, f=f[:1])
    case.norm(case.put(Op.ADD, n, a=a, b=b, f=(1.0, 0.25)), n, b=a, f=f[:1])
    return case


FACTORS = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1,), Activation.HARDTANH: (-1.0, 0.8)}


def activations() -> Case:
    case, n = Variants(FEW), SHORT
    for kind in Activation:
        p, f = (int(kind),), FACTORS.get(kind, ())
        z, dz, g = case.random(n), case.load(0.01 * torch.randn(FEW, n)), case.random(n)
        m = case.put(Op.ACT, n, a=z, p=p, f=f)
        case.put(Op.ACT_CHANGE, n, a=z, b=dz, c=m, p=p, f=f)
        case.put(Op.ACT_CHANGE, n, a=z, b=dz, p=p, f=f)
        case.put(Op.ACT_GRAD, n, a=g, b=z, c=dz, d=m, p=p, f=f)
        case.put(Op.ACT_GRAD, n, a=g, b=z, d=m, p=p, f=f, accumulate=True)
        case.put(Op.ACT_GRAD, n, a=g, b=z, p=p, f=f)
        if kind in (Activation.TANH, Activation.SIGMOID):
            case.put(Op.ACT_GRAD, n, a=g, b=m, c=dz, p=(*p, 1))
            case.put(Op.ACT_GRAD, n, a=g, b=m, p=(*p, 1), accumulate=True)
    return case


def losses(n: int) -> Case:
    """Both, with and without a change of mu and a place for each sample's loss."""
    case, f, classes, positions = Variants(SUMMED), (0.7 if n == LONG else -1.5,), *((4, 2) if n == LONG else (2, LONG))
    case.energies = 0
    for b, kept in ((True, True), (True, False), (False, True)):
        for p, rows in (((int(Loss.SQUARED_ERROR), 0), n), ((int(Loss.CROSS_ENTROPY), classes), positions * classes)):
            target = torch.randn(SUMMED, n) if rows == n else torch.randint(-1, classes, (SUMMED, positions))
            operands = {"a": case.random(rows), "c": case.load(target), "slot": case.energies}
            operands |= {"b": case.random(rows)} if b else {}
            operands |= {"slot2": case.result(1)} if kept else {}
            case.energies += 1
            case.put(Op.LOSS, rows, p=p, f=f, **operands)
    return case


def fine(*shape: int) -> Tensor:
    """Numbers that no half precision holds, of which float32 holds sums of two: both sides then round the same operands."""
    return (torch.randn(*shape) * 2**14).round() / 2**14


def linear(*p: int) -> Case:
    """Positions, inputs, outputs."""
    case, (positions, inputs, outputs) = Variants(BATCH), p
    weight, bias = case.weight(fine(outputs, inputs)), case.weight(fine(outputs))
    x, g = case.load(fine(BATCH, positions * inputs)), case.load(fine(BATCH, positions * outputs))
    for accumulate in (False, True):
        case.put(Op.LINEAR, positions * outputs, a=x, slot=weight, p=p, accumulate=accumulate)
        case.put(Op.LINEAR, positions * outputs, a=x, slot=weight, slot2=bias, p=p, accumulate=accumulate)
        case.put(Op.LINEAR_T, positions * inputs, a=g, slot=weight, p=p, accumulate=accumulate)
    return case


def output_sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = ((shape[k] + 2 * shape[k + 7] - shape[k + 9] * (shape[k + 3] - 1) - 1) // shape[k + 5] + 1 for k in (1, 2))
    return height, width


def convolution(*shape: int) -> Case:
    """C, H, W, C_out, kh, kw, sh, sw, ph, pw, dh, dw, groups."""
    case, p = Variants(FEW), (*shape, *output_sizes(shape))
    image, result = p[0] * p[1] * p[2], p[3] * p[13] * p[14]
    weight, bias = case.weight(fine(p[3], p[0] // p[12], p[4], p[5])), case.weight(fine(p[3]))
    x, dx, g = (case.load(fine(FEW, n)) for n in (image, image, result))
    case.put(Op.CONV, result, a=x, slot=weight, slot2=bias, p=p)
    case.put(Op.CONV, result, a=x, slot=weight, p=p, accumulate=True)
    for accumulate in (False, True):
        case.put(Op.CONV_T, image, a=g, slot=weight, p=p, accumulate=accumulate)
    twice, once = (case.gradient(*case.weights[weight].shape) for _ in range(2))
    case.add(Op.CONV_LEARN, a=g, b=x, slot=twice, p=p, f=(0.25,))
    case.add(Op.CONV_LEARN, a=g, b=x, slot=twice, p=p, f=(0.5,))
    case.add(Op.CONV_LEARN, a=g, b=x, c=dx, slot=once, p=p, f=(0.5,))
    return case


def pooling(average: bool, *shape: int) -> Case:
    """C, H, W, -, kh, kw, sh, sw, ph, pw, dh, dw, -."""
    case, p = Variants(FEW), (*shape, *output_sizes(shape))
    image, result = p[0] * p[1] * p[2], p[0] * p[13] * p[14]
    (average_pooling if average else max_pooling)(case, p, image, result)
    return case


def average_pooling(case: Variants, p: tuple[int, ...], image: int, result: int) -> None:
    x, g = case.random(image), case.random(result)
    for inside_only in (0, 1):
        case.put(Op.AVGPOOL, result, a=x, p=(*p, inside_only), accumulate=bool(inside_only))
        case.put(Op.AVGPOOL_T, image, a=g, p=(*p, inside_only), accumulate=bool(inside_only))


def max_pooling(case: Variants, p: tuple[int, ...], image: int, result: int) -> None:
    """With ties, of which the first counts."""
    p = (*p, 0)
    x, dx = (case.load(scale * torch.randint(-2, 3, (FEW, image))) for scale in (1.0, 0.25))
    g, where, moved, still = case.random(result), *(case.array(result) for _ in range(3))
    top = case.put(Op.MAXPOOL, result, a=x, b=where, p=p)
    case.put(Op.MAXPOOL_CHANGE, result, a=x, b=dx, c=top, d=moved, p=p)
    case.put(Op.MAXPOOL_CHANGE, result, a=x, c=top, d=still, p=p)
    for source, accumulate in ((where, False), (moved, True), (still, False)):
        case.put(Op.MAXPOOL_GRAD, image, a=g, b=source, p=p, accumulate=accumulate)


def sums() -> Case:
    """What is learned in the loop, by one program from two tiles, and after it. The last gradient nothing reaches."""
    case = Variants(SUMMED)
    a, columns, other = case.random(2 * 19 * 3), case.gradient(19), case.gradient(57)
    for p, slot, f in (((2, 19, 3), columns, 0.5), ((6, 19, 1), columns, 0.25), ((1, 57, 2), other, -1.0)):
        case.add(Op.SUM_LEARN, a=a, slot=slot, p=p, f=(f,))
    g, x, wide = case.tensor(fine(SUMMED, 2 * 19)), case.tensor(fine(SUMMED, 2 * 13)), case.tensor(fine(SUMMED, 50))
    weight, bias, second = case.gradient(19, 13), case.gradient(19), case.gradient(19, 13)
    case.products.append(OuterProduct(weight, bias, g, x, 2, 13, 19, 26, 0, 0.75))
    case.products.append(OuterProduct(weight, bias, g, wide, 2, 13, 19, 50, 11, -0.5))
    case.products.append(OuterProduct(second, columns, case.tensor(fine(SUMMED, 19)), wide, 1, 13, 19, 50, 3))
    case.gradient(7)
    return case


def steps() -> Case:
    """A loop over steps, and one instruction that starts late in it."""
    case = Variants(SUMMED)
    a, b = case.random(SHORT), case.random(SHORT)
    case.norm(a, SHORT, f=(1.0,))
    case.loop = len(case.instructions)
    case.add(Op.ADD, n=SHORT, out=b, a=a, b=b, f=(1.0, 0.5))
    case.add(Op.ADD, n=SHORT, out=b, a=a, f=(1.0, 0.0), accumulate=True, first=2)
    case.norm(b, SHORT, f=(1.0,))
    case.store(b, SHORT)
    return case


# Blocks of rows, of columns and of the sum; more than one position.
LINEARS = [(1, 70, 67), (3, 5, 7)]
# C, H, W, C_out, kh, kw, sh, sw, ph, pw, dh, dw, groups. The last two: a convolution of sequences, and more channels than a block has.
CONVOLUTIONS = [
    (4, 4, 3, 4, 3, 2, 2, 1, 1, 2, 1, 2, 2),
    (2, 5, 4, 3, 2, 3, 1, 2, 0, 1, 3, 1, 1),
    (3, 1, 7, 2, 1, 3, 1, 1, 0, 1, 1, 2, 1),
    (34, 1, 2, 35, 1, 1, 1, 1, 0, 0, 1, 1, 1),
]
MAX_POOLS = [
    (2, 6, 5, 0, 3, 2, 2, 1, 1, 0, 1, 2, 0),
    (1, 5, 7, 0, 2, 3, 1, 2, 0, 1, 3, 1, 0),
]
AVERAGE_POOLS = [
    (2, 6, 5, 0, 3, 2, 2, 1, 1, 0, 1, 1, 0),
    (1, 5, 6, 0, 2, 3, 1, 2, 0, 1, 1, 1, 0),
]
PRODUCTS: dict[str, Callable[[], Case]] = {
    **{f"linear {p}": partial(linear, *p) for p in LINEARS},
    **{f"convolution {shape}": partial(convolution, *shape) for shape in CONVOLUTIONS},
    "sums": sums,
}
CASES: dict[str, Callable[[], Case]] = {
    **{f"{make.__name__} {n}": partial(make, n) for make in (moves, arithmetic, dynamics, losses) for n in (SHORT, LONG)},
    **{f"maximum {shape}": partial(pooling, False, *shape) for shape in MAX_POOLS},
    **{f"average {shape}": partial(pooling, True, *shape) for shape in AVERAGE_POOLS},
    "activations": activations,
    "steps": steps,
    **PRODUCTS,
}


@pytest.mark.parametrize("name", CASES)
def test_every_variant(name: str) -> None:
    case = CASES[name]()
    assert all(distance <= 4e-6 for distance in distances(run(case), expected(case)))


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_rounded_operands(name: str) -> None:
    """Operands are rounded, each once, and nothing else is: from float32's result every product is far, and only sums are not."""
    case = PRODUCTS[name]()
    found = run(case, "fp16")
    assert all(distance <= 4e-6 for distance in distances(found, expected(case, "fp16")))
    exact = [distance <= 2e-5 for distance, result in zip(distances(found, expected(case)), found, strict=True) if result.any()]
    assert exact.count(True) == (3 if name == "sums" else 0)


# Of the clusters of the CUDA engine and of the graph tier alone.
BEYOND = {Op.MEET, Op.GATHER, Op.MOVE_OR_REST, Op.REST, Op.LINEAR_LEARN, Op.MOVE_WEIGHTS}
# What instructions.py allows, of what the machine runs: parameters, factors, operands that may be absent, and whether it accumulates.
IMAGE, KERNEL, RESULT = (0, 1, 2), (4, 5, 6, 7, 8, 9), (13, 14)
CONVOLUTION = (*IMAGE, 3, *KERNEL, 10, 11, 12, *RESULT)
MAXIMUM, AVERAGE = (*IMAGE, *KERNEL, 10, 11, *RESULT), (*IMAGE, *KERNEL, *RESULT, 15)
FREEDOM: dict[Op, tuple[tuple[int, ...], int, str, bool]] = {
    Op.LOAD: ((0, 1), 0, "", False),
    Op.STORE: ((0, 1), 0, "a b", False),
    Op.FILL: ((), 1, "", False),
    Op.COPY: ((0, 1, 2, 3), 1, "", True),
    Op.LINEAR: ((0, 1, 2), 0, "slot2", True),
    Op.LINEAR_T: ((0, 1, 2), 0, "", True),
    Op.CONV: (CONVOLUTION, 0, "slot2", True),
    Op.CONV_T: (CONVOLUTION, 0, "", True),
    Op.ACT: ((0,), 2, "", False),
    Op.ACT_CHANGE: ((0,), 2, "c", False),
    Op.ACT_GRAD: ((0, 1), 2, "c d", True),
    Op.ADD: ((), 2, "b", True),
    Op.MUL: ((), 0, "", False),
    Op.MUL_CHANGE: ((), 0, "b d", False),
    Op.MUL_GRAD: ((), 0, "c", True),
    Op.MAXPOOL: (MAXIMUM, 0, "", False),
    Op.MAXPOOL_CHANGE: (MAXIMUM, 0, "b", False),
    Op.MAXPOOL_GRAD: (MAXIMUM, 0, "", True),
    Op.AVGPOOL: (AVERAGE, 0, "", True),
    Op.AVGPOOL_T: (AVERAGE, 0, "", True),
    Op.LOSS: ((0, 1), 1, "b slot2", False),
    Op.ERROR: ((), 0, "", False),
    Op.MOVE: ((), 3, "c", False),
    Op.RELAX: ((), 1, "", False),
    Op.NORM: ((), 1, "b", False),
    Op.CONV_LEARN: (CONVOLUTION, 1, "c", False),
    Op.SUM_LEARN: ((0, 1, 2), 1, "", False),
}


def test_whatever_an_instruction_may_say_it_says_in_two_ways() -> None:
    """So nothing of it can be ignored; nor one axis taken for the other."""
    words = [instruction for make in CASES.values() for instruction in make().instructions]
    assert {instruction.op for instruction in words} == FREEDOM.keys() == set(Op) - BEYOND
    for op, (parameters, factors, optional, accumulates) in FREEDOM.items():
        mine = [instruction for instruction in words if instruction.op is op]
        for k in parameters:
            assert len({(*i.p, 0)[k] for i in mine}) > 1, (op, f"p{k}")
        for k in range(factors):
            assert len({(*i.f, 0.0, 0.0)[k] for i in mine}) > 1, (op, f"f{k}")
        for operand in optional.split():
            assert {getattr(i, operand) < 0 for i in mine} == {True, False}, (op, operand)
        assert {i.accumulate for i in mine} == ({True, False} if accumulates else {False}), op
        for k in (1, 4, 6, 8, 10, 13):
            assert {k, k + 1} - set(parameters) or any(i.p[k] != i.p[k + 1] for i in mine), (op, f"p{k} and p{k + 1}")
