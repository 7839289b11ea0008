"""Fixed prediction without its steps: the T-step errors from backward sweeps over the feed-forward pass.

The error of a vertex after T steps is the sum over path lengths k of c_k(T) times the part of delta that travels paths of
length k (coefficients.py). A component is one such part. Components that can no longer be told apart are merged: lengths
whose coefficients are 1 to rounding here and at every vertex further up; those whose coefficients are 0 are dropped.
In nested order an edge into a later time step starts again at k = 1, from an error that is final.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound, Local, Place, feedback, vjp_of_several
from pckernels.backends.learning import LocalUpdates
from pckernels.backends.path_lengths import Plan, Siblings, make_plan, siblings
from pckernels.backends.results import Frozen, Lazy, Tensors, bound_updates, complaint, energy, full_errors, relaxation
from pckernels.call import Call, Outcome, Snapshot
from pckernels.graph import ComputationGraph
from pckernels.rules import Dynamics

Components = dict[int, Tensor]  # path length -> the part of delta that travels paths of that length


class Sweep:
    """One backward sweep: components, and errors, from the outputs up."""

    def __init__(self, bound: Bound, plan: Plan, merge: bool, learn: LocalUpdates | None):
        self.bound, self.graph, self.plan, self.merge, self.learn = bound, bound.graph, plan, merge, learn
        self.components: dict[str, Components] = {}
        self.final: Tensors = {}  # errors that more than one component makes up
        self.sums: set[tuple[str, int]] = set()  # components that were made by adding here: nobody else holds them
        self.products = 0
        self.merged = False

    def run_at_once(self, at_outputs: Tensors, lengths: dict[str, int]) -> None:
        """Every vertex's only component from one pass over the connected graph."""
        self.merged = self.plan.merged
        arrived = [v.name for v in self.graph.vertices if lengths[v.name] < self.plan.zeros and v.name not in at_outputs]
        learning = [name for name in (*at_outputs, *arrived) if self.learn and self.plan.weight(lengths[name]) != 0.0]
        wanted = [self.learn.wanted(self.bound.locals[name]) for name in learning] if self.learn else []
        places = [self.bound.leaves[name] for name in arrived]
        outputs = [self.bound.locals[name] for name in at_outputs]
        targets = [*places, *(place for own in wanted for place in own)]
        results = vjp_of_several(outputs, list(at_outputs.values()), targets, again=False)
        self.products = len(at_outputs) + len(arrived)
        self.components.update({name: {0: error} for name, error in at_outputs.items()})
        for name, delta in zip(arrived, results, strict=False):
            if delta is not None:
                self.components[name] = {lengths[name]: delta}
        if self.learn:
            self._learn(self.learn, learning, wanted, results[len(arrived) :], [self.plan.weight(lengths[name]) for name in learning])

    def run(self, at_outputs: Tensors) -> None:
        self.components.update({name: {0: error} for name, error in at_outputs.items()})
        waiting = {names: len(names) for names in siblings(self.graph).values()}
        for vertex in reversed(self.graph.vertices):
            names = siblings(self.graph)[vertex.name]
            waiting[names] -= 1
            if waiting[names] == 0:  # the children of all of them have been visited
                self._visit(names)

    def _visit(self, names: Siblings) -> None:
        arrived = [name for name in names if name in self.components]
        for name in arrived:
            self.components[name] = self._simplified(name)
            if not self.components[name]:
                del self.components[name]  # the error has not arrived after T steps
        arrived = [name for name in arrived if name in self.components]
        length = self._common_length(arrived)
        if length is not None:
            self._visit_alone(arrived, length)
        elif arrived:
            self._visit_mixtures(arrived)

    def _common_length(self, names: list[str]) -> int | None:
        """The one path length of all components, or one that stands for all, since their coefficients are 1 from here up."""
        lengths = {length for name in names for length in self.components[name]}
        if not names or any(len(self.components[name]) > 1 for name in names):
            return None
        if len(lengths) == 1:
            return lengths.pop()
        alike = all(length + self.plan.above[name] <= self.plan.ones for name in names for length in self.components[name])
        return max(lengths) if alike and self.merge else None

    def _parents(self, names: list[str]) -> tuple[list[str], list[str]]:
        """The parents that relax together with these vertices, and those of earlier time steps in nested order."""
        groups = {self.plan.groups[name] for name in names if name not in self.graph.outputs}
        parents = self.graph.free_parents(self.graph[names[0]])
        near = [parent for parent in parents if not groups or groups == {self.plan.groups[parent]}]
        return near, [parent for parent in parents if parent not in near]

    def _visit_alone(self, names: list[str], length: int) -> None:
        """One component: everything from a single vector-Jacobian product, since all of it is linear in the error."""
        weight = self.plan.weight(length)
        near, far = self._parents(names)
        deltas = [next(iter(self.components[name].values())) for name in names]
        for parent, result in self._differentiate(names, deltas, [*near, *far], weight).items():
            self._send(parent, length + 1 if parent in near else 1, result if parent in near else _scaled(result, weight))

    def _visit_mixtures(self, names: list[str]) -> None:
        near, far = self._parents(names)
        for name in names if near else ():
            for length, delta in self.components[name].items():
                self.products += 1
                for parent, part in feedback(self.bound.locals[name], delta, near).items():
                    self._send(parent, length + 1, part)
        self.final.update({name: self.error(name) for name in names})
        if self.merge:  # their sum is all that is asked for from here on
            self.components.update({name: {} for name in names})
        for parent, result in self._differentiate(names, [self.final[name] for name in names], far, 1.0).items():
            self._send(parent, 1, result)

    def _differentiate(self, names: list[str], errors: list[Tensor], parents: list[str], weight: float) -> dict[str, Tensor | None]:
        """Feedback to the parents; on the way the vertices learn from their errors times `weight`."""
        locals_ = [self.bound.locals[name] for name in names]
        learn = self.learn if weight != 0.0 else None
        wanted = [learn.wanted(local) for local in locals_] if learn else []
        self.products += len(names)
        if self.bound.dynamics.has_own_feedback:
            if learn:
                self._learn(
                    learn, names, wanted, vjp_of_several(locals_, errors, [p for own in wanted for p in own]), [weight] * len(names)
                )
            return self._fed_back(locals_, errors, parents)
        places = [self.bound.leaves[parent] for parent in parents]
        results = vjp_of_several(locals_, errors, [*places, *(place for own in wanted for place in own)])
        start = len(parents)
        if learn:
            self._learn(learn, names, wanted, results[start:], [weight] * len(names))
        return dict(zip(parents, results[:start], strict=True))

    def _fed_back(self, locals_: list[Local], errors: list[Tensor], parents: list[str]) -> dict[str, Tensor | None]:
        """What the parents get where the way back is another than the Jacobian by which weights learn."""
        parts = [feedback(local, error, parents) for local, error in zip(locals_, errors, strict=True)]
        arrived = {parent: [part[parent] for part in parts if parent in part] for parent in parents}
        return {parent: sum(own[1:], own[0]) for parent, own in arrived.items() if own}

    def _learn(
        self, learn: LocalUpdates, names: list[str], wanted: list[list[Place]], results: list[Tensor | None], weights: list[float]
    ) -> None:
        """Hand each vertex its part of the results of one differentiation."""
        start = 0
        for name, own, weight in zip(names, wanted, weights, strict=True):
            learn.add(self.bound.locals[name], results[start : start + len(own)], weight)
            start += len(own)

    def _send(self, parent: str, length: int, part: Tensor | None) -> None:
        if part is None:
            return
        components = self.components.setdefault(parent, {})
        if (parent, length) in self.sums:
            components[length] += part
        elif length in components:
            components[length] = components[length] + part
            self.sums.add((parent, length))
        else:
            components[length] = part

    def _simplified(self, name: str) -> Components:
        components = {k: part for k, part in self.components[name].items() if k < self.plan.zeros}
        alike = [k for k in components if k + self.plan.above[name] <= self.plan.ones] if self.merge else []
        if len(alike) < 2:
            return components
        self.merged = True
        total = components[alike[0]]
        for k in alike[1:]:
            total = total + components[k]
        return {**{k: part for k, part in components.items() if k not in alike}, max(alike): total}

    def error(self, name: str) -> Tensor:
        """eps after T steps."""
        if name in self.final:
            return self.final[name]
        return self.error_at(name, self.plan.weight)

    def error_at(self, name: str, weight: Callable[[int], float]) -> Tensor:
        total: Tensor | None = None
        for length, part in self.components[name].items():
            c = weight(length)
            if c != 0.0:
                term = part if c == 1.0 else c * part
                total = term if total is None else total + term
        return torch.zeros_like(self.bound.mu[name]) if total is None else total


