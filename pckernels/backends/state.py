"""Values, predictions and errors of a graph at one moment, and how they move: what descends F on its values shares this."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from pckernels.backends.feedforward import Bound, Local, feedback
from pckernels.backends.results import Tensors, energy, full_errors
from pckernels.call import Objective, Snapshot


class Moving:
    """Predictions and errors of a graph at one moment, from the feed-forward pass on. The loss pulls with the factor beta:
    eps_out = -beta dloss/dmu_out."""

    def __init__(self, bound: Bound, objective: Objective, beta: float = 1.0):
        self.bound, self.graph, self.objective, self.beta = bound, bound.graph, objective, beta
        self.locals: dict[str, Local] = dict(bound.locals)
        self.velocities: Tensors = {}
        self.errors: Tensors = {}
        self.observe()

    def value(self, name: str) -> Tensor:
        """v_i; of an output, which has no free value, its prediction."""
        raise NotImplementedError

    def observe(self) -> None:
        """The losses at the present predictions, and the errors that they put at the outputs."""
        self.losses, errors = self.objective({name: self.locals[name].mu.detach() for name in self.graph.outputs})
        self.errors.update(errors if self.beta == 1.0 else {name: self.beta * error for name, error in errors.items()})

    def velocity(self, name: str, drive: Tensor, momentum: float) -> Tensor:
        """velocity_i <- momentum * velocity_i + drive_i."""
        velocity = momentum * self.velocities[name] + drive if momentum and name in self.velocities else drive
        self.velocities[name] = velocity
        return velocity

    def energy(self) -> Tensor:
        """F: half the squared hidden errors times their precisions, and beta times the loss, summed over the batch."""
        hidden = [self.bound.whitened(name, error) for name, error in self.errors.items() if name not in self.graph.outputs]
        return energy(self.beta * self.losses, hidden) + self.bound.log_volume(self.losses)

    def snapshot(self) -> Snapshot:
        names = [vertex.name for vertex in self.graph.vertices]
        return Snapshot({name: self.value(name) for name in names}, full_errors(self.bound, self.errors))


class State(Moving):
    """Values are what moves, kept as displacements d_i = v_i - (feed-forward value), so that eps_i = d_i - (mu_i - its feed-forward
    value) loses no digits near equilibrium."""

    def __init__(self, bound: Bound, objective: Objective, beta: float = 1.0):
        self.displacements: Tensors = {}
        super().__init__(bound, objective, beta)
        self.errors.update(bound.unrest())

    def value(self, name: str) -> Tensor:
        """v_i; of an output, which has no free value, its prediction."""
        if name in self.graph.outputs:
            return self.locals[name].mu.detach()
        start = self.bound.mu[name]
        return start + self.displacements[name] if name in self.displacements else start

    def place(self, values: Mapping[str, Tensor]) -> None:
        """Put hidden value nodes anywhere, and refresh the predictions and errors that depend on them."""
        self.displacements.update({name: value - self.bound.mu[name] for name, value in values.items()})
        self.refresh(values)

    def drives(self, names: Iterable[str]) -> Tensors:
        """-pi_i eps_i + sum over children of (d mu_j / d v_i)^T pi_j eps_j, which is -dF/dv_i, for each vertex of a group."""
        wanted = list(names)
        totals = {name: self.own_drive(name) for name in wanted if name in self.errors}
        for child in dict.fromkeys(child for name in wanted for child in self.graph.children[name] if child in self.errors):
            for name, part in feedback(self.locals[child], self.bound.weighted(child, self.errors[child]), wanted).items():
                totals[name] = totals[name] + part if name in totals else part
        return totals

    def own_drive(self, name: str) -> Tensor:
        """-dF/dv_i through the vertex's own error."""
        return -self.bound.weighted(name, self.errors[name])

    def move(self, names: Iterable[str], rate: float, momentum: float, mask: Callable[[str, Tensor], Tensor] | None = None) -> Tensors:
        """Move the vertices of a group at once, then refresh what that changes. Returns the moves."""
        moves = self.advance(names, rate, momentum, mask)
        self.refresh(moves)
        return moves

    def advance(self, names: Iterable[str], rate: float, momentum: float, mask: Callable[[str, Tensor], Tensor] | None = None) -> Tensors:
        """Move the vertices of a group at once, and nothing else. Returns the moves."""
        moves = {}
        for name, drive in self.drives(names).items():
            step = rate * self.velocity(name, drive, momentum)
            moves[name] = step if mask is None else mask(name, step)
        for name, step in moves.items():
            self.displacements[name] = self.displacements[name] + step if name in self.displacements else step
        return moves

    def refresh(self, moved: Iterable[str], others: Iterable[str] = ()) -> None:
        """Predictions of the moved vertices' children and of `others`, whose weights have moved; and the errors of all of these."""
        moved = list(moved)
        repredicted = list(dict.fromkeys([*(child for name in moved for child in self.graph.children[name]), *others]))
        for name in repredicted:
            vertex = self.graph[name]
            self.locals[name] = self.bound.local(vertex, {parent: self.value(parent) for parent in self.graph.free_parents(vertex)})
        for name in dict.fromkeys([*moved, *repredicted]):
            if name not in self.graph.outputs:
                self.errors[name] = self._error(name)
        if any(name in self.graph.outputs for name in repredicted):
            self.observe()

    def _error(self, name: str) -> Tensor:
        if name in self.bound.error_weights:
            return self.value(name) - self.bound.expected(name, self.locals[name].mu.detach())
        change = self.locals[name].mu.detach() - self.bound.mu[name]
        return self.displacements[name] - change if name in self.displacements else -change
