"""The feed-forward pass of the reference backend, and the one place where it differentiates a vertex."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pckernels.call import Call, Extra
from pckernels.graph import ComputationGraph, Derived, Trace, Vertex, feature_axis
from pckernels.routes import route_of


@dataclass
class Local:
    """A vertex's prediction at given values of its parents, with what its Jacobian needs.

    Attributes:
        vertex: the vertex.
        mu: its prediction, which remembers how it was computed from `parents` and `weights` and from nothing else.
        parents: the free parents' values; clamped ones have no Jacobian.
        taps: of each product with a weight its input, and where autograd passes its output: the edge keeps no memory.
        direct: the weights read outside of those products.
        back: the prediction again, with the derivative by which errors come back, where that is not its own.
    """

    vertex: Vertex
    mu: Tensor
    parents: dict[str, Tensor]
    taps: tuple[tuple[Tensor, GradientEdge | None], ...]
    direct: tuple[Tensor, ...]
    back: Tensor | None = None


Place = Tensor | GradientEdge | None


def compute_constants(graph: ComputationGraph, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """What the graph derives from a call's tensors alone, where nothing of it is a function of parameters."""
    found: dict[str, object] = {}
    for name in graph.schedule:
        derived = graph.derived.get(name)
        if derived is not None:
            found[name] = _computed(derived, [tensors[read] if read in tensors else found[read] for read in derived.reads])
    return found


_KEPT = 8  # shapes for which a constant is remembered
_known: WeakKeyDictionary[Derived, OrderedDict[object, object]] = WeakKeyDictionary()


def _computed(derived: Derived, reads: Sequence[object]) -> object:
    """A derived quantity; one that depends on shapes alone is computed once for each of them: nobody writes to a constant."""
    if not derived.of_shapes:
        return derived.compute(*reads)
    key = tuple((read.shape, read.dtype, read.device) if isinstance(read, Tensor) else read for read in reads)
    known = _known.setdefault(derived, OrderedDict())
    if key not in known:
        known[key] = derived.compute(*reads)
        if len(known) > _KEPT:
            known.popitem(last=False)
    return known[key]


def vjp(local: Local, error: Tensor, wrt: Sequence[Place]) -> list[Tensor | None]:
    """(d mu / d wrt)^T error, for one vertex alone."""
    return _vjp([local.mu], [error], wrt)


def vjp_of_several(locals_: Sequence[Local], errors: Sequence[Tensor], wrt: Sequence[Place], again: bool = True) -> list[Tensor | None]:
    """The sum of (d mu_i / d wrt)^T error_i over vertices, for a backward sweep; `again`: whether another may follow."""
    return _vjp([local.mu for local in locals_], errors, wrt, again)


def _vjp(mu: Sequence[Tensor], errors: Sequence[Tensor], wrt: Sequence[Place], again: bool = True) -> list[Tensor | None]:
    pairs = [(prediction, error) for prediction, error in zip(mu, errors, strict=True) if prediction.requires_grad]
    wanted: Any = [place for place in wrt if _can_be_differentiated_for(place)] if pairs else []
    if not wanted:
        return [None] * len(wrt)
    outputs, seeds = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, seeds, retain_graph=again, allow_unused=True))
    return [next(found) if _can_be_differentiated_for(place) else None for place in wrt]


def _can_be_differentiated_for(place: Place) -> bool:
    return place.requires_grad if isinstance(place, Tensor) else place is not None


def feedback(local: Local, error: Tensor, parents: Iterable[str]) -> dict[str, Tensor]:
    """(d mu / d v)^T error for the given parents, or what the rule has in its place; a parent that the prediction does not depend on is
    left out."""
    names = [name for name in parents if name in local.parents]
    way = local if local.back is None else replace(local, mu=local.back)
    results = vjp(way, error, [local.parents[name] for name in names])
    return {name: result for name, result in zip(names, results, strict=True) if result is not None}


