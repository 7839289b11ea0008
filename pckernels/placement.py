"""Where the value nodes sit.

- "layer": a vertex ends at every operation that reads a parameter (norms excepted) and at every operation with two or more
  non-constant inputs. Following operations with one non-constant input join it, until a tensor has two consumers; one on
  an input or after a fork is its own vertex. A slice or split is part of the edge. Recurrent cells have their own nodes.
- "op": one vertex for each operation, slices and splits excepted.
- a list of submodule names: the value node sits exactly at that submodule's output.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from pckernels.capture import Captured, is_mark
from pckernels.dependence import Dependence, is_slice, is_tuple, operation_name, own_sources
from pckernels.expansion import RUNNING
from pckernels.wrappers import ORIGINAL

aten = torch.ops.aten


def value_node_ends(captured: Captured, facts: Dependence, value_nodes: str | Sequence[str]) -> set[fx.Node]:
    """The nodes that value nodes sit on."""
    if value_nodes == "layer":
        return set(_layer_ends(captured, facts))
    if value_nodes == "op":
        return set(_op_ends(captured, facts))
    # Marks with a time belong to recurrent cells, which a list does not name.
    return {node for node in captured.graph.nodes if is_mark(node) and node in facts.floats and node.args[2] < 0}


def value_node_names(
    ends: Sequence[fx.Node], outputs: Sequence[fx.Node | None], facts: Dependence, value_nodes: str | Sequence[str]
) -> dict[fx.Node, str]:
    """A name for each node that carries a value, in the order of the graph."""
    carrying = [node for node in outputs if node is not None]
    names = {node: f"output.{k}" if len(carrying) > 1 else "output" for k, node in enumerate(outputs) if node is not None}
    hidden = _Namer(facts, value_nodes == "op").names([node for node in ends if node not in names], set(ends))
    return {**hidden, **names}


def check_value_nodes(value_nodes: Any, modules: Iterable[str]) -> None:
    """Raise unless `value_nodes` is "layer", "op", or a list of names out of `modules`."""
    if isinstance(value_nodes, str):
        if value_nodes not in ("layer", "op"):
            raise ValueError(f'value_nodes must be "layer", "op" or a list of submodule names; got {value_nodes!r}.')
        return
    if not isinstance(value_nodes, list | tuple) or not all(isinstance(name, str) for name in value_nodes):
        raise TypeError('value_nodes must be "layer", "op" or a list of submodule names (str).')
    known = [name for name in modules if name]
    for name in value_nodes:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else " See dict(module.named_modules()) for the names."
            raise ValueError(f"value_nodes: the module has no submodule named {name!r}.{hint}")
    if len(set(value_nodes)) < len(value_nodes):
        raise ValueError("value_nodes names a submodule twice; give each name once.")


def _candidates(captured: Captured, facts: Dependence) -> list[fx.Node]:
    return [n for n in captured.graph.nodes if n.op == "call_function" and n in facts.floats and not is_tuple(n) and n not in facts.held]


def _op_ends(captured: Captured, facts: Dependence) -> list[fx.Node]:
    candidates = [node for node in _candidates(captured, facts) if not is_slice(node)]
    # A mark is the name of the operation it stands on, not an operation.
    marked = {node.args[0] for node in candidates if is_mark(node) and node.args[0] in candidates}
    return [node for node in candidates if node not in marked]


def _layer_ends(captured: Captured, facts: Dependence) -> list[fx.Node]:
    ends: list[fx.Node] = []
    for node in _candidates(captured, facts):
        if _in_cell(node):
            if is_mark(node):
                ends.append(node)
        elif not _is_edge(node, facts) and not _is_joined(node, facts):
            ends.append(node)
    return ends


def _in_cell(node: fx.Node) -> bool:
    return any("pckernels.cells" in str(kind) for _, kind in (node.meta.get("nn_module_stack") or {}).values())


def _is_edge(node: fx.Node, facts: Dependence) -> bool:
    """A slice that does not simply continue its vertex."""
    return is_slice(node) and not _continues(node, facts)


def _is_joined(node: fx.Node, facts: Dependence) -> bool:
    """Whether the vertex goes on behind this node: its one consumer reads nothing else that moves, and no parameter."""
    consumers = _consumers(node, facts)
    return len(consumers) == 1 and _continues(consumers[0], facts)


def _continues(node: fx.Node, facts: Dependence) -> bool:
    """Whether an operation joins the vertex of its input."""
    if is_tuple(node) or _in_cell(node) or facts.reads_parameter(node) or node not in facts.floats:
        return False
    sources = [source for source in own_sources(node) if source in facts.values]
    if len(sources) != 1 or sources[0] not in facts.floats:
        return False
    source = sources[0]
    if source.op == "placeholder" or _in_cell(source) or is_tuple(source):
        return False
    if is_slice(source) and not _continues(source, facts):
        return False
    return len(_consumers(source, facts)) == 1


def _consumers(node: fx.Node, facts: Dependence) -> list[fx.Node]:
    """The operations that read a tensor's values (sizes, masks held from it and running statistics aside)."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        if user.op == "output":
            found[user] = None
        elif user in facts.values and is_tuple(user):
            found.update(dict.fromkeys(item for item in user.users if item in facts.values))
        elif user in facts.values and user.target not in RUNNING:
            found[user] = None
    return list(found)


