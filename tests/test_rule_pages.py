"""The pages of docs/rules say all that a page is to say, and their figures show what the text beside them says."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "rules"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
PARTS = ("Source", "Exact", "When", "Cost")
PNG = b"\x89PNG"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_equations_source_what_is_exact_when_cost_and_a_figure(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.search(r"^ {4}\S.*(=|<-)", text, flags=re.MULTILINE), "no equations"
    for part in PARTS:
        assert re.search(rf"^\*\*{part}[.*]", text, flags=re.MULTILINE), f"no {part}"
    assert re.search(r"\b(19|20)\d\d\b|arxiv\.org/abs/", text), "no source"
    figures = re.findall(r"!\[(.+)\]\((.+\.png)\)", text)
    assert figures, "no figure"
    for caption, name in figures:
        picture = (FOLDER / name).read_bytes()
        assert picture.startswith(PNG) and len(picture) < 80_000
        assert len(caption) > 20
    assert re.search(r"`python\sexamples/\w+\.py", text), "not the command that draws it"


def test_the_index_has_every_page() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.md\)", index)) == {page.stem for page in PAGES}


def drawn(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """The panels or maps of a figure of few steps, and the PNG that it becomes."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import rule_figures

    found = []
    for kind in ("panels", "heat_maps"):
        draw = getattr(rule_figures, kind)
        monkeypatch.setattr(rule_figures, kind, lambda path, parts, draw=draw, **rest: (found.extend(parts), draw(path, parts, **rest)))
    rule_figures.main(["--rules", name, "--quick", "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").read_bytes().startswith(PNG)
    assert f"`python examples/rule_figures.py --rules {name}`" in (FOLDER / f"{name}.md").read_text().replace("\n", " ")
    return found


def curves(panel) -> dict[str, list[float]]:  # type: ignore[no-untyped-def]
    return {curve.name: list(curve.y) for curve in panel.curves}


def test_strict_descends_and_its_errors_arrive_at_their_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    energy, angles, errors = drawn("strict", tmp_path, monkeypatch)
    for falls in (*curves(energy).values(), *curves(angles).values()):
        assert all(b < a for a, b in pairwise(falls))
    for name, sizes in curves(errors).items():
        arrival = int(name.split()[1])
        assert all(math.isnan(size) for size in sizes[:arrival]) and sizes[arrival] > 0


def test_fixed_prediction_is_measured_where_c_k_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for panel in drawn("fixed_prediction", tmp_path, monkeypatch):
        for line, dots in zip(panel.curves[::2], panel.curves[1::2], strict=True):
            assert (line.look, dots.look) == ("thin", "dots") and line.colour == dots.colour
            assert dots.y == pytest.approx(line.y, rel=1e-9, abs=1e-9, nan_ok=True)


def test_zero_divergence_is_exact_where_it_is_framed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, skip, levelled = drawn("zero_divergence", tmp_path, monkeypatch)
    assert all(chain.cells[row][column] < -13 for row, column in chain.framed) and len(chain.framed) == 3
    assert max(skip.cells[row][column] for row, column in skip.framed) > -1
    assert all(max(levelled.cells[row][column:]) < -13 for row, column in levelled.framed) and len(levelled.framed) == 5


def test_error_optimization_needs_fewer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = curves(drawn("error_optimization", tmp_path, monkeypatch)[0])
    assert counts["ErrorOptimization"][-1] < counts["Strict"][-1] < math.inf


def test_incremental_leads_by_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = curves(drawn("incremental", tmp_path, monkeypatch)[0])
    assert losses["Incremental"][0] == pytest.approx(losses["Strict"][0])
    assert losses["Incremental"][-1] < losses["Strict"][-1]


def test_the_bias_of_nudging_lies_on_its_slopes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (panel,) = drawn("nudging", tmp_path, monkeypatch)
    found = curves(panel)
    for name, factor in (("nudge=beta", 2.0), ("nudge=-beta", 2.0), ("centered", 4.0)):
        assert found[name][-2] / found[name][-1] == pytest.approx(factor, rel=0.35)


def test_the_precision_of_a_seen_value_is_one_over_the_variance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, relaxed = (curves(panel) for panel in drawn("precision", tmp_path, monkeypatch))
    assert seen["measured"] == pytest.approx(seen["1 / pi = variance"], rel=0.02)
    assert math.isnan(relaxed["variance 1"][-1])
    assert relaxed["variance 9"][-1] == pytest.approx((8 - math.sqrt(60)) / 2, rel=0.05)


def test_feedback_begins_unaligned_and_no_derivative_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = curves(drawn("relaxed", tmp_path, monkeypatch)[0])
    assert angles["no f'"][0] < 40 < angles["random feedback"][0] == pytest.approx(angles["learned feedback"][0])


def test_the_codes_lie_where_their_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = curves(drawn("match", tmp_path, monkeypatch)[0])
    assert angles["millidge2020"][-1] < angles["FixedPrediction"][-1] < angles["torch2pc, fixed"][-1]
    assert angles["whittington2017"] == pytest.approx(angles["Strict"])
