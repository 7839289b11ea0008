"""`pckernels verify`: are the gradients exact where a rule claims it, and do errors converge as theory predicts?

For each model, in float64 unless told otherwise: the literal dynamics against autograd, the fast sweeps against the
literal dynamics, controls that must fail, and the error of every vertex for growing T beside the predicted c_k(T).
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import gradient_quality
from .coefficients import coefficients
from .errors import Unsupported
from .graph import ComputationGraph
from .jsonfile import add_json_argument, output_path, write_json
from .measure import Probe, largest_error, mixture, relative_error
from .models import BUILDERS, Case, build, converted
from .network import PCNetwork
from .rules import FixedPrediction, ZeroDivergence, require_fixed_prediction_rate, require_steps
from .testing import bound, convergence_rows, dtype_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}
MARGIN = 100  # between what a control leaves out and the limit that must show it
ROWS = 12  # a table of more vertices shows one for each distance


@dataclass(frozen=True)
class Check:
    """One comparison; a control must lie above its limit, every other check at or below it."""

    name: str
    error: float
    limit: float
    control: bool = False

    @property
    def ok(self) -> bool:
        return self.error > self.limit if self.control else self.error <= self.limit


@dataclass(frozen=True)
class Convergence:
    """For each vertex the relative error ||eps_i(T) - delta_i|| / ||delta_i|| at each T of `steps`."""

    rate: float
    steps: list[int]
    distance: dict[str, int]
    measured: dict[str, list[float]]
    predicted: dict[str, list[float]]


@dataclass(frozen=True)
class Report:
    """What was found out about one model."""

    model: str
    summary: str
    checks: list[Check]
    convergence: Convergence

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "your own model: a function, named as module:function, that returns (module, x, target) or\n"
        "(module, x, target, loss). A tuple x is several inputs, a dict keyword arguments; the loss is\n"
        '"squared_error" (default), "cross_entropy" or f(output, target) -> (B,). A PCNetwork keeps its own.'
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(BUILDERS)} (default: all), or module:function")
    parser.add_argument("--steps", type=int, default=100, help="largest T of the convergence table (default: 100)")
    parser.add_argument("--rate", type=float, default=0.1, help="rate of the convergence table, in (0, 2) (default: 0.1)")
    parser.add_argument("--dtype", choices=DTYPES, default="float64", help="precision of the check (default: float64)")
    parser.add_argument("--plot", type=output_path, metavar="FILE", help="draw the convergence; several models: FILE-<model>")
    parser.add_argument("--gradients", action="store_true", help="compare rules and other ways of learning with the true gradient instead")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.gradients:
        return gradient_quality.run(args)
    require_steps(args.steps)
    require_fixed_prediction_rate(args.rate)
    cases = [converted(load(name), DTYPES[args.dtype]) for name in args.models or BUILDERS]
    reports = []
    for case in cases:
        reports.append(verify(case, args.steps, args.rate))
        print("\n".join(lines(reports[-1])), flush=True)
    failed = [report.model for report in reports if not report.ok]
    print(f"FAILED: {', '.join(failed)}" if failed else f"All checks passed on {len(reports)} model{'s' * (len(reports) > 1)}.")
    if args.json:
        write_json(args.json, {"ok": not failed, "dtype": args.dtype, "models": [plain(report) for report in reports]})
    if args.plot:
        draw(reports, args.plot)
    return 1 if failed else 0


def verify(case: Case, steps: int = 100, rate: float = 0.1) -> Report:
    """Check one model; nothing of `case` is changed.

    Args:
        steps: the largest T of the convergence table.
        rate: of fixed prediction, in that table.

    Raises:
        ValueError, TypeError, Unsupported: as PCNetwork raises them.
    """
    probe = Probe(case.module, case.x, case.target, case.loss)
    graph = probe.graph()
    limit = bound(dtype_of(case.module.state_dict(), case.x))
    checks = [*exactness(probe, graph, limit), *theory(probe, steps, rate)]
    return Report(case.name, summary(case, graph), checks, convergence(probe, graph, steps, rate))


def exactness(probe: Probe, graph: ComputationGraph, limit: float) -> Iterator[Check]:
    """Literal dynamics against autograd, fast sweeps against them, and the control: one step too few."""
    literal = probe.gradients(FixedPrediction(graph.depth, 1.0, solver="iterate"))
    zero = probe.gradients(ZeroDivergence(solver="iterate"))
    exact = probe.autograd_gradients()
    yield Check(f"fixed prediction, {graph.depth} literal steps at rate 1 = autograd", largest_error(literal, exact), limit)
    yield Check("zero divergence, literal levelled dynamics = autograd", largest_error(zero, exact), limit)
    closed = probe.gradients(FixedPrediction(graph.depth, 1.0))
    yield Check("fixed prediction, closed form = literal", largest_error(closed, literal), limit)
    yield Check("zero divergence, one sweep = literal", largest_error(probe.gradients(ZeroDivergence()), zero), limit)
    yield Check("pckernels.backward(loss) = literal", largest_error(probe.live_gradients(), literal), limit)
    early = control_steps(probe, graph, limit)
    if early is not None:
        short = probe.gradients(FixedPrediction(early, 1.0, solver="iterate"))
        yield Check(f"control: {early} steps, too few, must differ from autograd", largest_error(short, exact), limit, control=True)


def control_steps(probe: Probe, graph: ComputationGraph, limit: float) -> int | None:
    """The largest T that theory says must leave a visible part of some learning vertex's delta behind; None if none does.

    That is the depth - 1 of the learning vertices, unless their longest paths carry less than the check can see.
    """
    parts, learning = probe.path_parts(), [vertex.name for vertex in graph.hidden if vertex.parameters]
    delta = mixture(parts, graph.depth, 1.0)
    for steps in range(graph.depth - 1, -1, -1):
        early = mixture(parts, steps, 1.0)
        if any(relative_error(early[name], delta[name]) > MARGIN * limit for name in learning):
            return steps
    return None


def theory(probe: Probe, steps: int, rate: float) -> Iterator[Check]:
    """Where the errors are after T steps, against c_k(T): the worst vertex."""
    name, error, limit = max(convergence_rows(probe, rate, steps), key=_excess)
    yield Check(f"errors after {steps} steps at rate {rate:g} = c_k({steps}) mixture (worst: {name})", error, limit)


def convergence(probe: Probe, graph: ComputationGraph, steps: int, rate: float) -> Convergence:
    """The error of every vertex for growing T, measured and predicted."""
    times = time_points(steps)
    parts = probe.path_parts()
    delta = mixture(parts, graph.depth, 1.0)
    states = probe.errors(FixedPrediction(steps, rate, solver="iterate"))
    theories = [mixture(parts, t, rate) for t in times]
    names = [vertex.name for vertex in graph.hidden]
    measured = {name: [relative_error(states[t][name], delta[name]) for t in times] for name in names}
    predicted = {name: [relative_error(theory[name], delta[name]) for theory in theories] for name in names}
    predicted |= {vertex.name: remaining(vertex.distance, times, rate) for vertex in graph.hidden if vertex.distance == vertex.shortest}
    return Convergence(rate, times, {vertex.name: vertex.distance for vertex in graph.hidden}, measured, predicted)


def remaining(distance: int, times: Sequence[int], rate: float) -> list[float]:
    """|1 - c_k(T)|: what is missing where every path to an output has length k = `distance`."""
    return [abs(1.0 - coefficients(t, rate, distance)[distance]) for t in times]


def time_points(steps: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, .. up to T = `steps`, and T itself."""
    decades = range(int(math.log10(max(1, steps))) + 1)
    return sorted({t for d in decades for t in (10**d, 2 * 10**d, 5 * 10**d) if t < steps} | {steps})


