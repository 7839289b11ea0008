"""The registry: what is timed. A new case is one line here; suites say when it runs, goals what its ratios should reach."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from pckernels.benchmarks.models import CNN, NAMES_RNN, TRANSFORMER, VGG, Model, deep_mlp, lstm, mlp
from pckernels.rules import FixedPrediction, Incremental, Rule, Strict, ZeroDivergence

SUITES = ("quick", "cpu", "gpu")
QUICK, CPU, GPU = ("quick", "cpu"), ("cpu",), ("gpu",)
EVERYWHERE = SUITES
RATE = 0.1
# What float32 may cost, relative to float64. Values that are kept as values lose the digits that PC lives on: most in convolutions.
LIMIT, LIMIT_OF_VALUES = 1e-3, 2e-2


@dataclass(frozen=True)
class Case:
    """One contest: a model, a batch, a rule; who else takes part, and what is to be reached.

    Attributes:
        rivals: of contenders.RIVALS, beside autograd, which takes part in every case.
        goals: "one / other" -> the ratio of their times to reach, such as {"host / loop": 0.5}.
        accuracy: the goal for the relative distance of ours from float64, per parameter, or None.
        limit, limit_of_values: how far ours, and those that keep values as values, may be from float64 before nothing is timed.
        as_a_whole: that distance is of the whole gradient, not the largest of a parameter's.
        oracle: "reference" in float64, or "loop": the loop by hand in float64, where the reference takes minutes.
        axes: the plots that it is a point of: "batch", "steps", "depth", "width".
        seconds: of the timing, about.
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
    as_a_whole: bool = False
    oracle: str = "reference"
    axes: tuple[str, ...] = ()
    seconds: float = 3.0
    reference: bool = False
    peers: bool = False

    @property
    def name(self) -> str:
        return f"{self.model.name}, batch {self.batch}, {self.rule_name}"

    @property
    def rule_name(self) -> str:
        return rule_name(self.rule)

    @property
    def steps(self) -> int | None:
        return self.rule.dynamics.steps


def rule_name(rule: Rule) -> str:
    """In a few words: the kind, T, and what is not usual."""
    dynamics = rule.dynamics
    if isinstance(rule, ZeroDivergence):
        return "exact (zero divergence)"
    names: dict[type[Rule], str] = {Strict: "strict", FixedPrediction: "fixed prediction", Incremental: "incremental"}
    momentum = f", momentum {dynamics.momentum:g}" if dynamics.momentum else ""
    closed = ", closed form" if dynamics.closed_form else ""
    return f"{names.get(type(rule), type(rule).__name__)} T={dynamics.steps}{momentum}{closed}"


PAPER_MLP = mlp()
EXACT = ZeroDivergence()


def strict(steps: int, momentum: float = 0.0) -> Strict:
    return Strict(steps, RATE, momentum=momentum)


def contests() -> Iterator[Case]:
    """Models of the papers, each at the batch of its experiment, with the goals of the project."""
    loop = ("loop",)
    gpu = {"cuda / loop": 1 / 20, "cuda / loop, CUDA graph": 1 / 6}
    exact = {"cuda / autograd": 0.5, "cuda / autograd, CUDA graph": 1.0}
    yield Case(PAPER_MLP, 64, strict(20), EVERYWHERE, loop, {"host / loop": 0.5, **gpu}, peers=True)
    yield Case(PAPER_MLP, 64, strict(20), ("cpu", "gpu"), ("loop, compiled",))  # half a minute of compilation: not in quick
    yield Case(PAPER_MLP, 1, strict(20), EVERYWHERE, loop, {"host / loop": 0.25}, peers=True)
    yield Case(PAPER_MLP, 64, FixedPrediction(20, RATE, solver="iterate"), QUICK)
    yield Case(PAPER_MLP, 64, EXACT, EVERYWHERE, ("autograd, compiled",), {"host / autograd": 1.0, **exact})
    yield Case(PAPER_MLP, 64, Incremental(20, RATE, weight_rate=1e-4))
    yield Case(PAPER_MLP, 256, strict(20), QUICK, ("loop", "host, two threads"), {"host, two threads / host": round(1 / 1.7, 3)})
    yield Case(CNN, 64, strict(20), EVERYWHERE, loop, {"host / autograd": 3.0}, 5e-4, limit_of_values=2e-1, seconds=6.0, peers=True)
    # Strict dynamics of this CNN are chaotic over a hundred steps: a kink that float32 crosses a step early is felt.
    yield Case(CNN, 64, strict(100), CPU, loop, {"host / autograd": 14.0}, limit=1e-1, limit_of_values=5e-1, seconds=12.0)
    yield Case(CNN, 64, EXACT, EVERYWHERE, (), {"host / autograd": 1.0, **exact})
    yield Case(NAMES_RNN, 1, strict(20), QUICK, loop, {"host / loop": 0.33})
    yield Case(lstm(64, 12), 16, strict(20), QUICK, loop)
    yield Case(VGG, 2, strict(8, 0.6), CPU, loop, limit_of_values=2e-1, seconds=6.0)
    yield Case(VGG, 16, strict(8, 0.6), CPU, loop, limit_of_values=2e-1, seconds=6.0)
    yield Case(VGG, 16, EXACT, CPU, seconds=6.0)
    yield Case(VGG, 128, strict(8, 0.6), GPU, loop, {"cuda / autograd": 4.0}, limit_of_values=2e-1)
    yield Case(VGG, 128, EXACT, GPU, (), exact)
    yield Case(TRANSFORMER, 8, strict(8), QUICK, limit_of_values=2e-1)
    yield Case(lstm(256, 50), 64, strict(20), CPU, loop, {"host / loop": 0.4}, oracle="loop", seconds=30.0)
    yield Case(lstm(256, 50), 64, EXACT, ("cpu", "gpu"), (), {"host / autograd": 1.0, **exact}, seconds=12.0)


