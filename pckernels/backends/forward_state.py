"""Values that follow from errors by a forward pass: the state of error optimisation."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pckernels.backends.feedforward import feedback
from pckernels.backends.results import Tensors
from pckernels.backends.state import Moving


class ForwardState(Moving):
    """Errors are what moves; values and predictions follow from them by a forward pass."""

    def value(self, name: str) -> Tensor:
        """v_i = mu_i + eps_i; of an output its prediction."""
        mu = self.locals[name].mu.detach()
        return mu + self.errors[name] if name in self.errors and name not in self.graph.outputs else mu

    def deltas(self) -> Tensors:
        """-dL/dv_i at the present values, from the outputs up, one vertex at a time."""
        found = {name: self.errors[name] for name in self.graph.outputs if name in self.errors}
        for vertex in reversed(self.graph.vertices):
            delta = self.toward_parents(vertex.name, found.get(vertex.name))
            if delta is not None:
                found[vertex.name] = delta
                for parent, part in feedback(self.locals[vertex.name], delta, self.graph.free_parents(vertex)).items():
                    found[parent] = found[parent] + part if parent in found else part
        return found

    def toward_parents(self, name: str, delta: Tensor | None) -> Tensor | None:
        """-dF/dmu_i from delta_i, None being 0: they are one, since the value follows from the prediction."""
        return delta

    def drive(self, name: str, delta: Tensor) -> Tensor:
        """-dF/deps_i."""
        return delta - self.bound.weighted(name, self.errors[name]) if name in self.errors else delta

    def shift(self, name: str, step: Tensor) -> None:
        """Move one error."""
        self.errors[name] = self.errors[name] + step if name in self.errors else step

    def move(self, names: Iterable[str], rate: float, momentum: float) -> None:
        """Move the errors of a group at once, then let values and predictions follow."""
        deltas = self.deltas()
        moved = [name for name in names if name in deltas]
        for name in moved:
            self.shift(name, rate * self.velocity(name, self.drive(name, deltas[name]), momentum))
        self.follow(moved)

    def follow(self, moved: Iterable[str]) -> None:
        """The forward pass, from the first of the moved errors on."""
        changed = set(moved)
        for vertex in self.graph.vertices:
            parents = self.graph.free_parents(vertex)
            if changed.intersection(parents):
                self.locals[vertex.name] = self.bound.local(vertex, {parent: self.value(parent) for parent in parents})
                changed.add(vertex.name)
        if changed.intersection(self.graph.outputs):
            self.observe()
