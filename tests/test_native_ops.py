"""Each operation of the native engine against the interpreter in float64, for ragged batches, several threads and lane groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from native_case import Case
from torch import Tensor

from pckernels.instructions import Activation, Loss, Op, OuterProduct

native = pytest.importorskip("pckernels._native", reason="the native engine is not built")

BATCHES = [1, 15, 16, 17, 33]
SETTINGS = [(1, 1), (1, 2), (1, 3), (2, 0), (3, 0), (3, 2)]  # threads, tile_groups
CHOSEN = native.info()["chosen"]


def sets() -> list[str]:
    """The instruction sets that were compiled and that this machine has: all behind the one it chose."""
    compiled = native.info()["instruction_sets"]
    return compiled[compiled.index(CHOSEN) :]


@pytest.fixture(params=sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test with every instruction set of this machine, and with teams as large as they can be."""
    native.choose_instruction_set(request.param)
    native.set_work_of_thread(1.0)
    yield
    native.set_work_of_thread(200e3)
    native.choose_instruction_set(CHOSEN)


def check(make: Callable[[int], Case], tolerance: float = 2e-6, learns: bool = False) -> None:
    """The outcome is that of the interpreter, and the same bits for any number of threads."""
    for batch in BATCHES:
        torch.manual_seed(batch)
        case = make(batch)
        expected, first = case.expected(2.0), case.run(native, 1, 1, 2.0)
        for got, want in zip(first, expected, strict=True):
            size = float(want.abs().max()) if want.numel() else 0.0
            assert float((got.double() - want).abs().max()) <= tolerance * (size + 1e-30), batch
        for threads, tile_groups in SETTINGS:
            again = case.run(native, threads, 1 if learns else tile_groups, 2.0)
            for got, want in zip(again, first, strict=True):
                assert got.equal(want), (batch, threads, tile_groups)


def random(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape)


def elementwise(op: Op, n: int, count: int, **settings: Any) -> Callable[[int], Case]:
    def make(batch: int) -> Case:
        case = Case(batch)
        out = case.load(random(batch, n))
        operands = {name: case.load(random(batch, n)) for name in "abcd"[:count]}
        case.add(op, n=n, out=out, **operands, **settings)
        case.store(out, n)
        return case

    return make


@pytest.mark.parametrize("n", [1, 3, 33, 64])
def test_load_and_store_parts_of_rows(n: int) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        source, result, row = case.tensor(random(batch, 70)), case.result(80), case.array(n)
        case.io[result].zero_()
        case.add(Op.LOAD, n=n, out=row, slot=source, p=(70, 5))
        case.add(Op.STORE, n=n, a=row, b=case.load(random(batch, n)), slot=result, p=(80, 7))
        return case

    check(make)


def test_store_of_nothing_is_zero() -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        case.add(Op.STORE, n=5, slot=case.result(5), p=(5, 0))
        return case

    check(make)


@pytest.mark.parametrize("n", [1, 37, 200])
@pytest.mark.parametrize("accumulate", [False, True])
def test_arithmetic(n: int, accumulate: bool) -> None:
    check(elementwise(Op.ADD, n, 2, f=(0.5, -2.0), accumulate=accumulate))
    check(elementwise(Op.ADD, n, 1, f=(0.5, -2.0), accumulate=accumulate))
    check(elementwise(Op.MUL_GRAD, n, 3, accumulate=accumulate))
    check(elementwise(Op.MUL_GRAD, n, 2, accumulate=accumulate))
    if not accumulate:
        check(elementwise(Op.FILL, n, 0, f=(1.5,)))
        check(elementwise(Op.MUL, n, 2))
        check(elementwise(Op.MUL_CHANGE, n, 4))
        check(elementwise(Op.ERROR, n, 2))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("p", [(1, 50, 50, 50), (4, 7, 9, 20), (20, 1, 3, 2)])
def test_copy(p: tuple[int, ...], accumulate: bool) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        out, a = case.load(random(batch, 200)), case.load(random(batch, 200))
        case.add(Op.COPY, out=out, a=a, p=p, f=(0.5,), accumulate=accumulate)
        case.store(out, 200)
        return case

    check(make)


@pytest.mark.parametrize("momentum", [False, True])
def test_dynamics(momentum: bool) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        out, error, feedback, velocity = (case.load(random(batch, 43)) for _ in range(4))
        operands = {"c": velocity} if momentum else {}
        case.add(Op.MOVE, n=43, out=out, a=error, b=feedback, f=(0.1, 0.9 if momentum else 0.0, 1.5), **operands)
        case.add(Op.RELAX, n=43, out=error, a=feedback, f=(0.3,))
        for row in (out, error, velocity):
            case.store(row, 43)
        return case

    check(make)


@pytest.mark.parametrize("n", [1, 100, 700])
@pytest.mark.parametrize("both", [False, True])
def test_norm(n: int, both: bool) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        a = case.load(random(batch, n))
        b = {"b": case.load(random(batch, n).abs() + case.io[0])} if both else {}
        case.energies = 2
        case.add(Op.NORM, n=n, a=a, **b, slot=0, f=(0.5,))
        case.add(Op.FILL, n=n, out=a, f=(0.25,))
        case.add(Op.NORM, n=n, a=a, slot=1, f=(0.5,))
        return case

    check(make)


