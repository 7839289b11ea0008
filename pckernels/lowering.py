"""A computation graph lowered to a Program, one ATen operation after the other. What has no stage is refused with a reason.

A new vertex kind is an entry of _LOWERED here, its instructions in stages.py, and the operations in each backend.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph, Vertex
from pckernels.instructions import ABSENT, Activation
from pckernels.products import linear
from pckernels.program import PRODUCTS, Buffer, Kind, Node, Program, Shape, Stage, WeightInfo, numel

aten = torch.ops.aten
Size = tuple[Any, ...]  # int, or "B" for the batch
_BATCH = "B"


def lower(graph: ComputationGraph) -> Program:
    """The program of a graph, for any batch size.

    Raises:
        Unsupported: an operation has no stage, or samples are folded into another axis; the text names vertex and operation.
    """
    return _Lowering(graph).program()


class _Lowering:
    """What the vertices of a graph share while they are lowered."""

    def __init__(self, graph: ComputationGraph):
        self.graph = graph
        self.buffers: list[Buffer] = []
        self.weights: dict[str, tuple[int, WeightInfo]] = {}
        self.read: dict[str, int] = {}  # buffers of what is read from outside
        self.values: dict[str, int] = {}
        self.batch_axes: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}

    def program(self) -> Program:
        nodes = [self._node(vertex) for vertex in self.graph.vertices]
        return Program(
            nodes=tuple(nodes),
            buffers=tuple(self.buffers),
            inputs=tuple((buffer, name) for name, buffer in self.read.items()),
            weights=tuple(info for _, info in self.weights.values()),
            outputs=self.graph.outputs,
            batch_axes=self.batch_axes,
            shapes=self.shapes,
        )

    def _node(self, vertex: Vertex) -> Node:
        size, axis = _per_sample(vertex.shape, vertex.name)
        self.shapes[vertex.name], self.batch_axes[vertex.name] = size, axis
        kept = len(self.buffers), dict(self.weights), dict(self.read)
        try:
            node = _VertexLowering(self, vertex).node()
        except Unsupported:
            if self.graph.free_parents(vertex) or vertex.name in self.graph.outputs:
                raise
            del self.buffers[kept[0] :]
            self.weights, self.read = kept[1:]
            node = Node(vertex.name, self.new_buffer(vertex.name, numel(size)), (), external=True)
        self.values[vertex.name] = node.prediction
        return node

    def new_buffer(self, name: str, size: int, source: str = "") -> int:
        self.buffers.append(Buffer(name, size, source))
        return len(self.buffers) - 1

    def weight(self, name: str, outputs: int, inputs: int) -> int:
        """The place of a tensor that stages read, (outputs, inputs)."""
        if name not in self.weights:
            self.weights[name] = len(self.weights), WeightInfo(name, outputs, inputs)
        return self.weights[name][0]

    def sample(self, name: str, shape: Size, source: str) -> int:
        """The buffer of a tensor outside that has a row for each sample."""
        if name not in self.read:
            size, self.batch_axes[name] = _per_sample(shape, name)
            self.read[name] = self.new_buffer(name, numel(size), source)
        return self.read[name]


class _VertexLowering:
    """The operations of one vertex, in order. `found` says what each fx node has become: a buffer and its shape, or a name."""

    def __init__(self, shared: _Lowering, vertex: Vertex):
        self.shared, self.vertex = shared, vertex
        self.stages: list[Stage] = []
        self.found: dict[fx.Node, Any] = {}

    def node(self) -> Node:
        body = self.vertex.body
        if body is None:
            raise Unsupported(f"vertex {self.vertex.name!r} was not cut out of a traced module, so that its operations are unknown")
        reads = iter([*self.vertex.parents, *self.vertex.weights, *self.vertex.constants])
        for node in body.nodes:
            if node.op == "placeholder":
                self.found[node] = next(reads)
            elif node.op == "call_function":
                self.found[node] = self._call(node)
            elif node.op == "output":
                return self._finished(_arguments(node)[0][0])
        raise AssertionError("a graph ends with its output")

    def _finished(self, end: fx.Node) -> Node:
        buffer = self.buffer(end)
        if not any(stage.output == buffer for stage in self.stages):
            buffer = self.activation(end, end, Activation.AFFINE, 1.0, 0.0)
        return Node(self.vertex.name, buffer, tuple(self.stages))

    def _call(self, node: fx.Node) -> Any:
        target: Any = getattr(node.target, "overloadpacket", node.target)
        lowered = _LOWERED.get(target)
        if lowered is None:
            raise self.refusal(node, "has no stage")
        return lowered(self, node)

    def refusal(self, node: fx.Node, why: str) -> Unsupported:
        name = str(getattr(node.target, "overloadpacket", getattr(node.target, "__name__", node.target))).removeprefix("aten.")
        return Unsupported(f"{name} in vertex {self.vertex.name!r} {why}")

    # What operations read

    def shape(self, node: Any) -> Size:
        return node.meta["shape"]

    def size(self, node: fx.Node) -> Shape:
        """The shape of one sample."""
        return _per_sample(self.shape(node), self.vertex.name)[0]

    def axis(self, node: fx.Node) -> int:
        """Where the batch lies."""
        return _per_sample(self.shape(node), self.vertex.name)[1]

    def has_batch(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and any(size == _BATCH for size in node.meta.get("shape", ()))

    def buffer(self, node: Any) -> int:
        """The buffer that a node has become; inputs and per-sample tensors get one when they are first read."""
        found = self.found[node]
        if isinstance(found, int):
            return found
        if not isinstance(found, str) or not self.has_batch(node):
            raise self.refusal(node, "is not one value for each sample") if isinstance(node, fx.Node) else AssertionError(node)
        if found in self.shared.values:
            return self.shared.values[found]
        return self.shared.sample(found, self.shape(node), "input" if found in self.shared.graph.inputs else "sample")

    def weight(self, node: Any, user: fx.Node) -> int:
        """The place of a tensor that all samples share; ABSENT for None."""
        if node is None:
            return ABSENT
        name = self.found[node]
        if not isinstance(name, str) or self.has_batch(node) or name not in self.vertex.weights:
            raise self.refusal(user, "multiplies by something other than a parameter")
        shape = self.shape(node)
        return self.shared.weight(name, shape[0], numel(shape[1:]))

    # What operations write

    def stage(self, kind: Kind, node: fx.Node, inputs: Sequence[int], **fields: Any) -> int:
        output = self.shared.new_buffer(f"{self.vertex.name}/{node.name}", numel(self.size(node)))
        self.stages.append(Stage(kind, tuple(inputs), output, **fields))
        return output

    def activation(self, node: fx.Node, source: Any, kind: Activation, *f: float) -> int:
        return self.stage(Kind.ACTIVATION, node, [self.buffer(source)], p=(int(kind),), f=f)

    def copy(self, source: int, output: int, blocks: int, run: int, strides: tuple[int, int], starts: tuple[int, int]) -> None:
        self.stages.append(Stage(Kind.COPY, (source,), output, p=(blocks, run, *strides, *starts), f=(1.0,)))

    def merged(self, first: int, second: int) -> int | None:
        """Two sums of products as one: the stages of the second add to the buffer of the first. None where that is not so."""
        own = [{stage.kind for stage in self.stages if stage.output == buffer} for buffer in (first, second)]
        read = [buffer for stage in self.stages for buffer in stage.inputs]
        alone = first != second and first not in read and second not in read
        if not alone or not all(kinds and kinds <= set(PRODUCTS) for kinds in own):
            return None
        self.stages = [replace(stage, output=first) if stage.output == second else stage for stage in self.stages]
        return first


def _per_sample(shape: Size, name: str) -> tuple[Shape, int]:
    """The shape without the batch, and where the batch was."""
    axes = [axis for axis, size in enumerate(shape) if size == _BATCH]
    if len(axes) != 1 or any(not isinstance(size, int) for size in shape if size != _BATCH):
        words = "x".join(map(str, shape)) or "a scalar"
        raise Unsupported(f"{name!r} has a tensor of shape {words}, in which samples have no axis of their own")
    return tuple(size for size in shape if size != _BATCH), axes[0]


# One function for each operation: it adds stages, and returns the buffer of the result


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """Positional arguments, filled up with defaults."""
    return [*node.args, *defaults[len(node.args) :]]


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _linear(lowering: _VertexLowering, node: fx.Node) -> int:
    x, w, b = _arguments(node, None, None, None)
    if lowering.axis(x) == len(lowering.shape(x)) - 1:
        raise lowering.refusal(node, "runs over the batch")
    weight, bias = lowering.weight(w, node), lowering.weight(b, node)
    *positions, inputs = lowering.size(x)
    p = (numel(positions), inputs, lowering.size(node)[-1])
    return lowering.stage(Kind.LINEAR, node, [lowering.buffer(x)], weight=weight, bias=bias, p=p)


def _conv(lowering: _VertexLowering, node: fx.Node) -> int:
    x, w, b, stride, padding, dilation, groups = _arguments(node, None, None, None, 1, 0, 1, 1)
    if lowering.axis(x) != 0 or not isinstance(padding, int | list | tuple):
        raise lowering.refusal(node, "needs the batch first and its padding in numbers")
    kernel, flat = lowering.shape(w)[2:], len(lowering.size(x)) == 2
    geometry = [_planar(value, flat, fill) for value, fill in ((kernel, 1), (stride, 1), (padding, 0), (dilation, 1))]
    p = (
        *_image(lowering.size(x)),
        lowering.shape(w)[0],
        *(size for pair in geometry for size in pair),
        groups,
        *_image(lowering.size(node))[1:],
    )
    weight, bias = lowering.weight(w, node), lowering.weight(b, node)
    return lowering.stage(Kind.CONV, node, [lowering.buffer(x)], weight=weight, bias=bias, p=p)


def _image(size: Shape) -> tuple[int, int, int]:
    """(C, H, W) of one sample; a sequence (C, W) has H = 1."""
    return (size[0], 1, size[1]) if len(size) == 2 else (size[0], size[1], size[2])


def _planar(value: Any, flat: bool, fill: int) -> tuple[int, int]:
    pair = _pair(value)
    return (fill, pair[-1]) if flat else pair


def _pool(kind: Kind) -> Callable[[_VertexLowering, fx.Node], int]:
    def lowered(lowering: _VertexLowering, node: fx.Node) -> int:
        x, kernel, stride, padding, *rest = _arguments(node, None, None, [], 0)
        dilation = rest.pop(0) if kind is Kind.MAXPOOL and rest else 1
        defaults: list[Any] = [False, True, None]
        ceil, inside, divisor = [*rest, *defaults[len(rest) :]]
        if ceil or divisor is not None or lowering.axis(x) != 0:
            raise lowering.refusal(node, "needs the batch first, ceil_mode=False and no divisor_override")
        geometry = (kernel, stride or kernel, padding, dilation)
        return _pooled(lowering, node, kind, geometry, kind is Kind.AVGPOOL and not inside)

    return lowered


def _pooled(lowering: _VertexLowering, node: fx.Node, kind: Kind, geometry: Sequence[Any], inside_only: bool) -> int:
    x: Any = node.args[0]
    flat = len(lowering.size(x)) == 2
    sizes = [size for value, fill in zip(geometry, (1, 1, 0, 1), strict=True) for size in _planar(value, flat, fill)]
    p = (*_image(lowering.size(x)), 0, *sizes, 0, *_image(lowering.size(node))[1:], int(inside_only))
    return lowering.stage(kind, node, [lowering.buffer(x)], p=p)


def _adaptive_average(lowering: _VertexLowering, node: fx.Node) -> int:
    x: Any = node.args[0]
    before, after = _image(lowering.size(x))[1:], _image(lowering.size(node))[1:]
    if lowering.axis(x) != 0 or any(a % b for a, b in zip(before, after, strict=True)):
        raise lowering.refusal(node, "has windows of unequal sizes")
    kernel = [a // b for a, b in zip(before, after, strict=True)]
    return _pooled(lowering, node, Kind.AVGPOOL, (kernel, kernel, 0, 1), False)


def _mean(lowering: _VertexLowering, node: fx.Node) -> int:
    x, axes = _arguments(node, None, None)[:2]
    rank = len(lowering.shape(x))
    last = isinstance(axes, list | tuple) and sorted(axis % rank for axis in axes) == [rank - 2, rank - 1]
    if not last or rank != 4 or lowering.axis(x) != 0:
        raise lowering.refusal(node, "is not the mean of an image")
    channels, height, width = lowering.size(x)
    p = (channels, height, width, 0, height, width, height, width, 0, 0, 1, 1, 0, 1, 1, 0)
    return lowering.stage(Kind.AVGPOOL, node, [lowering.buffer(x)], p=p)


def _activation(kind: Activation, *f: float) -> Callable[[_VertexLowering, fx.Node], int]:
    return lambda lowering, node: lowering.activation(node, node.args[0], kind, *f)


def _leaky_relu(lowering: _VertexLowering, node: fx.Node) -> int:
    x, slope = _arguments(node, None, 0.01)
    return lowering.activation(node, x, Activation.LEAKY_RELU, float(slope))


def _hardtanh(lowering: _VertexLowering, node: fx.Node) -> int:
    x, low, high = _arguments(node, None, -1.0, 1.0)
    return lowering.activation(node, x, Activation.HARDTANH, float(low), float(high))


def _gelu(lowering: _VertexLowering, node: fx.Node) -> int:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return lowering.activation(node, node.args[0], Activation.GELU_TANH if tanh else Activation.GELU)


def _add(sign: float, reverse: bool = False) -> Callable[[_VertexLowering, fx.Node], int]:
    """a + sign * alpha * b, or sign * alpha * a + b for the reverse."""

    def lowered(lowering: _VertexLowering, node: fx.Node) -> int:
        a, b, alpha = _arguments(node, None, None, node.kwargs.get("alpha", 1))
        factors = (sign * alpha, 1.0) if reverse else (1.0, sign * alpha)
        if not isinstance(b, fx.Node):
            return lowering.activation(node, a, Activation.AFFINE, factors[0], factors[1] * b)
        _require_equal(lowering, node, a, b)
        first, second = lowering.buffer(a), lowering.buffer(b)
        if factors == (1.0, 1.0) and _only_summed(a, b, node):
            merged = lowering.merged(first, second)
            if merged is not None:
                return merged
        return lowering.stage(Kind.ADD, node, [first, second], f=factors)

    return lowered


def _only_summed(a: fx.Node, b: fx.Node, node: fx.Node) -> bool:
    """Whether nothing but the sum reads its summands; what the graph hands back beside the result does not count."""
    return all(user is node or user.op == "output" for summand in (a, b) for user in summand.users)


def _multiply(lowering: _VertexLowering, node: fx.Node) -> int:
    a, b = _arguments(node)
    if not isinstance(b, fx.Node):
        return lowering.activation(node, a, Activation.AFFINE, float(b), 0.0)
    _require_equal(lowering, node, a, b)
    return lowering.stage(Kind.MULTIPLY, node, [lowering.buffer(a), lowering.buffer(b)])


def _divide(lowering: _VertexLowering, node: fx.Node) -> int:
    a, b = _arguments(node)
    if isinstance(b, fx.Node):
        raise lowering.refusal(node, "divides by a tensor")
    return lowering.activation(node, a, Activation.AFFINE, 1.0 / float(b), 0.0)


def _require_equal(lowering: _VertexLowering, node: fx.Node, a: Any, b: Any) -> None:
    equal = isinstance(a, fx.Node) and a.meta.get("shape") == b.meta.get("shape") == node.meta.get("shape")
    if not equal or not lowering.has_batch(a):
        raise lowering.refusal(node, "broadcasts, or reads a tensor without a row for each sample")


def _alias(lowering: _VertexLowering, node: fx.Node) -> int:
    return lowering.buffer(node.args[0])


def _view(lowering: _VertexLowering, node: fx.Node) -> int:
    """A reshape that leaves every sample's elements in their order."""
    x = _arguments(node)[0]
    before, after = lowering.shape(x), lowering.shape(node)
    a, b = lowering.axis(x), lowering.axis(node)
    if numel(before[:a]) != numel(after[:b]):
        raise lowering.refusal(node, "moves elements from one sample to another")
    return lowering.buffer(x)