def precisions_of(extra: Extra, tensors: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """Hidden vertex -> pi, of those that have one: as it is fixed, or as it is now where it is learned."""
    return {**extra.precisions, **{name: tensors[key].detach().exp() for name, key in extra.log_precisions.items()}}


class Bound:
    """A graph bound to the tensors of one call: feed-forward predictions `mu`, weights, and what the pass drew or measured.

    The locals of the feed-forward pass start from one leaf for each value node, so that vertices with the same parents may be
    differentiated in one go; each of their graphs still ends at its own parents. With `connected` they start from the
    predictions themselves: one graph of the whole pass, for a sweep in one go.
    """

    def __init__(
        self,
        graph: ComputationGraph,
        call: Call,
        connected: bool = False,
        held: Mapping[str, object] | None = None,
        only: Set[str] | None = None,
    ):
        """`held`: what an earlier pass of the same call drew and measured, to be used again; `only`: the vertices to compute."""
        self.graph, self.connected, self.parameters = graph, connected, call.trace.parameters
        self.clamped = call.clamps.held
        self.environment: dict[str, object] = {**call.tensors, **(held or {})}
        self.dynamics, self.extra = call.dynamics, call.extra
        self.sources: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self._read_parameters(call.tensors)
        self.learning = learning_parameters(call)
        self.mu: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}
        self.locals: dict[str, Local] = {}
        with torch.enable_grad():
            for name in graph.schedule:
                if only is None or name in only or name in graph.derived:
                    self._compute(name)

    def _read_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.sources = {name: tensor for name, tensor in tensors.items() if name in self.parameters}
        self.weights = {name: _leaf(tensor, tensor.requires_grad) for name, tensor in self.sources.items()}
        self.backward_weights: dict[str, object] = {name: tensors[key].detach() for name, key in self.extra.feedback.items()}
        self.error_weights = {name: tensors[key].detach() for name, key in self.extra.error_weights.items()}
        self.precisions = precisions_of(self.extra, tensors)

    def weighted(self, name: str, error: Tensor) -> Tensor:
        """pi_i eps_i: what a vertex sends to its parents and learns from."""
        return self.precisions[name] * error if name in self.precisions else error

    def whitened(self, name: str, error: Tensor) -> Tensor:
        """sqrt(pi_i) eps_i, half whose square is its part in F."""
        return self.precisions[name] ** 0.5 * error if name in self.precisions else error

    def log_volume(self, losses: Tensor) -> Tensor:
        """The sum over learned precisions of -1/2 log pi_i for each element of v_i, over the whole batch; in the losses' dtype."""
        parts = [-0.5 * self.mu[name].numel() * self.tensors[key].detach() for name, key in self.extra.log_precisions.items()]
        return torch.stack(parts).sum().to(losses.dtype) if parts else losses.new_zeros(())

    def expected(self, name: str, mu: Tensor) -> Tensor:
        """What a value is compared with: E_i mu_i, or the prediction itself."""
        return mixed(self.error_weights[name], mu) if name in self.error_weights else mu

    def unrest(self) -> dict[str, Tensor]:
        """The errors of the feed-forward pass that are not 0: v_i - E_i mu_i with v_i = mu_i, of the vertices with error weights."""
        return {name: self.mu[name] - self.expected(name, self.mu[name]) for name in self.error_weights}

    def read(self, tensors: Mapping[str, Tensor]) -> None:
        """Let predictions from now on read other parameters; what the feed-forward pass drew and measured holds."""
        self._read_parameters(tensors)
        for name in self.graph.schedule:
            if name in self.graph.derived and self.graph.derived[name].kind == "weight":
                self._compute_weight(name)

    def _compute(self, name: str) -> None:
        derived = self.graph.derived.get(name)
        if derived is None:
            vertex = self.graph[name]
            local = self.locals[name] = self._local(vertex, {parent: self.leaves[parent] for parent in self.graph.free_parents(vertex)})
            self.mu[name], self.leaves[name] = local.mu.detach(), self._start(local)
        elif derived.kind == "weight":
            self._compute_weight(name)
        elif name not in self.environment:
            with torch.no_grad():
                self.environment[name] = _computed(derived, [self._constant(read) for read in derived.reads])

    def _start(self, local: Local) -> Tensor:
        """Where the children of a vertex start from."""
        if local.vertex.name in self.clamped:
            return _leaf(self.clamped[local.vertex.name].over(local.mu), True)
        if not self.connected or not local.mu.requires_grad:
            return _leaf(local.mu, True)
        return local.mu

    def _compute_weight(self, name: str) -> None:
        derived = self.graph.derived[name]
        value = derived.compute(*[self.sources.get(read, self.environment.get(read)) for read in derived.reads])
        self.sources[name] = value
        if isinstance(value, Tensor):
            self.weights[name] = _leaf(value, value.requires_grad)
        if any(read in self.backward_weights for read in derived.reads):  # an arrangement of parameters, and of their backward weights
            parts = [self.backward_weights.get(read, self.sources.get(read, self.environment.get(read))) for read in derived.reads]
            self.backward_weights[name] = derived.compute(*parts)

    def _constant(self, name: str) -> object:
        if name in self.mu:
            return self.leaves[name].detach()
        return self.weights[name] if name in self.weights else self.environment[name]

    def local(self, vertex: Vertex, values: Mapping[str, Tensor]) -> Local:
        """The vertex's prediction at these values of its free parents."""
        return self._local(vertex, {name: _leaf(values[name], True) for name in self.graph.free_parents(vertex)})

    def _local(self, vertex: Vertex, parents: dict[str, Tensor]) -> Local:
        arguments = [parents[name] if name in parents else self.environment[name] for name in vertex.parents]
        weights = {name: self.weights[name] for name in vertex.weights}
        if self.connected:  # each vertex learns by itself what it reads, so it reads an alias of its own
            weights.update({name: weights[name].view_as(weights[name]) for name in vertex.direct})
        arguments += [*weights.values()] + [self.environment[name] for name in vertex.constants]
        mu, taps = vertex.predict(*arguments)
        mu = mu.view_as(mu) if any(mu is parent for parent in parents.values()) else mu
        edges = tuple((x.detach(), get_gradient_edge(z) if z.requires_grad else None) for x, z in taps)
        back = self._back(vertex, tuple(parents), arguments) if self.dynamics.has_own_feedback else None
        return Local(vertex, _cast(mu, vertex), parents, edges, tuple(weights[n] for n in vertex.direct), back)

    def _back(self, vertex: Vertex, free: tuple[str, ...], arguments: list[Any]) -> Tensor | None:
        """The prediction with the derivative by which errors come back, or None where that is its own."""
        route = route_of(vertex, free, self.dynamics.feedback != "symmetric", self.dynamics.derivative)
        if route is None:
            return None
        return _cast(route.run(*arguments, *(self.backward_weights[name] for name in route.weights)), vertex)