PARAMETERS = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1,), Activation.HARDTANH: (-1.0, 0.8)}


@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 5.0])
def test_activations(kind: Activation, size: float) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        n, f, p = 61, PARAMETERS.get(kind, ()), (int(kind),)
        z, dz, g = case.load(2 * random(batch, n).float()), case.load(size * random(batch, n)), case.load(random(batch, n))
        value, change, slope = case.array(n), case.array(n), case.load(random(batch, n))
        case.add(Op.ACT, n=n, out=value, a=z, p=p, f=f)
        case.add(Op.ACT_CHANGE, n=n, out=change, a=z, b=dz, c=value, p=p, f=f)
        case.add(Op.ACT_GRAD, n=n, out=slope, a=g, b=z, c=dz, p=p, f=f, accumulate=True)
        for row in (value, change, slope):
            case.store(row, n)
        case.add(Op.ACT_GRAD, n=n, out=slope, a=g, b=z, d=value, p=p, f=f)
        case.store(slope, n)
        for slot in range(3):  # what float32 holds, so that both start from the same numbers
            case.io[slot] = case.io[slot].float().double()
        return case

    check(make, tolerance=3e-6)


@pytest.mark.parametrize("slot2", [False, True])
def test_squared_error(slot2: bool) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        n = 133
        out, mu, dmu, target = case.array(n), *(case.load(random(batch, n)) for _ in range(3))
        per_sample = {"slot2": case.result(1)} if slot2 else {}
        case.add(Op.LOSS, n=n, out=out, a=mu, b=dmu, c=target, slot=0, p=(int(Loss.SQUARED_ERROR), 0), f=(0.7,), **per_sample)
        case.store(out, n)
        return case

    check(make)


@pytest.mark.parametrize("positions", [1, 9])
def test_cross_entropy(positions: int) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        classes = 11
        n = positions * classes
        mu, dmu = case.load(3 * random(batch, n)), case.load(random(batch, n))
        target = case.load(torch.randint(-1, classes, (batch, positions)))
        out, losses = case.array(n), case.result(1)
        case.add(Op.LOSS, n=n, out=out, a=mu, b=dmu, c=target, slot=0, slot2=losses, p=(int(Loss.CROSS_ENTROPY), classes), f=(-0.7,))
        case.store(out, n)
        return case

    check(make)


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 7, 5), (3, 33, 17), (1, 129, 100), (2, 1, 64)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_linear(positions: int, inputs: int, outputs: int, accumulate: bool) -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        w, bias = case.weight(torch.randn(outputs, inputs)), case.weight(torch.randn(outputs))
        x, out = case.load(random(batch, positions * inputs)), case.load(random(batch, positions * outputs))
        back = case.load(random(batch, positions * inputs))
        p = (positions, inputs, outputs)
        case.add(Op.LINEAR, out=out, a=x, slot=w, slot2=bias, p=p, accumulate=accumulate)
        case.store(out, positions * outputs)
        case.add(Op.LINEAR, out=out, a=x, slot=w, p=p)
        case.store(out, positions * outputs)
        case.add(Op.LINEAR_T, out=back, a=out, slot=w, p=p, accumulate=accumulate)
        case.store(back, positions * inputs)
        return case

    check(make)


#       C, H, W, C_out, kh, kw, sh, sw, ph, pw, dh, dw, groups
CONVS = [
    (3, 8, 9, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1),
    (4, 7, 7, 6, 3, 2, 2, 1, 1, 0, 1, 2, 2),
    (2, 6, 5, 3, 5, 5, 1, 1, 0, 0, 1, 1, 1),
    (6, 9, 9, 6, 3, 3, 2, 2, 2, 2, 2, 2, 6),
    (1, 28, 28, 8, 5, 5, 1, 1, 0, 0, 1, 1, 1),
    (3, 5, 5, 4, 1, 1, 1, 1, 0, 0, 1, 1, 1),
]


def conv_p(shape: tuple[int, ...]) -> tuple[int, ...]:
    def size(axis: int) -> int:
        return (shape[1 + axis] + 2 * shape[8 + axis] - shape[10 + axis] * (shape[4 + axis] - 1) - 1) // shape[6 + axis] + 1

    return (*shape, size(0), size(1))


