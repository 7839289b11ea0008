"""From a module and an example call to a flat, functional graph of ATen operations, by torch.export.

The user's module is never touched: a shadow of its module tree, sharing every parameter and buffer, is what gets
traced. Recurrent layers of the shadow are unrolled (cells.py); hooks on the shadow mark the named value nodes.
"""

import logging
import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from pckernels.arguments import batch_size, is_batched
from pckernels.cells import MARK
from pckernels.errors import Unsupported
from pckernels.shadow import shadow_of
from pckernels.strays import RefuseStrays

aten = torch.ops.aten
Shape = tuple[Any, ...]  # int, or torch.SymInt in the batch


@dataclass
class Captured:
    """A functional graph of one call of a module, for one training mode, and what its placeholders stand for."""

    graph: fx.Graph
    parameters: dict[fx.Node, str]
    buffers: dict[fx.Node, str]
    tensors: dict[fx.Node, Tensor]  # constants that belong to no module
    inputs: list[fx.Node | None]  # the flattened arguments; None where an argument is not a tensor
    output_spec: pytree.TreeSpec
    output_places: list[int]  # where the flattened results stand in the graph's output
    update_places: dict[str, int]  # likewise a buffer's value after the call
    batched: bool  # whether the graph holds for any batch size

    @property
    def outputs(self) -> list[Any]:
        """The flattened results: nodes, or plain Python constants."""
        return [self._returned[place] for place in self.output_places]

    @property
    def updates(self) -> dict[str, fx.Node]:
        """Each buffer's value after the call."""
        return {name: self._returned[place] for name, place in self.update_places.items()}

    @property
    def _returned(self) -> Any:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output").args[0]


def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch_dim: int, names: Sequence[str] = ()) -> Captured:
    """Trace one call of `module`.

    Args:
        module: any module that torch.export can capture, in the training mode that is wanted.
        args, kwargs: an example call; every tensor whose size at `batch_dim` equals the first one's is batched.
        batch_dim: where the batch lies in the inputs.
        names: submodules whose outputs are to be marked as value nodes.

    Raises:
        Unsupported: the module cannot be captured; the text names the operation and what to do.
        ValueError, TypeError: the module itself rejects these inputs.
    """
    size = batch_size(pytree.tree_leaves((args, kwargs)), batch_dim)
    try:
        example = pytree.tree_map(lambda leaf: _resized(leaf, batch_dim, size), (args, kwargs))
        dynamic = pytree.tree_map(lambda leaf: _dynamic(leaf, batch_dim, size), (args, kwargs))
        program = _export(module, names, example, dynamic)
    except _EXPORT_ERRORS:
        program = _export_for_this_batch(module, names, args, kwargs)
    return _read(program)


_EXPORT_ERRORS = (Exception,)  # torch.export raises errors of many unrelated types


def _resized(leaf: Any, batch_dim: int, size: int | None) -> Any:
    # torch.export takes a size of 0 or 1 for a constant, so an example with fewer than 2 samples is widened.
    if not is_batched(leaf, batch_dim, size):
        return leaf.detach() if isinstance(leaf, Tensor) else leaf
    shape = list(leaf.shape)
    shape[batch_dim] = max(shape[batch_dim], 2)
    return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)


def _dynamic(leaf: Any, batch_dim: int, size: int | None) -> Any:
    return {batch_dim: Dim.AUTO} if is_batched(leaf, batch_dim, size) else None


def _export(module: nn.Module, names: Sequence[str], example: Any, dynamic: Any) -> torch.export.ExportedProgram:
    args, kwargs = example
    shadow = _Call(shadow_of(module, names), module)
    with _tracing_state():
        program = torch.export.export(shadow, (args, kwargs), dynamic_shapes=(dynamic[0], dynamic[1]), strict=False)
        if any(_must_be_rewritten(node) for node in program.graph.nodes):
            program = program.run_decompositions({aten.scaled_dot_product_attention.default: _attention})
        return program


