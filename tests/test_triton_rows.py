"""Formulas by Triton, one launch each: against their plain evaluation, and the graph tier's inferences made of them against the reference.

In the interpreter, or on a GPU where there is one (the inferences: test_graph_gpu.py).
"""

from __future__ import annotations

import dataclasses

import pytest
import test_backends as backends
import torch
from fast_interpreter import install
from torch import Tensor, nn
from triton_case import DEVICE, relative_error, require_a_way_to_run

import pckernels as pck
from pckernels.formula import BY_VALUE, NONE, PARTS, Operation, Sheet, Written, evaluate
from pckernels.instructions import Activation

require_a_way_to_run()

from pckernels.triton import rows  # noqa: E402

from pckernels.backends import graph  # noqa: E402

if DEVICE == "cpu":
    install()

SHAPE = (5, 210)  # not a multiple of a block
FACTORS = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1,), Activation.HARDTANH: (-1.0, 0.8)}
Tensors = dict[str, Tensor]


def run(written: Written[str], tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    """What is stored, and the parts of each sum."""
    ours = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    parts = [torch.zeros(PARTS, 2, dtype=torch.float64, device=DEVICE)[:, 1] for _ in written.formula.sums]
    loads, stores = ([ours[name] for name in names] for names in (written.loads, written.stores))
    rows.run(written, loads, stores, parts)
    return {name: ours[name] for name in written.stores}, parts


def exact(written: Written[str], tensors: Tensors) -> tuple[Tensors, list[Tensor]]:
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    parts = [torch.zeros(PARTS, dtype=torch.float64) for _ in written.formula.sums]
    loads, stores = ([wide[name] for name in names] for names in (written.loads, written.stores))
    evaluate(written, loads, stores, parts)
    return {name: wide[name] for name in written.stores}, parts


def assert_equal(written: Written[str], tensors: Tensors, unit: float = 1e-6) -> None:
    wanted, sums = exact(written, tensors)
    found, parts = run(written, tensors)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert relative_error(found[name], tensor) < unit, name
    for part, total in zip(parts, sums, strict=True):
        assert relative_error(part.sum(), total.sum()) < 1e-6


def randoms(*names: str) -> Tensors:
    return {name: torch.randn(SHAPE) for name in names}


@pytest.mark.parametrize("kind", Activation)
def test_every_operation(kind: Activation) -> None:
    """On a displacement of the usual size, and on one so small that a difference of values would lose it."""
    sheet: Sheet[str] = Sheet()
    f = FACTORS.get(kind, ())
    z, dz, a = (sheet.load(name) for name in ("z", "dz", "a"))
    m = sheet.term(Operation.ACT, z, kind=kind, f=f)
    change = sheet.term(Operation.CHANGE, z, dz, m if kind in BY_VALUE else NONE, kind, f)
    slope = sheet.term(Operation.SLOPE, sheet.add(z, dz), kind=kind, f=f)
    results = {"m": m, "change": change, "slope": slope, "filled": sheet.term(Operation.FILL, f=(0.3,)), "scaled": sheet.scale(a, 0.7)}
    results |= {"added": sheet.add(a, z, 0.3, -1.7), "product": sheet.mul(a, z)}
    if kind in BY_VALUE:
        results["slope of value"] = sheet.term(Operation.SLOPE_OF_VALUE, sheet.add(m, change), kind=kind, f=f)
    for name, value in results.items():
        sheet.put(name, value)
    sheet.sum(m, m, 0.5)  # of elements that there are: f(0) is not 0
    sheet.sum(change, change, 2.0)
    written = sheet.finished(list(results))
    for size in (1e-3, 1.0):
        tensors = randoms("z", "dz", "a") | {name: torch.full(SHAPE, float("nan")) for name in results}
        tensors["dz"] *= size
        assert_equal(written, tensors)


def moved() -> Written[str]:
    """a += 0.1 b, in place, and b as it was into c."""
    sheet: Sheet[str] = Sheet()
    a, b = sheet.load("a"), sheet.load("b")
    sheet.put("a", sheet.add(a, b, 1.0, 0.1))
    sheet.put("c", b)
    sheet.sum(sheet.load("a"), b, 1.0)
    return sheet.finished(["a", "c"])


def test_strided_rows() -> None:
    """Parts of larger arrays; what lies beside them stays."""
    whole = {name: torch.randn(5, width) for name, width in (("a", 300), ("b", 400), ("c", 500))}
    tensors = {name: tensor[:, 7 + k : 217 + k] for k, (name, tensor) in enumerate(whole.items())}
    wanted, sums = exact(moved(), tensors)
    on_device = {name: tensor.to(DEVICE) for name, tensor in whole.items()}
    ours = {name: tensor[:, 7 + k : 217 + k] for k, (name, tensor) in enumerate(on_device.items())}
    written, part = moved(), torch.zeros(PARTS, dtype=torch.float64, device=DEVICE)
    rows.run(written, [ours["a"], ours["b"]], [ours["a"], ours["c"]], [part])
    for name in "ac":
        assert relative_error(ours[name], wanted[name]) < 1e-6
        expected = whole[name].clone()
        k = "abc".index(name)
        expected[:, 7 + k : 217 + k] = ours[name].cpu()
        assert torch.equal(on_device[name].cpu(), expected)
    assert relative_error(part.sum(), sums[0].sum()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes_of_products(dtype: torch.dtype) -> None:
    tensors = randoms("a", "b", "c")
    tensors["b"], tensors["c"] = tensors["b"].to(dtype), tensors["c"].to(dtype)
    assert_equal(moved(), tensors)


def test_programs_take_more_than_a_block_each_and_sums_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "PARTS", 2)
    monkeypatch.setattr(rows, "BLOCK", 128)
    tensors = randoms("a", "b", "c")
    assert_equal(moved(), {name: tensor.clone() for name, tensor in tensors.items()})
    parts = [run(moved(), {name: tensor.clone() for name, tensor in tensors.items()})[1][0] for _ in range(2)]
    assert torch.equal(*parts) and parts[0].count_nonzero() == 2


def test_nothing_is_done_for_an_empty_batch() -> None:
    empty = torch.empty(0, 3, device=DEVICE)
    written, part = moved(), torch.zeros(PARTS, dtype=torch.float64, device=DEVICE)
    rows.run(written, [empty, empty], [empty, empty], [part])
    assert not part.any()


# Inferences of the graph tier

needs_interpreter = pytest.mark.skipif(DEVICE != "cpu", reason="compares tensors of the CPU; on a GPU test_graph_gpu.py does")
STRICT = pck.Strict(4, 0.05, momentum=0.5)
CASES = [("mlp", STRICT, "cross_entropy"), ("mlp", pck.FixedPrediction(4, 0.3, solver="iterate"), "squared_error")]
CASES += [(name, STRICT, "squared_error") for name in ("pooled", "cnn", "skip", "residual", "lstm")]
CASES += [("mlp", pck.ErrorOptimization(3, 0.1, momentum=0.3), "squared_error"), ("rnn", STRICT, "cross_entropy")]


def pooled() -> nn.Module:
    """Pooling behind a prediction that moves, with a row and a column left over."""
    layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 3))


