"""A tiny DAG with every Jacobian as a dense matrix: fixed prediction by matrices, and its closed form by explicit paths."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn as nn
from torch import Tensor

from oracle.graph import Graph, Values, Vertex, binomial_tail

Matrices = dict[tuple[str, str], Tensor]


class Diamond(nn.Module):
    """A skip of length 1 beside branches of length 2 and 3, joined by multiplication and addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.a(x))
        b = torch.tanh(self.b(a))
        c = torch.sigmoid(self.c(b))
        return self.out(a + b * c)


def diamond(batch: int = 2) -> tuple[Diamond, Tensor, Tensor, Graph]:
    """Vertices a, b, c, mul, add, output; a reaches the output along 2, 4 and 5 edges."""
    torch.manual_seed(7)
    module = Diamond().double()
    x, target = torch.randn(batch, 3).double(), torch.randn(batch, 2).double()
    p = dict(module.named_parameters())

    def owned(layer: str) -> dict[str, Tensor]:
        return {f"{layer}.{k}": p[f"{layer}.{k}"] for k in ("weight", "bias")}

    vertices = (
        Vertex("a", ("x",), lambda x: torch.tanh(module.a(x)), owned("a")),
        Vertex("b", ("a",), lambda a: torch.tanh(module.b(a)), owned("b")),
        Vertex("c", ("b",), lambda b: torch.sigmoid(module.c(b)), owned("c")),
        Vertex("mul", ("b", "c"), lambda b, c: b * c),
        Vertex("add", ("a", "mul"), lambda a, m: a + m),
        Vertex("output", ("add",), lambda s: module.out(s), owned("out")),
    )
    return module, x, target, Graph({"x": x}, vertices, {"output": target})


def jacobians(graph: Graph) -> Matrices:
    """d mu_child / d v_parent at the feed-forward pass, flattened to (child size, parent size)."""
    v, matrices = graph.feed_forward(), {}
    for child in graph.vertices:
        parents = tuple(v[p] for p in child.parents)
        blocks = torch.autograd.functional.jacobian(child.function, parents)
        for name, value, block in zip(child.parents, parents, blocks, strict=True):
            matrices[name, child.name] = block.reshape(v[child.name].numel(), value.numel())
    return matrices


def iterate(graph: Graph, steps: int, rate: float) -> Values:
    """eps_i <- (1 - rate) eps_i + rate sum_j J_ji^T eps_j, as matrix-vector products."""
    matrices, v = jacobians(graph), graph.feed_forward()
    eps = {name: e.flatten() for name, e in graph.errors(v, v).items()}
    for _ in range(steps):
        pull = {u.name: sum(matrices[u.name, c.name].T @ eps[c.name] for c in graph.children(u.name)) for u in graph.hidden}
        eps = eps | {u.name: (1 - rate) * eps[u.name] + rate * pull[u.name] for u in graph.hidden}
    return {name: e.reshape(v[name].shape) for name, e in eps.items()}


def by_paths(graph: Graph, steps: int, rate: float) -> Values:
    """sum over paths p from i to an output of c_|p|(T) J_p^T eps_out, each path's product taken on its own."""
    matrices, v = jacobians(graph), graph.feed_forward()
    seeds = graph.errors(v, v)
    total = {u.name: torch.zeros(v[u.name].numel(), dtype=torch.float64) for u in graph.vertices}
    for u in graph.vertices:
        for path in paths(graph, u.name):
            carried = seeds[path[-1]].flatten()
            for parent, child in reversed(list(pairwise(path))):
                carried = matrices[parent, child].T @ carried
            total[u.name] += binomial_tail(len(path) - 1, steps, rate) * carried
    return {name: e.reshape(v[name].shape) for name, e in total.items()}


def paths(graph: Graph, name: str) -> Iterator[tuple[str, ...]]:
    if name in graph.targets:
        yield (name,)
    for child in graph.children(name):
        for rest in paths(graph, child.name):
            yield (name, *rest)
