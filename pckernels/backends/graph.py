"""The graph backend: state in device memory, each operation by PyTorch's own kernels (cuBLAS, cuDNN, oneDNN), on the CPU or a CUDA device.

It takes what does not fit on a chip, in float32 or float64. On CUDA, what lies between two products of a step runs in one launch of a
Triton kernel (in float32, where Triton is installed), and the steps of a shape that comes again are recorded in CUDA graphs and
replayed: no launch of the loop costs Python anything, and nothing waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch

from pckernels import replay
from pckernels.backends import native, selection, triton
from pckernels.backends.options import Scope
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.memory import Packed
from pckernels.replay import Step
from pckernels.tensor_layout import Layout, Stage, layout
from pckernels.tensor_machine import Kernels, Machine

DTYPES = (torch.float32, torch.float64)
_KEPT = 4  # recordings; each keeps the memory of a whole inference


@dataclass(frozen=True)
class Options:
    """What a caller asks of the graph tier, by `with options(..):`.

    Attributes:
        fused: whether what lies between two products is one launch of a Triton kernel; None: where that can be.
    """

    fused: bool | None = None


options = Scope(Options)


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
    cannot_fuse = _cannot_fuse(where, _dtype(call)) if options.get().fused else None
    return cannot_fuse or selection.refusal(call)


def device_of(call: Call) -> torch.device | str:
    """The one device of a call's tensors, or why there is none."""
    tensors, dtypes = _tensors(call), _dtypes(call)
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return f"it runs float32 or float64, one of them at a time; this call has {', '.join(sorted(map(str, dtypes))) or 'neither'}"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) != 1:
        return f"it runs on one device; this call has tensors on {', '.join(devices)}"
    found = torch.device(devices[0])
    return found if found.type in ("cpu", "cuda") else f"it runs on the CPU or a CUDA device; this call has tensors on {found}"


def _tensors(call: Call) -> list[torch.Tensor]:
    return [*call.tensors.values(), *getattr(call.objective, "targets", {}).values()]


def _dtypes(call: Call) -> set[torch.dtype]:
    vertices = {vertex.dtype for vertex in call.trace.graph.vertices if vertex.dtype is not None}
    return vertices | {tensor.dtype for tensor in _tensors(call) if tensor.is_floating_point()}


def _dtype(call: Call) -> torch.dtype:
    """The one dtype of a call that is not refused."""
    (found,) = _dtypes(call)
    return found


def _cannot_fuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why nothing can be fused, or None."""
    if dtype is not torch.float32:
        return f"launches are fused in float32; this call has {dtype}"
    ok, reason = _triton(triton.interpreted())
    if ok and device.type != ("cpu" if triton.interpreted() else "cuda"):
        return "launches are fused on a CUDA device, or in Triton's interpreter on the CPU (TRITON_INTERPRET=1)"
    return None if ok else f"launches are fused by Triton: {reason}"


@lru_cache(maxsize=2)
def _triton(interpreted: bool) -> tuple[bool, str]:
    """Whether it is there. Asked at every call, so looked for once; `interpreted` is what the answer depends on."""
    return triton.availability()


def _kernels(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """What runs fused launches, under the options of this context; None: launches are not fused."""
    wanted = options.get().fused
    if wanted is False or (wanted is None and device.type == "cpu"):
        return None
    reason = _cannot_fuse(device, dtype)
    if wanted and reason is not None:
        raise Unsupported(reason)
    return _of_triton() if reason is None else None


@lru_cache(maxsize=1)
def _of_triton() -> Kernels:
    loss = triton.kernels("cross_entropy")
    return Kernels(triton.kernels("rows").run, loss.cross_entropy, loss.refusal, triton.kernels("max_pool"))


def plan_for(compiled: Compiled | str, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Plan:
    """Everything that compiles runs."""
    assert isinstance(compiled, Compiled)
    fused = _kernels(device, dtype) is not None
    steps = f"{layout(compiled, fused).launches} operations a step{', fused' if fused else ''}"
    return Plan(f"graph tier: state in memory, {steps}, {'each step a CUDA graph' if device.type == 'cuda' else 'operation by operation'}")


def run(call: Call) -> Outcome:
    """One inference, in order with whatever else is on the current stream."""
    return native.run_on(device_of(call), call, execute, partial(plan_for, dtype=_dtype(call)))


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 or float64 tensors of one device."""
    device = memory.kept.device
    kernels = _kernels(device, memory.kept.dtype)
    with _on(device):
        if compiled.sections and memory.update is None and replay.can_record(device):
            _execute_recorded(compiled, memory, batch, factor, kernels)
        else:
            found = layout(compiled, kernels is not None)
            machine = Machine(compiled, found, memory, batch, kernels)
            _run_stages(machine, found, lambda stage: lambda: machine.step(stage), stops_early=device.type == "cpu")
            machine.finish(factor)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launch there, and products in full float32, the same at every run."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with torch.cuda.device(device), cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False):
        yield


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


def _execute_recorded(compiled: Compiled, memory: Packed, batch: int, factor: float, kernels: Kernels | None) -> None:
    """The first call of a shape runs plainly, so that the libraries set themselves up; its second call is recorded, and then replayed."""
    recording = _recording_of(compiled, memory, batch, kernels)
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


def _recording_of(compiled: Compiled, memory: Packed, batch: int, kernels: Kernels | None) -> _Recording:
    weights = tuple(weight.data_ptr() for weight in memory.weights)  # a replay reads them where they were
    key = (compiled, batch, memory.kept.dtype, memory.kept.device, weights, memory.divisor, kernels)
    found = _recordings.get(key)
    if found is None:
        found = _recordings[key] = _Recording(Machine(compiled, layout(compiled, kernels is not None), memory, batch, kernels))
        if len(_recordings) > _KEPT:
            _recordings.popitem(last=False)
    else:
        found.machine.bind(memory)
    _recordings.move_to_end(key)
    return found
