"""When vertices move, and in which company: facts of the graph alone, for every backend."""

from collections.abc import Callable, Sequence

from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph, Vertex
from pckernels.rules import Dynamics


def steps_on(graph: ComputationGraph, steps: int | None) -> int:
    """T on this graph: None stands for its depth."""
    return graph.depth if steps is None else steps


def sweep_groups(graph: ComputationGraph, sweep: str) -> list[list[str]]:
    """The hidden vertices in the groups that move at once, in the order of one step."""
    hidden = graph.hidden
    if sweep == "jacobi":
        groups = [hidden]
    elif sweep == "top_down":
        groups = [[vertex for vertex in hidden if vertex.distance == d] for d in range(1, graph.depth + 1)]
    else:
        groups = [[vertex for vertex in hidden if vertex.distance % 2 == parity] for parity in (1, 0)]
    return [[vertex.name for vertex in group] for group in groups if group]


def light_cone(graph: ComputationGraph) -> dict[str, int]:
    """The first step after which each vertex's error can differ from zero, under Strict with Jacobi steps.

    From a feed-forward start with fixed weights: e(out) = 0, m(i) = 1 + min(e(i), e(children)), e(i) = min(m(i),
    m(parents)), iterated to the fixed point, where m(i) is the first step at which the value moves.
    """
    never = len(graph) + 1
    e = {vertex.name: (0 if vertex.name in graph.outputs else never) for vertex in graph.vertices}
    changed = True
    while changed:
        m = {v.name: 1 + min([e[v.name], *(e[child] for child in graph.children[v.name])]) for v in graph.hidden}
        new = {v.name: min([e[v.name], m[v.name], *(m[p] for p in graph.free_parents(v) if p in m)]) for v in graph.hidden}
        changed = any(new[name] != e[name] for name in new)
        e.update(new)
    return e


def time_groups(graph: ComputationGraph) -> dict[str, int]:
    """The time step that each vertex relaxes with in nested order.

    A cell's vertices belong to their time step; what lies behind them, to the last of the steps that it reads; what lies
    before them, to the first step that reads it.

    Raises:
        Unsupported: no vertex has a time step, or an edge runs back in time (a bidirectional network).
    """
    groups = {vertex.name: vertex.time for vertex in graph.vertices if vertex.time is not None}
    if not groups:
        raise Unsupported('order="nested" needs a recurrent network (nn.RNN, nn.LSTM, nn.GRU or their cells); use order="global".')
    _assign(graph, graph.vertices, groups, lambda vertex: graph.free_parents(vertex), max)
    _assign(graph, graph.vertices[::-1], groups, lambda vertex: list(graph.children[vertex.name]), min)
    for vertex in graph.vertices:
        groups.setdefault(vertex.name, 0)
        if any(groups[parent] > groups[vertex.name] for parent in graph.free_parents(vertex)):
            raise Unsupported(
                'order="nested" runs back through time, which a bidirectional network has no direction for; use order="global".'
            )
    return groups


def error_groups(graph: ComputationGraph, dynamics: Dynamics) -> list[list[str]]:
    """The hidden vertices that relax together: all, or in nested order those of one time step, the last first."""
    if not dynamics.nested:
        return [[vertex.name for vertex in graph.hidden]]
    times = time_groups(graph)
    return [[v.name for v in graph.hidden if times[v.name] == time] for time in sorted(set(times.values()), reverse=True)]


def _assign(
    graph: ComputationGraph,
    vertices: Sequence[Vertex],
    groups: dict[str, int],
    neighbours: Callable[[Vertex], list[str]],
    choose: Callable[[list[int]], int],
) -> None:
    for vertex in vertices:
        known = [groups[name] for name in neighbours(vertex) if name in groups]
        if vertex.name not in groups and known:
            groups[vertex.name] = choose(known)