def mixed(weights: Tensor, mu: Tensor) -> Tensor:
    """E mu over the features of mu: channels where it has four or five dimensions, else the last one."""
    axis = feature_axis(mu.dim())
    return (mu.movedim(axis, -1) @ weights.to(mu.dtype).t()).movedim(-1, axis)


def _cast(mu: Tensor, vertex: Vertex) -> Tensor:
    return mu if vertex.dtype in (None, mu.dtype) else mu.to(vertex.dtype)


def learning_parameters(call: Call) -> list[str]:
    """The parameters that vertices read and that learn, whether or not an error reaches them; and what the rule learns besides."""
    return [key for key in (*_read_parameters(call.trace), *learning_extras(call)) if call.tensors[key].requires_grad]


def learning_extras(call: Call) -> list[str]:
    """The backward weights that learn, which their own weights must do too, and the error weights that do."""
    feedback = [key for name, key in call.extra.feedback.items() if call.tensors[name].requires_grad]
    others = (*call.extra.error_weights.values(), *call.extra.log_precisions.values())
    return [key for key in (*feedback, *others) if call.tensors[key].requires_grad]


@lru_cache(maxsize=64)
def _read_parameters(trace: Trace) -> list[str]:
    read = {name for vertex in trace.graph.vertices for name in vertex.parameters}
    return [key for key, name in trace.parameters.items() if name in read]


def _leaf(tensor: Tensor, free: bool) -> Tensor:
    return tensor.detach().requires_grad_(free)
