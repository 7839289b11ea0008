"""How well, and how cheaply, rules of predictive coding and other ways of learning approximate the gradient.

For each: the angle to the gradient, the ratio of the norms, and the cost of one update in products. A product is one layer's weights
times one batch: a prediction, a feedback, or an outer product of errors and inputs.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import data
from .errors import InferenceDiverged, Unsupported
from .gradient_methods import bp_stdp, evolution_strategies, feedback_alignment
from .graph import ComputationGraph
from .jsonfile import write_json
from .measure import Probe
from .models import Case, converted
from .rules import ErrorOptimization, FixedPrediction, Incremental, Rule, Strict, ZeroDivergence

SAMPLES = 64
PAIRS = (64, 1024)
SIGMA = 1e-3
WARM_UP = 60  # steps of backprop before the comparison
SPIKE_STEPS, SPIKE_WINDOW = 50, 4  # of BP-STDP; time steps


@dataclass(frozen=True)
class Count:
    """What one pass over the layers of a graph costs, in products.

    layers: weights that are multiplied with; fed: those of them that also feed back, since a value node lies before them.
    """

    layers: int
    fed: int

    @classmethod
    def of(cls, graph: ComputationGraph) -> "Count":
        weighted = [vertex for vertex in graph.vertices if vertex.parameters]
        return cls(len(weighted), sum(bool(graph.free_parents(vertex)) for vertex in weighted))

    @property
    def backprop(self) -> int:
        """Forward, back, outer products."""
        return 2 * self.layers + self.fed

    def relaxation(self, steps: int, phases: int = 1) -> int:
        """A pass forward; at each step feedback and the predictions that move; outer products. Each phase relaxes and learns."""
        return self.layers + phases * (2 * self.fed * steps + self.layers)

    def errors(self, steps: int) -> int:
        """Predictions are frozen: at each step feedback alone."""
        return 2 * self.layers + self.fed * steps

    def incremental(self, steps: int) -> int:
        """All weights move: at each step feedback, every prediction, every outer product."""
        return self.layers + steps * (self.fed + 2 * self.layers)

    def forward(self, passes: int) -> int:
        return self.layers * passes

    def spiking(self, steps: int) -> int:
        """At each time step currents, feedback of xi, and outer products."""
        return steps * (2 * self.layers + self.fed)


@dataclass(frozen=True)
class Row:
    """One method on one model; without an angle, `note` says why there is none.

    angle: degrees between the estimate and the gradient, over all parameters; angles: of each parameter alone.
    ratio: ||estimate|| / ||gradient||.
    """

    method: str
    products: int
    angle: float | None
    ratio: float | None
    angles: dict[str, float]
    note: str = ""


@dataclass(frozen=True)
class Table:
    model: str
    summary: str
    rows: list[Row]


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two vectors, exact for small angles; NaN where one is 0."""
    size_a, size_b = a.norm(), b.norm()
    if not size_a or not size_b:
        return math.nan
    u, v = a / size_a, b / size_b
    return math.degrees(2.0 * math.atan2(float((u - v).norm()), float((u + v).norm())))


def rules(depth: int) -> dict[str, tuple[Rule, Callable[[Count], int]]]:
    """The rules of predictive coding in the table, by what it calls them, each with what it costs."""
    found: dict[str, tuple[Rule, Callable[[Count], int]]] = {}
    for steps in (5, 20, 100):
        found[f"Strict, T = {steps}"] = Strict(steps, 0.1), partial(Count.relaxation, steps=steps)
    found["Strict, nudge 0.1, T = 100"] = Strict(100, 0.1, nudge=0.1), partial(Count.relaxation, steps=100)
    found["Strict, centered 0.1, T = 100"] = Strict(100, 0.1, nudge=("centered", 0.1)), partial(Count.relaxation, steps=100, phases=2)
    for steps in (5, 20):
        found[f"ErrorOptimization, T = {steps}"] = ErrorOptimization(steps, 0.1), partial(Count.relaxation, steps=steps)
    found["Incremental, T = 20"] = Incremental(20, 0.1, 1e-4), partial(Count.incremental, steps=20)
    found["FixedPrediction, T = 20"] = FixedPrediction(20, 0.1, solver="iterate"), partial(Count.errors, steps=20)
    found["FixedPrediction, rate 1, T = depth"] = FixedPrediction(depth, 1.0, solver="iterate"), partial(Count.errors, steps=depth)
    found["ZeroDivergence"] = ZeroDivergence(), lambda count: count.backprop
    return found


