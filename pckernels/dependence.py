"""What each node of a captured graph depends on: value nodes, parameters, or neither."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from pckernels.capture import Captured
from pckernels.errors import Unsupported
from pckernels.expansion import HELD, NORMS, packet_of

aten = torch.ops.aten

_NORMS: set[Any] = {
    aten.batch_norm,
    aten.layer_norm,
    aten.group_norm,
    aten.instance_norm,
    aten.native_layer_norm,
    aten.native_group_norm,
    aten.rms_norm,
}
_NORMS |= {aten._native_batch_norm_legit_no_training, aten._native_batch_norm_legit, *NORMS}
_SLICES = {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.chunk, aten.unbind, aten.narrow, aten.tensor_split}
_SHAPE_ONLY = {
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
}
_DRAWS = {
    aten.rand,
    aten.randn,
    aten.randint,
    aten.randperm,
    aten.rand_like,
    aten.randn_like,
    aten.randint_like,
    aten.normal,
    aten.bernoulli,
}


class Dependence:
    """For each node of a captured graph: whether a value enters it, whether a parameter does, and what role that gives it."""

    def __init__(self, captured: Captured):
        self.values: set[fx.Node] = set()  # a float input or a parameter applied to input data enters: it may move
        self.floats: set[fx.Node] = set()  # of these, the ones that a value node may sit on
        self.parameters: set[fx.Node] = set()  # a parameter enters
        self.data: set[fx.Node] = set()  # the content of any input enters
        self.held: set[fx.Node] = set()
        self.inputs = [node for node in captured.inputs if node is not None]
        for node in captured.graph.nodes:
            self._classify(node, captured)

    def _classify(self, node: fx.Node, captured: Captured) -> None:
        if node.op == "placeholder":
            self._classify_placeholder(node, captured)
        elif node.op == "call_function":
            self._classify_call(node)

    def _classify_placeholder(self, node: fx.Node, captured: Captured) -> None:
        if node in captured.parameters:
            self.parameters.add(node)
        elif node in self.inputs:
            self.data.add(node)
            if _is_float(node):
                self.values.add(node)
                self.floats.add(node)

    def _classify_call(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if node.target in HELD or _is_draw(node):
            self.held.add(node)
            return
        if packet_of(node) in _SHAPE_ONLY or not _is_tensor(node):
            return
        if any(source in self.data or source in self.values for source in sources):
            self.data.add(node)
        if packet_of(node) is not aten.detach and any(source in self.parameters for source in sources):
            self.parameters.add(node)
        if any(source in self.values for source in sources) or (node in self.data and node in self.parameters):
            self.values.add(node)
            if _is_float(node):
                self.floats.add(node)

    def is_weight(self, node: fx.Node) -> bool:
        """A function of parameters alone (and of constants); with a row for each sample it belongs to the vertex that reads it."""
        return node in self.parameters and node not in self.values and not _is_batched(node)

    def is_constant(self, node: fx.Node) -> bool:
        return node not in self.values and node not in self.parameters

    def moving_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The distinct non-constant inputs of an operation; what comes out of a tuple counts as coming from the tuple's inputs."""
        found: dict[fx.Node, None] = {}
        for source in node.all_input_nodes:
            if source in self.floats and not is_tuple(source):
                found[source] = None
            elif source in self.values:
                found.update(dict.fromkeys(self.moving_inputs(source)))
        return list(found)

    def reads_parameter(self, node: fx.Node) -> bool:
        return any(self.is_weight(source) for source in own_sources(node)) and own_packet(node) not in _NORMS


def _is_batched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape)


def operation_name(node: fx.Node) -> str:
    """The operation's name as a reader knows it: linear, relu, add."""
    target = own_packet(node)
    name = getattr(target, "__name__", str(target)).split(".")[-1].strip("_")
    return "batch_norm" if "batch_norm" in name else _READABLE.get(name, name)


_READABLE = {"alias": "identity", "unsafe_view": "view", "dropout_mask": "dropout"}


def _is_draw(node: fx.Node) -> bool:
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    if packet_of(node) not in _DRAWS:
        raise Unsupported(
            f"{node.target} draws random numbers inside its gradient, so that no mask of it can be held. Call .eval(), or use dropout."
        )
    return True


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor | tuple | list)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, tuple | list) or (isinstance(value, Tensor) and value.is_floating_point())


def is_tuple(node: fx.Node) -> bool:
    """Whether an operation returns several tensors."""
    return isinstance(node.meta.get("val"), tuple | list)


def own_sources(node: fx.Node) -> list[fx.Node]:
    """The inputs of the operation behind a node: getitem stands for the operation that made the tuple."""
    if node.target is operator.getitem:
        return own_sources(node.args[0])  # type: ignore[arg-type]
    return node.all_input_nodes


def own_packet(node: fx.Node) -> Any:
    """The operation behind a node, as in `own_sources`."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return own_packet(node.args[0])
    return packet_of(node)


def is_slice(node: fx.Node) -> bool:
    """Whether a node only picks a part of a tensor."""
    return own_packet(node) in _SLICES
