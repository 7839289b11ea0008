"""Predictive coding on an arbitrary DAG, one vertex at a time: strict, fixed prediction, and the levelled Z-IL dynamics.

Every Jacobian is that of a single vertex function; autograd never sees two vertices at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import comb

import torch
from torch import Tensor

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Vertex:
    """mu = function(*parent values); `parameters` are those that it reads, by name."""

    name: str
    parents: tuple[str, ...]
    function: Callable[..., Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """Vertices in topological order; `targets` names the output vertices, with squared error on each."""

    clamped: Values
    vertices: tuple[Vertex, ...]
    targets: Values

    @property
    def hidden(self) -> list[Vertex]:
        return [u for u in self.vertices if u.name not in self.targets]

    def children(self, name: str) -> list[Vertex]:
        return [u for u in self.vertices if name in u.parents]

    def distances(self, longest: bool = True) -> dict[str, int]:
        """Edges to an output, along the longest (or the shortest) path."""
        choose, distance = (max if longest else min), {}
        for u in reversed(self.vertices):
            below = [distance[c.name] + 1 for c in self.children(u.name)]
            distance[u.name] = 0 if u.name in self.targets else choose(below)
        return distance

    def feed_forward(self) -> Values:
        v = dict(self.clamped)
        with torch.no_grad():
            for u in self.vertices:
                v[u.name] = u.function(*(v[p] for p in u.parents)).clone()
        return v

    def predict(self, v: Values) -> Values:
        with torch.no_grad():
            return {u.name: u.function(*(v[p] for p in u.parents)) for u in self.vertices}

    def errors(self, v: Values, mu: Values) -> Values:
        eps = {u.name: v[u.name] - mu[u.name] for u in self.hidden}
        return eps | {name: target - mu[name] for name, target in self.targets.items()}

    def energy(self, eps: Values) -> float:
        """F; with squared error the loss of an output is 1/2 ||target - mu||^2 too."""
        return sum(0.5 * float((e**2).sum()) for e in eps.values())

    def loss(self) -> float:
        eps = self.errors(mu := self.feed_forward(), mu)
        return sum(0.5 * float((eps[name] ** 2).sum()) for name in self.targets)

    def pull_back(self, u: Vertex, v: Values, g: Tensor) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """(d mu / d parent)^T g for each parent edge, and (d mu / d theta)^T g, of the one vertex u at the state v."""
        parents = [v[p].detach().clone() for p in u.parents]
        moving = [p.requires_grad_() for p in parents if p.is_floating_point()]
        names = [name for name, p in u.parameters.items() if p.requires_grad]
        with torch.enable_grad():
            mu = u.function(*parents)
            wanted = [*moving, *(u.parameters[name] for name in names)]
            got = torch.autograd.grad(mu, wanted, g, allow_unused=True, materialize_grads=True) if wanted else ()
        stream = iter(got[: len(moving)])
        edges = [next(stream) if p.is_floating_point() else None for p in parents]
        return edges, dict(zip(names, got[len(moving) :], strict=True))

    def feedback(self, v: Values, eps: Values) -> Values:
        """sum over children j of (d mu_j / d v_i)^T eps_j, for every hidden i."""
        total = {u.name: torch.zeros_like(v[u.name]) for u in self.hidden}
        for child in self.vertices:
            edges, _ = self.pull_back(child, v, eps[child.name])
            for parent, g in zip(child.parents, edges, strict=True):
                if parent in total and g is not None:
                    total[parent] = total[parent] + g
        return total

    def learn(self, u: Vertex, v: Values, error: Tensor) -> dict[str, Tensor]:
        """dF/dtheta of the vertex u: -(d mu / d theta)^T eps."""
        return {name: -g for name, g in self.pull_back(u, v, error)[1].items()}

    def gradients(self, v: Values, eps: Values) -> dict[str, Tensor]:
        return add_up(self.learn(u, v, eps[u.name]) for u in self.vertices)


@dataclass
class Trajectory:
    values: list[Values]
    errors: list[Values]
    energies: list[float]
    gradients: dict[str, Tensor]


def strict(graph: Graph, steps: int, rate: float, momentum: float = 0.0, sweep: str = "jacobi") -> Trajectory:
    v = graph.feed_forward()
    velocity = {u.name: torch.zeros_like(v[u.name]) for u in graph.hidden}
    states, errors = [], []
    for t in range(steps + 1):
        states.append(dict(v))
        errors.append(graph.errors(v, graph.predict(v)))
        for group in sweep_groups(graph, sweep) if t < steps else ():
            eps = graph.errors(v, graph.predict(v))
            drive = graph.feedback(v, eps)
            for name in group:
                velocity[name] = momentum * velocity[name] + drive[name] - eps[name]
            v = v | {name: v[name] + rate * velocity[name] for name in group}
    return Trajectory(states, errors, [graph.energy(e) for e in errors], graph.gradients(v, errors[-1]))


def sweep_groups(graph: Graph, sweep: str) -> list[list[str]]:
    distance = graph.distances()
    names = [u.name for u in graph.hidden]
    if sweep == "jacobi":
        return [names]
    if sweep == "red_black":
        return [[n for n in names if distance[n] % 2 == parity] for parity in (1, 0)]
    return [[n for n in names if distance[n] == d] for d in range(1, max(distance.values()) + 1)]


def fixed_prediction(graph: Graph, steps: int, rate: float) -> Trajectory:
    """Errors relax with predictions, Jacobians and the inputs of the weight update frozen at the feed-forward pass."""
    v = graph.feed_forward()
    eps = graph.errors(v, v)
    trail = [eps]
    for _ in range(steps):
        drive = graph.feedback(v, eps)
        eps = eps | {u.name: eps[u.name] + rate * (drive[u.name] - eps[u.name]) for u in graph.hidden}
        trail.append(eps)
    return Trajectory([v] * (steps + 1), trail, [graph.energy(e) for e in trail], graph.gradients(v, eps))


def delta_by_path_length(graph: Graph) -> list[Values]:
    """Element k: for every vertex, the part of delta that reaches it along paths of exactly k edges."""
    v = graph.feed_forward()
    zero = {u.name: torch.zeros_like(v[u.name]) for u in graph.hidden}
    wave = graph.errors(v, v)
    parts = []
    for _ in range(max(graph.distances().values()) + 1):
        parts.append(wave)
        nothing = {name: torch.zeros_like(v[name]) for name in graph.targets}
        wave = zero | graph.feedback(v, wave) | nothing
    return parts


def mixture(graph: Graph, steps: int, rate: float) -> Values:
    """The closed form: sum over path lengths k of c_k(T) times the part of delta that travels k edges."""
    parts = delta_by_path_length(graph)
    weights = [binomial_tail(k, steps, rate) for k in range(len(parts))]
    return {name: sum(c * part[name] for c, part in zip(weights, parts, strict=True)) for name in parts[0]}


def binomial_tail(k: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) >= k) in exact rational arithmetic: the sum cancels badly for rate > 1."""
    p = Fraction(rate)
    return float(1 - sum(comb(trials, j) * p**j * (1 - p) ** (trials - j) for j in range(min(k, trials + 1))))


