"""What all rules share when a program becomes code: arrays for every quantity, and the passes over one node's stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from pckernels import stages
from pckernels.arena import Array, Draft, Section, assemble, prepare
from pckernels.errors import Unsupported
from pckernels.instructions import ABSENT, Code, Loss, Op, OuterProduct
from pckernels.merging import merge_products
from pckernels.ordering import order_loops
from pckernels.program import PRODUCTS, Kind, Node, Program, Stage
from pckernels.returns import TRANSPOSED, Way
from pckernels.stages import Operands


@dataclass(frozen=True)
class Place:
    """What an io slot stands for: n numbers for each sample.

    kind: "input", "external" (a prediction computed outside), "target", "factor" (of a node's error: see Emitter.weighed), "losses",
    "value", "error", "rest" (see Op.MOVE_OR_REST), "x" and "g" (inputs and errors of products, for their weights).
    """

    kind: str
    name: str
    n: int

    @property
    def is_result(self) -> bool:
        return self.kind not in ("input", "external", "target", "factor")

    @property
    def is_kept(self) -> bool:
        """Whether the run's outcome needs it."""
        return self.kind in ("losses", "value", "error", "rest")


@dataclass(frozen=True)
class Objective:
    """The loss at one output: its kind, and the number of classes of a cross-entropy."""

    loss: Loss
    classes: int = 0


@dataclass(frozen=True)
class Gram:
    """A displacement d = W^T h held as h, where the only reader of d multiplies it by W: one product with W W^T in place of two.

    Attributes:
        node: whose displacement it is; `child` and `place`: the product that reads it.
        state: h, into which the error at the product's output is the feedback; slot: of W W^T.
    """

    node: Node
    child: Node
    place: int
    state: Array
    slot: int

    @property
    def stage(self) -> Stage:
        return self.child.stages[self.place]


class Emitter:
    """Drafts of one kind of call.

    Attributes:
        live: whether values move, so that predictions and Jacobians follow; otherwise all stays at the feed-forward pass.
        nudge: the factor of the loss in the energy.
        way: how errors come back to values.
        weighed: nodes whose error counts times a factor, of each of its elements, that a call brings.
        errors, displacements: of each node; an output has no displacement.
        sent: what each node sends back, and learns from: its error, times its factor where it is weighed.
        fed: of each node in the Gram form, the feedback into its state.
    """

    def __init__(
        self,
        program: Program,
        objectives: Mapping[str, Objective],
        learning: frozenset[str],
        live: bool,
        nudge: float = 1.0,
        way: Way = TRANSPOSED,
        weighed: frozenset[str] = frozenset(),
    ):
        self.program, self.objectives, self.learning, self.live, self.nudge = program, objectives, learning, live, nudge
        self.way, self.weighed = way, weighed
        self.nodes = {node.name: node for node in program.nodes}
        self.hidden = [node for node in program.nodes if node.name not in program.outputs]
        self.energy_slots = {node.name: slot for slot, node in enumerate(program.nodes)}
        self.sections: list[Section] = []
        self.first = 0
        self.io: dict[tuple[str, str], tuple[int, Place]] = {}
        self.gradients: dict[str, int] = {}
        self.products: list[OuterProduct] = []
        self._node_of = {node.prediction: node for node in program.nodes}
        self._names = dict(program.inputs)
        self._base: dict[int, Array] = {}
        self._inner_change: dict[int, Array] = {}
        self._where: dict[tuple[str, int], Array] = {}
        self._targets: dict[str, Array] = {}
        self.weights = list(program.weights)
        self.grams: dict[tuple[str, int], Gram] = {}
        self.fed: dict[str, Array] = {}
        self.displacements = {node.name: self.array(node.prediction, "displacement") for node in self.hidden if live}
        self.moved = {node.name: self.array(node.prediction, "change") for node in program.nodes if live}
        self.moving = self._moving_buffers() if live else set()
        self.errors = {node.name: self._error_array(node) for node in program.nodes}
        self.sent = {**self.errors, **{name: self.array(self.nodes[name].prediction, "weighed error") for name in sorted(weighed)}}
        self._factors: dict[str, Array] = {}

    def array(self, buffer: int, name: str) -> Array:
        return Array(self.program.buffers[buffer].size, f"{self.program.buffers[buffer].name}:{name}")

    def _error_array(self, node: Node) -> Array:
        """Where a prediction never moves, the displacement is the error."""
        is_displacement = node.name in self.displacements and node.prediction not in self.moving
        return self.displacements[node.name] if is_displacement else self.array(node.prediction, "error")

    def _moving_buffers(self) -> set[int]:
        """Inner buffers and predictions that depend on a value node. (Read as a value, a hidden node always moves.)"""
        moving: set[int] = set()
        for node in self.program.nodes:
            for stage in node.stages:
                if any(self._moves(buffer, moving) for buffer in stage.inputs):
                    moving.add(stage.output)
        return moving

    def _moves(self, buffer: int, moving: set[int]) -> bool:
        node = self._node_of.get(buffer)
        return node.name in self.displacements if node is not None else buffer in moving

    def parents(self, node: Node) -> list[Node]:
        """The nodes whose values it reads."""
        found = {buffer: self._node_of[buffer] for stage in node.stages for buffer in stage.inputs if buffer in self._node_of}
        return list(found.values())

    # Sections and slots

    def section(self, first: int, last: int) -> None:
        self.sections.append(Section(first, last))

    def emit(self, draft: Draft) -> None:
        draft.first = self.first if self.sections[-1].repeats else 0
        self.sections[-1].drafts.append(draft)

    def place(self, kind: str, name: str, n: int) -> int:
        """The io slot of something."""
        if (kind, name) not in self.io:
            self.io[kind, name] = len(self.io), Place(kind, name, n)
        return self.io[kind, name][0]

    def gradient(self, weight: str) -> int:
        return self.gradients.setdefault(weight, len(self.gradients))

    def finished(self, steps: int) -> Code:
        self._check_gradients()
        merge_products(self.sections)
        order_loops(self.sections)
        self.sections = prepare(self.sections)
        phases, rows = assemble(self.sections)
        counts = {"weights": len(self.weights), "io": len(self.io), "gradients": len(self.gradients)}
        return Code(phases, rows, steps=steps, energies=len(self.energy_slots), products=tuple(self.products), **counts)

    def _check_gradients(self) -> None:
        """A gradient is summed inside the tiles, or from outer products after them."""
        inside = {draft.slot for section in self.sections for draft in section.drafts if draft.op in (Op.CONV_LEARN, Op.SUM_LEARN)}
        outside = {slot for product in self.products for slot in (product.weight, product.bias)} - {ABSENT}
        if inside & outside:
            raise Unsupported("a convolution and a linear layer share a parameter")

    # The feed-forward pass

    def base(self, buffer: int) -> Array:
        """A buffer as the feed-forward pass leaves it; what is read from outside is loaded when it is first wanted."""
        if buffer not in self._base:
            self._base[buffer] = self.array(buffer, "")
            if buffer in self._names:
                self._load(self._base[buffer], "input", self._names[buffer])
        return self._base[buffer]

    def _load(self, array: Array, kind: str, name: str) -> None:
        self.emit(Draft(Op.LOAD, array, n=array.n, slot=self.place(kind, name, array.n), p=(array.n, 0)))

    def feed_forward(self, node: Node) -> None:
        if node.external:
            self._load(self.base(node.prediction), "external", node.name)
        begun: set[int] = set()
        for k, stage in enumerate(node.stages):
            self.emit(stages.forward(stage, self.operands(node, k, stage), stage.output in begun))
            begun.add(stage.output)

    def operands(self, node: Node, k: int, stage: Stage) -> Operands:
        inputs = tuple(self.base(buffer) for buffer in stage.inputs)
        changes = tuple(self.change(buffer) for buffer in stage.inputs) if self.live else ()
        change = self.change(stage.output, node) if self.live else None
        where = None
        if stage.kind is Kind.MAXPOOL:
            where = self._where.setdefault((node.name, k), Array(self.program.buffers[stage.output].size, f"{node.name}:where"))
        return Operands(inputs, self.base(stage.output), changes, change, where)

    def change(self, buffer: int, inside: Node | None = None) -> Array | None:
        """How far a buffer is from its feed-forward value; None where it never moves. `inside`: as the output of a stage of this node."""
        node = self._node_of.get(buffer)
        if node is not None and node is not inside:
            return self.displacements.get(node.name)
        if buffer not in self.moving:
            return None
        if node is not None:
            return self.moved[node.name]
        return self._inner_change.setdefault(buffer, self.array(buffer, "change"))

    def loss(self, node: Node, at_start: bool) -> None:
        """The output's error and the loss."""
        objective = self.objectives.get(node.name)
        if objective is None:
            return
        mu, target = self.base(node.prediction), self._target(node, objective)
        change = self.moved[node.name] if self.live and not at_start and node.prediction in self.moving else None
        losses = self.place("losses", node.name, 1) if at_start else ABSENT
        slot = self.energy_slots[node.name]
        p = (int(objective.loss), objective.classes)
        f = (self.nudge,)
        self.emit(Draft(Op.LOSS, self.errors[node.name], mu, change, target, n=mu.n, slot=slot, slot2=losses, p=p, f=f))

    def _target(self, node: Node, objective: Objective) -> Array:
        if node.name not in self._targets:
            size = self.program.buffers[node.prediction].size
            array = Array(size // objective.classes if objective.loss is Loss.CROSS_ENTROPY else size, f"{node.name}:target")
            self._targets[node.name] = array
            self._load(array, "target", node.name)
        return self._targets[node.name]

    # Moving values

    def refresh(self, node: Node) -> None:
        """The change of a node's prediction."""
        begun: set[int] = set()
        for k, stage in enumerate(node.stages):
            arrays = self.operands(node, k, stage)
            if stage.kind is Kind.COPY and stage.output in self.moving and stage.output not in begun:
                self._clear_still_parts(node, stage.output, arrays.change)
            gram = self.grams.get((node.name, k))
            if gram is not None:
                positions, _, outputs = stage.p
                self.emit(Draft(Op.LINEAR, arrays.change, gram.state, slot=gram.slot, p=(positions, outputs, outputs)))
            elif any(change is not None for change in arrays.changes):
                self.emit(stages.changed(stage, arrays, stage.kind in PRODUCTS and stage.output in begun))
            if stage.kind is Kind.COPY or arrays.changes[0] is not None:
                begun.add(stage.output)

    def _clear_still_parts(self, node: Node, output: int, change: Array | None) -> None:
        assert change is not None
        if not self._all_parts_move(node, output):
            self.emit(Draft(Op.FILL, change, n=change.n, f=(0.0,)))

    def _all_parts_move(self, node: Node, output: int) -> bool:
        return all(self.change(buffer) is not None for stage in node.stages if stage.output == output for buffer in stage.inputs)

    def error(self, node: Node) -> None:
        """eps = d - (mu - its feed-forward value)."""
        d = self.displacements[node.name]
        if self.errors[node.name] is not d:
            self.emit(Draft(Op.ERROR, self.errors[node.name], d, self.moved[node.name], n=d.n))

    def load_factors(self) -> None:
        """Of the nodes that are weighed."""
        for name in sorted(self.weighed):
            self._factors[name] = self.array(self.nodes[name].prediction, "factor")
            self._load(self._factors[name], "factor", name)

    def weigh(self, node: Node) -> None:
        """What the node sends, from its error as it is now."""
        if node.name in self.weighed:
            sent = self.sent[node.name]
            self.emit(Draft(Op.MUL, sent, self.errors[node.name], self._factors[node.name], n=sent.n))

    def weighed_norm(self, node: Node) -> None:
        """Half the square of the node's error, times its factor where it has one."""
        error, sent = self.errors[node.name], self.sent[node.name]
        self.norm(node, error, 0.5, sent if sent is not error else None)

    def norm(self, node: Node, error: Array, factor: float, other: Array | None = None) -> None:
        self.emit(Draft(Op.NORM, a=error, b=other, n=error.n, slot=self.energy_slots[node.name], f=(factor,)))

    # The Gram form

    def gram(self, node: Node) -> Gram | None:
        """The Gram form of a node's displacement, where there is one: a prediction that never moves, and one reader, a product."""
        readers = [(child, k) for child in self.program.nodes for k, stage in enumerate(child.stages) if node.prediction in stage.inputs]
        if node.prediction in self.moving or node.name not in self.displacements or len(readers) != 1:
            return None
        if self.way.own_weights or node.name in self.weighed:  # W psi^T is not symmetric; and h would have a factor for each row of W
            return None
        child, place = readers[0]
        stage = child.stages[place]
        alone = sum(other.output == stage.output for other in child.stages) == 1
        if stage.kind is not Kind.LINEAR or not alone or stage.p[2] >= 2 * stage.p[1]:
            return None
        state = self.array(stage.output, f"state of {node.name}")
        info = self.program.weights[stage.weight]
        self.weights.append(replace(info, inputs=info.outputs, gram=True))
        return self.grams.setdefault((child.name, place), Gram(node, child, place, state, len(self.weights) - 1))

    def unfold(self, gram: Gram) -> None:
        """d = W^T h, which is the node's error as well."""
        d, stage = self.displacements[gram.node.name], gram.stage
        self.emit(Draft(Op.LINEAR_T, d, gram.state, slot=stage.weight, p=stage.p))
        del self.grams[gram.child.name, gram.place]

    # Feedback and learning

    def feedback(
        self, node: Node, error: Array, sinks: Mapping[int, Array], written: set[Array], learn: bool = False, coefficient: float = 1.0
    ) -> None:
        """(d mu / d v)^T error of one node, or what the way back has in its place, added up in `sinks` (buffer -> array); on the way its
        weights learn, or on a way of their own.

        written: arrays that already hold a part of their sum.
        """
        if learn and self.way.is_own:
            self._walk(node, error, {}, written, coefficient)
            learn = False
        self._walk(node, error, sinks, written, coefficient if learn else None)

    def _walk(self, node: Node, error: Array, sinks: Mapping[int, Array], written: set[Array], coefficient: float | None) -> None:
        """Back through a node's stages. coefficient: weights learn from the error times this; None: they do not."""
        learn = coefficient is not None
        useful = self._useful(node, sinks, learn)
        grads = {node.prediction: error}
        for k, stage in reversed(list(enumerate(node.stages))):
            if stage.output not in useful:
                continue
            gram = self.grams.get((node.name, k))
            if gram is not None and stage.inputs[0] in sinks:
                self.fed[gram.node.name] = grads[stage.output]
                continue
            arrays = self.operands(node, k, stage)
            if coefficient is not None and self._learns(stage):
                self._learn(node, k, stage, arrays, grads[stage.output], coefficient)
            for which, buffer in enumerate(stage.inputs):
                if buffer not in sinks and (buffer not in useful or buffer in self._node_of):
                    continue
                way, target = self.way.through(stage, self._backward_weight) if sinks else stage, sinks.get(buffer)
                if target is None:
                    if stages.passes_on(way, which) and sum(other.inputs.count(buffer) for other in node.stages) == 1:
                        grads[buffer] = grads[stage.output]
                        continue
                    target = grads.setdefault(buffer, self.array(buffer, "feedback"))
                self._send(stages.feedback(way, arrays, which, grads[stage.output], target), way, target, written)

    def _backward_weight(self, place: int) -> int:
        """The slot of the backward weight of a weight."""
        info = replace(self.program.weights[place], backward=True)
        if info not in self.weights:
            self.weights.append(info)
        return self.weights.index(info)

    def _send(self, draft: Draft, stage: Stage, target: Array, written: set[Array]) -> None:
        if target not in written and not stages.covers(stage, target.n):
            self.emit(Draft(Op.FILL, target, n=target.n, f=(0.0,)))
            written.add(target)
        self.emit(replace(draft, accumulate=target in written))
        written.add(target)

    def _useful(self, node: Node, sinks: Iterable[int], learn: bool) -> set[int]:
        """Buffers of a node whose errors lead to a sink or to a weight that learns."""
        useful, wanted = set(), set(sinks)
        for stage in node.stages:
            if (learn and self._learns(stage)) or any(buffer in wanted or buffer in useful for buffer in stage.inputs):
                useful.add(stage.output)
        return useful

    def weight_name(self, place: int) -> str:
        return self.program.weights[place].name

    def _learns(self, stage: Stage) -> bool:
        return any(place != ABSENT and self.weight_name(place) in self.learning for place in (stage.weight, stage.bias))

    def _learn(self, node: Node, k: int, stage: Stage, arrays: Operands, error: Array, coefficient: float) -> None:
        weight, bias = (self._gradient_slot(place) for place in (stage.weight, stage.bias))
        if stage.kind is Kind.CONV:
            change = arrays.changes[0] if arrays.changes else None
            if weight != ABSENT:
                self.emit(Draft(Op.CONV_LEARN, None, error, arrays.inputs[0], change, slot=weight, p=stage.p, f=(coefficient,)))
            if bias != ABSENT:
                self.emit(Draft(Op.SUM_LEARN, None, error, slot=bias, p=(1, stage.p[3], stage.p[13] * stage.p[14]), f=(coefficient,)))
            return
        positions, inputs, outputs = stage.p
        x_slot, stride, offset = self._rows_of(node, stage.inputs[0])
        g_slot = self._errors_of(node, k, error)
        self.products.append(OuterProduct(weight, bias, g_slot, x_slot, positions, inputs, outputs, stride, offset, coefficient))

    def _gradient_slot(self, place: int) -> int:
        if place == ABSENT or self.weight_name(place) not in self.learning:
            return ABSENT
        return self.gradient(self.weight_name(place))

    def _errors_of(self, node: Node, k: int, error: Array) -> int:
        """The slot where the error of a product is kept for its weight."""
        if error is self.errors[node.name]:
            return self.store_error(node, error)
        slot = self.place("g", f"{node.name}/{k}", error.n)
        self.emit(Draft(Op.STORE, a=error, n=error.n, slot=slot, p=(error.n, 0)))
        return slot

    def _rows_of(self, node: Node, buffer: int) -> tuple[int, int, int]:
        """Where the input of a product lies in io: slot, elements of a row, first element."""
        size = self.program.buffers[buffer].size
        if buffer in self._names:
            return self.place("input", self._names[buffer], size), size, 0
        if buffer in self._node_of:
            return self.place("value", self._node_of[buffer].name, size), size, 0
        copies = [stage for stage in node.stages if stage.output == buffer]
        if len(copies) == 1 and copies[0].kind is Kind.COPY and copies[0].p[0] == 1 and copies[0].f == (1.0,):
            slot, stride, offset = self._rows_of(node, copies[0].inputs[0])
            return slot, stride, offset + copies[0].p[5]
        if ("x", str(buffer)) not in self.io:
            slot = self.place("x", str(buffer), size)
            self.emit(Draft(Op.STORE, a=self.base(buffer), b=self.change(buffer), n=size, slot=slot, p=(size, 0)))
        return self.place("x", str(buffer), size), size, 0

    def store_rest(self, rest: Array) -> None:
        """Keep which samples rest, and since when."""
        self.emit(Draft(Op.STORE, a=rest, n=rest.n, slot=self.place("rest", "", rest.n), p=(rest.n, 0)))

    def store_error(self, node: Node, error: Array) -> int:
        """Keep a node's error for whoever asks."""
        known = ("error", node.name) in self.io
        slot = self.place("error", node.name, error.n)
        if not known:
            self.emit(Draft(Op.STORE, a=error, n=error.n, slot=slot, p=(error.n, 0)))
        return slot

    def store_value(self, node: Node) -> None:
        """Keep a node's value: the prediction of an output, and of any node where nothing moves."""
        change = self.displacements.get(node.name, self.change(node.prediction, node))
        n = self.program.buffers[node.prediction].size
        self.emit(Draft(Op.STORE, a=self.base(node.prediction), b=change, n=n, slot=self.place("value", node.name, n), p=(n, 0)))