@needs_interpreter
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "rule", "loss"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_inferences(name: str, rule: pck.rules.Rule, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MODELS, "pooled", backends.Model(pooled, (2, 7, 7), (3,)))
    launches: list[str] = []
    kernels = graph._of_triton()
    for kernel in ("maxima_change", "maxima_feedback"):
        run = getattr(kernels.max_pool, kernel)
        monkeypatch.setattr(kernels.max_pool, kernel, lambda *a, kernel=kernel, run=run: launches.append(kernel) or run(*a))

    def counted(*arguments: object) -> None:
        launches.append("rows")
        kernels.evaluate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(graph, "_of_triton", lambda: dataclasses.replace(kernels, evaluate=counted))
    with graph.options(fused=True):
        backends.assert_as_good("graph", name, rule, 5, loss)
        _, network = backends.networks(name)
        network.backend, network.rule, network.loss = "graph", rule, loss
        assert "operations a step, fused" in network.infer(*backends.data(name, 5, loss)).plan
    assert set(launches) == {
        "rows",
        *(["maxima_change", "maxima_feedback"] if name == "pooled" else ["maxima_feedback"] if name == "cnn" else []),
    }


@needs_interpreter
def test_two_inferences_are_equal_bit_for_bit() -> None:
    _, network = backends.networks("cnn")
    network.backend = "graph"
    with graph.options(fused=True):
        first, second = (backends.run(network, STRICT, "squared_error", *backends.data("cnn", 5, "squared_error")) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@needs_interpreter
def test_double_precision_is_refused_in_a_sentence() -> None:
    network = pck.PCNetwork(backends.MODELS["mlp"].build().double(), STRICT, backend="graph")
    x, target = backends.data("mlp", 5, "squared_error")
    with graph.options(fused=True), pytest.raises(pck.Unsupported, match=r"launches are fused in float32; this call has torch\.float64"):
        network.infer(x.double(), target.double())
