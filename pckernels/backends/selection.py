"""Which code a call needs: from its graph, rule, losses and learning parameters; or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from pckernels.backends import closed_form
from pckernels.backends.path_lengths import make_plan
from pckernels.call import Call
from pckernels.compiler import Compiled, compile_feed_forward, compile_steps, compile_sweep, compile_weighed_sweep
from pckernels.emitter import Objective
from pckernels.errors import Unsupported
from pckernels.graph import ComputationGraph, Trace
from pckernels.incremental_compiler import compile_incremental
from pckernels.instructions import Loss
from pckernels.lowering import lower
from pckernels.objective import Objective as Target
from pckernels.program import Program
from pckernels.returns import Way
from pckernels.rules import Dynamics

PlanFor = Callable[[Compiled | str, int, torch.device], object]  # how a backend runs code on a batch, or why it cannot
Objectives = tuple[tuple[str, Objective], ...]


@lru_cache(maxsize=64)
def lowered(graph: ComputationGraph) -> Program | str:
    """The graph's program, or why there is none."""
    try:
        return lower(graph)
    except Unsupported as error:
        return str(error)


def program_of(graph: ComputationGraph) -> Program:
    """The program of a graph that has one."""
    program = lowered(graph)
    assert isinstance(program, Program), program
    return program


@lru_cache(maxsize=256)
def compiled(
    graph: ComputationGraph,
    dynamics: Dynamics | None,
    objectives: Objectives,
    learning: frozenset[str],
    weighed: frozenset[str] = frozenset(),
    gram: bool = False,
) -> Compiled | str:
    """The code for one kind of call (without a target: no dynamics), or why there is none. weighed: vertices with a precision."""
    program = lowered(graph)
    if isinstance(program, str):
        return program
    try:
        if dynamics is None:
            return compile_feed_forward(program)
        if dynamics.closed_form and weighed:  # c_k(T) then differs from 1 everywhere
            hidden = frozenset(vertex.name for vertex in graph.hidden)
            return compile_weighed_sweep(program, dict(objectives), learning, Way.of(dynamics), hidden)
        if dynamics.closed_form:
            plan = make_plan(graph, dynamics, closed_form.plan_dtype(graph))
            return compile_sweep(program, graph, plan, dict(objectives), learning, Way.of(dynamics))
        if dynamics.learn_at_each_step:
            return compile_incremental(program, graph, dynamics, dict(objectives), learning)
        return compile_steps(program, graph, dynamics, dict(objectives), learning, gram, weighed)
    except Unsupported as error:
        return str(error)


@lru_cache(maxsize=64)
def is_float32(graph: ComputationGraph) -> bool:
    """Whether every vertex is, as the compiled engines need it."""
    return all(vertex.dtype in (None, torch.float32) for vertex in graph.vertices)


def misfit(tensors: Iterable[Tensor], kind: str) -> Tensor | None:
    """The first tensor that is not on a device of this kind, or is floating point but not float32."""
    for tensor in tensors:
        if tensor.device.type != kind or (tensor.dtype is not torch.float32 and tensor.is_floating_point()):
            return tensor
    return None


def device_of(call: Call, kind: str, place: str) -> torch.device | str:
    """The one device of a call's tensors and targets, of this kind, or why there is none; `place`: the kind in words."""
    tensors = [*call.tensors.values(), *getattr(call.objective, "targets", {}).values()]
    other = misfit(tensors, kind)
    if other is not None:
        return f"it runs float32 on {place}; this call has {other.dtype} on {other.device}"
    devices = sorted({str(tensor.device) for tensor in tensors})
    return torch.device(devices[0]) if len(devices) == 1 else f"it runs on one device; this call has tensors on {', '.join(devices)}"


def refusal_on(device: torch.device | str, call: Call, plan_for: PlanFor) -> str | None:
    """Why a backend that plans its calls cannot run one on a device, or None."""
    if isinstance(device, str):
        return device
    reason = refusal_in_float32(call)
    if reason is not None or not call.size:
        return reason
    found = plan_for(code_of(call), call.size, device)
    return found if isinstance(found, str) else None


def refusal_in_float32(call: Call) -> str | None:
    """Why no backend that computes in float32 can run a call, or None."""
    if not is_float32(call.trace.graph):
        return "it runs float32; a vertex of this graph has another dtype"
    return refusal(call) or _refusal_on_chip(call)


def _refusal_on_chip(call: Call) -> str | None:
    """What only backends do that look at their tensors between steps."""
    if call.objective is not None and call.dynamics.tolerance is not None:
        return 'tolerance= lets each sample rest by itself, which backend="graph" does, and the reference'
    if call.objective is not None and call.dynamics.learn_at_each_step:
        return 'weights that move at every step are written inside of the steps, which backend="graph" does, and the reference'
    return None