def _scaled(part: Tensor | None, weight: float) -> Tensor | None:
    return part if part is None or weight == 1.0 else part * weight


def sweep(call: Call) -> Outcome:
    """FixedPrediction by its closed form; ZeroDivergence in one sweep."""
    assert call.objective is not None
    graph = call.trace.graph
    plan = make_plan(graph, call.dynamics, plan_dtype(graph))
    at_once = plan.lengths is not None and not call.dynamics.has_own_feedback
    bound = Bound(graph, call, connected=at_once)
    losses, at_outputs = call.objective({name: bound.mu[name] for name in graph.outputs})
    updates = LocalUpdates(bound, call.factor)
    swept = Sweep(bound, plan, True, updates if call.learn else None)
    if at_once and plan.lengths is not None:
        swept.run_at_once(at_outputs, plan.lengths)
    else:
        swept.run(at_outputs)
    errors = Lazy(lambda: full_errors(bound, {name: swept.error(name) for name in swept.components}))
    # A sum is finite only if every entry is; it reads each error once, many times faster than isfinite does.
    parts = [part for name, own in swept.components.items() for part in ([swept.final[name]] if name in swept.final else own.values())]
    energies = Lazy(partial(_energies, bound, call, plan, swept, losses, at_outputs, _versions(call)))
    return Outcome(
        losses=losses,
        values=lambda: {name: Frozen(bound, errors()).value(name) for name in bound.mu},
        errors=errors,
        energy=energies,
        good=torch.stack([tensor.sum() for tensor in (losses, *parts)]).sum().isfinite(),
        complaint=lambda: complaint(bound.mu, call.dynamics, losses.sum()[None], errors(), None),
        plan=_description(call.dynamics, graph, swept),
        gradients=updates.gradients() if call.learn else {},
        updates=bound_updates(bound, call),
        history=_history(bound, call, plan, at_outputs) if call.record else None,
    )