class _Namer:
    """Names of value nodes: submodule path, `#2` for its second call, bare operation names for joins."""

    def __init__(self, facts: Dependence, by_operation: bool):
        self.facts = facts
        self.by_operation = by_operation
        self.taken: dict[str, int] = {}

    def names(self, ends: Sequence[fx.Node], all_ends: set[fx.Node]) -> dict[fx.Node, str]:
        firsts = {node: self._first(node, all_ends) for node in ends}
        self.crowded = Counter(_call_of(first)[0] for first in firsts.values())
        return {node: self._unique(self._name(node, firsts[node])) for node in ends}

    def _unique(self, name: str) -> str:
        self.taken[name] = count = self.taken.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"

    def _name(self, node: fx.Node, first: fx.Node) -> str:
        if is_mark(node):
            return node.args[1]  # type: ignore[return-value]
        operation = operation_name(first)
        if not self.by_operation and len(self.facts.moving_inputs(first)) > 1:
            return operation
        call, is_layer = _call_of(first)
        own = is_layer or self.facts.reads_parameter(first)
        if own and not (self.by_operation and self.crowded[call] > 1) and call not in self.taken:
            return call
        return f"{call}.{operation}" if call else operation

    def _first(self, node: fx.Node, ends: set[fx.Node]) -> fx.Node:
        """The operation that a vertex starts with: what is furthest back without crossing another value node."""
        while True:
            sources = self.facts.moving_inputs(node)
            if len(sources) != 1 or sources[0] in ends or sources[0].op == "placeholder" or self.facts.reads_parameter(node):
                return node
            if is_slice(sources[0]) and not _continues(sources[0], self.facts):
                return node
            node = sources[0]


def _call_of(node: fx.Node) -> tuple[str, bool]:
    """The path of the innermost module that ran an operation, `#2` at its second call, and whether it is one of torch's layers."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(key, str(path), str(kind)) for key, (path, kind) in stack.items() if str(path).startswith("module.")]
    if not entries:
        return "", False
    key, path, kind = entries[-1]
    again = re.search(r"@(\d+)$", key)
    call = path.removeprefix("module.").replace(f".{ORIGINAL}", "") + (f"#{int(again[1]) + 1}" if again else "")
    return call, "torch.nn.modules." in kind and ".container." not in kind


def add_output_vertices(captured: Captured, facts: Dependence, ends: set[fx.Node]) -> list[fx.Node | None]:
    """The output vertex of each result, made anew where the result also feeds others; None where it carries no gradient."""
    outputs: list[fx.Node | None] = []
    for result in captured.outputs:
        carries = isinstance(result, fx.Node) and result in facts.floats
        outputs.append(_output_node(captured, facts, result) if carries else None)
    ends.update(node for node in outputs if node is not None)
    return outputs


def _output_node(captured: Captured, facts: Dependence, result: fx.Node) -> fx.Node:
    feeds_others = any(user.op != "output" and user in facts.values and user.target not in RUNNING for user in result.users)
    returned_once = sum(other is result for other in captured.outputs) == 1
    if result.op != "placeholder" and not feeds_others and returned_once:
        return result
    with captured.graph.inserting_after(result):
        node = captured.graph.call_function(aten.alias.default, (result,))
    node.meta = {"val": result.meta["val"]}
    facts.values.add(node)
    facts.floats.add(node)
    return node
