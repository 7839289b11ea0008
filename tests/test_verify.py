"""`pckernels verify`: every model passes, what is broken fails with exit code 1, and one's own model is checked alike."""

import json
from pathlib import Path

import pytest
import torch

import pckernels as pck
from pckernels import verify
from pckernels.cli import main
from pckernels.measure import Probe
from pckernels.models import BUILDERS, build

CHAINS = ("mlp", "cnn", "rnn")


@pytest.mark.parametrize("name", BUILDERS)
def test_every_model_passes(name: str) -> None:
    report = verify.verify(build(name), steps=20, rate=0.3)
    assert [check.name for check in report.checks if not check.ok] == []
    assert len(report.checks) == 7
    (control,) = [check for check in report.checks if check.control]
    depth = max(report.convergence.distance.values())
    assert control.name.startswith(f"control: {depth - 1} steps")
    assert ("every path as long" in report.summary) == (name in CHAINS)


@pytest.mark.parametrize("name", BUILDERS)
def test_models_are_the_same_at_every_call(name: str) -> None:
    state = torch.get_rng_state()
    one, two = build(name), build(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.x, two.x) and torch.equal(one.target, two.target)
    for key, value in one.module.state_dict().items():
        assert torch.equal(value, two.module.state_dict()[key])


def test_on_a_chain_the_prediction_is_one_minus_c() -> None:
    found = verify.verify(build("mlp"), steps=10, rate=0.2).convergence
    assert found.steps == [1, 2, 5, 10]
    for name, k in found.distance.items():
        assert found.predicted[name] == [abs(1 - pck.coefficients.coefficients(t, 0.2, k)[k]) for t in found.steps]
        assert found.measured[name] == pytest.approx(found.predicted[name], rel=1e-12)


def test_on_a_graph_the_prediction_is_the_mixture() -> None:
    found = verify.verify(build("resnet"), steps=10, rate=0.2).convergence
    for name in found.distance:
        assert found.measured[name] == pytest.approx(found.predicted[name], rel=1e-10)
    single = {name: verify.remaining(k, found.steps, 0.2) for name, k in found.distance.items()}
    assert any(abs(a - b) > 0.01 for name in single for a, b in zip(single[name], found.measured[name], strict=True))


def test_wrong_gradients_fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = Probe.autograd_gradients
    monkeypatch.setattr(Probe, "autograd_gradients", lambda probe: {name: value * 1.0000001 for name, value in real(probe).items()})
    assert main(["verify", "mlp", "--steps", "3"]) == 1
    assert "FAILED: mlp" in capsys.readouterr().out


def test_a_control_that_agrees_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "gradients", lambda probe, rule: probe.autograd_gradients())
    failed = [check for check in verify.verify(build("mlp"), steps=3).checks if not check.ok]
    assert [check.control for check in failed] == [True]


def test_nan_is_a_failure() -> None:
    assert not verify.Check("a", float("nan"), 1e-12).ok
    assert not verify.Check("a", float("nan"), 1e-12, control=True).ok


def test_float32_has_the_limits_of_float32(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert main(["verify", "mlp", "gru", "--dtype", "float32", "--steps", "5", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["dtype"] == "float32"
    errors = [check["error"] for model in written["models"] for check in model["checks"] if not check["control"]]
    assert max(errors) > 1e-12  # it did run in float32


def test_json_and_plots_hold_what_was_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plots" / "plot.png"
    assert main(["verify", "mlp", "cnn", "--steps", "5", "--json", str(report), "--plot", str(plot)]) == 0
    printed, written = capsys.readouterr().out, json.loads(report.read_text())
    assert written["ok"] is True
    for model in written["models"]:
        assert f"{model['model']}: {model['summary']}" in printed
        for check in model["checks"]:
            assert check["name"] in printed and f"{float(check['error']):.1e}" in printed
        for name, errors in model["convergence"]["measured"].items():
            assert name in printed
            assert all(f"{error:.2e}" in printed for error in errors)
    assert {path.name for path in plot.parent.iterdir()} == {"plot-mlp.png", "plot-cnn.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plot.parent.iterdir())


OWN = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return module, torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1]), "cross_entropy"

def network():
    import pckernels as pck
    module, x, target, loss = build()
    return pck.PCNetwork(module, rule=pck.ZeroDivergence(), loss=loss, value_nodes="op"), x, target

def shallow():
    return nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 2)

def broken():
    raise RuntimeError("no data")

def untraceable():
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x
    return Branch(), torch.randn(5, 3), torch.randn(5, 3)

def mismatched():
    return nn.Linear(3, 2), torch.randn(5, 3), torch.randn(5, 7)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_model.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_own_model", raising=False)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("function", ["build", "network", "shallow"])
def test_ones_own_model(function: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"my_own_model:{function}", "--steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"my_own_model:{function}: ")
    assert "float64" in printed


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("function", "words"), [("broken", "no data"), ("untraceable", ""), ("mismatched", "target"), ("absent", "absent")]
)
def test_ones_own_mistakes_are_sentences(function: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"my_own_model:{function}"]) == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("pckernels verify: ") and words in sentence


def test_many_vertices_are_shown_by_distance() -> None:
    few = {"a": 2, "b": 1}
    many = {f"v{i}": i // 2 for i in range(60)}
    assert verify.representatives(few) == ["b", "a"]
    shown = verify.representatives(many)
    assert len(shown) <= verify.ROWS and len({many[name] for name in shown}) == len(shown)


@pytest.mark.parametrize(("steps", "times"), [(0, [0]), (1, [1]), (7, [1, 2, 5, 7]), (100, [1, 2, 5, 10, 20, 50, 100])])
def test_time_points(steps: int, times: list[int]) -> None:
    assert verify.time_points(steps) == times