def plan_dtype(graph: ComputationGraph) -> torch.dtype:
    """In which 0 and 1 are told from what is near them: the outputs', or float32 where that is narrower."""
    return torch.promote_types(graph[graph.outputs[0]].dtype or torch.float32, torch.float32)


def _description(dynamics: Dynamics, graph: ComputationGraph, swept: Sweep) -> str:
    count = max(1, len(graph))
    kind = "zero divergence in one backward sweep" if dynamics.learn_on_arrival else "fixed prediction in closed form"
    order = ", one time step after the other" if dynamics.nested else ""
    work = f"{swept.products} vector-Jacobian products for {len(graph)} vertices ({swept.products / count:.2g} sweeps)"
    return f"{kind}{order}{relaxation(dynamics)}: {work}"


def energy_later(call: Call) -> Callable[[], Tensor]:
    """F at t = 0 .. T for a call that another backend has swept: computed when it is asked for, by a sweep of its own."""
    versions = _versions(call)

    def compute() -> Tensor:
        _require_unmoved(call, versions)
        with torch.enable_grad():
            return sweep(replace(call, learn=False, memo={})).energy()

    return compute


def _require_unmoved(call: Call, versions: list[int]) -> None:
    if versions != _versions(call):
        raise RuntimeError(
            "The energy of this closed form was not computed in its one sweep, and the parameters have moved since. "
            'Read .energy before the optimizer steps, call infer(x, target).energy, or use solver="iterate".'
        )


def _versions(call: Call) -> list[int]:
    return [] if torch.is_inference_mode_enabled() else [call.tensors[name]._version for name in call.trace.parameters]


def _energies(bound: Bound, call: Call, plan: Plan, swept: Sweep, losses: Tensor, at_outputs: Tensors, versions: list[int]) -> Tensor:
    """F at t = 0 .. T. What the sweep merged is taken apart once more, for which the parameters must not have moved."""
    if call.dynamics.learn_on_arrival:
        return _energies_on_arrival(bound.graph, swept, losses)
    if swept.merged or swept.final:
        _require_unmoved(call, versions)
        swept = _unmerged(bound, call, plan, at_outputs)
    return _energies_of(bound.graph, plan, swept, losses)


def _unmerged(bound: Bound, call: Call, plan: Plan, at_outputs: Tensors) -> Sweep:
    """The sweep with every path length by itself, over a feed-forward pass with the same draws."""
    with torch.enable_grad():
        again = Bound(bound.graph, call, held=bound.environment) if bound.connected else bound
        swept = Sweep(again, plan, False, None)
        swept.run(at_outputs)
    return swept


def _energies_of(graph: ComputationGraph, plan: Plan, swept: Sweep, losses: Tensor) -> Tensor:
    """1/2 sum over pairs of path lengths of c_k(t) c_l(t) <delta_k, delta_l>, plus the loss."""
    total = losses.sum().repeat(len(plan.rows))
    c = torch.tensor(plan.rows, dtype=losses.dtype, device=losses.device)
    for name, components in swept.components.items():
        if name not in graph.outputs:
            lengths = list(components)
            parts = torch.stack([components[k].flatten() for k in lengths]).to(losses.dtype)
            weights = c[:, lengths]
            total = total + 0.5 * ((weights @ (parts @ parts.t())) * weights).sum(1)
    return total


def _energies_on_arrival(graph: ComputationGraph, swept: Sweep, losses: Tensor) -> Tensor:
    energies = [losses.sum()]
    for distance in range(1, graph.depth + 1):
        arrived = [swept.error(name) for name in swept.components if graph[name].distance == distance]
        energies.append(energy(energies[-1], arrived))
    return torch.stack(energies)


def _history(bound: Bound, call: Call, plan: Plan, at_outputs: Tensors) -> list[Snapshot]:
    swept = _unmerged(bound, call, plan, at_outputs)
    history = []
    for t, row in enumerate(plan.rows):
        if call.dynamics.learn_on_arrival:
            errors = {name: swept.error(name) for name in swept.components if bound.graph[name].distance <= t}
        else:
            errors = {name: swept.error_at(name, row.__getitem__) for name in swept.components}
        history.append(Frozen(bound, errors).snapshot(bound.graph))
    return history
