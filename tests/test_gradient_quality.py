"""The table of how well each way of learning approximates the gradient: exact rules do, every row is there, and more samples help."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pckernels import gradient_quality as quality
from pckernels.cli import main
from pckernels.gradient_methods import bp_stdp, evolution_strategies, feedback_alignment
from pckernels.models import Case

EXACT = ("backprop", "FixedPrediction, rate 1", "ZeroDivergence")
FAMILIES = (
    "Strict, T",
    "Strict, nudge",
    "Strict, centered",
    "ErrorOptimization",
    "Incremental",
    "FixedPrediction, T",
    "feedback",
    "BP-STDP",
)


compare = quality.compare  # before any test replaces it


@cache
def table(model: str) -> quality.Table:
    return compare(quality.build(model), pairs=(4, 64))


@pytest.fixture(params=quality.BUILDERS)
def rows(request: pytest.FixtureRequest) -> dict[str, quality.Row]:
    pytest.importorskip("sklearn")
    return {row.method: row for row in table(request.param).rows}


def one(rows: dict[str, quality.Row], start: str) -> quality.Row:
    return next(row for name, row in rows.items() if name.startswith(start))


def test_every_method_has_a_row_with_numbers(rows) -> None:
    for start in (*EXACT, *FAMILIES, "evolution strategies, 4 pairs", "evolution strategies, 64 pairs"):
        row = one(rows, start)
        assert row.angle is not None and 0.0 <= row.angle <= 180.0 and row.ratio > 0.0 and row.products > 0, row


def test_exact_rules_are_the_gradient(rows) -> None:
    for start in EXACT:
        row = one(rows, start)
        assert row.angle < 1e-9 and abs(row.ratio - 1.0) < 1e-12, row
        assert all(angle < 1e-9 for angle in row.angles.values())
    assert all(row.angle > 0.1 for name, row in rows.items() if not name.startswith(EXACT))


def test_theory_holds_in_the_table(rows) -> None:
    few, many = (rows[f"evolution strategies, {pairs} pairs"].angle for pairs in (4, 64))
    assert many < few - 1.0
    assert one(rows, "Strict, centered").angle < one(rows, "Strict, nudge").angle < one(rows, "Strict, T = 100").angle
    assert one(rows, "feedback alignment").angle < 90.0 and one(rows, "BP-STDP").angle < 90.0
    # fixed prediction points each layer the right way and falls short in its size: the last layer is backprop's
    fixed, last = one(rows, "FixedPrediction, T"), max(one(rows, "backprop").angles, key=lambda name: int(name.split(".")[0]))
    assert fixed.angles[last] < 1e-9 and fixed.ratio < 1.0


def test_products_are_those_of_a_pen_and_paper(rows) -> None:
    """By hand for three layers: 3 forward, 2 back, 3 outer products."""
    layers = 3 if len(one(rows, "backprop").angles) == 6 else 4
    assert one(rows, "backprop").products == 3 * layers - 1
    assert one(rows, "Strict, T = 20").products == layers + 20 * 2 * (layers - 1) + layers
    assert one(rows, "Strict, centered").products == layers + 2 * (100 * 2 * (layers - 1) + layers)
    assert one(rows, "Incremental").products == layers + 20 * (3 * layers - 1)
    assert one(rows, "evolution strategies, 64").products == 128 * layers


def summed(target: torch.Tensor):
    return lambda twin: F.cross_entropy(twin(X), target, reduction="sum")


X = torch.rand(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def small(float64: None) -> tuple[nn.Sequential, torch.Tensor]:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)), torch.tensor([0, 1, 2, 3, 0, 1])


def test_feedback_alignment_changes_the_way_back_alone(small) -> None:
    """The last layer learns the gradient; the first by the random weights, here by hand."""
    module, target = small
    loss = summed(target)
    loss(module).backward()
    found = feedback_alignment(module, loss, torch.Generator().manual_seed(3))
    assert torch.allclose(found["2.weight"], module[2].weight.grad, rtol=1e-12)
    assert torch.allclose(found["2.bias"], module[2].bias.grad, rtol=1e-12)
    generator = torch.Generator().manual_seed(3)
    torch.randn(7, 5, generator=generator)
    back = torch.randn(4, 7, generator=generator) * module[2].weight.detach().std()
    z = module[0](X).detach()
    delta = (torch.softmax(module[2](z.relu()), 1) - F.one_hot(target, 4)).detach() @ back * (z > 0)
    assert torch.allclose(found["0.weight"], delta.T @ X, rtol=1e-11, atol=1e-14)
    assert torch.allclose(found["0.bias"], delta.sum(0), rtol=1e-11, atol=1e-14)


def test_evolution_strategies_tend_to_the_gradient(small) -> None:
    module, target = small
    loss = summed(target)
    loss(module).backward()
    exact = torch.cat([p.grad.flatten() for p in module.parameters()])
    angles = []
    for pairs in (16, 256, 4096):
        found = evolution_strategies(module, loss, pairs, 1e-4, torch.Generator().manual_seed(0))
        angles.append(quality.angle(torch.cat([found[name].flatten() for name, _ in module.named_parameters()]), exact))
    assert angles[0] > angles[1] > angles[2] and angles[2] < 10.0
    # of `pairs` directions among d a random estimate has tan(angle) of about sqrt(d / pairs)
    assert math.tan(math.radians(angles[2])) == pytest.approx((len(exact) / 4096) ** 0.5, rel=0.3)


def test_bp_stdp_of_one_layer_is_counted_by_hand(float64: None) -> None:
    """Weights so small that nothing fires: the true class is told to at every step, by the input's spikes within the window."""
    module = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.constant_(module[0].weight, 1e-3)
    x = torch.tensor([[1.0, 0.0, 1.0]])
    found = bp_stdp(module, x, torch.tensor([[0.0, 1.0]]), steps=5, window=2, generator=torch.Generator())
    spikes = 1 + 2 * 4  # one within the window at the first step, two later
    assert torch.equal(found["0.weight"], torch.tensor([[0.0, 0.0, 0.0], [-spikes, 0.0, -spikes]]))