def compare(case: Case, pairs: Sequence[int] = PAIRS) -> Table:
    """Every method on one model; nothing of `case` is changed.

    Args:
        pairs: how many antithetic pairs evolution strategies draw, a row for each.
    """
    probe = Probe(case.module, case.x, case.target, case.loss)
    graph = probe.graph()
    count, exact = Count.of(graph), _flat(probe.autograd_gradients())
    rows = [_row("backprop", count.backprop, exact, lambda: exact)]
    for name, (rule, cost) in rules(graph.depth).items():
        rows.append(_row(name, cost(count), exact, lambda rule=rule: _flat(probe.gradients(rule))))  # type: ignore[misc]
    rows += [_row(name, cost, exact, estimate) for name, cost, estimate in _others(case, probe, count, pairs)]
    size = sum(parameter.numel() for parameter in case.module.parameters())
    return Table(case.name, f"{count.layers} layers with weights, {size:,} parameters, a batch of {len(probe.args[0])}", rows)


def _others(case: Case, probe: Probe, count: Count, pairs: Sequence[int]) -> Iterator[tuple[str, int, Callable[[], dict[str, Tensor]]]]:
    module = probe.network.module

    def loss(twin: nn.Module) -> Tensor:
        return probe.summed_loss_of(twin)

    yield "feedback alignment", count.backprop, lambda: feedback_alignment(module, loss, _generator())
    for number in pairs:
        yield (
            f"evolution strategies, {number} pairs",
            count.forward(2 * number),
            lambda number=number: evolution_strategies(module, loss, number, SIGMA, _generator()),  # type: ignore[misc]
        )
    yield (
        f"BP-STDP, {SPIKE_STEPS} time steps",
        count.spiking(SPIKE_STEPS),
        lambda: bp_stdp(module, case.x, case.target, SPIKE_STEPS, SPIKE_WINDOW, _generator()),
    )


def _row(method: str, products: int, exact: dict[str, Tensor], estimate: Callable[[], dict[str, Tensor]]) -> Row:
    try:
        found = estimate()
    except (Unsupported, InferenceDiverged) as error:
        return Row(method, products, None, None, {}, str(error))
    a, b = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (found, exact))
    angles = {name: angle(found[name], exact[name]) for name in exact}
    return Row(method, products, angle(a, b), float(a.norm() / b.norm()), angles)


def _flat(gradients: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def mlp() -> Case:
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return _digits("mlp", nn.Sequential(*layers), flat=True)


def cnn() -> Case:
    convolutions = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 2), nn.ReLU(), nn.Flatten()]
    return _digits("cnn", nn.Sequential(*convolutions, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


def _digits(name: str, module: nn.Module, flat: bool = False) -> Case:
    """On the first digits of scikit-learn, with pixels in [0, 1] and one-hot targets, of which backprop has learned a little: at the
    start no output of a spiking network fires."""
    pixels, labels = data.digits().train.fetch(torch.arange(SAMPLES))
    x = (pixels.flatten(1) if flat else pixels) / 2 + 0.5
    target = nn.functional.one_hot(labels, 10).to(x.dtype)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(WARM_UP):
        optimizer.zero_grad()
        nn.functional.mse_loss(module(x), target).backward()
        optimizer.step()
    return Case(name, module, x, target)


BUILDERS: dict[str, Callable[[], Case]] = {"mlp": mlp, "cnn": cnn}


def build(name: str) -> Case:
    """One of the two models with its data, in float64, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return converted(BUILDERS[name](), torch.float64)


def run(args: argparse.Namespace) -> int:
    """Print the table of both models; write and draw it where that was asked for."""
    if args.models:
        raise ValueError(f"--gradients compares on models of its own, {' and '.join(BUILDERS)}: name none.")
    tables = []
    for name in BUILDERS:
        tables.append(compare(build(name)))
        print("\n".join(lines(tables[-1])), flush=True)
    if args.json:
        write_json(args.json, {"models": [plain(table) for table in tables]})
    if args.plot:
        from . import plot

        points = {t.model: {row.method: (row.products, row.angle) for row in t.rows if row.angle is not None} for t in tables}
        plot.gradient_quality(args.plot, points)
    return 0


def lines(table: Table) -> Iterator[str]:
    """The table as a person reads it."""
    width = max(len(row.method) for row in table.rows)
    yield f"{table.model}: {table.summary}"
    yield f"  {'method':<{width}}  {'products':>8}  {'angle':>7}  {'norm ratio':>10}"
    for row in table.rows:
        if row.angle is None or row.ratio is None:
            yield f"  {row.method:<{width}}  {row.products:8}  {row.note}"
        else:
            yield f"  {row.method:<{width}}  {row.products:8}  {row.angle:6.2f}°  {row.ratio:10.3g}"
    yield ""


def plain(table: Table) -> dict[str, Any]:
    """The table as plain data."""
    return {"model": table.model, "summary": table.summary, "rows": [vars(row) for row in table.rows]}
