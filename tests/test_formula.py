"""Formulas: what a sheet makes of what is written on it, and what its plain evaluation computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pckernels import interpreter
from pckernels.formula import PARTS, Operation, Sheet, Written, evaluate
from pckernels.instructions import Activation


def run(written: Written[str], tensors: dict[str, Tensor]) -> list[Tensor]:
    """Its sums; the tensors of its stores are written."""
    parts = [torch.zeros(PARTS, dtype=torch.float64) for _ in written.formula.sums]
    loads, stores = ([tensors[name] for name in names] for names in (written.loads, written.stores))
    evaluate(written, loads, stores, parts)
    return [part.sum() for part in parts]


def test_what_is_not_needed_is_neither_loaded_nor_computed() -> None:
    sheet: Sheet[str] = Sheet()
    a, b = sheet.load("a"), sheet.load("b")
    sheet.put("unwanted", sheet.mul(a, b))
    sheet.put("c", sheet.scale(a, 2.0))
    written = sheet.finished(["c"])
    assert (written.loads, written.stores, len(written.formula.terms), written.factors) == (("a",), ("c",), 1, (2.0, 0.0))


def test_the_same_term_is_computed_once() -> None:
    sheet: Sheet[str] = Sheet()
    a, b = sheet.load("a"), sheet.load("b")
    assert sheet.add(a, b) == sheet.add(a, b) != sheet.add(a, b, 1.0, -1.0)
    assert sheet.load("a") == a and sheet.scale(a, 1.0) == a


def test_a_place_holds_what_was_put_there_last_and_its_tensor_what_is_stored(float64: None) -> None:
    sheet: Sheet[str] = Sheet()
    sheet.put("a", sheet.scale(sheet.load("a"), 3.0))
    sheet.put("b", sheet.add(sheet.load("a"), sheet.load("b")))
    sheet.put("a", sheet.scale(sheet.load("a"), 2.0))
    written = sheet.finished(["a", "b"])
    a, b = torch.randn(4, 5), torch.randn(4, 5)
    tensors = {"a": a.clone(), "b": b.clone()}
    run(written, tensors)
    torch.testing.assert_close(tensors["a"], 6.0 * a)
    torch.testing.assert_close(tensors["b"], 3.0 * a + b)


def test_loads_come_before_stores(float64: None) -> None:
    """Two tensors change places."""
    sheet: Sheet[str] = Sheet()
    a, b = sheet.load("a"), sheet.load("b")
    sheet.put("a", b)
    sheet.put("b", a)
    before = torch.randn(2, 3, 4)
    tensors = dict(zip("ab", before.clone(), strict=True))
    run(sheet.finished(["a", "b"]), tensors)
    assert torch.equal(tensors["a"], before[1]) and torch.equal(tensors["b"], before[0])


def test_sums(float64: None) -> None:
    sheet: Sheet[str] = Sheet()
    a, b = sheet.load("a"), sheet.load("b")
    sheet.sum(a, a, 0.5)
    sheet.sum(a, sheet.scale(b, 3.0), 2.0)
    tensors = {name: torch.randn(4, 5) for name in "ab"}
    found = run(sheet.finished([]), tensors)
    torch.testing.assert_close(found, [0.5 * tensors["a"].square().sum(), 6.0 * (tensors["a"] * tensors["b"]).sum()])


@pytest.mark.parametrize("kind", Activation)
def test_activations(float64: None, kind: Activation) -> None:
    """Value, change and slope are those of the interpreter of instructions, with the kink's parameters as factors."""
    f = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1,), Activation.HARDTANH: (-1.0, 0.8)}.get(kind, ())
    sheet: Sheet[str] = Sheet()
    z, dz = sheet.load("z"), sheet.load("dz")
    m = sheet.term(Operation.ACT, z, kind=kind, f=f)
    sheet.put("m", m)
    sheet.put("change", sheet.term(Operation.CHANGE, z, dz, m, kind, f))
    sheet.put("slope", sheet.term(Operation.SLOPE, z, kind=kind, f=f))
    tensors = {name: torch.randn(4, 5) for name in ("z", "dz", "m", "change", "slope")}
    run(sheet.finished(["m", "change", "slope"]), tensors)
    z0 = tensors["z"]
    torch.testing.assert_close(tensors["m"], interpreter.activate(kind, f, z0))
    torch.testing.assert_close(tensors["change"], interpreter.activate(kind, f, z0 + tensors["dz"]) - tensors["m"])
    torch.testing.assert_close(tensors["slope"], interpreter.slope(kind, f, z0))