def load(name: str) -> Case:
    """A built-in model by its name, or the user's own by `module:function`."""
    if ":" not in name:
        return build(name)
    return _checked(name, _call(name))


def summary(case: Case, graph: ComputationGraph) -> str:
    dtype = str(dtype_of(case.module.state_dict(), case.x)).removeprefix("torch.")
    count = sum(parameter.numel() for parameter in case.module.parameters())
    kind = "every path as long" if graph.is_level else "paths of several lengths"
    return f"{len(graph.hidden)} value nodes, depth {graph.depth}, {kind}, {count:,} parameters, {dtype}"


def lines(report: Report) -> Iterator[str]:
    """The report as a person reads it."""
    yield f"{report.model}: {report.summary}"
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        sign = ">" if check.control else "<="
        yield f"  {'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.error:.1e} ({sign} {check.limit:.0e})"
    yield from table(report.convergence)
    yield ""


def table(found: Convergence) -> Iterator[str]:
    """Measured over predicted error of each vertex, or of one for each distance where there are many."""
    shown = representatives(found.distance)
    if not shown:
        return
    width = max(len("vertex"), *(len(name) for name in shown))
    yield f"  relative error of a vertex's delta after T steps at rate {found.rate:g}: measured, and below it predicted"
    yield f"  {'vertex':<{width}}  distance" + "".join(f"{f'T={t}':>10}" for t in found.steps)
    for name in shown:
        yield f"  {name:<{width}}  {found.distance[name]:8}" + "".join(f"{value:10.2e}" for value in found.measured[name])
        yield f"  {'':<{width}}  {'':8}" + "".join(f"{value:10.2e}" for value in found.predicted[name])
    if len(shown) < len(found.distance):
        yield f"  ({len(shown)} of {len(found.distance)} vertices; --json writes all)"


