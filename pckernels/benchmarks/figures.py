"""Figures of a run, from its record alone: nothing here measures or computes what the JSON does not hold."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from pckernels.benchmarks.record import Record, contender, fastest_of_ours, memories, timed
from pckernels.plot import blank_figure

OURS = "#1557b0"
COLORS = {"autograd": "#5f6368", "loop": "#d9730d", "autograd, compiled": "#9aa0a6", "loop, compiled": "#f0a868"}
PEER_COLORS = {"pcx": "#2e7d32", "fabricpc": "#7b1fa2"}
AXES = {"batch": "batch size", "steps": "inference steps T", "depth": "layers", "width": "units in a layer"}
WIDTH = 9.0  # inches


def svg(figure: Any) -> bytes:
    """A figure as an SVG image."""
    target = io.BytesIO()
    figure.savefig(target, format="svg")
    return target.getvalue()


def all_figures(record: Record) -> dict[str, tuple[str, Any]]:
    """Name -> (caption, figure), of those that the record has data for."""
    found = {}
    for name, (caption, draw) in FIGURES.items():
        figure = draw(record)
        if figure is not None:
            found[name] = (caption, figure)
    return found


def ratios(record: Record) -> Any:
    """A row for each case, a dot for each rival: how long we take beside it, with the middle half."""
    cases = [case for case in timed(record) if not case["axes"] or any("goal" in ratio for ratio in case["ratios"])]
    if not cases:
        return None
    figure = blank_figure(WIDTH, 1.2 + 0.42 * len(cases))
    axes = figure.subplots()
    seen: set[str] = set()
    for row, case in enumerate(reversed(cases)):
        ours = fastest_of_ours(case)["name"]
        for ratio in (r for r in case["ratios"] if r["ours"] == ours):
            _dot(axes, row, ratio, seen)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(cases)), [case["name"] for case in reversed(cases)], fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain_number)
    axes.set_xlabel("time of pckernels / time of the other (left of the line: pckernels is faster)")
    axes.grid(axis="x", which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _dot(axes: Any, row: int, ratio: Record, seen: set[str]) -> None:
    name = ratio["other"]
    low, high = ratio.get("low", ratio["median"]), ratio.get("high", ratio["median"])
    axes.plot([low, high], [row, row], color=color(name), linewidth=3, alpha=0.35, solid_capstyle="round")
    label = None if name in seen else name
    axes.plot(ratio["median"], row, "o", color=color(name), markersize=6, label=label)
    seen.add(name)
    if "goal" in ratio:
        axes.plot(
            ratio["goal"], row, "|", color=color(name), markersize=14, markeredgewidth=2, label=None if "goal" in seen else "its goal"
        )
        seen.add("goal")


def color(name: str) -> str:
    """Of a contender, the same in every figure."""
    return PEER_COLORS.get(name) or COLORS.get(name, OURS)


def _plain_number(value: float, _: object = None) -> str:
    return f"{value:g}"


def lines(record: Record) -> Any:
    """Milliseconds against batch, T, depth and width: us, the loop by hand, autograd, and peers."""
    present = [axis for axis in AXES if len(_points(record, axis)) > 1]
    if not present:
        return None
    figure = blank_figure(WIDTH, 3.1 * ((len(present) + 1) // 2))
    for panel, axis in zip(figure.subplots((len(present) + 1) // 2, 2, squeeze=False).flat, present, strict=False):
        _line_panel(panel, _points(record, axis), axis)
    for panel in list(figure.axes)[len(present) :]:
        panel.set_visible(False)
    return figure


def _points(record: Record, axis: str) -> list[Record]:
    return sorted((case for case in timed(record) if axis in case["axes"]), key=lambda case: int(case[axis]))


def _line_panel(panel: Any, cases: list[Record], axis: str) -> None:
    places = [case[axis] for case in cases]
    names = ["pckernels", *dict.fromkeys(c["name"] for case in cases for c in case["contenders"] if not c["ours"])]
    for name in names:
        found = [fastest_of_ours(case) if name == "pckernels" else contender(case, name) for case in cases]
        points = [(place, c["ms"]) for place, c in zip(places, found, strict=True) if c is not None]
        if len(points) < 2 and len(cases) > 2:
            continue
        where = [place for place, _ in points]
        panel.plot(where, [ms["median"] for _, ms in points], "o-", color=color(name), label=name, markersize=4, linewidth=2)
        panel.fill_between(
            where, [ms["low"] for _, ms in points], [ms["high"] for _, ms in points], color=color(name), alpha=0.15, linewidth=0
        )
    books = [(place, case["ledger"]) for place, case in zip(places, cases, strict=True) if case["ledger"]]
    panel.plot([p for p, _ in books], [b["floor_ms"] for _, b in books], ":", color=OURS, linewidth=1.5, label="floor of pckernels")
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(places, [str(place) for place in places], minor=False)
    panel.yaxis.set_major_formatter(_plain_number)
    panel.set_xlabel(AXES[axis])
    panel.set_ylabel("ms a call")
    panel.grid(alpha=0.2)
    panel.legend(fontsize=7)


def roofline(record: Record) -> Any:
    """Multiply-adds a second against multiply-adds for each byte of device memory; the roof is what was measured in the run."""
    cases = [case for case in timed(record) if case["ledger"] and case["ledger"]["multiply_adds"]]
    if not cases:
        return None
    ceilings = record["ceilings"]
    figure = blank_figure(WIDTH, 4.6)
    axes = figure.subplots()
    where = [case["ledger"]["multiply_adds"] / case["ledger"]["device_bytes"] for case in cases]
    span = [min(where) / 3, max(where) * 3]
    edges = sorted([*span, ceilings["products"] / ceilings["device"]])
    axes.plot(
        edges, [min(ceilings["products"], ceilings["device"] * x) / 1e9 for x in edges], color="black", linewidth=1.5, label="ceilings"
    )
    for kind, marker in (("ours", "o"), ("autograd", "x")):
        _rates(axes, cases, kind, marker)
    axes.set_xlim(*span)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("multiply-adds for each byte of device memory")
    axes.set_ylabel("billion multiply-adds a second")
    axes.yaxis.set_major_formatter(_plain_number)
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _rates(axes: Any, cases: list[Record], kind: str, marker: str) -> None:
    """Of ours, each on its own ledger; autograd's is drawn on the ledger of the exact rule, which does the same work."""
    points = []
    for case in cases:
        found = fastest_of_ours(case) if kind == "ours" else contender(case, kind)
        if found is None or (kind != "ours" and "exact" not in case["rule"]):
            continue
        book = case["ledger"]
        points.append((book["multiply_adds"] / book["device_bytes"], book["multiply_adds"] / found["ms"]["median"] / 1e6))
    if points:
        x, y = zip(*points, strict=True)
        name = "pckernels, a case each" if kind == "ours" else "autograd, where the rule does the same work"
        axes.plot(x, y, marker, color=OURS if kind == "ours" else color(kind), linestyle="none", label=name)