def _must_be_rewritten(node: fx.Node) -> bool:
    """Whether an operation writes in place, updates a buffer or is to be taken apart. Rewriting takes as long as tracing."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    return packet is aten.scaled_dot_product_attention or (packet in (aten.batch_norm, aten.instance_norm) and bool(node.args[5]))


def _export_for_this_batch(module: nn.Module, names: Sequence[str], args: Any, kwargs: Any) -> torch.export.ExportedProgram:
    example = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    try:
        return _export(module, names, example, pytree.tree_map(lambda leaf: None, (args, kwargs)))
    except _EXPORT_ERRORS as error:
        raise _explained(module, names, example, error) from error


class _Call(nn.Module):
    """Gives torch.export one signature for every module: a tuple of arguments and a dict of keywords."""

    def __init__(self, shadow: nn.Module, module: nn.Module):
        super().__init__()
        self.module = shadow
        self.guard = RefuseStrays(module)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self.guard:
            return self.module(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    # A failure is explained by the exception; torch would print tracebacks of its own beside it.
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _tracing_state() -> Iterator[None]:
    # The traced graph must not depend on the caller's modes: those apply when the graph runs.
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            _quiet(),
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's own use of what it deprecates
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention as its two products, so that the scores are a value node and their dropout a mask."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = torch.softmax(scores, -1)
    if dropout_p > 0.0:
        weights = torch.dropout(weights, dropout_p, True)
    return torch.matmul(weights, value)


def _read(program: torch.export.ExportedProgram) -> Captured:
    signature = program.graph_signature
    graph = program.graph_module.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    captured = Captured(graph, {}, {}, {}, [], _output_spec(program), [], {}, False)
    for spec in signature.input_specs:
        _read_input(captured, program, spec, placeholders)
    _read_outputs(captured, signature.output_specs)
    captured.batched = _has_symbol(captured.inputs)
    _check_operations(graph)
    _check_products(graph)
    _simplify(graph)
    return captured


def _output_spec(program: torch.export.ExportedProgram) -> pytree.TreeSpec:
    return program.call_spec.out_spec


def _read_input(captured: Captured, program: torch.export.ExportedProgram, spec: Any, placeholders: dict[str, fx.Node]) -> None:
    kind, node = spec.kind.name, placeholders.get(getattr(spec.arg, "name", ""))
    if kind == "USER_INPUT":
        captured.inputs.append(node if node is not None and isinstance(node.meta.get("val"), Tensor) else None)
    elif kind == "PARAMETER":
        captured.parameters[_present(node)] = spec.target.removeprefix("module.")
    elif kind == "BUFFER":
        captured.buffers[_present(node)] = spec.target.removeprefix("module.")
    elif kind == "CONSTANT_TENSOR":
        captured.tensors[_present(node)] = program.constants[spec.target]
    else:
        raise Unsupported(
            f"The module holds a {kind.lower()} object, which has no place in a graph. Use pck.backward(loss), which needs no trace."
        )


def _present(node: fx.Node | None) -> fx.Node:
    assert node is not None
    return node


def _read_outputs(captured: Captured, specs: Iterable[Any]) -> None:
    for place, spec in enumerate(specs):
        kind = spec.kind.name
        if kind == "USER_OUTPUT":
            captured.output_places.append(place)
        elif kind == "BUFFER_MUTATION":
            captured.update_places[spec.target.removeprefix("module.")] = place
        elif kind == "USER_INPUT_MUTATION":
            raise Unsupported("The module writes into one of its inputs in place. Let it work on a clone: x = x.clone().")
        else:
            raise Unsupported(f"The module's call has an effect beside its result ({kind.lower()}). Remove it, or use pck.backward(loss).")


def _has_symbol(inputs: Iterable[fx.Node | None]) -> bool:
    return any(_is_free(size) for node in inputs if node is not None for size in node.meta["val"].shape)


def _is_free(size: Any) -> bool:
    """Whether a size is a symbol still: forward may have fixed it to the example's number, as .view(5, 3) does."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _check_operations(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output") or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise Unsupported(
                f"The operation {node.target} has no place in a computation graph. Inside forward use x.detach() in place of "
                "torch.no_grad(), and plain operations in place of torch.cond; or use pck.backward(loss), which needs no trace."
            )


_PRODUCTS = {aten.linear, aten.matmul, aten.mm, aten.mv, aten.addmm, aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution}
_PRODUCTS |= {aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d}