def deltas(graph: Graph) -> Values:
    """-dL/dv_i: the whole mixture with every weight 1."""
    parts = delta_by_path_length(graph)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def levelled(graph: Graph, longest: bool = True) -> Graph:
    """Pad each edge that skips d - 1 levels with identity vertices; edges from clamped inputs need none."""
    distance, padded = graph.distances(longest), []
    for u in graph.vertices:
        parents = []
        for edge, parent in enumerate(u.parents):
            gap = 0 if parent in graph.clamped else distance[parent] - distance[u.name] - 1
            for k in range(gap):
                pad = f"pad:{parent}->{u.name}.{edge}.{k}"
                padded.append(Vertex(pad, (parent,), lambda value: value.clone()))
                parent = pad
            parents.append(parent)
        padded.append(replace(u, parents=tuple(parents)))
    return replace(graph, vertices=tuple(padded))


@dataclass(frozen=True)
class Mistake:
    """Ways to get zero-divergence inference wrong; each must show up as a gradient that is not backprop's."""

    padding: bool = True
    longest: bool = True
    error_shift: int = 0
    relaxed_inputs: bool = False
    steps_short: int = 0


def zero_divergence(graph: Graph, mistake: Mistake = Mistake()) -> Trajectory:
    """Strict dynamics at rate 1 on the levelled graph; a vertex at distance d learns after d updates, from fresh errors."""
    distance = graph.distances(mistake.longest)
    levels = levelled(graph, mistake.longest) if mistake.padding else graph
    steps = max(graph.distances().values()) - mistake.steps_short
    run = strict(levels, steps + max(mistake.error_shift, 0), 1.0)
    learned, errors, values = [], {}, {}
    for u in levels.vertices:
        if u.name.startswith("pad:"):
            continue
        when = distance[u.name]
        if when > steps:
            continue
        state = run.values[-1] if mistake.relaxed_inputs else run.values[when]
        errors[u.name] = run.errors[max(when + mistake.error_shift, 0)][u.name]
        values[u.name] = run.values[when][u.name]
        learned.append(levels.learn(u, state, errors[u.name]))
    return Trajectory([values], [errors], run.energies, add_up(learned))


def add_up(contributions: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for one in contributions:
        for name, g in one.items():
            total[name] = total[name] + g if name in total else g
    return total


def path_lengths(graph: Graph, name: str) -> Counter[int]:
    """How many paths of each length lead from a vertex to an output."""
    if name in graph.targets:
        return Counter({0: 1})
    lengths: Counter[int] = Counter()
    for child in graph.vertices:
        for _ in range(child.parents.count(name)):
            lengths.update({k + 1: n for k, n in path_lengths(graph, child.name).items()})
    return lengths