def errors(record: Record) -> Any:
    """How long it takes to come within an error of backprop's gradient."""
    found = record["curves"].get("errors")
    if not found:
        return None
    figure = blank_figure(WIDTH, 4.4)
    axes = figure.subplots()
    families = list(dict.fromkeys(point["family"] for point in found["points"]))
    shades = {"autograd": COLORS["autograd"], "zero divergence": OURS}
    others = iter(["#d9730d", "#2e7d32", "#7b1fa2", "#00838f"])
    for family in families:
        points = [point for point in found["points"] if point["family"] == family]
        style = "o-" if len(points) > 1 else "*"
        shade = shades.get(family) or next(others)
        size = 4 if len(points) > 1 else 13
        axes.plot([p["ms"] for p in points], [max(p["off"], 1e-9) for p in points], style, color=shade, label=family, markersize=size)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(_plain_number)
    axes.set_xlabel(f"ms a call ({found['model']}, batch {found['batch']})")
    axes.set_ylabel("distance from backprop's gradient in float64")
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=8)
    return figure


def steps(record: Record) -> Any:
    """Time in T with its slope and the predicted one, rule by rule, and memory in T."""
    slopes = [found for found in record["curves"].get("slopes", []) if "ms" in found]
    memory = memories(record)
    count = len(slopes) + len(memory)
    if not count:
        return None
    figure = blank_figure(WIDTH, 3.1 * ((count + 1) // 2))
    panels = list(figure.subplots((count + 1) // 2, 2, squeeze=False).flat)
    for panel, slope in zip(panels, slopes, strict=False):
        _slope_panel(panel, slope)
    for panel, found in zip(panels[len(slopes) :], memory, strict=False):
        _memory_panel(panel, found)
    for panel in panels[:count]:
        panel.grid(alpha=0.2)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure


def _slope_panel(panel: Any, slope: Record) -> None:
    """Both lines go through the middle of the points: what a call costs beside its steps is not predicted."""
    times = {int(T): ms for T, ms in slope["ms"].items()}
    middle_t, middle = sum(times) / len(times), sum(times.values()) / len(times)
    panel.plot(list(times), list(times.values()), "o", color=OURS, label="measured")
    for step, style, color, words in (
        (slope["ms_a_step"], "-", OURS, "a step"),
        (slope["predicted_ms_a_step"], ":", "black", "a step, predicted by the ledger"),
    ):
        panel.plot(list(times), [middle + step * (T - middle_t) for T in times], style, color=color, label=f"{step:.3f} ms {words}")
    panel.set_title(f"{slope['model']}, {slope['rule']}", fontsize=9)
    panel.set_xlabel("inference steps T")
    panel.set_ylabel(f"ms a call, batch {slope['batch']}")
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)


def _memory_panel(panel: Any, memory: Record) -> None:
    found = {int(T): count for T, count in memory["bytes"].items()}
    state = {int(T): count for T, count in memory.get("state_bytes", {}).items()}
    if state:
        _state_lines(panel, state)
    panel.plot(
        list(found),
        [max(count, 2**12) / 2**20 for count in found.values()],
        "o-",
        color=OURS,
        label="rise of the peak in a call (4 KiB: none)",
    )
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(_plain_number)
    panel.set_xlabel("inference steps T")
    panel.set_ylabel(f"MiB, batch {memory['batch']}")
    panel.set_title(f"{memory['model']}, {memory.get('backend', 'engine')}", fontsize=9)
    panel.legend(fontsize=8)


def _state_lines(panel: Any, state: dict[int, int]) -> None:
    kept = [state[min(state)] * T for T in state]
    panel.plot(list(state), [count / 2**20 for count in kept], ":", color="#d9730d", label="if every step were kept")
    mebibytes = [count / 2**20 for count in state.values()]
    panel.plot(list(state), mebibytes, "s-", color="black", markersize=4, label="state and results, by the code")


FIGURES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "ratios": ("pckernels beside each rival, case by case. Bars: the middle half of the rounds. Vertical ticks: goals.", ratios),
    "lines": (
        "Time of one call as one thing grows. Bands: the middle half. Dotted: what the ledger allows on the measured ceilings.",
        lines,
    ),
    "errors": ("Time to come within an error of backprop's gradient: every rule that converges to it.", errors),
    "roofline": ("How fast multiply-adds run, against how many there are for each byte of memory.", roofline),
    "steps": ("Time (on a CPU, the processor's) is linear in T, with the slope that the ledger predicts; memory is flat in T.", steps),
}
