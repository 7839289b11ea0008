"""From a call to code over tensors, and back to an outcome: what all native backends share.

A backend hands in `execute`: it runs code over weights, io, gradients and energies. What lies outside of the code stays in
PyTorch: functions of parameters (a slice of a weight), constants, and vertices whose parents are all clamped and whose
operations have no stage, such as an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from pckernels.backends import closed_form
from pckernels.backends.feedforward import Bound, learning_parameters
from pckernels.backends.learning import LocalUpdates
from pckernels.backends.path_lengths import Plan, make_plan
from pckernels.backends.results import Lazy, complaint, feed_forward_outcome, verdict
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled, compile_feed_forward, compile_gram, compile_steps, compile_sweep
from pckernels.emitter import Objective, Place
from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph
from pckernels.instructions import Loss
from pckernels.lowering import lower
from pckernels.memory import Memory
from pckernels.objective import Objective as Target
from pckernels.program import Program, WeightInfo, numel
from pckernels.rules import Dynamics

Execute = Callable[[Compiled, Memory, int, float], None]
Key = tuple[str, str]  # kind and name of a place
KEPT, SCRATCH = ("losses", "value", "error"), ("x", "g")
Objectives = tuple[tuple[str, Objective], ...]


@lru_cache(maxsize=64)
def lowered(graph: ComputationGraph) -> Program | str:
    """The graph's program, or why there is none."""
    try:
        return lower(graph)
    except Unsupported as error:
        return str(error)


@lru_cache(maxsize=256)
def compiled(
    graph: ComputationGraph, dynamics: Dynamics | None, objectives: Objectives, learning: frozenset[str], gram: bool = False
) -> Compiled | str:
    """The code for one kind of call (without a target: no dynamics), or why there is none."""
    program = lowered(graph)
    if isinstance(program, str):
        return program
    try:
        if dynamics is None:
            return compile_feed_forward(program)
        if dynamics.closed_form:
            return compile_sweep(program, graph, make_plan(graph, dynamics, closed_form.plan_dtype(graph)), dict(objectives), learning)
        return compile_steps(program, graph, dynamics, dict(objectives), learning, gram)
    except Unsupported as error:
        return str(error)


@lru_cache(maxsize=64)
def is_float32(graph: ComputationGraph) -> bool:
    """Whether every vertex is, as the compiled engines need it."""
    return all(vertex.dtype in (None, torch.float32) for vertex in graph.vertices)


def refusal(call: Call) -> str | None:
    """Why no native backend can run a call, or None."""
    trace = call.trace
    if not trace.batched:
        return "the trace holds for one batch size alone"
    if any(derived.kind == "held" for derived in trace.graph.derived.values()):
        return "dropout masks and batch statistics are drawn or measured in the feed-forward pass, which only the reference does"
    if trace.updates:
        return "the call moves buffers of the module, which only the reference does"
    if call.record:
        return "record=True keeps every step, which only the reference does"
    if call.objective is not None and not (isinstance(call.objective, Target) and isinstance(call.objective.loss, str)):
        return "a loss of one's own is a PyTorch function, which runs in the reference alone"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    code = _code(call)
    return code if isinstance(code, str) else None


def _code(call: Call) -> Compiled | str:
    if "code" not in call.memo:
        dynamics = call.dynamics if call.objective is not None else None
        call.memo["code"] = _cheapest(call, (call.trace.graph, dynamics, _objectives(call), _learning(call)))
    return call.memo["code"]


def _cheapest(call: Call, key: tuple[ComputationGraph, Dynamics | None, Objectives, frozenset[str]]) -> Compiled | str:
    """In the Gram form where it pays: it costs a product W W^T a call, and saves one product a step."""
    code = compiled(*key, gram=True)
    widths = [] if isinstance(code, str) else [info.outputs for info in code.weights if info.gram]
    pays = (call.dynamics.steps or 0) * (call.size or 0) >= 2 * max(widths, default=0)
    return code if pays else compiled(*key, gram=False)


