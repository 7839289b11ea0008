"""The cuda backend: the native engine on an NVIDIA GPU, float32, all steps in one kernel, on PyTorch's current stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pckernels import ops
from pckernels.backends import native, selection
from pckernels.backends.options import Scope
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.engine import arguments
from pckernels.errors import Unsupported
from pckernels.memory import Packed
from pckernels.planner import Limits, Plan, plan
from pckernels.sharding import sharded


@dataclass(frozen=True)
class Options:
    """What is asked of the planner: None leaves it the choice. `with cuda.options("tf32", tier="stream"): ..`

    Attributes:
        precision: "fp32", or "tf32", "bf16", "fp16" for tensor cores, which add up in fp32. Convolutions are in fp32 whatever it says.
        tier: "stream", "resident" or "cluster"; None: what the planner finds faster.
        lanes: samples of a tile; None likewise.
        product: "simt" (fp32), "mma" or "wgmma" (the others): what multiplies. None: simt or mma. No GPU has proved wgmma yet, which needs
            compute capability 9.0; so it is taken only where asked for, or, with "fastest", where the planner finds it faster.
        cluster: 2, 4, 8 or 16 blocks that share a tile, in tier "cluster"; None likewise, of up to 8.
    """

    precision: str = "fp32"
    tier: str | None = None
    lanes: int | None = None
    product: str | None = None
    cluster: int | None = None


options = Scope(Options)


@lru_cache(maxsize=1)
def engine() -> Any:
    """The compiled extension. Raises ImportError where it was not built."""
    return import_module("pckernels._cuda")


def availability() -> tuple[bool, str]:
    """Whether the extension was built and there is a GPU. (Counted without initialising CUDA, which would spoil a later fork.)"""
    try:
        info = engine().info
    except ImportError as error:
        return False, f"the CUDA extension is missing ({error}); install pckernels with nvcc at hand"
    if torch.version.cuda is None:
        return False, "this PyTorch was built without CUDA"
    if torch.cuda.device_count() == 0:
        return False, f"PyTorch finds no CUDA device ({info()['unusable'] or 'CUDA_VISIBLE_DEVICES may hide it'})"
    return True, "native engine for NVIDIA GPUs, float32, all steps in one kernel"


def refusal(call: Call) -> str | None:
    """Why the engine cannot run a call, or None."""
    return selection.refusal_on(device_of(call), call, plan_for)


def device_of(call: Call) -> torch.device | str:
    """The one device of a call's tensors, or why there is none."""
    return selection.device_of(call, DEVICE, "a CUDA device")


DEVICE = "cuda"  # tests of the emulated engine set "cpu"


def plan_for(compiled: Compiled | str, batch: int, device: torch.device) -> Plan | str:
    """How code runs on a batch under the options of this context."""
    assert isinstance(compiled, Compiled)
    return _planned(compiled, batch, limits(device), options.get())


@lru_cache(maxsize=1024)
def _planned(compiled: Compiled, batch: int, limits: Limits, wanted: Options) -> Plan | str:
    wishes = (wanted.precision, wanted.tier, wanted.lanes, wanted.product, wanted.cluster)
    return plan(compiled.code, batch, limits, *wishes)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """What a device has."""
    properties = torch.cuda.get_device_properties(device)
    usual = Limits.of(10 * properties.major + properties.minor, properties.multi_processor_count)
    return replace(usual, shared_bytes=getattr(properties, "shared_memory_per_block_optin", usual.shared_bytes))


def run(call: Call) -> Outcome:
    """One inference, in order with whatever else is on the current stream."""
    return native.run_on(device_of(call), call, execute, plan_for)


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 tensors on a CUDA device."""
    number = ops.number_of(compiled)
    torch.ops.pckernels.relax.out(memory.weights, memory.inputs, number, batch, factor, out=memory.written)


def launch(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Put code's kernels on the current stream of the current device, which is the tensors'. Nothing waits for the GPU."""
    device = memory.energies.device
    found = plan_for(compiled, batch, device)
    if isinstance(found, str):  # of an op's call, or of the feed-forward pass that a complaint makes: nobody has asked before
        raise Unsupported(found)
    program, tables = loaded(compiled, device, found.cluster)
    cut = (found.tier, found.lanes, found.precision, found.blocks, found.product, found.staged)
    workspace = torch.empty(program.workspace_bytes(batch, *cut), dtype=torch.uint8, device=device)
    weights, gradients = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.gradients))
    pointers = (weights, memory.io_addresses, gradients)
    places = (tables.data_ptr(), workspace.data_ptr(), workspace.numel())
    program.run(*pointers, memory.energies.data_ptr(), batch, factor, *places, *cut, device.index or 0, _stream(device))


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def program_of(module: Any, compiled: Compiled, cluster: int) -> Any:
    """The code as an engine's module takes it; for clusters, sharded over their blocks."""
    code = compiled if cluster == 1 else replace(compiled, code=sharded(compiled.code, cluster))
    return module.Program(**arguments(code), cluster=cluster)


@lru_cache(maxsize=256)
def loaded(compiled: Compiled, device: torch.device, cluster: int = 1) -> tuple[Any, Tensor]:
    """The engine's copy of the code for clusters of so many blocks, checked, and its tables on the device."""
    with torch.device("cpu"):
        program = program_of(engine(), compiled, cluster)
        tables = torch.frombuffer(bytearray(program.tables()), dtype=torch.uint8)
    return program, tables.to(device)