def _check_products(graph: fx.Graph) -> None:
    """Raise where a product takes integers and floating-point numbers: torch's own refuse that, but only when they run."""
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _PRODUCTS:
            dtypes = [source.meta["val"].dtype for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
            integer = next((dtype for dtype in dtypes if not dtype.is_floating_point), None)
            if integer is not None and any(dtype.is_floating_point for dtype in dtypes):
                name = node.target.overloadpacket.__name__
                raise TypeError(f"The module rejects these inputs: {name} takes floating-point numbers; got {integer}. Pass x.float().")


# Rewriting ------------------------------------------------------------------

_COPIES = {aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default, aten.view_as.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_LAST = torch.iinfo(torch.int64).max


def _simplify(graph: fx.Graph) -> None:
    """Drop copies, whole slices and detours through a stack; what nothing needs goes with them."""
    for node in list(graph.nodes):
        replacement = _shortcut(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
        elif node.target in _VIEWS:
            node.target = aten.reshape.default  # the copy that made its input contiguous may be gone
    graph.eliminate_dead_code(_is_impure)


def _is_impure(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output")


def _shortcut(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function":
        return None
    if node.target in _COPIES:
        return node.args[0]  # type: ignore[return-value]
    if node.target is aten.slice.Tensor:
        return _whole_slice(node)
    if node.target is aten.select.int:
        return _selected(node)
    if node.target is operator.getitem:
        return _unbound(node)
    return None


def _whole_slice(node: fx.Node) -> fx.Node | None:
    arguments = list(node.args) + [None, 0, None, None, 1][len(node.args) :]
    source, start, end, step = arguments[0], arguments[2], arguments[3], arguments[4]
    return source if not start and end in (None, _LAST) and step == 1 else None  # type: ignore[return-value]


def _selected(node: fx.Node) -> fx.Node | None:
    source, dim, index = node.args
    return _stacked(source, dim, index)


def _unbound(node: fx.Node) -> fx.Node | None:
    source, index = node.args
    if isinstance(source, fx.Node) and source.target is aten.unbind.int:
        return _stacked(source.args[0], source.args[1] if len(source.args) > 1 else 0, index)
    return None


def _stacked(source: Any, dim: Any, index: Any) -> fx.Node | None:
    """The tensor at `index` of a stack along `dim`, so that one step of a sequence depends on no other."""
    if not (isinstance(source, fx.Node) and source.target is aten.stack.default and isinstance(index, int)):
        return None
    rank = source.meta["val"].dim()
    stack_dim = source.args[1] if len(source.args) > 1 else 0
    if stack_dim % rank != dim % rank:
        return None
    return source.args[0][index]  # type: ignore[index,return-value]


def _explained(module: nn.Module, names: Sequence[str], example: Any, error: Exception) -> Exception:
    if isinstance(error, Unsupported):
        return error
    if "nference tensor" in str(error):
        return ValueError(
            f"forward reads a tensor that was made under torch.inference_mode, and that {type(module).__name__} neither registers nor is "
            "given: no gradient can pass by it. Make it, or clone it, outside of that mode."
        )
    own = _own_complaint(module, names, example)
    if own is None and "not support dtype" in str(error):  # of integers in a convolution, which only the trace complains of
        own = error
    if own is not None:
        kind = TypeError if isinstance(own, TypeError | AttributeError) or speaks_of_dtypes(own) else ValueError
        return kind(
            f"{type(module).__name__} rejects these inputs: {first_line(own)}. Pass inputs of the shape and dtype that its forward takes."
        )
    return Unsupported(
        f"torch.export cannot capture {type(module).__name__}: {first_line(error)}. Rewrite that operation without control flow on tensor "
        "values, or use pck.backward(loss), which works on any program that records gradients."
    )


def _own_complaint(module: nn.Module, names: Sequence[str], example: Any) -> Exception | None:
    """What the module's own forward says of these inputs, run on tensors without storage; None if it accepts them."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            args, kwargs = pytree.tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, example)
            shadow_of(module, names)(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as complaint:
        return None if isinstance(complaint, NotImplementedError) else complaint
    except Exception:
        return None
    return None


def speaks_of_dtypes(error: Exception) -> bool:
    """Whether a message of torch's is about the dtype of a tensor."""
    return any(word in str(error) for word in ("dtype", "scalar type", "data type", "Input type"))


def first_line(error: Exception) -> str:
    """The first line of a message, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def is_mark(node: fx.Node) -> bool:
    """Whether a node marks a value node (cells.mark)."""
    return node.op == "call_function" and node.target is MARK