def _permute(lowering: _VertexLowering, node: fx.Node) -> int:
    x, *axes = _arguments(node)
    rank, batch = len(lowering.shape(x)), lowering.axis(x)
    if getattr(node.target, "overloadpacket", None) is aten.permute:
        order = [axis % rank for axis in axes[0]]
    else:
        order = list(range(rank))
        i, j = (axis % rank for axis in axes or (0, 1))
        order[i], order[j] = order[j], order[i]
    if [axis for axis in order if axis != batch] != [axis for axis in range(rank) if axis != batch]:
        raise lowering.refusal(node, "changes the order of a sample's elements")
    return lowering.buffer(x)


def _cat(lowering: _VertexLowering, node: fx.Node) -> int:
    parts, dim = _arguments(node, None, 0)
    return _joined(lowering, node, parts, [lowering.shape(part)[dim] for part in parts], dim)


def _stack(lowering: _VertexLowering, node: fx.Node) -> int:
    parts, dim = _arguments(node, None, 0)
    return _joined(lowering, node, parts, [1] * len(parts), dim)


def _joined(lowering: _VertexLowering, node: fx.Node, parts: Sequence[Any], sizes: Sequence[Any], dim: int) -> int:
    shape = lowering.shape(node)
    dim %= len(shape)
    if shape[dim] == _BATCH:
        raise lowering.refusal(node, "joins along the batch")
    blocks, inner = _around(shape, dim)
    output = lowering.shared.new_buffer(f"{lowering.vertex.name}/{node.name}", numel(lowering.size(node)))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        run = size * inner
        lowering.copy(lowering.buffer(part), output, blocks, run, (shape[dim] * inner, run), (start, 0))
        start += run
    return output


