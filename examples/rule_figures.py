"""The figures of docs/rules: each measures one rule on a small network, most of them on scikit-learn's digits.

    python examples/rule_figures.py [--rules NAME ..] [--quick] [--out FOLDER]

Draws FOLDER/<page>.png for each page. --quick takes few steps, to see that it runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pckernels as pck
from pckernels import data
from pckernels.coefficients import trajectory
from pckernels.nn import MLPModule
from pckernels.panels import Curve, HeatMap, Panel, heat_maps, panels

SAMPLES, CLASSES, WARM_UP = 64, 10, 60


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", default=list(FIGURES), choices=list(FIGURES), metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("docs/rules"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.rules:
        path = args.out / f"{name}.png"
        FIGURES[name](path, args.quick)
        print(path, flush=True)


# The measuring sticks.


@cache
def digits() -> data.Split:
    return data.load("digits").train


def batch(start: int = 0, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Images of digits (count, 64) and their classes as one-hot targets, in float64."""
    images, labels = digits().fetch(torch.arange(start, start + count) % len(digits()))
    return images.flatten(1).double(), F.one_hot(labels, CLASSES).double()


def perceptron(*hidden: int, activation: str = "tanh", seed: int = 0, warm_up: int = WARM_UP) -> nn.Module:
    """64 - hidden - 10, after a few steps of backprop, so that its gradient is not that of noise."""
    torch.manual_seed(seed)
    module = MLPModule([64, *hidden, CLASSES], activation).double()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for step in range(warm_up):
        x, y = batch(step * SAMPLES)
        optimizer.zero_grad()
        loss(module, x, y).backward()
        optimizer.step()
    return module


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (module(x) - y).square().sum()


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def backprop(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    module.zero_grad()
    loss(module, x, y).backward()
    return flat(module)


def learned(network: pck.PCNetwork, rule: pck.rules.Rule, x: Tensor, y: Tensor) -> Tensor:
    """What the rule writes into `.grad` of the module's parameters."""
    network.rule = rule
    network.zero_grad()
    network.backward(x, y)
    return flat(network.module)


def angle(a: Tensor, b: Tensor) -> float:
    """In degrees."""
    return math.degrees(math.acos(max(-1.0, min(1.0, float(a @ b / (a.norm() * b.norm()))))))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def hidden(inference: pck.Inference) -> list[str]:
    return [name for name in inference.values if name != "output"]


def deltas(network: pck.PCNetwork, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Backprop's -dL/dv of every vertex, by the exact rule."""
    network.rule = pck.ZeroDivergence()
    return network.infer(x, y).errors


# A figure for each page.


def strict(path: Path, quick: bool) -> None:
    module, (x, y) = perceptron(32, 32, 32, 32), batch()
    network, exact = pck.PCNetwork(module, pck.Strict(0, 0.1), reduction="sum"), backprop(module, x, y)
    rules = {"rate 0.05": (0.05, 0.0), "rate 0.1": (0.1, 0.0), "rate 0.3": (0.3, 0.0), "rate 0.1, momentum 0.7": (0.1, 0.7)}
    longest = 8 if quick else 64
    counts = [2**k for k in range(longest.bit_length())]
    energies, angles = [], []
    for colour, (name, (rate, momentum)) in enumerate(rules.items()):
        network.rule = pck.Strict(longest, rate, momentum=momentum)
        energy = network.infer(x, y).energy
        energies.append(Curve(name, range(longest + 1), (energy / energy[0]).tolist(), colour, "thin"))
        found = [angle(learned(network, pck.Strict(steps, rate, momentum=momentum), x, y), exact) for steps in counts]
        angles.append(Curve(name, counts, found, colour))
    network.rule = pck.Strict(longest, 0.1)
    moments = network.infer(x, y, record=True).history
    sizes = [
        Curve(f"distance {4 - k}", range(longest + 1), [float(moment.errors[name].norm()) or math.nan for moment in moments], k, "thin")
        for k, name in enumerate(["0", "2", "4", "6"])
    ]
    panels(
        path,
        [
            Panel("it descends F", "step t", "F(t) / F(0)", energies),
            Panel("its gradient beside backprop's", "steps T", "angle, degrees", angles, "x", counts),
            Panel("errors arrive late, and fade (rate 0.1)", "step t", "size of the error", sizes, log="y"),
        ],
    )


def fixed_prediction(path: Path, quick: bool) -> None:
    steps, shown = (10 if quick else 40), (1, 2, 3, 5)
    module, (x, y) = perceptron(*[16] * 5), batch()
    network = pck.PCNetwork(module, pck.ZeroDivergence(), reduction="sum")
    exact = deltas(network, x, y)
    drawn = []
    for rate in (0.3, 1.5):
        network.rule = pck.FixedPrediction(steps, rate, solver="iterate")
        moments, rows = network.infer(x, y, record=True).history, trajectory(steps, rate, 5)
        arrived, left = [], []
        for colour, k in enumerate(shown):
            delta, errors = exact[str(2 * (5 - k))], [moment.errors[str(2 * (5 - k))] for moment in moments]
            arrived.append(Curve(f"k = {k}", range(steps + 1), [row[k] for row in rows], colour, "thin"))
            shares = [float((error * delta).sum() / delta.square().sum()) for error in errors]
            arrived.append(Curve("", range(steps + 1), shares, colour, "dots"))
            left.append(Curve(f"k = {k}", range(steps + 1), [abs(row[k] - 1) or math.nan for row in rows], colour, "thin"))
            left.append(Curve("", range(steps + 1), [distance(error, delta) or math.nan for error in errors], colour, "dots"))
        drawn.append(Panel(f"rate {rate:g}: the share of delta", "step T", "c_k(T)", arrived))
        drawn.append(Panel(f"rate {rate:g}: what is missing", "step T", "|c_k(T) - 1|", left, log="y"))
    panels(path, drawn[:3])


class Skip(nn.Module):
    """Two layers beside three, and an input of two consumers: paths of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (nn.Linear(n, 16) for n in (64, 16, 16, 16))
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(h)))))))


def zero_divergence(path: Path, quick: bool) -> None:
    torch.manual_seed(0)
    (x, y), skip = batch(), Skip().double()
    chain = perceptron(*[16] * (3 if quick else 6))
    heat_maps(
        path,
        [
            arrivals("Strict at rate 1 on a chain", chain, pck.Strict(8, 1.0), x, y),
            arrivals("Strict at rate 1, with a skip", skip, pck.Strict(8, 1.0), x, y),
            arrivals("ZeroDivergence, with a skip", skip, pck.ZeroDivergence("iterate"), x, y),
        ],
        scale=(-16, 0),
        x="step t",
        colour="log10 of the distance from delta",
    )


def arrivals(title: str, module: nn.Module, rule: pck.rules.Rule, x: Tensor, y: Tensor) -> HeatMap:
    """How far the error of each vertex is from backprop's delta at each step; framed where the step is the vertex's distance."""
    network = pck.PCNetwork(module, rule)
    exact = deltas(network, x, y)
    network.rule = rule
    moments = network.infer(x, y, record=True).history
    distances = {vertex.name: vertex.distance for vertex in network.graph.vertices if vertex.name in exact and vertex.name != "output"}
    names = sorted(distances, key=distances.__getitem__)
    cells = [[math.log10(max(1e-16, distance(moment.errors[name], exact[name]))) for moment in moments] for name in names]
    return HeatMap(title, names, cells, [(row, distances[name]) for row, name in enumerate(names)])


def error_optimization(path: Path, quick: bool) -> None:
    depths, steps, still = ((2, 4), 80, 1e-4) if quick else ((2, 4, 8, 16), 400, 1e-4)
    rules: dict[str, tuple[type, tuple[float, ...]]] = {
        "Strict": (pck.Strict, (0.15, 0.3, 0.45)),
        "ErrorOptimization": (pck.ErrorOptimization, (0.1, 0.2, 0.4, 0.8)),
    }
    needed, falls = [], []
    for colour, (name, (rule, rates)) in enumerate(rules.items()):
        best = []
        for depth in depths:
            runs = [settled(depth, rule(steps, rate), still) for rate in rates]
            best.append(min(runs, key=lambda run: run[0]))
        needed.append(Curve(name, depths, [count for count, _ in best], colour))
        falls.append(Curve(name, range(len(best[-1][1])), best[-1][1], colour, "thin"))
    panels(
        path,
        [
            Panel(f"tanh chains: steps until |dF| < {still:g}", "layers", "steps", needed, "xy", depths),
            Panel(f"{depths[-1]} layers: F above its equilibrium", "step t", "(F(t) - F*) / F(0)", falls, log="y"),
        ],
    )


def settled(depth: int, rule: pck.rules.Rule, still: float) -> tuple[float, list[float]]:
    """Steps after which the gradient that the rule descends stays below `still`, infinite if it does not; and F's fall until then."""
    torch.manual_seed(depth)
    linears = [nn.Linear(8, 8) for _ in range(depth)]
    for linear in linears:
        nn.init.orthogonal_(linear.weight, 0.9)
    module = nn.Sequential(*[part for linear in linears for part in (linear, nn.Tanh())][:-1]).double()
    x, y = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    moves = "errors" if isinstance(rule, pck.ErrorOptimization) else "values"
    try:
        inference = pck.PCNetwork(module, rule).infer(x, y, record=True)
    except pck.InferenceDiverged:
        return math.inf, []
    states = [getattr(moment, moves) for moment in inference.history]
    slopes = [max(float((new[name] - old[name]).abs().max()) for name in hidden(inference)) / rule.rate for old, new in pairwise(states)]
    count = 1 + max((t for t, slope in enumerate(slopes) if slope >= still), default=-1)
    energy = ((inference.energy - inference.energy[-1]) / inference.energy[0])[:count].tolist()
    return (count if count < len(slopes) else math.inf), energy


def incremental(path: Path, quick: bool) -> None:
    batches, steps = (6 if quick else 60), 6
    rules = {"Strict": pck.Strict(steps, 0.1), "Incremental": pck.Incremental(steps, 0.5)}
    by_batch, by_step = [], []
    for colour, (name, rule) in enumerate(rules.items()):
        module = perceptron(64, 32, activation="relu", warm_up=0)
        network, optimizer = pck.PCNetwork(module, rule), torch.optim.Adam(module.parameters(), 1e-3)
        losses = [float(network.step(*batch(k * SAMPLES), optimizer).loss) for k in range(batches)]
        each = steps if name == "Incremental" else 1
        by_batch.append(Curve(name, range(1, batches + 1), losses, colour, "thin"))
        by_step.append(Curve(name, [1 + each * k for k in range(batches)], losses, colour, "thin"))
    panels(
        path,
        [
            Panel("digits, the same batches, Adam at 0.001", "batches", "training loss", by_batch),
            Panel("the same runs", "steps of the optimizer", "training loss", by_step, "x"),
        ],
    )


def nudging(path: Path, quick: bool) -> None:
    betas = [0.4 * 0.5**k for k in range(3 if quick else 8)]
    module, (x, y) = perceptron(12, 8), batch(count=16)
    network, exact = pck.PCNetwork(module, pck.Strict(0, 0.1), reduction="sum"), backprop(module, x, y)
    kinds: dict[str, Callable[[float], pck.rules.Nudge]] = {
        "nudge=beta": lambda beta: beta,
        "nudge=-beta": lambda beta: -beta,
        "centered": lambda beta: ("centered", beta),
    }
    curves = []
    for colour, (name, nudge) in enumerate(kinds.items()):
        bias = [distance(learned(network, pck.Strict(180, 0.3, momentum=0.7, nudge=nudge(beta)), x, y), exact) for beta in betas]
        curves.append(Curve(name, betas, bias, colour, "dots"))
        slope = 2 if name == "centered" else 1
        if name != "nudge=-beta":
            curves.append(Curve(f"slope {slope}", betas, [bias[-1] * (beta / betas[-1]) ** slope for beta in betas], colour, "dashes"))
    panels(path, [Panel("at equilibrium, tanh perceptron", "beta", "distance from backprop's gradient", curves, log="xy")])


def precision(path: Path, quick: bool) -> None:
    """A linear model h = W x + noise, y = h + noise of variance 1: h is seen itself, or relaxes between x and y."""
    steps = 20 if quick else 60
    variances = (0.3, 3.0) if quick else (0.1, 0.3, 1.0, 3.0, 10.0)
    seen = [1.0 / precision_learned(variance, steps, clamped=True)[-1] for variance in variances]
    drawn = [Curve("measured", variances, seen, 0, "dots"), Curve("1 / pi = variance", variances, variances, 1, "dashes")]
    courses = []
    for colour, variance in enumerate((1.0, 9.0) if quick else (1.0, 2.0, 4.0, 9.0)):
        courses.append(Curve(f"variance {variance:g}", range(steps + 1), precision_learned(variance, steps, clamped=False), colour, "thin"))
        if variance > 3.0:
            b = variance - 1.0
            courses.append(Curve("", (0, steps), [(b - math.sqrt(b * b - 4.0)) / 2] * 2, colour, "dashes"))
    panels(
        path,
        [
            Panel("the value is seen", "variance of the noise", "1 / learned precision", drawn, log="xy"),
            Panel("the value relaxes", "steps of learning", "learned precision", courses, log="y"),
        ],
    )


def precision_learned(variance: float, steps: int, clamped: bool) -> list[float]:
    """The precision of h after each step of learning it alone, the weights being the true ones."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 8, bias=False)).double().requires_grad_(False)
    module[1].weight.copy_(torch.eye(8))
    x = torch.randn(400, 4).double()
    noise = torch.randn(400, 8).double()
    h = module[0](x) + noise * math.sqrt(variance) / noise.square().mean().sqrt()
    network = pck.PCNetwork(module, pck.Strict(60, 0.1, momentum=0.5), precision={"0": "learned"})
    held = {"clamp": {"0": h}} if clamped else {}
    network.trace(x)
    (log_precision,) = network.extra_parameters().values()
    optimizer = torch.optim.SGD([log_precision], 0.1)
    found = [1.0]
    for _ in range(steps):
        network.step(x, h + torch.randn_like(h), optimizer, **held)
        found.append(math.exp(log_precision.item()))
        if not clamped and found[-1] > 8.0:  # on its way to where inference at this rate diverges
            return [*found, *[math.nan] * (steps + 1 - len(found))]
    return found


def relaxed(path: Path, quick: bool) -> None:
    batches, every = (6, 3) if quick else (150, 5)
    ways: dict[str, tuple[dict[str, object], float]] = {
        "no f'": ({"derivative": False}, 0.0),
        "random feedback": ({"feedback": "random"}, 0.0),
        "learned feedback": ({"feedback": "learned"}, 0.0),
        "learned, weight decay 0.02": ({"feedback": "learned"}, 0.02),
    }
    angles, losses = [], []
    for colour, (name, (way, decay)) in enumerate(ways.items()):
        module, rule = perceptron(64, 32, activation="relu", warm_up=0), pck.Relaxed(pck.ZeroDivergence(), **way)
        network = pck.PCNetwork(module, rule)
        network.trace(batch()[0])
        optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=decay)
        found, loss_found = [], []
        for k in range(batches):
            x, y = batch(k * SAMPLES)
            if k % every == 0:
                found.append(angle(learned(network, rule, x, y), backprop(module, x, y)))
            loss_found.append(float(network.step(x, y, optimizer).loss))
        angles.append(Curve(name, range(0, batches, every), found, colour))
        losses.append(Curve(name, range(batches), loss_found, colour, "thin"))
    panels(
        path,
        [
            Panel("what it learns, beside backprop's gradient there", "batches", "angle, degrees", angles),
            Panel("over ZeroDivergence, digits, SGD at 0.1", "batches", "training loss", losses),
        ],
    )


def match(path: Path, quick: bool) -> None:
    counts = (2, 4) if quick else (2, 4, 8, 16, 32, 64, 128)
    module, (x, y) = perceptron(24, 16), batch()
    exact = backprop(module, x, y)
    codes: dict[str, tuple[str | None, Callable[[int], pck.rules.Rule]]] = {
        "millidge2020": ("millidge2020", lambda steps: pck.FixedPrediction(steps, 0.1, solver="iterate")),
        "torch2pc, fixed": ("torch2pc", lambda steps: pck.FixedPrediction(steps, 0.1, solver="iterate")),
        "FixedPrediction": (None, lambda steps: pck.FixedPrediction(steps, 0.1, solver="iterate")),
        "torch2pc, strict": ("torch2pc", lambda steps: pck.Strict(steps, 0.1)),
        "pcx, nudge -0.1": ("pcx", lambda steps: pck.Strict(steps, 0.1, nudge=-0.1)),
        "whittington2017": ("whittington2017", lambda steps: pck.Strict(steps, 0.1)),
        "Strict": (None, lambda steps: pck.Strict(steps, 0.1)),
    }
    angles, ratios = [], []
    for colour, (name, (code, rule)) in enumerate(codes.items()):
        network = pck.PCNetwork(module, rule(1), reduction="sum", match=code)
        found = [learned(network, rule(steps), x, y) for steps in counts]
        look = "line" if code else "dashes"
        scale = 8.0 if name == "millidge2020" else 1.0
        angles.append(Curve(name, counts, [angle(gradient, exact) for gradient in found], colour, look))
        norms = [float(gradient.norm() / exact.norm()) / scale for gradient in found]
        ratios.append(Curve(name + (" / 8" if scale > 1.0 else ""), counts, norms, colour, look))
    panels(
        path,
        [
            Panel("rate 0.1, tanh perceptron", "steps T", "angle to backprop's gradient, degrees", angles, "x", counts),
            Panel("the same", "steps T", "norm over backprop's", ratios, "x", counts),
        ],
    )


FIGURES: dict[str, Callable[[Path, bool], None]] = {
    "strict": strict,
    "fixed_prediction": fixed_prediction,
    "zero_divergence": zero_divergence,
    "error_optimization": error_optimization,
    "incremental": incremental,
    "nudging": nudging,
    "precision": precision,
    "relaxed": relaxed,
    "match": match,
}


if __name__ == "__main__":
    main()