def test_what_a_method_cannot_do_is_said_in_its_row(float64: None) -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 2))
    found = quality.compare(Case("own", module, torch.randn(4, 5), torch.randn(4, 2)), pairs=(2,))
    notes = {row.method.split(",")[0]: row.note for row in found.rows if row.angle is None}
    assert set(notes) == {"feedback alignment", "BP-STDP"} and all("is for" in note for note in notes.values())
    assert notes["BP-STDP"] in "\n".join(quality.lines(found))


@pytest.mark.parametrize(("a", "b", "degrees"), [((1, 0), (0, 2), 90), ((1, 0), (-3, 0), 180), ((1, 1), (2, 2), 0), ((1, 0), (1, 1), 45)])
def test_angle(a: tuple[float, ...], b: tuple[float, ...], degrees: float) -> None:
    assert quality.angle(torch.tensor(a).double(), torch.tensor(b).double()) == pytest.approx(degrees, abs=1e-12)
    assert math.isnan(quality.angle(torch.tensor(a).double(), torch.zeros(2).double()))


def test_the_command_prints_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(quality, "compare", lambda case: table(case.name))
    report, plot = tmp_path / "table.json", tmp_path / "table.png"
    assert main(["verify", "--gradients", "--json", str(report), "--plot", str(plot)]) == 0
    printed, written = capsys.readouterr().out, json.loads(report.read_text())
    assert [model["model"] for model in written["models"]] == ["mlp", "cnn"]
    for model in written["models"]:
        assert all(row["method"] in printed and f"{row['angle']:.2f}°" in printed for row in model["rows"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["verify", "mlp", "--gradients"]) == 2
    assert "name none" in capsys.readouterr().err
