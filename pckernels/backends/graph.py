"""The graph backend: state in device memory, each operation by PyTorch's own kernels (cuBLAS, cuDNN, oneDNN), on the CPU or a CUDA device.

It takes what does not fit on a chip, in float32 or float64. On CUDA the steps of a shape that comes again are recorded in CUDA graphs and
replayed: no launch of the loop costs Python anything, and nothing waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from pckernels import replay
from pckernels.backends import native, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.graph import ComputationGraph
from pckernels.memory import Packed
from pckernels.replay import Step
from pckernels.tensor_layout import Layout, Stage, layout
from pckernels.tensor_machine import Machine

DTYPES = (torch.float32, torch.float64)
_KEPT = 4  # recordings; each keeps the memory of a whole inference


@dataclass(frozen=True)
class Plan:
    """How code runs: in words."""

    reason: str


@dataclass
class _Recording:
    """The machine of one shape, and a replay for each stage of its loops, made at the shape's second call."""

    machine: Machine
    calls: int = 0
    replays: dict[Stage, Step] = field(default_factory=dict)


_recordings: OrderedDict[Hashable, _Recording] = OrderedDict()


def forget() -> None:
    """Let go of all recordings and their memory."""
    _recordings.clear()


def availability() -> tuple[bool, str]:
    """It needs PyTorch alone."""
    return True, "PyTorch's own kernels over compiled steps, float32 and float64; on CUDA recorded in CUDA graphs"


def refusal(call: Call) -> str | None:
    """Why it cannot run a call, or None."""
    where = device_of(call)
    if isinstance(where, str):
        return where
    return selection.refusal(call)


def device_of(call: Call) -> torch.device | str:
    """The one device of a call's tensors, or why there is none."""
    tensors = [*call.tensors.values(), *getattr(call.objective, "targets", {}).values()]
    dtypes = _dtypes(call.trace.graph) | {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return f"it runs float32 or float64, one of them at a time; this call has {', '.join(sorted(map(str, dtypes))) or 'neither'}"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        return f"it runs on one device; this call has tensors on {', '.join(devices)}"
    found = torch.device(devices[0])
    return found if found.type in ("cpu", "cuda") else f"it runs on the CPU or a CUDA device; this call has tensors on {found}"


def _dtypes(graph: ComputationGraph) -> set[torch.dtype]:
    return {vertex.dtype for vertex in graph.vertices if vertex.dtype is not None}


def plan_for(compiled: Compiled | str, batch: int, device: torch.device) -> Plan:
    """Everything that compiles runs."""
    assert isinstance(compiled, Compiled)
    how = "each step a CUDA graph" if device.type == "cuda" else "operation by operation"
    return Plan(f"graph tier: state in memory, {layout(compiled).launches} operations a step, {how}")


def run(call: Call) -> Outcome:
    """One inference, in order with whatever else is on the current stream."""
    return native.run_on(device_of(call), call, execute, plan_for)


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 or float64 tensors of one device."""
    device = memory.kept.device
    with _precisely(device):
        if compiled.sections and memory.update is None and replay.can_record(device):
            _execute_recorded(compiled, memory, batch, factor)
        else:
            found = layout(compiled)
            machine = Machine(compiled, found, memory, batch)
            _run_stages(machine, found, lambda stage: lambda: machine.step(stage), stops_early=device.type == "cpu")
            machine.finish(factor)


def _precisely(device: torch.device) -> AbstractContextManager[Any]:
    """Products in full float32, the same at every run."""
    if device.type != "cuda":
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False)


def _run_stages(machine: Machine, found: Layout, step_of: Callable[[Stage], Step], stops_early: bool = False) -> None:
    """stops_early: look after each step whether every sample rests. On a GPU a look costs more than the steps that it saves: there what
    rests stands still."""
    rests = False
    for stage in found.stages:
        if rests and stage.repeats:
            continue
        machine.start(stage)
        step = step_of(stage)
        for _ in range(stage.first, stage.last + 1):
            step()
            rests = stops_early and stage.repeats and machine.rests
            if rests:
                machine.stand_still()
                break


def _execute_recorded(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """The first call of a shape runs plainly, so that the libraries set themselves up; its second call is recorded, and then replayed."""
    recording = _recording_of(compiled, memory, batch)
    machine = recording.machine
    recorder = replay.Recorder() if recording.calls == 1 else None

    def step_of(stage: Stage) -> Step:
        if recorder is not None and stage.repeats:
            recording.replays[stage] = _recorded(recorder, machine, stage)
        return recording.replays.get(stage) or (lambda: machine.step(stage))

    _run_stages(machine, machine.layout, step_of)
    machine.finish(factor)
    recording.calls += 1


def _recorded(recorder: replay.Recorder, machine: Machine, stage: Stage) -> Step:
    """A replay of a stage's step, which leaves for later stages what the step itself has left."""
    again = recorder.record(lambda: machine.step(stage))
    left = machine.left(stage)

    def step() -> None:
        again()
        machine.tensors.update(left)

    return step


def _recording_of(compiled: Compiled, memory: Packed, batch: int) -> _Recording:
    weights = tuple(weight.data_ptr() for weight in memory.weights)  # a replay reads them where they were
    key = (compiled, batch, memory.kept.dtype, memory.kept.device, weights, memory.divisor)
    found = _recordings.get(key)
    if found is None:
        found = _recordings[key] = _Recording(Machine(compiled, layout(compiled), memory, batch))
        if len(_recordings) > _KEPT:
            _recordings.popitem(last=False)
    else:
        found.machine.bind(memory)
    _recordings.move_to_end(key)
    return found
