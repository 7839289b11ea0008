"""The host backend: the native engine on the CPU, float32, all steps in one call."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pckernels.backends import native
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.interpreter import Memory


@lru_cache(maxsize=1)
def engine() -> Any:
    """The compiled extension. Raises ImportError where it was not built."""
    return import_module("pckernels._native")


def availability() -> tuple[bool, str]:
    """Whether the engine was built, and for what."""
    try:
        info = engine().info()
    except ImportError as error:
        return False, f"the compiled extension is missing ({error}); install pckernels with a C++17 compiler at hand"
    return True, f"native engine for the CPU, float32, {info['chosen']} instructions ({info['why']})"


def refusal(call: Call) -> str | None:
    """Why the engine cannot run a call, or None."""
    other = next((tensor for tensor in call.tensors.values() if not _fits(tensor)), None)
    if other is not None:
        return f"it runs float32 on the CPU; this call has {other.dtype} on {other.device}"
    if any(vertex.dtype not in (None, torch.float32) for vertex in call.trace.graph.vertices):
        return "it runs float32; a vertex of this graph has another dtype"
    return native.refusal(call)


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and (tensor.dtype is torch.float32 or not tensor.is_floating_point())


def run(call: Call) -> Outcome:
    """One inference on the CPU, with as many threads as PyTorch uses."""
    return native.run(call, execute)


def execute(compiled: Compiled, memory: Memory, batch: int, factor: float) -> None:
    """Run code over float32 tensors on the CPU."""
    pointers = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.io, memory.gradients))
    program(compiled).run(*pointers, memory.energies.data_ptr(), batch, torch.get_num_threads(), factor)


@lru_cache(maxsize=256)
def program(compiled: Compiled) -> Any:
    """The engine's copy of the code, checked and ready to run."""
    code = compiled.code
    words, phases = code.encoded()
    table = [[p.weight, p.bias, p.g_slot, p.x_slot, p.positions, p.inputs, p.outputs, p.x_stride, p.x_offset] for p in code.products]
    return engine().Program(
        words=words.numpy(),
        phases=phases.numpy(),
        products=torch.tensor(table, dtype=torch.int32).reshape(-1, 9).numpy(),
        coefficients=torch.tensor([p.coefficient for p in code.products], dtype=torch.float32).numpy(),
        rows=code.rows,
        weights=[(info.outputs, info.inputs) for info in compiled.weights],
        io=[place.n for place in compiled.io],
        gradients=list(compiled.gradient_sizes),
        steps=code.steps,
        energies=code.energies,
    )