@pytest.mark.parametrize("shape", CONVS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_convolution(shape: tuple[int, ...], accumulate: bool) -> None:
    def make(batch: int) -> Case:
        case, p = Case(batch), conv_p(shape)
        image, result = p[0] * p[1] * p[2], p[3] * p[13] * p[14]
        w, bias = case.weight(torch.randn(p[3], p[0] // p[12], p[4], p[5])), case.weight(torch.randn(p[3]))
        x, dx, g = case.load(random(batch, image)), case.load(random(batch, image)), case.load(random(batch, result))
        out, back = case.load(random(batch, result)), case.load(random(batch, image))
        case.add(Op.CONV, out=out, a=x, slot=w, slot2=bias, p=p, accumulate=accumulate)
        case.add(Op.CONV_T, out=back, a=g, slot=w, p=p, accumulate=accumulate)
        case.store(out, result)
        case.store(back, image)
        for extra in ({"c": dx}, {}):
            slot = case.gradient(*case.weights[w].shape)
            case.add(Op.CONV_LEARN, a=g, b=x, slot=slot, p=p, f=(0.5,), **extra)
            case.add(Op.CONV_LEARN, a=g, b=x, slot=slot, p=p, f=(0.25,))
        slot = case.gradient(p[3])
        case.add(Op.SUM_LEARN, a=g, slot=slot, p=(1, p[3], p[13] * p[14]), f=(0.5,))
        return case

    check(make, tolerance=4e-6, learns=True)


#        C, H, W, -, kh, kw, sh, sw, ph, pw, dh, dw, -
POOLS = [
    (3, 8, 8, 0, 2, 2, 2, 2, 0, 0, 1, 1, 0),
    (2, 9, 7, 0, 3, 3, 2, 2, 1, 1, 1, 1, 0),
    (2, 7, 8, 0, 3, 2, 1, 1, 1, 0, 1, 1, 0),
]


@pytest.mark.parametrize("shape", [*POOLS, (1, 9, 9, 0, 2, 3, 2, 1, 0, 1, 2, 2, 0)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_max_pooling(shape: tuple[int, ...], accumulate: bool) -> None:
    def make(batch: int) -> Case:
        case, p = Case(batch), (*conv_p(shape), 0)
        image, result = p[0] * p[1] * p[2], p[0] * p[13] * p[14]
        values = torch.randint(-2, 3, (batch, image)).float()  # with ties: the first maximum counts
        x, dx, g = case.load(values), case.load(torch.randint(-2, 3, (batch, image)) * 0.25), case.load(random(batch, result))
        top, where, change, moved = (case.array(result) for _ in range(4))
        back, again = case.load(random(batch, image)), case.load(random(batch, image))
        case.add(Op.MAXPOOL, out=top, a=x, b=where, p=p)
        case.add(Op.MAXPOOL_CHANGE, out=change, a=x, b=dx, c=top, d=moved, p=p)
        case.add(Op.MAXPOOL_GRAD, out=back, a=g, b=where, p=p, accumulate=accumulate)
        case.add(Op.MAXPOOL_GRAD, out=again, a=g, b=moved, p=p, accumulate=accumulate)
        for row, n in ((top, result), (change, result), (back, image), (again, image)):
            case.store(row, n)
        return case

    check(make)


@pytest.mark.parametrize("shape", POOLS)
@pytest.mark.parametrize("inside_only", [0, 1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_average_pooling(shape: tuple[int, ...], inside_only: int, accumulate: bool) -> None:
    def make(batch: int) -> Case:
        case, p = Case(batch), (*conv_p(shape), inside_only)
        image, result = p[0] * p[1] * p[2], p[0] * p[13] * p[14]
        out, back = case.load(random(batch, result)), case.load(random(batch, image))
        x, g = case.load(random(batch, image)), case.load(random(batch, result))
        case.add(Op.AVGPOOL, out=out, a=x, p=p, accumulate=accumulate)
        case.add(Op.AVGPOOL_T, out=back, a=g, p=p, accumulate=accumulate)
        case.store(out, result)
        case.store(back, image)
        return case

    check(make)


def test_sums_learned_in_the_loop() -> None:
    def make(batch: int) -> Case:
        case = Case(batch)
        a = case.load(random(batch, 4 * 6 * 5))
        first, second = case.gradient(6), case.gradient(24)
        case.add(Op.SUM_LEARN, a=a, slot=first, p=(4, 6, 5), f=(0.5,))
        case.add(Op.SUM_LEARN, a=a, slot=first, p=(4, 6, 5), f=(0.25,))
        case.add(Op.SUM_LEARN, a=a, slot=second, p=(5, 24, 1), f=(-1.0,))
        return case

    check(make, learns=True)


def test_outer_products() -> None:
    """Two summands of one weight with its bias, a bias that two weights share, and a gradient that nothing writes."""

    def make(batch: int) -> Case:
        case = Case(batch)
        g, x, wide = case.tensor(random(batch, 2 * 19)), case.tensor(random(batch, 2 * 13)), case.tensor(random(batch, 50))
        weight, bias, other, shared = case.gradient(19, 13), case.gradient(19), case.gradient(19, 13), case.gradient(19)
        case.gradient(7)
        for coefficient in (1.0, -0.5):
            case.products.append(OuterProduct(weight, bias, g, x, 2, 13, 19, 26, 0, coefficient))
        case.products.append(OuterProduct(other, shared, g, wide, 2, 13, 19, 50, 11))
        case.products.append(OuterProduct(-1, shared, g, x, 2, 13, 19, 26, 0, 0.25))
        return case

    check(make, tolerance=4e-6)


def test_an_empty_batch_writes_zeros() -> None:
    case = Case(0)
    case.gradient(6)
    case.add(Op.FILL, n=1, out=case.array(1), f=(1.0,))
    assert all(not tensor.any() for tensor in case.run(native))