def refusal(call: Call) -> str | None:
    """Why no native backend can run a call, or None."""
    reason = _refusal_of(call.trace)
    if reason is not None:
        return reason
    if call.clamps:
        return "it clamps value nodes or frees inputs, which only the reference does"
    if call.record:
        return "record=True keeps every step, which only the reference does"
    if call.objective is not None and not (isinstance(call.objective, Target) and isinstance(call.objective.loss, str)):
        return "a loss of one's own, or as another code has it (match=), is a PyTorch function, which runs in the reference alone"
    if call.objective is not None and _follows_another_code(call.dynamics):
        return "match= follows another code's ways, which only the reference knows"
    if call.objective is not None and call.dynamics.learn_at_each_step and (call.dynamics.has_own_feedback or call.extra.weighs_errors):
        return "a relaxed rule or a precision, where weights move at every step, is for the reference alone"
    if call.objective is not None and call.dynamics.has_error_weights:
        return "a rule with error weights compares values with mixtures of predictions, which only the reference does"
    if isinstance(call.objective, Target) and call.objective.known:
        return "a target that is known in part is for the reference alone"
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    code = code_of(call)
    return code if isinstance(code, str) else None


def _follows_another_code(dynamics: Dynamics) -> bool:
    return dynamics.stale_errors or dynamics.halving is not None or dynamics.clamp is not None


@lru_cache(maxsize=64)
def _refusal_of(trace: Trace) -> str | None:
    if not trace.batched:
        return "the trace holds for one batch size alone"
    if any(derived.kind == "held" for derived in trace.graph.derived.values()):
        return "dropout masks and batch statistics are drawn or measured in the feed-forward pass, which only the reference does"
    return "the call moves buffers of the module, which only the reference does" if trace.updates else None


def phases(call: Call) -> list[Call]:
    """The runs that a call consists of: one for each nudge, which learns its share of the mean, divided by the nudge."""
    nudges = call.dynamics.nudges
    if call.objective is None or not call.dynamics.is_nudged:
        return [call]
    return [
        replace(call, dynamics=replace(call.dynamics, nudges=(beta,)), factor=call.factor * (1.0 / (beta * len(nudges))), memo={})
        for beta in nudges
    ]


def code_of(call: Call) -> Compiled | str:
    """The code that a call needs, or why there is none."""
    if "code" not in call.memo:
        call.memo["code"] = cheapest((call.trace.graph, *_kind_of(call), _learning(call), _weighed(call)), call.size or 0)
    return call.memo["code"]


def _kind_of(call: Call) -> tuple[Dynamics | None, Objectives]:
    """Its dynamics and losses; without a target, the feed-forward pass."""
    if not isinstance(call.objective, Target):
        return None, ()
    assert isinstance(call.objective.loss, str)
    return call.dynamics, _objectives(call.trace.graph, call.objective.loss, tuple(call.objective.targets))


def code_for(graph: ComputationGraph, rule: Dynamics, batch: int) -> Compiled | str:
    """The code of a call with the squared error in which every weight learns, without tensors: for those who count or plan."""
    program = lowered(graph)
    if isinstance(program, str):
        return program
    learning = frozenset(info.name for info in program.weights)
    return cheapest((graph, rule, _objectives(graph, "squared_error", tuple(program.outputs)), learning, frozenset()), batch)


Key = tuple[ComputationGraph, Dynamics | None, Objectives, frozenset[str], frozenset[str]]  # what `compiled` takes, but for the Gram form


def cheapest(key: Key, batch: int) -> Compiled | str:
    """In the Gram form where it pays: it costs a product W W^T a call, and saves one product a step.

    Of several nudges, each of which is a run of its own (see `phases`), the code of the first; the others' has the same shape.
    """
    graph, dynamics, objectives, learning, weighed = key
    if dynamics is not None and len(dynamics.nudges) > 1:
        dynamics = replace(dynamics, nudges=dynamics.nudges[:1])
    code = compiled(graph, dynamics, objectives, learning, weighed, gram=True)
    width = 0 if isinstance(code, str) else code.gram_width
    steps = 0 if dynamics is None else dynamics.steps or 0
    return code if steps * batch >= 2 * width else compiled(graph, dynamics, objectives, learning, weighed, gram=False)


def _weighed(call: Call) -> frozenset[str]:
    """The vertices with a precision, where there is a target."""
    return frozenset((*call.extra.precisions, *call.extra.log_precisions) if call.objective is not None else ())


@lru_cache(maxsize=64)
def _objectives(graph: ComputationGraph, loss: str, outputs: tuple[str, ...]) -> Objectives:
    if loss == "squared_error":
        return tuple((name, Objective(Loss.SQUARED_ERROR)) for name in outputs)
    return tuple((name, Objective(Loss.CROSS_ENTROPY, graph[name].shape[-1])) for name in outputs)


def _learning(call: Call) -> frozenset[str]:
    """The weights that stages read whose gradients are wanted: parameters, and functions of parameters."""
    if not (call.learn or call.dynamics.learn_at_each_step):
        return frozenset()
    tensors = call.tensors
    return _with_functions(call.trace.graph, tuple([name for name in call.trace.parameters if tensors[name].requires_grad]))


@lru_cache(maxsize=64)
def _with_functions(graph: ComputationGraph, parameters: tuple[str, ...]) -> frozenset[str]:
    found = set(parameters)
    for name in graph.schedule:
        derived = graph.derived.get(name)
        if derived is not None and derived.kind == "weight" and found & set(derived.reads):
            found.add(name)
    return frozenset(found)
