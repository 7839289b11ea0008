"""The registry: what is timed. A new case is one line here; suites say when it runs, goals what its ratios should reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pckernels.benchmarks.models import CNN, NAMES_RNN, TRANSFORMER, VGG, Model, deep_mlp, lstm, mlp
from pckernels.benchmarks.timing import LEAST
from pckernels.rules import ErrorOptimization, FixedPrediction, Incremental, Relaxed, Rule, Strict, ZeroDivergence

SUITES = ("quick", "cpu", "gpu")
QUICK, CPU, GPU = ("quick", "cpu"), ("cpu",), ("gpu",)
RATE = 0.1
# What float32 may cost, relative to float64: never so much that gradients wrong by 1 % would pass. Values that are kept as values lose
# the digits that PC lives on, and among very many units some always lies within rounding of its kink.
LIMIT, LIMIT_OF_VALUES, LIMIT_OF_MANY = 1e-3, 5e-3, 5e-3


@dataclass(frozen=True)
class Case:
    """One contest: a model, a batch, a rule; who else takes part, and what is to be reached.

    Attributes:
        rivals: of contenders.RIVALS, beside autograd, which takes part in every case.
        goals: "one / other" -> the ratio of their times to reach, such as {"host / loop": 0.5}. "ours": the fastest of ours in float32.
        accuracy: the goal for the relative distance of ours from float64, per parameter, or None.
        limit, limit_of_values: how far ours, and those that keep values as values, may be from float64 before nothing is timed.
        drift: how far float32 takes the engines at this T, where that is farther than the limit: then a short T has to be right (proof.py).
        seed: of the first draw of data, where those before it are known to put a unit within rounding of its kink.
        as_a_whole: that distance is of the whole gradient, not the largest of a parameter's.
        oracle: "reference" in float64; where that takes long, "loop", the loop by hand in float64, or, of an exact rule, "autograd".
        axes: the plots that it is a point of: "batch", "steps", "depth", "width".
        seconds: of the timing, about. least: rounds that it has even where they take longer.
        trains: each call ends with SGD's step, as a training step does.
        tiers: what the planner did not choose takes part: on a GPU the engine's other tiers, and products in tf32 and bf16; on the CPU
            the graph tier, and what "auto" takes.
        peers: other libraries take part where they are installed: each compiles the case anew, which takes minutes.
        reference: the reference backend takes part beside the fast ones (it does wherever none of those runs the case).
    """

    model: Model
    batch: int
    rule: Rule
    suites: tuple[str, ...] = CPU
    rivals: tuple[str, ...] = ()
    goals: dict[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    limit: float = LIMIT
    limit_of_values: float = LIMIT_OF_VALUES
    drift: float = 0.0
    seed: int = 0
    as_a_whole: bool = False
    oracle: str = "reference"
    axes: tuple[str, ...] = ()
    seconds: float = 3.0
    reference: bool = False
    peers: bool = False
    trains: bool = False
    tiers: bool = False
    least: int = LEAST

    @property
    def name(self) -> str:
        return f"{self.model.name}, batch {self.batch}, {self.rule_name}" + (", with SGD's step" if self.trains else "")

    @property
    def rule_name(self) -> str:
        return rule_name(self.rule)

    @property
    def steps(self) -> int | None:
        return self.rule.dynamics.steps


def rule_name(rule: Rule) -> str:
    """In a few words: the kind, T, and what is not usual."""
    if isinstance(rule, Relaxed):
        parts = [f"{rule.feedback} feedback"] * (rule.feedback != "symmetric") + ["without f'"] * (not rule.derivative)
        return ", ".join([rule_name(rule.rule), *parts, *[f"{rule.error_weights} error weights"] * (rule.error_weights != "identity")])
    if isinstance(rule, ZeroDivergence):
        return "exact (zero divergence)"
    dynamics = rule.dynamics
    names: dict[type[Rule], str] = {Strict: "strict", FixedPrediction: "fixed prediction", ErrorOptimization: "error optimization"}
    words = [f"{names.get(type(rule), type(rule).__name__.lower())} T={dynamics.steps}"]
    words += [f"rate {dynamics.rate:g}"] * (dynamics.rate != RATE)
    words += [f"momentum {dynamics.momentum:g}"] * (dynamics.momentum != 0.0)
    words += ["nudged by " + " and ".join(f"{beta:g}" for beta in dynamics.nudges)] * dynamics.is_nudged
    words += ["closed form"] * dynamics.closed_form
    return ", ".join(words)


PAPER_MLP = mlp()
WEIGHED_MLP = replace(PAPER_MLP, name=f"{PAPER_MLP.name} with a precision", precision=(("2", 2.0),))
EXACT = ZeroDivergence()
CLOSED = FixedPrediction(200, 1.0)  # its T is beyond every model's depth: backprop's gradient in one sweep


def strict(steps: int, momentum: float = 0.0) -> Strict:
    return Strict(steps, RATE, momentum=momentum)


def contests() -> Iterator[Case]:
    """Models of the papers, each at the batch of its experiment, with the goals of the project."""
    loop = ("loop",)
    yield Case(PAPER_MLP, 64, strict(20), QUICK, loop, {"host / loop": 0.5}, peers=True, tiers=True)
    yield Case(PAPER_MLP, 64, strict(20), CPU, ("loop, compiled",))  # half a minute of compilation: not in quick
    yield Case(PAPER_MLP, 1, strict(20), QUICK, loop, {"host / loop": 0.25}, peers=True, tiers=True)
    yield Case(PAPER_MLP, 64, FixedPrediction(20, RATE, solver="iterate"), QUICK)
    yield Case(PAPER_MLP, 64, EXACT, QUICK, ("autograd, compiled",), {"host / autograd": 1.0})
    yield from _other_rules()
    yield Case(PAPER_MLP, 256, strict(20), QUICK, ("loop", "host, two threads"), {"host, two threads / host": round(1 / 1.7, 3)})
    yield Case(CNN, 64, strict(20), QUICK, loop, {"host / autograd": 3.0}, 5e-4, seconds=6.0, peers=True, tiers=True)
    # Strict dynamics of this CNN are chaotic over a hundred steps: a kink that float32 crosses a step early is felt.
    yield Case(CNN, 64, strict(100), CPU, loop, {"host / autograd": 14.0}, drift=1e-1, seed=1, seconds=12.0)
    yield Case(CNN, 64, EXACT, QUICK, (), {"host / autograd": 1.0})
    yield Case(NAMES_RNN, 1, strict(20), QUICK, loop, {"host / loop": 0.33})
    yield Case(lstm(64, 12), 16, strict(20), QUICK, loop, tiers=True)
    yield Case(VGG, 2, strict(8, 0.6), CPU, loop, seconds=6.0, tiers=True)
    yield Case(VGG, 16, strict(8, 0.6), CPU, loop, seed=2, seconds=6.0)
    yield Case(VGG, 16, EXACT, CPU, seconds=6.0)
    yield Case(TRANSFORMER, 8, strict(8), QUICK)
    yield Case(lstm(256, 50), 64, strict(20), CPU, loop, {"host / loop": 0.4}, oracle="loop", seconds=20.0)
    yield Case(lstm(256, 50), 64, EXACT, CPU, (), {"host / autograd": 1.0}, seconds=12.0)


def _other_rules() -> Iterator[Case]:
    """A row for every rule that no other case has, on the paper's MLP at batch 64."""
    rules: tuple[Rule, ...] = (
        Incremental(20, RATE, weight_rate=1e-4),
        ErrorOptimization(20, RATE),
        Strict(20, RATE, nudge=("centered", 0.1)),
        Relaxed(strict(20), feedback="learned", derivative=False),
        FixedPrediction(20, RATE),
    )
    for rule in rules:
        yield Case(PAPER_MLP, 64, rule, seconds=1.5, tiers=True)
    yield Case(WEIGHED_MLP, 64, strict(20), seconds=1.5, tiers=True)