def _around(shape: Size, dim: int) -> tuple[int, int]:
    """Elements of one sample before and after a dimension."""
    return numel([s for s in shape[:dim] if s != _BATCH]), numel([s for s in shape[dim + 1 :] if s != _BATCH])


def _part(lowering: _VertexLowering, node: fx.Node, x: fx.Node, dim: int, start: int, length: int) -> int:
    shape = lowering.shape(x)
    dim %= len(shape)
    if shape[dim] == _BATCH:
        raise lowering.refusal(node, "picks samples")
    blocks, inner = _around(shape, dim)
    if length == shape[dim]:
        return lowering.buffer(x)
    output = lowering.shared.new_buffer(f"{lowering.vertex.name}/{node.name}", blocks * length * inner)
    lowering.copy(lowering.buffer(x), output, blocks, length * inner, (length * inner, shape[dim] * inner), (0, start * inner))
    return output


def _slice(lowering: _VertexLowering, node: fx.Node) -> int:
    x, dim, start, end, step = _arguments(node, None, 0, None, None, 1)
    size = lowering.shape(x)[dim]
    if step != 1:
        raise lowering.refusal(node, "skips elements")
    if size == _BATCH:
        if start not in (None, 0) or not (end is None or (isinstance(end, int) and end > 2**62)):
            raise lowering.refusal(node, "picks samples")
        return lowering.buffer(x)
    start, end, _ = slice(start, end).indices(size)
    return _part(lowering, node, x, dim, start, max(0, end - start))


