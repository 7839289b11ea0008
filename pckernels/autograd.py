"""pck.backward: fixed-prediction predictive coding on the live autograd graph of any program."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import InferenceDiverged, Unsupported
from .node_errors import Errors, PathLengths, closed_form, iterate
from .node_graph import NodeGraph
from .rules import require_choice, require_fixed_prediction_rate, require_steps

Tensors = Tensor | Sequence[Tensor]


def backward(
    loss: Tensor,
    steps: int | None = None,
    rate: float = 1.0,
    solver: str = "closed_form",
    output: Tensors | None = None,
    retain_graph: bool = False,
    inputs: Tensors | None = None,
) -> None:
    """Predictive coding in place of `loss.backward()`: T inference steps with fixed predictions, then local updates.

    Every autograd node behind `loss` is a vertex: its prediction is its forward output, its local Jacobian its own
    vector-Jacobian product. With eps_i = 0 at the start and the loss's own error held at -1, each step moves all errors at
    once, eps_i <- (1 - rate) eps_i + rate * sum_j J_j^T eps_j over the consumers j; after T steps each leaf learns from the
    errors of the nodes that read it. The result is added into `.grad` with PyTorch's sign and scale.

    A path's length counts the nodes that do arithmetic. Views, slices, splits, casts and memory copies (`nodes.VIEWS`)
    count 0, and so does a leaf. After T steps an error is the sum over path lengths k of c_k(T) times the part of
    backprop's delta that travels paths of length k, c_k(T) = P(Binomial(T, rate) >= k). So at rate 1 with
    steps >= `depth(loss, output)` this is `loss.backward()`, and the very same engine sweep does it.

    Args:
        loss: tensor of one element, real. A loss multiplied afterwards (GradScaler) is one operation further away; name
            `output` to be independent of that.
        steps: T >= 0; at 0 only what is at distance 0 learns. None, at rate 1 alone, is as many as the depth.
        rate: in (0, 2).
        solver: "closed_form" makes one vector-Jacobian product for each node and distinct path length, lengths merged
            where their c_k(T) agree to rounding from there on; "iterate" makes the T steps. Both give the same errors
            to 1e-12 * m * ||delta|| in float64, m = max(1, the largest |c_k(t)| on the way).
        output: tensor(s) at distance 0: their error is exactly -dloss/doutput, and everything between them and the loss
            counts 0. Without it the loss is at distance 0.
        retain_graph: keep the graph for another call.
        inputs: the leaf tensor(s) to accumulate into; None means every leaf behind the loss.

    There is no `create_graph`: the result has no graph of its own. Hooks run once, in the engine: those of a leaf
    (also post-accumulate-grad hooks and DDP's) see the local update, and what they return counts. A tensor hook or
    `retain_grad` on an intermediate tensor sees the feedback sum_j J_j^T eps_j that arrives there; unless one full sweep
    is the answer, what it returns changes no error further up. Checkpointed blocks (non-reentrant) are recomputed at each product.

    Raises:
        TypeError, ValueError: an argument of wrong type or value.
        Unsupported: errors would have to relax through a reentrant checkpoint or a compiled region, or a custom function
            answers None at one call and a gradient at another.
        InferenceDiverged: an error is not finite after T steps. One full sweep does not check, as `loss.backward()` does not.
        RuntimeError: the graph has been freed by an earlier call.
        Whatever is raised, `.grad` of the leaves is as it was; existing gradients are copied for that.

    Source: Millidge, Tschantz & Buckley 2020 (arXiv 2006.04182).
    """
    _require_settings(steps, rate, solver, retain_graph)
    leaves = None if inputs is None else _require_leaves(inputs)
    graph = NodeGraph(_require_loss(loss), _require_outputs(output), leaves)
    with _freed_graph_explained():
        errors = _relax(graph, loss, steps, rate, solver)
        with _grad_kept_on_failure(graph.leaves), _injected(graph, errors):
            torch.autograd.backward(loss, retain_graph=retain_graph, inputs=leaves)


def depth(loss: Tensor, output: Tensors | None = None) -> int:
    """The longest path from the loss, or from `output`, in nodes that do arithmetic: at rate 1, this many steps are exact.

    Args:
        loss: tensor of one element, real, with its graph.
        output: as in `backward`.

    Raises:
        TypeError, ValueError: as in `backward`.
    """
    return NodeGraph(_require_loss(loss), _require_outputs(output)).depth


def _relax(graph: NodeGraph, loss: Tensor, steps: int | None, rate: float, solver: str) -> Errors | None:
    """The errors that relax, after T steps; None where the closed form makes every one of them backprop's delta."""
    if steps is None and solver == "closed_form":
        return None
    steps = graph.depth if steps is None else steps
    lengths = None if solver == "iterate" else PathLengths.after(steps, rate, graph.depth, _rounding(loss.dtype))
    if lengths is not None and lengths.all_one:
        return None
    graph.require_walkable()
    with torch.no_grad():
        seed = torch.ones_like(loss)
        errors = iterate(graph, seed, steps, rate) if lengths is None else closed_form(graph, seed, lengths)
        _require_finite(errors, f"after {steps} steps at rate {rate}")
    return errors


def _rounding(dtype: torch.dtype) -> float:
    return 1e-15 if dtype == torch.float64 else torch.finfo(dtype).eps / 2


def _require_finite(errors: Errors, when: str) -> None:
    flags: dict[torch.device, list[Tensor]] = defaultdict(list)
    for error in errors.values():
        flags[error.device].append(_is_finite(error))
    if all(bool(torch.stack(group).all()) for group in flags.values()):  # one synchronisation for each device
        return
    node, output = next(edge for edge, error in errors.items() if not _is_finite(error))
    shape = list(errors[node, output].shape)
    raise InferenceDiverged(
        f"The error of {node.name()} (shape {shape}) is not finite {when}; .grad is unchanged. Use a smaller rate (at most 1 "
        "never overshoots), a smaller loss scale, or look for inf and NaN in the loss."
    )


def _is_finite(error: Tensor) -> Tensor:
    return torch.isfinite(error.coalesce().values() if error.is_sparse else error).all()


@contextmanager
def _injected(graph: NodeGraph, errors: Errors | None) -> Iterator[None]:
    """While this is open, the engine gives every relaxing node its own error in place of what arrives there."""
    if errors is None:
        yield
        return
    handles = []
    try:
        for node in graph.order:
            own = {output: errors.pop((node, output), None) for output in graph.relaxing(node)}
            if own:
                handles.append(node.register_prehook(partial(_replace, own)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replace(own: dict[int, Tensor | None], arriving: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The prehook of one node. An error of 0 is a gradient of 0, not a missing one: the leaf has been used."""
    return tuple(_own_error(own[i], gradient) if i in own else gradient for i, gradient in enumerate(arriving))


def _own_error(error: Tensor | None, arriving: Tensor | None) -> Tensor | None:
    if arriving is not None:
        return torch.zeros_like(arriving) if error is None else error
    if error is None:
        return None
    raise Unsupported("A custom autograd.Function returned None where it had returned a gradient before; let it return zeros.")


@contextmanager
def _grad_kept_on_failure(leaves: Sequence[Tensor]) -> Iterator[None]:
    # The engine adds into .grad in place, and hooks expect it there (DDP averages what is accumulated), so keep copies.
    before = [(leaf, leaf.grad) for leaf in leaves]
    copies = [(grad, grad.detach().clone()) for _, grad in before if grad is not None]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for accumulated, copy in copies:
                accumulated.copy_(copy)
        for leaf, grad in before:
            leaf.grad = grad
        raise


@contextmanager
def _freed_graph_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            "The graph behind this loss has been freed by an earlier backward call; .grad is unchanged. Run the forward pass "
            "again, or pass retain_graph=True to the earlier call."
        ) from None


def _require_settings(steps: Any, rate: Any, solver: Any, retain_graph: Any) -> None:
    require_fixed_prediction_rate(rate)
    require_choice("solver", solver, ("closed_form", "iterate"))
    if not isinstance(retain_graph, bool):
        raise TypeError(f"retain_graph must be a bool; got {type(retain_graph).__name__}.")
    if steps is not None:
        require_steps(steps)
    elif rate != 1.0:
        raise ValueError(f"steps=None is for rate=1.0 alone, where depth steps are exact; give steps for rate={rate}.")


def _require_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor; got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ValueError(f"loss must have one element; got shape {list(loss.shape)}. Reduce it with .sum() or .mean().")
    if loss.is_complex():
        raise TypeError(f"loss must be real; got {loss.dtype}. Take its .abs() or .real.")
    if not loss.requires_grad:
        raise ValueError("loss does not require grad: no parameter with requires_grad=True leads to it, or it was computed under no_grad.")
    return loss


def _require_outputs(output: Any) -> list[Tensor]:
    return [] if output is None else _require_tensors("output", output)


def _require_leaves(inputs: Any) -> list[Tensor]:
    tensors = _require_tensors("inputs", inputs)
    for tensor in tensors:
        if not tensor.is_leaf:
            raise ValueError("inputs must be leaf tensors, such as parameters; call retain_grad() on an intermediate tensor instead.")
    return tensors


def _require_tensors(name: str, given: Any) -> list[Tensor]:
    """`given` as a list of tensors that require grad; raise unless it is one, or a sequence of at least one."""
    tensors = [given] if isinstance(given, Tensor) else given
    if not isinstance(tensors, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"{name} must be a tensor or a list of tensors; got {type(given).__name__}.")
    if not tensors:
        raise ValueError(f"{name} is empty; leave it out, or name at least one tensor.")
    if not all(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"every tensor in {name} must require grad.")
    return list(tensors)