def _objectives(call: Call) -> Objectives:
    if not isinstance(call.objective, Target):
        return ()
    if call.objective.loss == "squared_error":
        return tuple((name, Objective(Loss.SQUARED_ERROR)) for name in call.objective.targets)
    shapes = {name: call.trace.graph[name].shape for name in call.objective.targets}
    return tuple((name, Objective(Loss.CROSS_ENTROPY, shape[-1])) for name, shape in shapes.items())


def _learning(call: Call) -> frozenset[str]:
    """The weights that stages read whose gradients are wanted: parameters, and functions of parameters."""
    if not call.learn:
        return frozenset()
    return _with_functions(call.trace.graph, tuple(name for name in call.trace.parameters if call.tensors[name].requires_grad))


@lru_cache(maxsize=64)
def _with_functions(graph: ComputationGraph, parameters: tuple[str, ...]) -> frozenset[str]:
    found = set(parameters)
    for name in graph.schedule:
        derived = graph.derived.get(name)
        if derived is not None and derived.kind == "weight" and found & set(derived.reads):
            found.add(name)
    return frozenset(found)


def run(call: Call, execute: Execute) -> Outcome:
    """One inference."""
    code = _code(call)
    assert not isinstance(code, str), code
    return _Run(call, code, execute).outcome()