def accuracies() -> Iterator[Case]:
    """The CNN in float32 against float64: displacements keep the digits. (T = 20 is among the contests.)"""
    for steps, momentum in ((1, 0.0), (5, 0.0), (8, 0.6)):
        yield Case(CNN, 64, strict(steps, momentum), CPU, ("loop",), accuracy=5e-4, limit_of_values=2e-1, seconds=2.0)


def lines() -> Iterator[Case]:
    """Points of the plots: one thing changes, the rest is the paper's MLP at batch 64 and T = 20, or layers of width 128."""
    loop = ("loop",)
    for batch in (1, 4, 16, 64, 256, 1024, 4096, 8192):
        suites = EVERYWHERE if batch in (1, 16, 64, 256, 1024) else ("cpu", "gpu")
        goals = {"cuda / loop, CUDA graph": 1.0} if batch != 64 else {}
        # among so many samples some unit always lies within rounding of its kink
        limit = LIMIT if batch <= 256 else 1e-2
        yield Case(PAPER_MLP, batch, strict(20), suites, loop, goals, None, limit, axes=("batch",), seconds=2.0 if batch <= 256 else 5.0)
    for steps in (1, 5, 10, 20, 50, 100, 200):
        suites = EVERYWHERE if steps in (5, 20, 50, 100) else ("cpu", "gpu")
        values = LIMIT_OF_VALUES if steps <= 50 else 1e-1
        yield Case(PAPER_MLP, 64, strict(steps), suites, loop, limit_of_values=values, axes=("steps",), seconds=2.0)
    for depth in (3, 4, 8, 16, 32, 64, 128):
        suites = EVERYWHERE if depth in (4, 8, 16, 32) else ("cpu", "gpu")
        yield Case(deep_mlp(depth, 128), 64, strict(20), suites, loop, as_a_whole=True, axes=("depth",), seconds=3.0)
    for width in (64, 128, 256, 512, 1024, 2048):
        suites = EVERYWHERE if width in (64, 128, 256) else ("cpu", "gpu")
        seconds = 2.0 if width < 1024 else 4.0
        yield Case(deep_mlp(4, width), 64, strict(20), suites, loop, as_a_whole=True, axes=("width",), seconds=seconds)


def suite(name: str) -> list[Case]:
    """The cases of a suite, each once.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"There is no suite {name!r}; choose from {', '.join(SUITES)}.")
    found: dict[str, Case] = {}
    for source in (contests, accuracies, lines):
        for case in source():
            if name in case.suites:
                found[case.name] = _joined(found[case.name], case) if case.name in found else case
    return [replace(case, seconds=case.seconds / 3) if name == "quick" else case for case in found.values()]


def _joined(a: Case, b: Case) -> Case:
    """One case that is asked for twice, as a contest and as a point of a plot."""
    return replace(a, axes=a.axes + b.axes, goals={**b.goals, **a.goals}, rivals=tuple(dict.fromkeys(a.rivals + b.rivals)))


def device_of(suite_name: str) -> torch.device:
    """Where a suite runs."""
    return torch.device("cuda" if suite_name == "gpu" else "cpu")
