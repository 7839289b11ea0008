"""What a backward sweep of fixed prediction must know of a graph before it starts: path lengths, and which of them are alike."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from pckernels.coefficients import trajectory
from pckernels.graph import ComputationGraph
from pckernels.rules import Dynamics
from pckernels.schedule import steps_on, time_groups


@dataclass
class Plan:
    """What a sweep needs to know before it starts: coefficients, groups, and how far each vertex is from its group's rim."""

    rows: list[list[float]]
    groups: dict[str, int]
    above: dict[str, int]
    ones: int  # c_k(T) is 1 to rounding for every k up to this
    zeros: int  # c_k(T) is 0 to rounding for every k from this on
    lengths: dict[str, int] | None = None  # where one path length stands for all of a vertex's: those; then one sweep is enough
    merged: bool = False  # whether it stands for several

    @property
    def c(self) -> list[float]:
        return self.rows[-1]

    def weight(self, length: int) -> float:
        return 1.0 if length <= self.ones else self.c[length] if length < self.zeros else 0.0


@lru_cache(maxsize=64)
def make_plan(graph: ComputationGraph, dynamics: Dynamics, dtype: torch.dtype) -> Plan:
    """The plan of a merged sweep. Merging counts a coefficient as 0 or 1 within half a unit of the dtype's rounding."""
    groups = time_groups(graph) if dynamics.nested else dict.fromkeys((v.name for v in graph.vertices), 0)
    rows = trajectory(steps_on(graph, dynamics.steps), dynamics.rate, graph.depth + 1)
    rounding = torch.finfo(dtype).eps / 2
    ones = next((k - 1 for k, c in enumerate(rows[-1]) if abs(c - 1.0) > rounding), len(rows[-1]) - 1)
    zeros = next((k + 1 for k in range(len(rows[-1]) - 1, -1, -1) if abs(rows[-1][k]) > rounding), 0)
    plan = Plan(rows, groups, _above(graph, groups), ones, zeros)
    if not dynamics.nested:
        plan.lengths, plan.merged = _single_lengths(graph, plan)
    return plan


def _single_lengths(graph: ComputationGraph, plan: Plan) -> tuple[dict[str, int] | None, bool]:
    """Each vertex's one path length, or one that stands for all since their coefficients are 1 (or 0) from there up."""
    found: dict[str, int] = {}
    merged = False
    for vertex in reversed(graph.vertices):
        lengths = {found[child] + 1 for child in graph.children[vertex.name]} or {0}
        alike = all(k + plan.above[vertex.name] <= plan.ones for k in lengths) or all(k >= plan.zeros for k in lengths)
        if len(lengths) > 1 and not alike:
            return None, False
        merged = merged or len(lengths) > 1
        found[vertex.name] = max(lengths)
    return found, merged


def _above(graph: ComputationGraph, groups: dict[str, int]) -> dict[str, int]:
    """The longest path from each vertex up to a free ancestor of its own group."""
    above: dict[str, int] = {}
    for vertex in graph.vertices:
        own = [above[parent] + 1 for parent in graph.free_parents(vertex) if groups[parent] == groups[vertex.name]]
        above[vertex.name] = max(own, default=0)
    return above


Siblings = tuple[str, ...]


@lru_cache(maxsize=64)
def siblings(graph: ComputationGraph) -> dict[str, Siblings]:
    """For each vertex, the vertices with the same parents as it: a sweep may differentiate them together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for vertex in graph.vertices:
        alone = (vertex.name,) if vertex.name in graph.outputs else ()
        groups.setdefault((*alone, "", *vertex.parents), []).append(vertex.name)
    return {name: tuple(names) for names in groups.values() for name in names}
