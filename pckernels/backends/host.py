"""The host backend: the native engine on the CPU, float32, all steps in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from pckernels import engine
from pckernels.backends import native, selection
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.memory import Packed


def availability() -> tuple[bool, str]:
    """Whether the engine was built, and for what."""
    try:
        info = engine.extension().info()
    except ImportError as error:
        return False, f"the compiled extension is missing ({error}); install pckernels with a C++17 compiler at hand"
    except ValueError as error:
        return False, f"PCKERNELS_INSTRUCTIONS asks for what is not there: {error}"
    return True, f"native engine for the CPU, float32, {info['chosen']} instructions ({info['why']})"


def refusal(call: Call) -> str | None:
    """Why the engine cannot run a call, or None."""
    for tensor in call.tensors.values():
        if not _fits(tensor):
            return f"it runs float32 on the CPU; this call has {tensor.dtype} on {tensor.device}"
    if not selection.is_float32(call.trace.graph):
        return "it runs float32; a vertex of this graph has another dtype"
    return selection.refusal(call)


def _fits(tensor: Tensor) -> bool:
    return tensor.is_cpu and (tensor.dtype is torch.float32 or not tensor.is_floating_point())


def run(call: Call) -> Outcome:
    """One inference on the CPU, with as many threads as PyTorch uses."""
    return native.run(call, execute)


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over float32 tensors on the CPU. (What torch.ops.pckernels.relax does, without the dispatcher on the way.)"""
    engine.execute(compiled, memory, batch, factor)
