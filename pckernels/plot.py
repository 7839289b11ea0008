"""Figures: training curves of both learners, and the convergence of gradients beside what theory predicts.

Nothing here computes: curves come from the CSV files that training wrote, convergence from lists of plain numbers.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import Unsupported

FLOOR = 1e-17  # an error of exactly 0 has no place on a log axis; it is drawn here
CLOSE = 7.0  # points below the first learner that a closer look at accuracies takes in
LEGEND = 10  # more vertices than this are told apart by colour alone, first and last named


def curves(tables: Mapping[str, str | Path], path: str | Path, title: str = "") -> None:
    """Draw training loss, test loss and test accuracy of each learner, side by side, as a PNG at `path`.

    Args:
        tables: learner name -> the metrics CSV that training wrote (columns step, epoch, batch, split, loss, accuracy).

    Raises:
        FileNotFoundError, ValueError: a CSV is missing, or is not one that training wrote.
    """
    rows = {name: read_metrics(table) for name, table in tables.items()}
    figure = blank_figure(12, 3.6)
    panels = figure.subplots(1, 3)
    for (name, metrics), style in zip(rows.items(), _styles(), strict=False):
        _draw_training(panels[0], name, metrics, style)
        _draw_test(panels[1], panels[2], name, metrics, style)
    for panel, label in zip(panels, ("training loss a sample", "test loss a sample", "test accuracy"), strict=True):
        panel.set_xlabel("batches")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def convergence(
    path: str | Path,
    steps: Sequence[int],
    measured: Mapping[str, Sequence[float]],
    predicted: Mapping[str, Sequence[float]],
    title: str = "",
) -> None:
    """Draw the relative gradient error of each vertex against T, measured (markers) over predicted (lines), as a PNG.

    Args:
        steps: the numbers of inference steps T, ascending.
        measured: vertex name -> relative error against autograd at each T.
        predicted: vertex name -> |c_k(T) - 1| at each T; a vertex without a prediction is drawn without a line.

    Raises:
        ValueError: a list is not as long as `steps`, or `measured` is empty.
    """
    _require_lengths(steps, measured, predicted)
    figure = blank_figure(7.5, 5)
    axes = figure.subplots()
    for index, name in enumerate(measured):
        _draw_vertex(axes, steps, name, index, measured, predicted)
    axes.set_yscale("log")
    axes.set_xlabel("inference steps T")
    axes.set_ylabel("relative gradient error against autograd")
    exact = any(value <= FLOOR for values in measured.values() for value in values)
    note = f"; 0 is drawn at {FLOOR:g}" if exact else ""
    axes.set_title(f"{title}\nmarkers: measured; lines: |c_k(T) - 1|, predicted{note}".strip(), fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def gradient_quality(path: str | Path, points: Mapping[str, Mapping[str, tuple[int, float]]]) -> None:
    """Draw the angle to the true gradient over the cost in products of every method, a panel for each model, as a PNG.

    Args:
        points: model -> method -> (products, angle in degrees).
    """
    figure = blank_figure(6.5 * len(points), 5.5)
    methods = list(dict.fromkeys(name for found in points.values() for name in found))
    for axes, (model, found) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items(), strict=True):
        for name, (products, angle) in found.items():
            style = _point_style(methods.index(name))
            axes.plot([products], [angle], linestyle="none", label=name, **style)
        axes.set_xscale("log")
        axes.set_ylim(-4, 94)
        axes.set_xlabel("products an update")
        axes.set_ylabel("angle to the gradient, degrees")
        axes.set_title(model, fontsize="medium")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=120)


def accuracies(path: str | Path, found: Mapping[str, Sequence[float]], title: str = "") -> None:
    """Draw the accuracy of every run of each learner as a dot, and their mean as a line, as a PNG; the first learner's mean goes through.

    Where some lie far from the first learner, a second panel shows those near it.

    Args:
        found: learner -> accuracies in [0, 1], one for each seed.
    """
    points = {name: [100 * value for value in values] for name, values in found.items()}
    means = [sum(values) / len(values) for values in points.values()]
    low, high = means[0] - CLOSE, means[0] + 0.4 * CLOSE
    far = any(not low < value < high for values in points.values() for value in values)
    figure = blank_figure(10 if far else 7.5, 1.5 + (0.27 if far else 0.35) * len(found))
    panels = figure.subplots(1, 1 + far, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.axvline(means[0], color="C3", linewidth=0.8, alpha=0.5)
        for row, (values, mean) in enumerate(zip(points.values(), means, strict=True)):
            axes.plot(values, [row] * len(values), "o", color="C0", fillstyle="none", markersize=6)
            axes.plot([mean, mean], [row - 0.3, row + 0.3], color="C3", linewidth=2)
        axes.set_yticks(range(len(found)), list(found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.grid(alpha=0.3, axis="x")
    if far:
        panels[1].set_xlim(low, high)
    figure.supxlabel("test accuracy, %: a circle for each seed, a bar for the mean", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=100)


def image_rows(path: str | Path, rows: Mapping[str, Sequence[Any]], title: str = "", signed: bool = False) -> None:
    """Draw rows of grey pictures, each row with its name, as a PNG at `path`.

    Args:
        rows: name -> pictures (H, W), on one scale from the darkest to the brightest pixel; `signed`: each has its own, with 0 grey.
    """
    columns = max(len(pictures) for pictures in rows.values())
    figure = blank_figure(2.0 + 0.62 * columns, 0.4 + 0.62 * len(rows))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    every = [picture for pictures in rows.values() for picture in pictures]
    low, high = min(float(picture.min()) for picture in every), max(float(picture.max()) for picture in every)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=False):
            size = float(abs(picture).max())
            axes.imshow(picture, cmap="gray", vmin=-size if signed else low, vmax=size if signed else high)
        for axes in line:
            axes.axis("off")
        line[0].text(-0.15, 0.5, name, ha="right", va="center", fontsize="small", transform=line[0].transAxes)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=110)


def lines(
    path: str | Path, x: Sequence[float], curves: Mapping[str, Sequence[float]], labels: tuple[str, str] = ("", ""), title: str = ""
) -> None:
    """Draw named curves over the same points, from 0 up, as a PNG at `path`; `labels`: of both axes."""
    figure = blank_figure(6, 4)
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(x, values, marker="o", markersize=3, label=name)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def read_metrics(path: str | Path) -> list[dict[str, str]]:
    """The rows of a metrics CSV, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = {"step", "split", "loss", "accuracy"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is not a metrics file of `pckernels train`: it has no column {', '.join(sorted(missing))}.")
        return list(reader)


def _draw_training(axes, name, metrics, style):  # type: ignore[no-untyped-def]
    train = [(int(row["step"]), float(row["loss"])) for row in metrics if row["split"] == "train"]
    if not train:
        return
    steps, losses = zip(*train, strict=True)
    width = max(1, len(losses) // 100)
    axes.plot(steps[width - 1 :], _running_mean(losses, width), label=name, **style)


def _draw_test(loss_axes, accuracy_axes, name, metrics, style):  # type: ignore[no-untyped-def]
    test = [row for row in metrics if row["split"] == "test"]
    steps = [int(row["step"]) for row in test]
    marker = {"marker": "o", "markersize": 3}
    loss_axes.plot(steps, [float(row["loss"]) for row in test], label=name, **style, **marker)
    accuracy_axes.plot(steps, [float(row["accuracy"]) for row in test], label=name, **style, **marker)


def _draw_vertex(axes, steps, name, index, measured, predicted):  # type: ignore[no-untyped-def]
    from matplotlib import colormaps

    last = len(measured) - 1
    color = colormaps["viridis"](0.9 * index / max(1, last))
    label = name if len(measured) <= LEGEND or index in (0, last) else None
    if name in predicted:
        axes.plot(steps, [max(FLOOR, value) for value in predicted[name]], color=color, linewidth=1)
    axes.plot(steps, [max(FLOOR, value) for value in measured[name]], "o", color=color, markersize=4.5, fillstyle="none", label=label)


def _require_lengths(steps: Sequence[int], measured: Mapping[str, Sequence[float]], predicted: Mapping[str, Sequence[float]]) -> None:
    if not measured:
        raise ValueError("measured must hold at least one vertex: there is nothing to draw.")
    for kind, table in (("measured", measured), ("predicted", predicted)):
        for name, values in table.items():
            if len(values) != len(steps):
                raise ValueError(f"{kind}[{name!r}] has {len(values)} values for {len(steps)} numbers of steps; give one for each.")


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    return [(total[end] - total[end - width]) / width for end in range(width, len(total))]


def _styles() -> list[dict[str, object]]:
    # an exact rule lies on top of backprop: dashes over a wide pale line keep both visible
    return [{"linewidth": 4, "alpha": 0.4}, {"linewidth": 1.4, "linestyle": "--"}]


def _point_style(index: int) -> dict[str, object]:
    # ten colours and eight markers, which repeat at different lengths: no two methods share both
    return {"color": f"C{index % 10}", "marker": "osD^vPX*"[index % 8], "markersize": 8, "fillstyle": "none"}


def blank_figure(width: float, height: float):  # type: ignore[no-untyped-def]
    """A figure of so many inches that no window system and no pyplot knows of.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported("Drawing needs matplotlib: `pip install matplotlib`.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, and the caller's own pyplot figures stay as they are
    return figure
