"""From a call to the memory of its code: what each slot reads, and room for what it writes.

What lies outside of the code stays in PyTorch: functions of parameters (a slice of a weight), constants, and vertices whose
parents are all clamped and whose operations have no stage, such as an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pckernels.backends.feedforward import Bound, compute_constants
from pckernels.backends.selection import program_of
from pckernels.backends.weighing import Weighing
from pckernels.call import Call
from pckernels.compiler import Compiled, compile_gram
from pckernels.emitter import Place
from pckernels.graph import ComputationGraph
from pckernels.memory import Packed
from pckernels.objective import Objective as Target
from pckernels.program import WeightInfo, numel

Execute = Callable[[Compiled, Packed, int, float], None]


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that the code writes whole."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Outside:
    """What of a graph lies outside of its code.

    Attributes:
        vertices: computed outside.
        has_functions: whether there are functions of parameters.
        shapes: value nodes whose shapes constants read.
    """

    vertices: frozenset[str]
    has_functions: bool
    shapes: tuple[str, ...]


@lru_cache(maxsize=64)
def _outside(graph: ComputationGraph) -> Outside:
    program, derived = program_of(graph), graph.derived.values()
    shapes = {name for each in derived for name in each.reads if name in program.shapes}
    vertices = frozenset(node.name for node in program.nodes if node.external)
    return Outside(vertices, any(each.kind == "weight" for each in derived), tuple(sorted(shapes)))


class Binding:
    """The tensors of one run.

    Attributes:
        weighing: the precisions of the call, where its code weighs errors.
        bound: PyTorch's part of the graph where a function of parameters or a vertex is outside of the code; most have none.
        sign: what the code multiplies gradients by. A factor on the device is applied there afterwards: to read it would be to wait.
    """

    def __init__(self, call: Call, code: Compiled, execute: Execute):
        assert call.size is not None
        self.call, self.code, self.batch, self.execute = call, code, call.size, execute
        graph = call.trace.graph
        self.program = program_of(graph)
        self.sign = -1.0 if isinstance(call.factor, Tensor) else -1.0 * call.factor
        self.dtype = graph.vertices[0].dtype or torch.float32
        self.device = next(iter(call.tensors.values())).device
        counts = {name: self.batch * numel(shape) for name, shape in self.program.shapes.items()} if code.weighed else {}
        self.weighing = Weighing(call, counts) if code.weighed else None
        self.bound: Bound | None = None
        self.constants: Mapping[str, object] = {}
        self._compute_what_is_outside()

    def _compute_what_is_outside(self) -> None:
        graph = self.call.trace.graph
        outside = _outside(graph)
        if outside.vertices or outside.has_functions:
            self.bound = Bound(graph, self.call, held=self._shapes(outside), only=outside.vertices)
        elif graph.derived:
            self.constants = compute_constants(graph, {**self.call.tensors, **self._shapes(outside)})

    def _shapes(self, outside: Outside) -> dict[str, Tensor]:
        """Stand-ins for the value nodes whose shapes constants read, such as the zeros that an LSTM starts from."""
        if not outside.shapes:
            return {}
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return {name: self.shaped(zero.expand(self.batch, numel(self.program.shapes[name])), name) for name in outside.shapes}

    def _memory(self) -> Packed:
        code, batch = self.code, self.batch
        return Packed(
            code,
            batch,
            [self._weight(info) for info in code.weights],
            [self._input(place) for place in code.inputs],
            self.new(batch * code.kept_size),
            self.new(batch * code.scratch_size),
            [self.new(*self._parameter(name).shape) for name in code.gradients],
            self.new(code.code.steps + 1, code.code.energies, dtype=torch.float64),
            self.call.divisor,
            None if self.call.update is None else self._update,
        )

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return allocate(shape, dtype or self.dtype, self.device)

    def run(self) -> Packed:
        """Execute the code, and hand over its memory; of no samples every sum is zero."""
        memory = self._memory()
        if self.batch:
            self.execute(self.code, memory, self.batch, self.sign)
        else:
            for tensor in (*memory.gradients, memory.energies):
                tensor.zero_()
        return memory

    # Weights

    def _weight(self, info: WeightInfo) -> Tensor:
        weight = (self._backward_weight(info.name) if info.backward else self._parameter(info.name)).contiguous()
        return self._gram(weight.view(info.outputs, -1)) if info.gram else weight

    def _gram(self, weight: Tensor) -> Tensor:
        """W W^T."""
        columns, result = weight.t().contiguous(), self.new(len(weight), len(weight))
        code, nothing = compile_gram(len(weight)), self.new(0)
        memory = Packed(code, len(columns), [result], [columns], nothing, nothing, [result], self.new(1, 1, dtype=torch.float64))
        self.execute(code, memory, len(columns), 1.0)
        return result

    def _parameter(self, name: str) -> Tensor:
        return self.call.tensors[name] if self.bound is None else self.bound.weights[name]

    def _update(self, learnt: Sequence[Tensor]) -> list[Tensor]:
        """Give the call's optimizer what each gradient slot has gained; the weights then."""
        call = self.call
        assert call.update is not None
        call.update([call.tensors[name] for name in self.code.gradients], [gained * -call.factor for gained in learnt])
        return [self._weight(info) for info in self.code.weights]

    def _backward_weight(self, name: str) -> Tensor:
        """psi; a function of parameters is an arrangement of theirs."""
        found = self.call.tensors[self.call.extra.feedback[name]] if self.bound is None else self.bound.backward_weights[name]
        assert isinstance(found, Tensor)
        return found

    # Inputs

    def _input(self, place: Place) -> Tensor:
        return self._factor(place.name) if place.kind == "factor" else self._rows(self._source(place), place)

    def _factor(self, name: str) -> Tensor:
        """Of each element of a weighed node, for each sample."""
        assert self.weighing is not None
        factor, shape = self.weighing.factor(name), self.program.shapes[name]
        if not isinstance(factor, Tensor):  # made where it is read: nothing waits for a copy
            return torch.full((self.batch, numel(shape)), factor, dtype=self.dtype, device=self.device)
        of_sample = (factor.reshape(()) if factor.numel() == 1 else factor).to(self.dtype).expand(shape)
        return of_sample.reshape(1, -1).expand(self.batch, -1).contiguous()

    def _source(self, place: Place) -> Tensor:
        if place.kind == "target":
            assert isinstance(self.call.objective, Target)
            return self.call.objective.targets[place.name]
        if place.kind == "external":
            assert self.bound is not None
            return self.bound.mu[place.name]
        if self.bound is None:
            found = self.call.tensors.get(place.name, self.constants.get(place.name))
        else:
            found = self.bound.weights.get(place.name, self.bound.environment.get(place.name))
        assert isinstance(found, Tensor)
        return found

    def _rows(self, tensor: Tensor, place: Place) -> Tensor:
        """One row for each sample."""
        axis = self.program.batch_axes[place.name]
        if axis == 0 and tensor.dtype is self.dtype and tensor.is_contiguous():
            return tensor
        return tensor.movedim(axis, 0).reshape(self.batch, place.n).to(self.dtype).contiguous()

    def shaped(self, rows: Tensor, name: str) -> Tensor:
        """A row for each sample, as the vertex's tensor."""
        return rows.reshape(self.batch, *self.program.shapes[name]).movedim(0, self.program.batch_axes[name])