def _select(lowering: _VertexLowering, node: fx.Node) -> int:
    x, dim, index = _arguments(node)
    size = lowering.shape(x)[dim]
    return _part(lowering, node, x, dim, index % size if size != _BATCH else 0, 1)


def _split(lowering: _VertexLowering, node: fx.Node) -> tuple[Any, ...]:
    """The parts are lowered when they are picked."""
    name = getattr(node.target, "overloadpacket", None)
    x, sizes, dim = _arguments(node, None, None, 0)
    whole = lowering.shape(x)[dim]
    if whole == _BATCH:
        raise lowering.refusal(node, "splits the batch")
    if isinstance(sizes, int):
        size = -(-whole // sizes) if name is aten.chunk else sizes
        sizes = [min(size, whole - start) for start in range(0, whole, size)]
    return x, dim, list(sizes)


def _unbind(lowering: _VertexLowering, node: fx.Node) -> tuple[Any, ...]:
    x, dim = _arguments(node, None, 0)
    if lowering.shape(x)[dim] == _BATCH:
        raise lowering.refusal(node, "splits the batch")
    return x, dim, [1] * lowering.shape(x)[dim]


def _getitem(lowering: _VertexLowering, node: fx.Node) -> Any:
    whole, index = _arguments(node)
    found = lowering.found[whole]
    if not isinstance(found, tuple):
        if index == 0 and isinstance(found, int):  # max_pool2d_with_indices
            return found
        raise lowering.refusal(node, "picks from something other than a split")
    x, dim, sizes = found
    return _part(lowering, node, x, dim, sum(sizes[:index]), sizes[index])


def _size_only(lowering: _VertexLowering, node: fx.Node) -> None:
    """Sizes are known: what they are used for reads shapes itself."""
    return None


_LOWERED: dict[Any, Callable[[_VertexLowering, fx.Node], Any]] = {
    linear: _linear,
    aten.linear: _linear,
    aten.conv2d: _conv,
    aten.conv1d: _conv,
    aten.max_pool2d: _pool(Kind.MAXPOOL),
    aten.max_pool2d_with_indices: _pool(Kind.MAXPOOL),
    aten.max_pool1d: _pool(Kind.MAXPOOL),
    aten.avg_pool2d: _pool(Kind.AVGPOOL),
    aten.avg_pool1d: _pool(Kind.AVGPOOL),
    aten.adaptive_avg_pool2d: _adaptive_average,
    aten.adaptive_avg_pool1d: _adaptive_average,
    aten.mean: _mean,
    aten.relu: _activation(Activation.RELU),
    aten.tanh: _activation(Activation.TANH),
    aten.sigmoid: _activation(Activation.SIGMOID),
    aten.leaky_relu: _leaky_relu,
    aten.hardtanh: _hardtanh,
    aten.relu6: _activation(Activation.HARDTANH, 0.0, 6.0),
    aten.gelu: _gelu,
    aten.silu: _activation(Activation.SILU),
    aten.neg: _activation(Activation.AFFINE, -1.0, 0.0),
    aten.add: _add(1.0),
    aten.sub: _add(-1.0),
    aten.rsub: _add(-1.0, reverse=True),
    aten.mul: _multiply,
    aten.div: _divide,
    aten.view: _view,
    aten.reshape: _view,
    aten._unsafe_view: _view,
    aten.flatten: _view,
    aten.unflatten: _view,
    aten.squeeze: _view,
    aten.unsqueeze: _view,
    aten.transpose: _permute,
    aten.permute: _permute,
    aten.t: _permute,
    aten.alias: _alias,
    aten.clone: _alias,
    aten.contiguous: _alias,
    aten.cat: _cat,
    aten.stack: _stack,
    aten.slice: _slice,
    aten.select: _select,
    aten.narrow: lambda lowering, node: _part(lowering, node, *_arguments(node)),
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _split,
    aten.unbind: _unbind,
    operator.getitem: _getitem,
    aten.sym_size: _size_only,
}
