"""From a module and one example call to its computation graph: torch.export captures the operations, and cutting makes vertices of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from pckernels.capture import capture
from pckernels.cutting import cut
from pckernels.graph import Trace
from pckernels.wrappers import uncompiled


def trace(
    module: nn.Module,
    *example: Any,
    value_nodes: str | Sequence[str] = "layer",
    batch_dim: int = 0,
    live_statistics: bool = False,
    **keywords: Any,
) -> Trace:
    """Turn a module into a computation graph, from one example call.

    Args:
        module: any nn.Module that torch.export can capture, in the training mode that is wanted.
        example, keywords: arguments of the module's forward. Tensors with the batch at `batch_dim` may take any batch size
            later; other sizes are fixed.
        value_nodes: "layer", "op" or a list of submodule names (placement.py says where each puts its value nodes).
        live_statistics: BatchNorm in training mode as a function of the batch, as the exact rules need it; otherwise its
            statistics are held from the feed-forward pass.

    Raises:
        Unsupported: the module cannot be captured; the text names the operation and what to do.
        ValueError, TypeError: bad names, or inputs that the module itself rejects.
    """
    module = uncompiled(module)
    names = () if isinstance(value_nodes, str) else tuple(value_nodes)
    captured = capture(module, example, keywords, batch_dim, names)
    return cut(captured, value_nodes, live_statistics, argument_names(module, example, keywords))


def argument_names(module: nn.Module, example: Sequence[Any], keywords: Mapping[str, Any]) -> list[str]:
    """A readable name for each flattened argument: the parameter of forward that it is bound to, with a path inside it."""
    bound = list(inspect.signature(module.forward).parameters)
    named = [(bound[k] if k < len(bound) else f"input.{k}", value) for k, value in enumerate(example)]
    names = []
    for name, value in [*named, *keywords.items()]:
        paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(value)[0]]
        names += [name + path.replace("[", ".").replace("]", "").replace("'", "") for path in paths]
    return names