def contests_on_gpu() -> Iterator[Case]:
    """Those of the GPU's table of goals first, then what else is compared there; rivals that have to be compiled come last."""
    loop, captured = ("loop",), "loop, CUDA graph"
    by_autograd: dict[str, Any] = {"oracle": "autograd", "seconds": 1.5, "trains": True}
    exact = {"ours / autograd, CUDA graph": 1.0, "ours / autograd": 0.5}
    trained = ((PAPER_MLP, 64, LIMIT), (CNN, 64, LIMIT), (lstm(256, 50), 64, LIMIT), (VGG, 128, LIMIT_OF_MANY))
    yield Case(PAPER_MLP, 64, strict(20), GPU, loop, {"ours / loop": 1 / 20, f"ours / {captured}": 1 / 6}, seconds=1.5)
    yield from (Case(model, batch, EXACT, GPU, (), exact, limit=limit, **by_autograd) for model, batch, limit in trained)
    yield Case(VGG, 128, strict(8, 0.6), GPU, (), {"ours / autograd": 4.0}, limit=LIMIT_OF_MANY, seconds=1.5)
    yield from _batches(GPU)  # slower than the captured loop at no batch: a goal across cases (goals.py)
    yield from (Case(model, batch, CLOSED, GPU, (), exact, limit=limit, **by_autograd) for model, batch, limit in trained)
    yield Case(CNN, 64, strict(20), GPU, loop)
    yield Case(PAPER_MLP, 256, FixedPrediction(20, RATE, solver="iterate"), GPU)
    yield Case(PAPER_MLP, 256, EXACT, GPU, ("autograd, compiled",), tiers=True)
    yield Case(PAPER_MLP, 64, strict(10), GPU, ("loop", "loop, compiled"), tiers=True)


