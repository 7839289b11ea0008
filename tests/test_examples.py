"""The examples, at a tiny size: they run, write what they say, and their claims can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PNG = b"\x89PNG"


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))


def pictures(folder: Path) -> set[str]:
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))
    return {path.name for path in folder.glob("*.png")}


def test_rao_ballard_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import rao_ballard

    monkeypatch.setattr(rao_ballard, "SETTLING", 10)
    rao_ballard.main(["--epochs", "2", "--windows", "64", "--out", str(tmp_path)])
    assert pictures(tmp_path) == {f"rao-ballard-{what}-photographs.png" for what in ("fields", "reconstruction", "bars")}
    printed = capsys.readouterr().out
    first, last = (float(word) for word in printed.splitlines()[0].split() if word.replace(".", "").isdigit())
    assert last < first
    assert "response to a bar without" in printed


def test_rao_ballard_s_cost_is_the_papers() -> None:
    """F is sigma_td^2 / 2 times E = |I - U r|^2 / s2 + |r - r_td|^2 / s2_td + alpha log(1 + r^2) + alpha_h r_h^2, term by term."""
    import rao_ballard as rb

    model = rb.Model.new()
    patches = torch.randn(3, rb.MODULES, rb.SIDE**2)
    inference = model.infer(patches, steps=7)
    r, r_h = inference.values["top"], inference.values["r_h"]
    assert r_h.any() and inference.errors["top"].any()
    squares = (patches - model.module.bottom(r)).square().sum() / rb.SIGMA2
    squares += (r - model.module.top(r_h).view_as(r)).square().sum() / rb.SIGMA2_TD
    energy = squares + rb.ALPHA * (1 + r.square()).log().sum() + rb.ALPHA_TOP * r_h.square().sum()
    assert torch.allclose(inference.energy[-1], rb.SIGMA2_TD / 2 * energy, rtol=1e-5)


def test_without_feedback_nothing_comes_from_the_top() -> None:
    import rao_ballard as rb

    inference = rb.Model.new().infer(torch.randn(2, rb.MODULES, rb.SIDE**2), steps=5, feedback=False)
    assert "r_h" not in inference.values
    assert torch.equal(inference.values["top"], inference.errors["top"])


def test_the_filter_and_the_windows_do_what_they_say() -> None:
    import rao_ballard as rb

    assert rb.filtered(torch.ones(40, 40)).abs().max() < 1e-6  # nothing but contrast passes
    assert rb.bars([4, 26]).shape == (2, *rb.WINDOW)
    windows = rb.windows([torch.rand(60, 60)], 5, torch.Generator().manual_seed(0))
    assert windows.square().mean() == pytest.approx(1.0, rel=1e-5)
    line = torch.exp(-0.5 * ((torch.arange(16) - 7.5) / 4.8).square())
    assert torch.allclose(rb.patches(windows)[2, 1], (windows[2, :, 5:21] * line[:, None] * line).flatten())


def test_inpainting_is_better_than_the_mean_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inpainting

    monkeypatch.setattr(inpainting, "RECALL", inpainting.pck.Strict(60, 0.1, momentum=0.9))
    inpainting.main(["--epochs", "6", "--samples", "200", "--memory-epochs", "40", "--out", str(tmp_path)])
    found = {row["name"]: row for row in json.loads((tmp_path / "inpainting.json").read_text())}
    assert set(found) == {"unseen, upper half", "unseen, left half", "unseen, one in two", "stored, upper half"}
    assert found["unseen, one in two"]["error"] < 0.8 * found["unseen, one in two"]["mean image"]
    assert found["stored, upper half"]["error"] < 0.6 * found["stored, upper half"]["mean image"]
    assert pictures(tmp_path) == {"inpainting.png"}


def test_the_table_runs_on_digits(tmp_path: Path) -> None:
    import mnist_table

    rows = ["backprop", "ZeroDivergence", "Strict, centered", "Incremental"]
    course = ["--data", "digits", "--batches", "4", "--seeds", "2", "--out", str(tmp_path)]
    mnist_table.main([*course, "--rows", *rows[1:]])
    mnist_table.main([*course, "--rows", rows[0]])  # what is there is kept
    written = json.loads((tmp_path / "mnist-table.json").read_text())
    assert [row["name"] for row in written["rows"]] == rows
    backprop, exact = (written["rows"][k]["accuracies"] for k in (0, 1))
    assert len(backprop) == 2 and backprop == pytest.approx(exact, abs=0.01)
    text = (tmp_path / "mnist-table.md").read_text()
    for row in written["rows"]:
        assert f"| {row['name']} |" in text and row["command"] in text
    assert pictures(tmp_path) == {"mnist-table.png"}


def test_the_table_says_who_is_within_a_point_of_backprop() -> None:
    import mnist_table

    found = {"backprop": [0.95, 0.93], "FixedPrediction": [0.94, 0.925], "Strict": [0.94, 0.90], "Incremental": [0.97, 0.98]}
    found |= {"ErrorOptimization": [0.95, None], "ZeroDivergence, random feedback": [0.5, 0.5]}
    rows = [{"name": name, "accuracies": values, "chosen": {"lr": 0.1}, "command": name} for name, values in found.items()]
    page = "\n".join(mnist_table.markdown(rows, "a title"))
    lines = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    assert "| 94.00% ± 1.41% | +0.00 |" in lines["backprop"]
    assert "| -0.75 | 2006.04182: kept |" in lines["FixedPrediction"] and "| +3.50 | 2212.00720: kept |" in lines["Incremental"]
    assert "| -2.00 | Whittington & Bogacz 2017: not kept |" in lines["Strict"]
    assert "| 95.00% ± 0.00%; 1 of 2 diverged |  | 2505.20137: not kept |" in lines["ErrorOptimization"]
    assert "| -44.00 |  |" in lines["ZeroDivergence, random feedback"]
    after = page.split("![test accuracy")[0].split("\n\n", 3)[-1]
    assert all(name in after for name in ("Strict", "ErrorOptimization", "random feedback")) and "Incremental" not in after.split("|")[-1]


def test_the_commands_of_the_table_are_commands() -> None:
    """Each is parsed to the very configuration that was run."""
    import argparse
    from dataclasses import replace

    import mnist_table

    from pckernels import settings, train

    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    base = settings.complete(replace(mnist_table.BASE, data="mnist", batches=7, epochs=2))
    for row in mnist_table.ROWS:
        _, _, *words = mnist_table.command(row, row.choices[0], base).split()
        (config,) = train.configurations(parser.parse_args(words))
        assert replace(config, threads=1) == mnist_table.config(row, base, row.choices[0], 0)
