"""Dropout and BatchNorm taken apart, so that what a call draws or measures once can be held through all inference steps."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from pckernels.errors import Unsupported

aten = torch.ops.aten

_DROPOUTS = {aten.dropout, aten.feature_dropout, aten.native_dropout}
_BATCH_NORM_TRAINING = aten._native_batch_norm_legit_functional


def batch_mean(x: Tensor) -> Tensor:
    """The mean of each channel, (C,). Raises ValueError, as torch.nn.BatchNorm does, for one value a channel."""
    if x.numel() == x.shape[1]:
        raise ValueError(f"BatchNorm in training mode needs several values for each channel; got shape {tuple(x.shape)}. Call .eval().")
    return x.mean([d for d in range(x.dim()) if d != 1])


def batch_variance(x: Tensor) -> Tensor:
    """The biased variance of each channel, (C,); 1 where there is no sample."""
    if x.numel() == 0:
        return x.new_ones(x.shape[1])
    return x.var([d for d in range(x.dim()) if d != 1], correction=0)


def batch_norm_live(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """BatchNorm with the statistics of this very batch, as functions of it."""
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def batch_norm_held(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """BatchNorm with given statistics."""
    return functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)


def running_mean(x: Tensor, running: Tensor, momentum: float) -> Tensor:
    """The running mean after this batch; an empty one leaves it."""
    if x.numel() == 0:
        return running
    return running.lerp(batch_mean(x).to(running.dtype), momentum)


def running_variance(x: Tensor, running: Tensor, momentum: float) -> Tensor:
    """The running variance after this batch; unbiased, as torch.nn.BatchNorm keeps it. An empty one leaves it."""
    if x.numel() == 0:
        return running
    variance = x.var([d for d in range(x.dim()) if d != 1], correction=1)
    return running.lerp(variance.to(running.dtype), momentum)


def assigned(old: Tensor, new: Tensor) -> Tensor:
    """`new` in the shape and dtype of `old`."""
    return new.to(old.dtype).expand_as(old)


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) for each element: drawn as dropout itself draws, so that a seed means the same."""
    return functional.dropout(torch.ones_like(x), p, True)


def channel_dropout_mask(x: Tensor, p: float) -> Tensor:
    """0 or 1 / (1 - p) for each channel of x."""
    return torch.feature_dropout(torch.ones_like(x), p, True)


HELD = {batch_mean, batch_variance, dropout_mask, channel_dropout_mask}
NORMS = {batch_norm_live, batch_norm_held}
RUNNING = {running_mean, running_variance}


def expand(graph: fx.Graph, live_statistics: bool) -> None:
    """Rewrite dropout as a product with a held mask, and BatchNorm in training mode with live or held statistics."""
    for node in list(graph.nodes):
        packet = packet_of(node)
        if packet in _DROPOUTS:
            _expand_dropout(graph, node, packet)
        elif packet is aten.copy:
            _expand_copy(graph, node)
        elif packet is _BATCH_NORM_TRAINING:
            _expand_batch_norm(graph, node, live_statistics)
        elif packet is aten.instance_norm and node.args[3] is not None and node.args[5]:
            raise Unsupported("InstanceNorm with track_running_stats=True in training mode is not supported. Call .eval(), or turn it off.")


def _expand_copy(graph: fx.Graph, node: fx.Node) -> None:
    """What an assignment in place leaves in a functional graph: the new content, in the shape and dtype of the old."""
    old, new = node.args[0], node.args[1]
    assert isinstance(old, fx.Node) and isinstance(new, fx.Node)
    before, after = old.meta["val"], new.meta["val"]
    if before.dtype == after.dtype and tuple(before.shape) == tuple(after.shape):
        node.replace_all_uses_with(new)
    else:
        with graph.inserting_before(node):
            node.replace_all_uses_with(_call(graph, assigned, (old, new), node, old))
    _erase_dead(graph, [node])


def _expand_dropout(graph: fx.Graph, node: fx.Node, packet: Any) -> None:
    arguments: tuple[Any, ...] = node.args
    x, p, training = arguments
    if packet is aten.native_dropout:
        users = [user for user in node.users if user.args[1] == 0]
    else:
        users = [node]
    with graph.inserting_before(node):
        if not training or p == 0.0:
            result = x
        else:
            draw = channel_dropout_mask if packet is aten.feature_dropout else dropout_mask
            mask = _call(graph, draw, (x, p), node, x)
            result = _call(graph, aten.mul.Tensor, (x, mask), node, x)
    for user in users:
        user.replace_all_uses_with(result)
    _erase_dead(graph, [*node.users, node])


def _expand_batch_norm(graph: fx.Graph, node: fx.Node, live: bool) -> None:
    x, weight, bias, mean, variance, _, momentum, eps = node.args
    with graph.inserting_before(node):
        if live:
            result = _call(graph, batch_norm_live, (x, weight, bias, eps), node, x)
        else:
            held = [_call(graph, statistic, (x,), node, mean) for statistic in (batch_mean, batch_variance)]
            result = _call(graph, batch_norm_held, (x, weight, bias, *held, eps), node, x)
        after = {3: (running_mean, mean), 4: (running_variance, variance)}
        for user in list(node.users):
            index = user.args[1]
            if index == 0:
                user.replace_all_uses_with(result)
            elif index in after and user.users:
                function, running = after[index]  # type: ignore[index]
                user.replace_all_uses_with(_call(graph, function, (x, running, momentum), node, running))
    _erase_dead(graph, [*node.users, node])


def _call(graph: fx.Graph, function: Any, args: tuple[Any, ...], origin: fx.Node, like: Any) -> fx.Node:
    node = graph.call_function(function, args)
    node.meta = {**origin.meta, "val": like.meta["val"]}
    return node


def _erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


def packet_of(node: fx.Node) -> Any:
    """The operation a node calls, whatever its overload."""
    return getattr(node.target, "overloadpacket", node.target) if node.op == "call_function" else None