def accuracies() -> Iterator[Case]:
    """The CNN in float32 against float64: displacements keep the digits. (T = 20 is among the contests.)"""
    for steps, momentum in ((1, 0.0), (5, 0.0), (8, 0.6)):
        yield Case(CNN, 64, strict(steps, momentum), CPU, ("loop",), accuracy=5e-4, seconds=2.0)


def lines() -> Iterator[Case]:
    """Points of the plots: one thing changes, the rest is the paper's MLP at batch 64 and T = 20, or layers of width 128.

    A curve asks less of its points than a contest of its medians: they have fewer rounds, and where the reference would take minutes in
    float64 the oracle is the loop by hand, which tests hold against the reference.
    """
    loop, everywhere = ("loop",), ("cpu", "gpu")
    yield from _batches(CPU)
    for steps in (1, 5, 10, 20, 50, 100, 200):
        suites = SUITES if steps in (5, 20, 50, 100) else everywhere
        yield Case(PAPER_MLP, 64, strict(steps), suites, loop, axes=("steps",), **POINT)
    for depth in (3, 4, 8, 16, 32, 64, 128):
        suites = SUITES if depth in (4, 8, 16, 32) else everywhere
        oracle = "reference" if depth <= 32 else "loop"
        yield Case(deep_mlp(depth, 128), 64, strict(20), suites, loop, as_a_whole=True, oracle=oracle, axes=("depth",), **POINT)
    for width in (64, 128, 256, 512, 1024, 2048):
        suites = SUITES if width in (64, 128, 256) else everywhere
        oracle = "reference" if width <= 256 else "loop"
        yield Case(deep_mlp(4, width), 64, strict(20), suites, loop, as_a_whole=True, oracle=oracle, axes=("width",), **POINT)


POINT: dict[str, Any] = {"seconds": 1.0, "least": 3}


def _batches(suites: tuple[str, ...]) -> Iterator[Case]:
    """The paper's MLP at every batch of the curve."""
    for batch in (1, 4, 16, 64, 256, 1024, 4096, 8192):
        where = QUICK if suites is CPU and batch in (1, 16, 64, 256, 1024) else suites
        limit = LIMIT if batch <= 256 else LIMIT_OF_MANY
        oracle = "reference" if batch <= 256 else "loop"
        yield Case(PAPER_MLP, batch, strict(20), where, ("loop",), limit=limit, oracle=oracle, axes=("batch",), **POINT)


def suite(name: str) -> list[Case]:
    """The cases of a suite, each once.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"There is no suite {name!r}; choose from {', '.join(SUITES)}.")
    found: dict[str, Case] = {}
    for source in (contests, contests_on_gpu, accuracies, lines):
        for case in source():
            if name in case.suites:
                found[case.name] = _joined(found[case.name], case) if case.name in found else case
    return [replace(case, seconds=case.seconds / 3) if name == "quick" else case for case in found.values()]


def _joined(a: Case, b: Case) -> Case:
    """One case that is asked for twice, as a contest and as a point of a plot."""
    rivals = tuple(dict.fromkeys(a.rivals + b.rivals))
    axes = tuple(dict.fromkeys(a.axes + b.axes))
    return replace(a, axes=axes, goals={**b.goals, **a.goals}, rivals=rivals, tiers=a.tiers or b.tiers)


def device_of(suite_name: str) -> torch.device:
    """Where a suite runs."""
    return torch.device("cuda" if suite_name == "gpu" else "cpu")
