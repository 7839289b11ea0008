"""What the code of Millidge, Tschantz & Buckley 2020 does besides its equations: clamps, and two updates of the weights a batch.

A vertex with weights sends no more than +-clamp back. Weights learn twice what the equations say, clamped, and once more from
"predictions" in place of errors: what the children send back, which the errors approach.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pckernels.backends.feedforward import Bound, Local, feedback
from pckernels.backends.learning import Lesson, learned
from pckernels.backends.results import Tensors
from pckernels.call import Call


def sent(local: Local, error: Tensor, parents: list[str], clamp: float | None) -> Tensors:
    """What a vertex sends back to its parents."""
    parts = feedback(local, error, parents)
    if clamp is None or not local.vertex.weights:
        return parts
    return {name: part.clamp(-clamp, clamp) for name, part in parts.items()}


def learned_twice(bound: Bound, call: Call, errors: Tensors) -> Tensors:
    """Two clamped gradients, added; nothing where a call does not learn."""
    clamp = call.dynamics.clamp
    assert clamp is not None
    doubled = replace(call, factor=2.0)
    total: Tensors = {}
    for lesson in (errors, _predictions(bound, errors, clamp)):
        for name, gradient in learned(bound, doubled, Lesson(bound.locals, lesson)).items():
            clamped = gradient.clamp(-clamp, clamp) * call.factor
            total[name] = total[name] + clamped if name in total else clamped
    return total


def _predictions(bound: Bound, errors: Tensors, clamp: float) -> Tensors:
    """The sum of what the children of a vertex send it; of an output its error."""
    found = {name: error for name, error in errors.items() if name in bound.graph.outputs}
    for child, error in errors.items():
        for name, part in sent(bound.locals[child], error, bound.graph.free_parents(bound.graph[child]), clamp).items():
            found[name] = found[name] + part if name in found else part
    return found
