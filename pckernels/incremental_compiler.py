"""Incremental rules become code: values and weights move together, so that nothing that reads a weight may be computed once.

Predictions are computed whole, since the weights of the feed-forward pass are no more; values are held as displacements from its
predictions all the same, so that eps = d - (mu - mu_0) is 0, and not a rounding of v, where nothing has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pckernels.arena import Array, Draft
from pckernels.compiler import Compiled
from pckernels.emitter import Emitter, Objective
from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph
from pckernels.instructions import ABSENT, Op
from pckernels.program import Kind, Node, Program, Stage
from pckernels.rules import Dynamics
from pckernels.schedule import steps_on, sweep_groups
from pckernels.stages import Operands


def compile_incremental(
    program: Program, graph: ComputationGraph, dynamics: Dynamics, objectives: Mapping[str, Objective], learning: frozenset[str]
) -> Compiled:
    """T steps of the values and of the weights that learn (backends/incremental.py has the mathematics)."""
    _refuse_what_is_outside(program, graph, learning)
    emitter = _Whole(program, objectives, learning)
    steps = steps_on(graph, dynamics.steps)
    emitter.section(0, 0)
    for node in program.nodes:
        emitter.feed_forward(node)
        emitter.loss(node, at_start=True)
        emitter.start(node)
    _Loop(emitter, graph, dynamics).emit(steps)
    emitter.section(steps, steps)
    learners = _with_errors(emitter)
    for node in program.nodes:
        emitter.store_value(node)
    for node in learners:
        emitter.store_error(node, emitter.errors[node.name])
    code = emitter.finished(steps)
    io = tuple(place for _, place in emitter.io.values())
    coefficients = dict.fromkeys((node.name for node in learners), 1.0)
    sections = tuple(emitter.sections)
    return Compiled(code, tuple(emitter.weights), io, tuple(emitter.gradients), coefficients, carried=True, sections=sections)


def _refuse_what_is_outside(program: Program, graph: ComputationGraph, learning: frozenset[str]) -> None:
    """What is computed from weights before the steps would stay as it was."""
    for info in program.weights:
        if info.name in learning and info.name in graph.derived:
            raise Unsupported("a weight is a function of parameters, which only the reference computes anew at every step")
    for node in program.nodes:
        if node.external and learning.intersection(graph[node.name].weights):
            raise Unsupported(f"vertex {node.name!r} has no stages here, and its weights move: only the reference computes it anew")


def _with_errors(emitter: Emitter) -> list[Node]:
    hidden = {node.name for node in emitter.hidden}
    return [node for node in emitter.program.nodes if node.name in hidden or node.name in emitter.objectives]


class _Whole(Emitter):
    """An emitter whose predictions are computed whole, from values, and whose weights learn inside of the loop.

    Attributes:
        values: of each hidden node, by its buffer: what children read. placed: its displacement. begun: its prediction at the start.
    """

    def __init__(self, program: Program, objectives: Mapping[str, Objective], learning: frozenset[str]):
        super().__init__(program, objectives, learning, live=False)
        self.values, self.placed, self.begun = (
            {node.prediction: self.array(node.prediction, name) for node in self.hidden} for name in ("value", "displacement", "start")
        )

    def start(self, node: Node) -> None:
        """The feed-forward start: v = mu."""
        for array in (self.values.get(node.prediction), self.begun.get(node.prediction)):
            if array is not None:
                self.emit(Draft(Op.ADD, array, self.base(node.prediction), n=array.n, f=(1.0, 0.0)))

    def move(self, node: Node, fed: Array | None, velocity: Array | None, factors: tuple[float, float, float]) -> None:
        """A step of its value."""
        d = self.placed[node.prediction]
        self.emit(Draft(Op.MOVE, d, self.errors[node.name], fed, velocity, n=d.n, f=factors))
        self.emit(Draft(Op.ADD, self.values[node.prediction], self.begun[node.prediction], d, n=d.n, f=(1.0, 1.0)))

    def operands(self, node: Node, k: int, stage: Stage) -> Operands:
        inputs = tuple(self._read(buffer) for buffer in stage.inputs)
        return replace(super().operands(node, k, stage), inputs=inputs)

    def _read(self, buffer: int) -> Array:
        return self.values[buffer] if buffer in self.values else self.base(buffer)

    def predict(self, node: Node) -> None:
        """Its prediction and its error, at the values and weights as they are."""
        if not node.external:
            self.feed_forward(node)
        if node.prediction in self.values:
            d, change = self.placed[node.prediction], self.array(node.prediction, "change")
            self.emit(Draft(Op.ADD, change, self.base(node.prediction), self.begun[node.prediction], n=d.n, f=(1.0, -1.0)))
            self.emit(Draft(Op.ERROR, self.errors[node.name], d, change, n=d.n))
        else:
            self.loss(node, at_start=False)

    def store_value(self, node: Node) -> None:
        value = self._read(node.prediction)
        self.emit(Draft(Op.STORE, a=value, n=value.n, slot=self.place("value", node.name, value.n), p=(value.n, 0)))

    def _learn(self, node: Node, k: int, stage: Stage, arrays: Operands, error: Array, coefficient: float) -> None:
        if stage.kind is Kind.CONV:
            super()._learn(node, k, stage, arrays, error, coefficient)
            return
        weight, bias = (self._gradient_slot(place) for place in (stage.weight, stage.bias))
        positions, _, outputs = stage.p
        if weight != ABSENT:
            self.emit(Draft(Op.LINEAR_LEARN, None, error, arrays.inputs[0], slot=weight, p=stage.p, f=(coefficient,)))
        if bias != ABSENT:
            self.emit(Draft(Op.SUM_LEARN, None, error, slot=bias, p=(positions, outputs, 1), f=(coefficient,)))


class _Loop:
    """One step: gradients and drives from the state before it; values move, group by group, then weights; then all is predicted anew."""

    def __init__(self, emitter: _Whole, graph: ComputationGraph, dynamics: Dynamics):
        self.emitter, self.graph, self.dynamics = emitter, graph, dynamics
        self.velocities = {node.name: emitter.array(node.prediction, "velocity") for node in emitter.hidden if dynamics.momentum}

    def emit(self, steps: int) -> None:
        emitter = self.emitter
        emitter.section(1, steps)
        moved: list[Node] = []
        for k, names in enumerate(sweep_groups(self.graph, self.dynamics.sweep) or [[]]):
            self._predict(moved, [])
            moved = [emitter.nodes[name] for name in names]
            self._move(moved, learn=k == 0)
        emitter.emit(Draft(Op.MOVE_WEIGHTS, n=len(emitter.gradients), f=(self.dynamics.weight_rate or 0.0,)))
        self._predict(moved, [node for node in emitter.program.nodes if self.graph[node.name].weights])
        for node in emitter.hidden:
            emitter.norm(node, emitter.errors[node.name], 0.5)

    def _move(self, group: Sequence[Node], learn: bool) -> None:
        """Feedback into a group, which moves at once. In the first of a step weights learn on the way, from the state before the step."""
        emitter = self.emitter
        sinks = {node.prediction: emitter.array(node.prediction, "feedback") for node in group}
        written: set[Array] = set()
        for child in _with_errors(emitter):
            emitter.feedback(child, emitter.errors[child.name], sinks, written, learn=learn)
        factors = (self.dynamics.rate, self.dynamics.momentum, 1.0)
        for node in group:
            fed = sinks[node.prediction]
            emitter.move(node, fed if fed in written else None, self.velocities.get(node.name), factors)

    def _predict(self, moved: Iterable[Node], others: Iterable[Node]) -> None:
        """What depends on the moved nodes, and others whose weights have moved."""
        names = {node.name for node in moved}
        wanted = names | {node.name for node in others}
        for node in self.emitter.program.nodes:
            if node.name in wanted or any(parent.name in names for parent in self.emitter.parents(node)):
                self.emitter.predict(node)
