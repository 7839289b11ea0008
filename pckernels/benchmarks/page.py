"""The report: figures as PNG files, and one HTML page with everything in it, for which no network is needed."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pckernels.benchmarks import figures, tables
from pckernels.benchmarks.record import Record, fastest_of_ours, refused, timed
from pckernels.errors import Unsupported

TEMPLATE = Path(__file__).with_name("page.html")
TILES = 4
WORDS = {"loop": "the loop by hand", "autograd": "backprop by autograd"}


def write(record: Record, folder: Path) -> Path:
    """Write a PNG for each figure, and report.html; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.all_figures(record)
    for name, (_, figure) in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
    page = folder / "report.html"
    page.write_text(html(record, drawn), encoding="utf-8")
    return page


def html(record: Record, drawn: dict[str, tuple[str, Any]]) -> str:
    """The page."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise Unsupported("The report needs jinja2: `pip install 'pckernels[bench]'`.") from error
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    images = {name: (caption, _image(figure)) for name, (caption, figure) in drawn.items()}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        provenance=tables.provenance(record),
        tiles=tiles(record),
        images=images,
        targets=tables.targets(record),
        times=tables.times(record),
        ledgers=tables.ledgers(record),
        refused=refused(record),
        not_here=not_here(record),
        rates=rates(record),
        slopes=record["curves"].get("slopes", []),
    )


def tiles(record: Record) -> list[dict[str, str]]:
    """The first cases in large figures: how many times faster or slower than the first goal's rival, or than whoever comes first."""
    found: list[dict[str, str]] = []
    for case in timed(record):
        ours = fastest_of_ours(case)["name"]
        own = [r for r in case["ratios"] if r["ours"] == ours]
        ratio = next((r for r in own if "goal" in r), None)
        if ratio is None or len(found) == TILES:
            continue
        factor = 1.0 / ratio["median"]
        other = WORDS.get(ratio["other"], ratio["other"])
        words = f"as fast as {other}" if factor >= 1 else f"the time of {other}"
        number = f"{max(factor, 1 / factor):.1f}x"
        found.append({"number": number, "words": words, "case": case["name"], "met": "met" if ratio["met"] else "missed"})
    return found


def rates(record: Record) -> list[tuple[str, str]]:
    """The ceilings, in words."""
    found = record["ceilings"]
    return [
        ("products", f"{found['products'] / 1e9:.1f} billion multiply-adds a second"),
        ("device memory", f"{found['device'] / 1e9:.1f} GB/s"),
        ("the last cache", f"{found['cache'] / 1e9:.1f} GB/s"),
        ("a GPU's shared memory, by its clock" if record["suite"] == "gpu" else "a core's own cache", f"{found['chip'] / 1e9:.1f} GB/s"),
    ]


def not_here(record: Record) -> list[tuple[str, str, str]]:
    """(who, why, in how many cases), each reason once."""
    counted: dict[tuple[str, str], int] = {}
    for case in timed(record):
        for who, why in case["not_here"].items():
            counted[who, why] = counted.get((who, why), 0) + 1
    return [(who, why, f"{count} case{'s' * (count > 1)}") for (who, why), count in counted.items()]


def _image(figure: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(figures.svg(figure)).decode("ascii")
