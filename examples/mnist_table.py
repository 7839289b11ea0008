"""Test accuracy on MNIST of every rule and of backprop, with one budget of batches, over several seeds.

    python examples/mnist_table.py [--seeds N] [--batches N] [--data NAME] [--out FOLDER]

Writes FOLDER/mnist-table.json, .png and .md; rows of the same course that are there already are kept. Every run is
`pckernels train mlp` with the options that the table names.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pckernels import data, plot
from pckernels.jsonfile import write_json
from pckernels.settings import TrainConfig, complete
from pckernels.training import Diverged, read_data, train

BASE = TrainConfig("mlp", hidden=(128, 64), loss="cross_entropy", optimizer="adam", epochs=1, threads=1)
VALIDATION = 5000  # training images that the choice of a learning rate is tried on
TUNING_SEED = 100
COURSE = """All rows see the same batches of a seed. The learning rate of a row is the better of two in one run of a sixth of the
batches, tried on the last 5,000 training images, which that run leaves out: the test images choose nothing. Incremental steps the
optimizer at each of its T steps, so T times a batch, the other rows once: its lead is one of steps taken, not of their direction."""


@dataclass(frozen=True)
class Row:
    """One learner: its options, and the learning rates to choose from."""

    name: str
    options: dict[str, object]
    rates: tuple[float, ...] = (1e-3, 3e-3)


ROWS = (
    Row("backprop", {"learner": "backprop"}),
    Row("FixedPrediction", {"rule": "fixed", "steps": 20, "rate": 0.3}),
    Row("ZeroDivergence", {"rule": "zero"}),
    Row("Strict", {"rule": "strict", "steps": 8, "rate": 0.1, "momentum": 0.65}),
    Row("Strict, nudged", {"rule": "strict", "steps": 8, "rate": 0.1, "momentum": 0.65, "nudge": 0.3}),
    Row("Strict, centered", {"rule": "strict", "steps": 8, "rate": 0.1, "momentum": 0.65, "nudge": ("centered", 0.3)}),
    Row("ErrorOptimization", {"rule": "error_optimization", "steps": 5, "rate": 0.1}),
    Row("Incremental", {"rule": "incremental", "steps": 6, "rate": 0.5}, (3e-4, 1e-3)),
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=938, help="of 64 images; 938 is one epoch")
    parser.add_argument("--data", default="mnist", help="or digits, which need no folder")
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], choices=[row.name for row in ROWS], metavar="ROW")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    args = parser.parse_args(arguments)
    base = complete(replace(BASE, data=args.data, batches=args.batches, epochs=1 + args.batches * 64 // 1000))
    dataset = read_data(base)
    for row in ROWS:
        if row.name in args.rows:
            found = measure(row, base, dataset, args.seeds)
            print(line(found), flush=True)
            write(args.out, found, base, args.seeds)


def measure(row: Row, base: TrainConfig, dataset: data.Dataset, seeds: int) -> dict[str, Any]:
    """The row's learning rate, chosen on training images alone, then its accuracy on the test images for each seed."""
    lr = choose(row, base, dataset)
    runs = [train(config(row, base, lr, seed), dataset, report=lambda _: None) for seed in range(seeds)]
    accuracies, seconds = [run.accuracy for run in runs], [run.seconds for run in runs]
    return {"name": row.name, "lr": lr, "accuracies": accuracies, "seconds": seconds, "command": command(row, lr, base)}


def choose(row: Row, base: TrainConfig, dataset: data.Dataset) -> float:
    held_out = min(VALIDATION, len(dataset.train) // 5)
    cut = len(dataset.train) - held_out
    parts = (data.Part(dataset.train, torch.arange(start, end)) for start, end in ((0, cut), (cut, len(dataset.train))))
    tuning = replace(dataset, **dict(zip(("train", "test"), parts, strict=True)))
    short = replace(base, batches=max(1, (base.batches or 1) // 6))
    scores = {}
    for lr in row.rates:
        try:
            scores[lr] = train(config(row, short, lr, TUNING_SEED), tuning, report=lambda _: None).accuracy
        except Diverged:
            scores[lr] = 0.0
    return max(scores, key=lambda lr: scores[lr])


def config(row: Row, base: TrainConfig, lr: float, seed: int) -> TrainConfig:
    plain = replace(base, rule=None, steps=None, rate=None, backend=None)
    return complete(replace(plain, lr=lr, seed=seed, **row.options))  # type: ignore[arg-type]


def command(row: Row, lr: float, base: TrainConfig) -> str:
    """The run of seed 0 on the command line."""
    words = []
    for name, value in row.options.items():
        words += [f"--{name}", " ".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    course = f"--data {base.data} --hidden 128 64 --loss cross_entropy --optimizer adam --lr {lr:g} --epochs {base.epochs}"
    return f"pckernels train mlp {' '.join(words)} {course} --batches {base.batches}"


def line(found: dict[str, Any]) -> str:
    return f"{found['name']:18} {share(found)}  lr {found['lr']:g}, {statistics.mean(found['seconds']):.1f} s a run"


def share(found: dict[str, Any]) -> str:
    accuracies = found["accuracies"]
    return f"{statistics.mean(accuracies):.2%} ± {statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0:.2%}"


def write(folder: Path, found: dict[str, Any], base: TrainConfig, seeds: int) -> None:
    """Put a row into the table in this folder, beside those of the same course that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mnist-table.json"
    course = {"data": base.data, "batches": base.batches, "batch_size": base.batch_size, "hidden": list(base.hidden or ()), "seeds": seeds}
    before = json.loads(path.read_text()) if path.exists() else {}
    known = {row["name"]: row for row in before.get("rows", [])} if all(before.get(key) == value for key, value in course.items()) else {}
    known[found["name"]] = found
    rows = [known[row.name] for row in ROWS if row.name in known]
    write_json(path, {**course, "rows": rows})
    title = f"{base.data}, MLP {'-'.join(map(str, base.hidden or ()))}, {base.batches} batches of {base.batch_size}, {seeds} seeds"
    plot.accuracies(folder / "mnist-table.png", {row["name"]: row["accuracies"] for row in rows}, title)
    (folder / "mnist-table.md").write_text("\n".join(markdown(rows, title)) + "\n", encoding="utf-8")


def markdown(rows: list[dict[str, Any]], title: str) -> Iterator[str]:
    yield from (f"# {title}", "", *COURSE.splitlines(), "")
    yield from ("| rule | test accuracy, mean and standard deviation over the seeds | lr |", "|---|---|---|")
    for row in rows:
        yield f"| {row['name']} | {share(row)} | {row['lr']:g} |"
    yield from ("", "![test accuracy of every seed](mnist-table.png)", "", "Seed 0 of each, on the command line:", "", "```")
    yield from (row["command"] for row in rows)
    yield "```"


if __name__ == "__main__":
    main()