class _Run:
    """The tensors of one run, by the names of the code's places."""

    def __init__(self, call: Call, code: Compiled, execute: Execute):
        self.call, self.code, self.execute = call, code, execute
        self.graph = call.trace.graph
        program = lowered(self.graph)
        assert isinstance(program, Program)
        self.program = program
        assert call.size is not None
        self.batch = call.size
        outside = {node.name for node in program.nodes if node.external}
        # Functions of parameters, constants and vertices outside are PyTorch's; most models have none.
        self.bound = Bound(self.graph, call, held=self._shapes(), only=outside) if outside or self.graph.derived else None
        # A factor on the device is applied there afterwards: to read it would be to wait.
        self.sign = -1.0 if isinstance(call.factor, Tensor) else -1.0 * call.factor
        self.dtype = self.graph.vertices[0].dtype or torch.float32
        self.device = next(iter(call.tensors.values())).device
        io = self._inputs() | self._results(KEPT) | self._results(SCRATCH)
        self.io = {key: rows for key, rows in io.items() if key[0] not in SCRATCH}
        self.gradients = {name: self._new(*self._parameter(name).shape) for name in code.gradients}
        self.energies = self._new(code.code.steps + 1, code.code.energies, dtype=torch.float64)
        slots = [io[place.kind, place.name] for place in code.io]
        memory = Memory([self._weight(info) for info in code.weights], slots, list(self.gradients.values()), self.energies)
        if self.batch:
            execute(code, memory, self.batch, self.sign)
        else:
            self._nothing(memory)

    def _shapes(self) -> dict[str, Tensor]:
        """Stand-ins for the value nodes whose shapes constants read, such as the zeros that an LSTM starts from."""
        read = {name for derived in self.graph.derived.values() for name in derived.reads if name in self.program.shapes}
        return {name: self._shaped(torch.zeros(()).expand(self.batch, numel(self.program.shapes[name])), name) for name in read}

    def _nothing(self, memory: Memory) -> None:
        for tensor in (*memory.gradients, memory.energies):
            tensor.zero_()

    def _weight(self, info: WeightInfo) -> Tensor:
        weight = self._parameter(info.name).contiguous()
        if not info.gram:
            return weight
        return self._gram(weight.view(info.outputs, -1))

    def _gram(self, weight: Tensor) -> Tensor:
        """W W^T."""
        columns, result = weight.t().contiguous(), self._new(len(weight), len(weight))
        memory = Memory([result], [columns], [result], self._new(1, 1, dtype=torch.float64))
        self.execute(compile_gram(len(weight)), memory, len(columns), 1.0)
        return result

    def _parameter(self, name: str) -> Tensor:
        return (self.call.tensors if self.bound is None else self.bound.weights)[name].detach()

    def _inputs(self) -> dict[Key, Tensor]:
        """What slots read, one row for each sample."""
        return {(place.kind, place.name): self._rows(self._source(place), place) for place in self.code.io if not place.is_result}

    def _source(self, place: Place) -> Tensor:
        if place.kind == "target":
            assert isinstance(self.call.objective, Target)
            return self.call.objective.targets[place.name]
        if self.bound is None:
            return self.call.tensors[place.name]
        if place.kind == "external":
            return self.bound.mu[place.name]
        found = self.bound.weights.get(place.name, self.bound.environment.get(place.name))
        assert isinstance(found, Tensor)
        return found.detach()

    def _results(self, kinds: Sequence[str]) -> dict[Key, Tensor]:
        """What slots take, one after the other in one piece of memory."""
        places = [place for place in self.code.io if place.kind in kinds]
        sizes = [self.batch * place.n for place in places]
        return {(place.kind, place.name): part for place, part in zip(places, self._new(sum(sizes)).split(sizes), strict=True)}

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that the code writes whole."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def _rows(self, tensor: Tensor, place: Place) -> Tensor:
        axis = self.program.batch_axes[place.name]
        if axis == 0 and tensor.dtype is self.dtype and tensor.is_contiguous():
            return tensor
        return tensor.movedim(axis, 0).reshape(self.batch, place.n).to(self.dtype).contiguous()

    def _shaped(self, rows: Tensor, name: str) -> Tensor:
        """A row for each sample, as the vertex's tensor."""
        return rows.reshape(self.batch, *self.program.shapes[name]).movedim(0, self.program.batch_axes[name])

    # Results

    def outcome(self) -> Outcome:
        if self.call.objective is None:
            return self._feed_forward_outcome()
        of_outputs = [rows for (kind, _), rows in self.io.items() if kind == "losses"]
        losses = of_outputs[0] if len(of_outputs) == 1 else torch.stack(of_outputs).sum(0)
        trajectory = self._trajectory()
        good, divergence = verdict(trajectory, self.call.dynamics.moves == "values")
        return Outcome(
            losses=losses,
            values=Lazy(self._values),
            errors=Lazy(self._errors),
            energy=Lazy(lambda: trajectory.to(losses.dtype)) if self.code.carried else Lazy(self._energy_of_sweep(losses)),
            good=good,
            complaint=lambda: complaint(self._feed_forward(), self.call.dynamics, trajectory, self._errors(), divergence),
            plan=self._plan(),
            gradients=self._gradients() if self.call.learn else {},
        )

    def _trajectory(self) -> Tensor:
        """F at the steps that ran; a loss stays where its prediction does."""
        total = self.energies.sum(1)
        for slot in self.code.still:  # one by one: a list of them would have to travel to the device
            total[1:] += self.energies[0, slot]
        return total

    def _feed_forward_outcome(self) -> Outcome:
        return feed_forward_outcome({name: self._value(name) for name in self.energy_names}, {})

    def _feed_forward(self) -> dict[str, Tensor]:
        """The feed-forward predictions, which the call has not kept."""
        code = compiled(self.graph, None, (), frozenset())
        assert isinstance(code, Compiled)
        return _Run(replace(self.call, objective=None, learn=False, memo={}), code, self.execute).outcome().values()

    def _errors(self) -> dict[str, Tensor]:
        found = {}
        for node in self.program.nodes:
            coefficient = self.code.coefficients.get(node.name, 0.0)
            if coefficient == 0.0:
                found[node.name] = torch.zeros_like(self._value(node.name))
            else:
                error = self._shaped(self.io["error", node.name], node.name)
                found[node.name] = error if coefficient == 1.0 else coefficient * error
        return found

    def _value(self, name: str) -> Tensor:
        return self._shaped(self.io["value", name], name)

    def _values(self) -> dict[str, Tensor]:
        """Moved values as they are; otherwise mu + eps, and of an output mu."""
        values = {node.name: self._value(node.name) for node in self.program.nodes}
        if self.call.dynamics.moves == "errors":
            errors = self._errors()
            values = {name: mu if name in self.program.outputs else mu + errors[name] for name, mu in values.items()}
        return values

    def _energy_of_sweep(self, losses: Tensor) -> Callable[[], Tensor]:
        """F at t = 0 .. T from the squares of the sweep's errors; where several path lengths make one up, by the reference."""
        plan = make_plan(self.graph, self.call.dynamics, closed_form.plan_dtype(self.graph))
        squares = {name: self.energies[0, slot] for slot, name in enumerate(self.energy_names) if name not in self.program.outputs}
        if self.call.dynamics.learn_on_arrival:
            return lambda: arrival_energy(self.graph, squares, losses)
        if any(len(lengths) > 1 for lengths in self.code.lengths.values()):
            return closed_form.energy_later(self.call)
        return lambda: sweep_energy(plan, self.code, squares, losses)

    @property
    def energy_names(self) -> list[str]:
        return [node.name for node in self.program.nodes]

    def _plan(self) -> str:
        dynamics, code = self.call.dynamics, self.code.code
        kind = "strict dynamics" if dynamics.moves == "values" else "fixed prediction"
        if dynamics.closed_form:
            what = "zero divergence in one backward sweep" if dynamics.learn_on_arrival else f"{kind} in closed form, one backward sweep"
        else:
            what = f"{kind}, {code.steps} steps"
        order = ", one time step after the other" if dynamics.nested else ""
        return f"{what}{order}: {len(code.instructions)} instructions over {len(self.program.nodes)} vertices, {code.rows} numbers a sample"

    # Learning

    def _gradients(self) -> dict[str, Tensor]:
        """Parameter in the graph -> dF/dtheta times the factor, also through functions of parameters and of vertices outside."""
        found, self.gradients = self.gradients, {}  # nobody else holds them: they become the .grad without a copy
        if isinstance(self.call.factor, Tensor):
            found = {name: gradient * self.call.factor for name, gradient in found.items()}
        if self.bound is None:
            unreached = [name for name in learning_parameters(self.graph, self.call) if name not in found]
            return found | {name: torch.zeros_like(self.call.tensors[name]) for name in unreached}
        updates = LocalUpdates(self.bound, self.call.factor)
        errors = self._errors() if self.bound.locals else {}
        for name, local in self.bound.locals.items():
            updates.learn(local, errors[name])
        return updates.gradients(found)


def sweep_energy(plan: Plan, code: Compiled, squares: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """F(t) = loss + 1/2 sum_i c_k(t)^2 ||delta_i||^2, where every vertex has one path length k."""
    total = losses.double().sum().repeat(len(plan.rows))
    for name, square in squares.items():
        for length in code.lengths.get(name, ()):
            c = torch.tensor([row[length] if length < len(row) else 0.0 for row in plan.rows], dtype=torch.float64)
            weight = code.coefficients.get(name, 0.0)
            total = total + (0.5 * c.square() * square if weight else 0.0)
    return total.to(losses.dtype)


def arrival_energy(graph: ComputationGraph, squares: Mapping[str, Tensor], losses: Tensor) -> Tensor:
    """F after d updates: the loss, and the errors of the vertices that have learned by then."""
    energies = [losses.double().sum()]
    for distance in range(1, graph.depth + 1):
        arrived = [square for name, square in squares.items() if graph[name].distance == distance]
        energies.append(energies[-1] + 0.5 * sum(arrived))
    return torch.stack(energies).to(losses.dtype)