def representatives(distance: dict[str, int]) -> list[str]:
    """All vertices, nearest to the output first; if they are many, one for each distance, evenly spread."""
    names = sorted(distance, key=lambda name: distance[name])
    if len(names) <= ROWS:
        return names
    names = list({distance[name]: name for name in names}.values())
    stride = -(-len(names) // ROWS)
    return names[::stride]


def plain(report: Report) -> dict[str, Any]:
    """The report as plain data."""
    checks = [{"name": c.name, "error": c.error, "limit": c.limit, "control": c.control, "ok": c.ok} for c in report.checks]
    return {
        "model": report.model,
        "summary": report.summary,
        "ok": report.ok,
        "checks": checks,
        "convergence": vars(report.convergence),
    }


def draw(reports: Sequence[Report], path: Path) -> None:
    """One figure for each model; the file is named after the model where there are several."""
    from . import plot

    for report in reports:
        file = path if len(reports) == 1 else path.with_stem(f"{path.stem}-{report.model.replace(':', '-')}")
        found = report.convergence
        plot.convergence(file, found.steps, found.measured, found.predicted, f"{report.model}, rate {found.rate:g}")


def _excess(row: tuple[str, float, float]) -> float:
    _, error, limit = row
    if error != error:
        return math.inf
    return error / limit if limit else (math.inf if error else 0.0)


def _call(name: str) -> Any:
    """What the user's function returns; whatever goes wrong in it is told in one sentence."""
    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory
    try:
        return getattr(import_module(module_name), function_name)()
    except Unsupported:
        raise
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name} could not be called ({detail}); give module:function, importable from this folder.") from error


def _checked(name: str, built: Any) -> Case:
    if not isinstance(built, tuple) or len(built) not in (3, 4) or not isinstance(built[0], nn.Module):
        raise TypeError(
            f"{name} must return (module, x, target) or (module, x, target, loss), the first an nn.Module; got {_shape(built)}."
        )
    case = Case(name, *built)
    return replace(case, loss=case.module.loss) if isinstance(case.module, PCNetwork) else case


def _shape(built: Any) -> str:
    return f"({', '.join(type(part).__name__ for part in built)})" if isinstance(built, tuple) else type(built).__name__
