"""Figures of several panels: curves over an axis each, or heat maps of vertices by steps. Nothing here computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plot import blank_figure


@dataclass(frozen=True)
class Curve:
    """A named line; `colour` 0, 1, .. is shared by curves that belong together, `look` is line, dashes, thin or dots."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    look: str = "line"


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes; `log` names the logarithmic ones, as "", "x", "y" or "xy"; `ticks` of the first axis are named."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: str = ""
    ticks: Sequence[float] | None = None


@dataclass(frozen=True)
class HeatMap:
    """Cells (row, column) of powers of ten, with some of them framed."""

    title: str
    rows: Sequence[str]
    cells: Sequence[Sequence[float]]
    framed: Sequence[tuple[int, int]] = ()


LOOKS: dict[str, dict[str, object]] = {
    "line": {"marker": "o", "markersize": 2.5, "linewidth": 1.4},
    "thin": {"linewidth": 1.0, "alpha": 0.6},
    "dashes": {"linestyle": "--", "linewidth": 1.2},
    "dots": {"linestyle": "none", "marker": "o", "markersize": 4, "fillstyle": "none"},
}


def panels(path: str | Path, drawn: Sequence[Panel]) -> None:
    """Draw panels side by side, each with its legend, as a PNG at `path`. A curve without a name is not in the legend."""
    figure = blank_figure(4.3 * len(drawn), 3.5)  # inches
    for axes, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for curve in panel.curves:
            axes.plot(curve.x, curve.y, color=f"C{curve.colour}", label=curve.name or None, **LOOKS[curve.look])
        axes.set_xscale("log" if "x" in panel.log else "linear")
        axes.set_yscale("log" if "y" in panel.log else "linear")
        axes.set(xlabel=panel.x, ylabel=panel.y)
        if panel.ticks is not None:
            axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            axes.set_xticks([], minor=True)
        axes.set_title(panel.title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=76)


def heat_maps(path: str | Path, drawn: Sequence[HeatMap], scale: tuple[float, float], x: str, colour: str) -> None:
    """Draw maps side by side on one scale of powers of ten, from its lower to its upper end, as a PNG at `path`.

    Args:
        x: what the columns are, counted from 0. colour: what the colours are.
    """
    from matplotlib.patches import Rectangle

    figure = blank_figure(4.3 * len(drawn), 3.3)
    grid = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, drawing in zip(grid, drawn, strict=True):
        image = axes.imshow(drawing.cells, cmap="viridis", vmin=scale[0], vmax=scale[1], aspect="auto")
        for row, column in drawing.framed:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="C3", linewidth=2))
        axes.set_yticks(range(len(drawing.rows)), list(drawing.rows), fontsize="small")
        axes.set_xlabel(x)
        axes.set_title(drawing.title, fontsize="medium")
    figure.colorbar(image, ax=grid, label=colour)
    figure.savefig(path, dpi=76)
