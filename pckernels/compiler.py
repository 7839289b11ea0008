"""A program and a rule become code: one function for each family of dynamics. Rules arrive as data; no rule is known by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from pckernels.arena import ALIGNMENT, Array, Draft, Section
from pckernels.backends.path_lengths import Plan
from pckernels.emitter import Emitter, Objective, Place
from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph
from pckernels.instructions import ABSENT, Code, Op, OuterProduct
from pckernels.program import Node, Program, WeightInfo
from pckernels.returns import TRANSPOSED, Way
from pckernels.rules import Dynamics
from pckernels.schedule import error_groups, light_cone, steps_on, sweep_groups

ALIKE = -1  # path lengths whose coefficients are all 1 from here up


@dataclass(frozen=True, eq=False)
class Compiled:
    """Code with what its slots stand for.

    Attributes:
        weights: what each weight slot is; io: each io slot; gradients: the weight of each gradient slot.
        coefficients: what each node's stored error is to be multiplied by; nodes that are missing have no error.
        lengths: of a sweep, the path lengths that make up each node's error.
        carried: whether energies are those of the steps; otherwise they are ||delta||^2 of each node, once.
        still: energy slots of losses that the steps do not move: they are known from the start.
        program, dynamics: what the steps were compiled from, for kernels that run a whole model by themselves; None of other code.
        weighed: nodes whose error counts times a factor that the call brings; of a sweep, whose stored error is the delta then.
        sections: the code before its arrays had rows in an arena, for what keeps each array in a tensor of its own.
    """

    code: Code
    weights: tuple[WeightInfo, ...]
    io: tuple[Place, ...]
    gradients: tuple[str, ...]
    coefficients: dict[str, float]
    carried: bool
    still: tuple[int, ...] = ()
    lengths: dict[str, set[int]] = field(default_factory=dict)
    program: Program | None = None
    dynamics: Dynamics | None = None
    weighed: frozenset[str] = frozenset()
    sections: tuple[Section, ...] = ()

    @cached_property
    def places(self) -> list[tuple[str, int]]:
        """Where each io slot lies: ("input", which of the inputs), or ("kept" or "scratch", first number of one sample there)."""
        counts = {"input": 0, "kept": 0, "scratch": 0}
        found = []
        for place in self.io:
            where = "kept" if place.is_kept else "scratch" if place.is_result else "input"
            found.append((where, counts[where]))
            counts[where] += place.n if place.is_result else 1
        return found

    @cached_property
    def moves_weights(self) -> bool:
        """Whether weights move at every step: then the code runs on a copy of them, or with an optimizer."""
        return any(draft.op is Op.MOVE_WEIGHTS for section in self.sections for draft in section.drafts)

    @cached_property
    def inputs(self) -> list[Place]:
        """The io slots that the code reads, in order."""
        return [place for place in self.io if not place.is_result]

    @cached_property
    def kept_size(self) -> int:
        """Numbers of one sample that the outcome needs: losses, values, errors."""
        return sum(place.n for place in self.io if place.is_kept)

    @cached_property
    def scratch_size(self) -> int:
        """Numbers of one sample that the run alone needs."""
        return sum(place.n for place in self.io if place.is_result and not place.is_kept)

    @cached_property
    def slots(self) -> dict[tuple[str, str], int]:
        """(kind, name) of a place -> its io slot."""
        return {(place.kind, place.name): slot for slot, place in enumerate(self.io)}

    @cached_property
    def gram_width(self) -> int:
        """Of the widest product W W^T; 0 without one."""
        return max((info.outputs for info in self.weights if info.gram), default=0)

    @cached_property
    def gradient_sizes(self) -> list[int]:
        """Elements of each gradient slot."""
        sizes = {info.name: info.outputs * info.inputs for info in self.weights if not info.gram and not info.backward}
        return [sizes[name] for name in self.gradients]


def compile_feed_forward(program: Program) -> Compiled:
    """Values without a target."""
    emitter = Emitter(program, {}, frozenset(), live=False)
    emitter.section(0, 0)
    for node in program.nodes:
        emitter.feed_forward(node)
        emitter.store_value(node)
    return _compiled(emitter, 0, {}, carried=True)


@lru_cache(maxsize=64)
def compile_gram(outputs: int) -> Compiled:
    """W W^T of a weight with so many outputs, as the sum of outer products of the rows of W^T: each row is a sample of this code.

    By the engine, since a library's product may depend on the number of threads, and results here must not.
    """
    product = OuterProduct(0, ABSENT, 0, 0, 1, outputs, outputs, outputs, 0)
    code = Code((), rows=ALIGNMENT, weights=1, io=1, gradients=1, steps=0, energies=1, products=(product,))
    return Compiled(code, (WeightInfo("gram", outputs, outputs),), (Place("input", "columns", outputs),), ("gram",), {}, carried=True)


def compile_steps(
    program: Program,
    graph: ComputationGraph,
    dynamics: Dynamics,
    objectives: Mapping[str, Objective],
    learning: frozenset[str],
    gram: bool = False,
    weighed: frozenset[str] = frozenset(),
) -> Compiled:
    """T steps, one after the other: of the values (predictions follow), of the errors (predictions stay), or of errors that values follow.

    gram: hold displacements in the Gram form where there is one (emitter.Gram). With a tolerance there is none: it is one of displacements.
    weighed: nodes with a precision, which a call brings.
    """
    if dynamics.learn_on_arrival:
        raise Unsupported("the literal zero-divergence dynamics run on the levelled graph, which only the reference has")
    steps = steps_on(graph, dynamics.steps)
    (nudge,) = dynamics.nudges  # of several, each is a run of its own: see phases in backends/selection.py
    emitter = Emitter(program, objectives, learning, dynamics.moves != "errors", nudge, Way.of(dynamics), weighed)
    emitter.section(0, 0)
    for node in program.nodes:
        emitter.feed_forward(node)
        emitter.loss(node, at_start=True)
    emitter.load_factors()
    rest = Array(3, "rest") if dynamics.tolerance is not None else None
    if dynamics.moves == "values":
        _Values(emitter, graph, dynamics, gram and rest is None, rest).loop(steps)
    elif dynamics.moves == "free_errors":
        _FreeErrors(emitter, graph, dynamics).loop(steps)
    else:
        _Errors(emitter, graph, dynamics).loop(steps)
    emitter.section(steps, steps)
    for folded in list(emitter.grams.values()):
        emitter.unfold(folded)
    if rest is not None:
        emitter.store_rest(rest)
    _learn_and_store(emitter)
    compiled = _compiled(emitter, steps, dict.fromkeys(_with_errors(emitter), 1.0), carried=True)
    return replace(compiled, program=program, dynamics=dynamics)


def _learn_and_store(emitter: Emitter) -> None:
    names = _with_errors(emitter)
    for node in emitter.program.nodes:
        emitter.store_value(node)
    for node in emitter.program.nodes:
        if node.name in names:
            emitter.store_error(node, emitter.errors[node.name])
            emitter.feedback(node, emitter.sent[node.name], {}, set(), learn=True)


def _with_errors(emitter: Emitter) -> set[str]:
    return {node.name for node in emitter.hidden} | set(emitter.objectives)


def _compiled(emitter: Emitter, steps: int, coefficients: dict[str, float], carried: bool) -> Compiled:
    code = emitter.finished(steps)
    io = tuple(place for _, place in emitter.io.values())
    outputs = (emitter.nodes[name] for name in emitter.objectives)
    still = tuple(emitter.energy_slots[node.name] for node in outputs if node.prediction not in emitter.moving)
    weights, gradients, sections = tuple(emitter.weights), tuple(emitter.gradients), tuple(emitter.sections)
    return Compiled(code, weights, io, gradients, coefficients, carried, still, weighed=emitter.weighed, sections=sections)


def _feedback(emitter: Emitter, sinks: Mapping[int, Array], arrives: Mapping[str, int]) -> set[Array]:
    """Feedback of all nodes into the sinks, each from the step on at which it has something to say; the sinks that get any.

    A sink with several contributions starts at zero, so that all of them add, in whatever order they begin: products of
    different time steps can then become one.
    """
    children = [node for node in emitter.program.nodes if node.name in _with_errors(emitter)]
    written: set[Array] = set()
    for buffer, sink in sinks.items():
        readers = [child.name for child in children for stage in child.stages for read in stage.inputs if read == buffer]
        if len(readers) > 1:
            emitter.first = min(arrives[name] for name in readers) + 1
            emitter.emit(Draft(Op.FILL, sink, n=sink.n, f=(0.0,)))
            written.add(sink)
    for child in children:
        emitter.first = arrives[child.name] + 1
        emitter.feedback(child, emitter.sent[child.name], sinks, written)
    return written


class _Errors:
    """Fixed prediction: eps_i <- (1 - rate pi_i) eps_i + rate * feedback, all of a group at once."""

    def __init__(self, emitter: Emitter, graph: ComputationGraph, dynamics: Dynamics):
        self.emitter, self.graph, self.dynamics = emitter, graph, dynamics

    def loop(self, steps: int) -> None:
        for group in error_groups(self.graph, self.dynamics):
            self.emitter.section(1, steps)
            self._step([self.emitter.nodes[name] for name in group])

    def _step(self, group: Sequence[Node]) -> None:
        sinks = {node.prediction: self.emitter.array(node.prediction, "feedback") for node in group}
        arrives = {node.name: self._arrives(node) for node in self.emitter.program.nodes}
        written = _feedback(self.emitter, sinks, arrives)
        for node in group:
            self.emitter.first = arrives[node.name]
            fed = sinks[node.prediction]
            self._relax(node, fed if fed in written else None)
            self.emitter.weighed_norm(node)

    def _relax(self, node: Node, fed: Array | None) -> None:
        emitter, rate = self.emitter, self.dynamics.rate
        error, sent = emitter.errors[node.name], emitter.sent[node.name]
        if sent is error:
            emitter.emit(Draft(Op.RELAX, error, fed, n=error.n, f=(rate,)))
        else:
            emitter.emit(Draft(Op.MOVE, error, sent, fed, n=error.n, f=(rate, 0.0, 1.0)))
            emitter.weigh(node)

    def _arrives(self, node: Node) -> int:
        """The step before which the error is zero; in nested order the errors of later time steps are there from the start."""
        return 0 if self.dynamics.nested else self.graph[node.name].shortest


class _Values:
    """Gradient descent of F on the values, one group after the other; predictions and errors are refreshed in between."""

    def __init__(self, emitter: Emitter, graph: ComputationGraph, dynamics: Dynamics, gram: bool, rest: Array | None = None):
        self.emitter, self.graph, self.dynamics, self.rest = emitter, graph, dynamics, rest
        self.grams = {node.name: found for node in emitter.hidden if gram and (found := emitter.gram(node)) is not None}
        jacobi = dynamics.sweep == "jacobi"
        self.arrives = light_cone(graph) if jacobi else dict.fromkeys((v.name for v in graph.vertices), 0)
        self.moves = {name: self._moves(name) if jacobi else 0 for name in emitter.displacements}
        self.velocities = {node.name: self._like_state(node, "velocity") for node in emitter.hidden if dynamics.momentum}

    def _like_state(self, node: Node, name: str) -> Array:
        gram = self.grams.get(node.name)
        return self.emitter.array(node.prediction if gram is None else gram.stage.output, name)

    def _moves(self, name: str) -> int:
        return 1 + min([self.arrives[name], *(self.arrives[child] for child in self.graph.children[name])])

    def loop(self, steps: int) -> None:
        self.emitter.section(1, steps)
        for group in sweep_groups(self.graph, self.dynamics.sweep):
            nodes = [self.emitter.nodes[name] for name in group]
            self._move(nodes)
            self._refresh(nodes)
        if self.rest is not None and self.dynamics.tolerance is not None:
            self.emitter.first = 0
            self.emitter.emit(Draft(Op.REST, self.rest, n=self.rest.n, f=(self.dynamics.tolerance,)))
        for node in self.emitter.hidden:
            self.emitter.first = self.arrives[node.name]
            gram = self.grams.get(node.name)
            if gram is None:
                self.emitter.weighed_norm(node)
            else:  # ||W^T h||^2 = h . W W^T h
                self.emitter.norm(node, gram.state, 0.5, self.emitter.change(gram.stage.output, gram.child))

    def _move(self, group: Sequence[Node]) -> None:
        emitter = self.emitter
        sinks = {node.prediction: emitter.array(node.prediction, "feedback") for node in group}
        written = _feedback(emitter, sinks, self.arrives)
        factors = (self.dynamics.rate, self.dynamics.momentum, 1.0)
        for node in group:
            emitter.first = self.moves[node.name]
            state, error, fed = emitter.displacements[node.name], emitter.sent[node.name], sinks[node.prediction]
            if node.name in self.grams:
                state = error = self.grams[node.name].state
                fed = emitter.fed[node.name]
                written.add(fed)
            operands = (state, error, fed if fed in written else None, self.velocities.get(node.name), self.rest)
            emitter.emit(Draft(Op.MOVE if self.rest is None else Op.MOVE_OR_REST, *operands, n=state.n, f=factors))

    def _refresh(self, group: Iterable[Node]) -> None:
        emitter, moved = self.emitter, {node.name for node in group}
        for node in emitter.program.nodes:
            reads = [parent.name for parent in emitter.parents(node) if parent.name in moved]
            if reads:
                emitter.first = min(self.moves[name] for name in reads)
                emitter.refresh(node)
            if node.name in self.grams:
                continue
            if node.name in emitter.displacements and (reads or node.name in moved):
                emitter.first = min([self.moves[name] for name in reads] + [self.moves[node.name]])
                emitter.error(node)
                emitter.weigh(node)
            elif reads:
                emitter.first = 0
                emitter.loss(node, at_start=False)


class _FreeErrors:
    """Gradient descent of F on the errors: delta_i = -dL/dv_i by a sweep back, errors move towards it, values follow by a forward pass."""

    def __init__(self, emitter: Emitter, graph: ComputationGraph, dynamics: Dynamics):
        self.emitter, self.graph, self.dynamics = emitter, graph, dynamics
        self.deltas = {node.name: emitter.array(node.prediction, "delta") for node in emitter.hidden}
        self.velocities = {node.name: emitter.array(node.prediction, "velocity") for node in emitter.hidden if dynamics.momentum}

    def loop(self, steps: int) -> None:
        self.emitter.section(1, steps)
        for group in sweep_groups(self.graph, self.dynamics.sweep):
            moved = self._move(group, self._sweep())
            self._follow(moved)
        for node in self.emitter.hidden:
            self.emitter.weighed_norm(node)

    def _sweep(self) -> set[Array]:
        """The deltas, from the outputs up; those that anything has reached."""
        emitter = self.emitter
        sinks = {node.prediction: self.deltas[node.name] for node in emitter.hidden}
        reached = {emitter.errors[name] for name in emitter.objectives}
        for node in reversed(emitter.program.nodes):
            delta = self.deltas.get(node.name, emitter.errors[node.name])
            if delta in reached:
                emitter.feedback(node, delta, sinks, reached)
        return reached

    def _move(self, group: Sequence[str], reached: set[Array]) -> set[str]:
        """velocity <- momentum velocity + (delta - pi eps); eps <- eps + rate velocity, for those of a group that a delta reaches."""
        emitter, factors = self.emitter, (self.dynamics.rate, self.dynamics.momentum, 1.0)
        moved = [name for name in group if self.deltas[name] in reached]
        for name in moved:
            error = emitter.errors[name]
            emitter.emit(Draft(Op.MOVE, error, emitter.sent[name], self.deltas[name], self.velocities.get(name), n=error.n, f=factors))
            emitter.weigh(emitter.nodes[name])
        return set(moved)

    def _follow(self, moved: set[str]) -> None:
        """The forward pass, from the first of the moved errors on: v_i = mu_i + eps_i."""
        emitter = self.emitter
        for node in emitter.program.nodes:
            reads = any(parent.name in moved for parent in emitter.parents(node))
            if reads:
                emitter.refresh(node)
            if node.name not in emitter.displacements:
                if reads:
                    emitter.loss(node, at_start=False)
            elif reads or node.name in moved:
                moved.add(node.name)
                self._place(node)

    def _place(self, node: Node) -> None:
        d, error = self.emitter.displacements[node.name], self.emitter.errors[node.name]
        if error is not d:
            self.emitter.emit(Draft(Op.ADD, d, error, self.emitter.moved[node.name], n=d.n, f=(1.0, 1.0)))


def compile_sweep(
    program: Program,
    graph: ComputationGraph,
    plan: Plan,
    objectives: Mapping[str, Objective],
    learning: frozenset[str],
    way: Way = TRANSPOSED,
) -> Compiled:
    """The T-step errors of fixed prediction by one backward sweep (backends/closed_form.py has the mathematics)."""
    emitter = Emitter(program, objectives, learning, live=False, way=way)
    _begin_sweep(emitter)
    sweep = _Sweep(emitter, graph, plan)
    for node in reversed(program.nodes):
        sweep.visit(node)
    compiled = _compiled(emitter, 0, sweep.coefficients, carried=False)
    compiled.lengths.update(sweep.lengths)
    return compiled


def _begin_sweep(emitter: Emitter) -> None:
    """The feed-forward pass, whose values a sweep leaves as they are."""
    emitter.section(0, 0)
    for node in emitter.program.nodes:
        emitter.feed_forward(node)
        emitter.store_value(node)
        emitter.loss(node, at_start=True)


def compile_weighed_sweep(
    program: Program, objectives: Mapping[str, Objective], learning: frozenset[str], way: Way, weighed: frozenset[str]
) -> Compiled:
    """The same on a chain with precisions (backends/weighted_chain.py): the errors that it stores are the deltas, and each weighed node
    learns from its delta times the factor that a call brings, c_k(T)."""
    emitter = Emitter(program, objectives, learning, live=False, way=way, weighed=weighed)
    _begin_sweep(emitter)
    emitter.load_factors()
    reached = {emitter.errors[name] for name in objectives}
    deltas = {node.prediction: emitter.errors[node.name] for node in emitter.hidden}
    for node in reversed(program.nodes):
        delta = emitter.errors[node.name]
        if delta in reached:
            emitter.store_error(node, delta)
            emitter.feedback(node, delta, deltas, reached)
            emitter.weigh(node)
            emitter.feedback(node, emitter.sent[node.name], {}, set(), learn=True)
            if node.name not in objectives:
                emitter.norm(node, delta, 1.0)
    names = [node.name for node in program.nodes if emitter.errors[node.name] in reached]
    return _compiled(emitter, 0, dict.fromkeys(names, 1.0), carried=False)


class _Sweep:
    """Components of the errors, by path length, from the outputs up."""

    def __init__(self, emitter: Emitter, graph: ComputationGraph, plan: Plan):
        self.emitter, self.graph, self.plan = emitter, graph, plan
        self.components: dict[str, dict[int, Array]] = {name: {0: emitter.errors[name]} for name in emitter.objectives}
        self.lengths: dict[str, set[int]] = {name: {0} for name in emitter.objectives}
        self.coefficients: dict[str, float] = {}
        self.written: set[Array] = set()

    def visit(self, node: Node) -> None:
        own = self.components.get(node.name)
        if own:
            near, far = self._parents(node)
            (self._alone if len(own) == 1 else self._mixture)(node, own, near, far)

    def _alone(self, node: Node, own: Mapping[int, Array], near: list[Node], far: list[Node]) -> None:
        ((length, error),) = own.items()
        weight = self._weight(length)
        if far and weight != 1.0:
            self._mixture(node, own, near, far)
            return
        sinks = {**self._sinks(near, node, length), **self._sinks(far, node, None)}
        self.emitter.feedback(node, error, sinks, self.written, learn=True, coefficient=weight)
        self._keep(node, error, weight, error)

    def _mixture(self, node: Node, own: Mapping[int, Array], near: list[Node], far: list[Node]) -> None:
        total = Array(self.emitter.errors[node.name].n, f"{node.name}:final")
        for length, part in own.items():
            self.emitter.emit(Draft(Op.ADD, total, part, n=part.n, f=(self._weight(length), 0.0), accumulate=total in self.written))
            self.written.add(total)
            self.emitter.feedback(node, part, self._sinks(near, node, length), self.written)
        self.emitter.feedback(node, total, self._sinks(far, node, None), self.written, learn=True)
        self._keep(node, total, 1.0, part)

    def _keep(self, node: Node, error: Array, weight: float, delta: Array) -> None:
        """Store `error`, to be multiplied by `weight`, and the square of the node's delta (of one of them, where there are several)."""
        self.coefficients[node.name] = weight
        self.emitter.store_error(node, error)
        if node.name not in self.emitter.objectives:
            self.emitter.norm(node, delta, 1.0)

    def _parents(self, node: Node) -> tuple[list[Node], list[Node]]:
        """Those that relax together with the node, and those of earlier time steps."""
        group = None if node.name in self.graph.outputs else self.plan.groups[node.name]
        parents = self.emitter.parents(node)
        near = [parent for parent in parents if group in (None, self.plan.groups[parent.name])]
        return near, [parent for parent in parents if parent not in near]

    def _sinks(self, parents: Iterable[Node], child: Node, length: int | None) -> dict[int, Array]:
        """Where feedback along one more edge is added up; None stands for a constant, at the rim of a group."""
        found = {}
        for parent in parents:
            key = self._key(parent, 1 if length is None else length + 1, length == ALIKE)
            if key is not None:
                components = self.components.setdefault(parent.name, {})
                if key not in components:
                    components[key] = self.emitter.array(parent.prediction, f"delta {key}")
                found[parent.prediction] = components[key]
                lengths = {1} if length is None else {k + 1 for k in (self.lengths[child.name] if length == ALIKE else {length})}
                self.lengths.setdefault(parent.name, set()).update(lengths)
        return found

    def _key(self, parent: Node, length: int, alike: bool) -> int | None:
        if alike or length + self.plan.above[parent.name] <= self.plan.ones:
            return ALIKE
        return None if length >= self.plan.zeros else length

    def _weight(self, length: int) -> float:
        return 1.0 if length == ALIKE else self.plan.weight(length)
