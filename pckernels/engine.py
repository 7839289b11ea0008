"""The compiled engine for the CPU: addresses and numbers in, nothing of torch inside."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch

from pckernels.compiler import Compiled
from pckernels.memory import Packed


@lru_cache(maxsize=1)
def extension() -> Any:
    """The compiled extension, with the instruction set that PCKERNELS_INSTRUCTIONS names, or the best that the processor has.

    Raises:
        ImportError: it was not built.
        ValueError: there is no such instruction set here.
    """
    module = import_module("pckernels._native")
    wanted = os.environ.get("PCKERNELS_INSTRUCTIONS", "")
    if wanted:
        module.choose_instruction_set(wanted)
    return module


def execute(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over contiguous float32 tensors on the CPU, with as many threads as PyTorch uses."""
    weights, gradients = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.gradients))
    threads = torch.get_num_threads()
    program(compiled).run(weights, memory.io_addresses, gradients, memory.energies.data_ptr(), batch, threads, factor)


@lru_cache(maxsize=256)
def program(compiled: Compiled) -> Any:
    """The engine's copy of the code, checked and ready to run."""
    return extension().Program(**arguments(compiled))


def arguments(compiled: Compiled) -> dict[str, Any]:
    """Code as every engine takes it: arrays of numbers, and the sizes of what it reads and writes."""
    code = compiled.code
    words, phases = code.encoded()
    table = [[p.weight, p.bias, p.g_slot, p.x_slot, p.positions, p.inputs, p.outputs, p.x_stride, p.x_offset] for p in code.products]
    return {
        "words": words.numpy(),
        "phases": phases.numpy(),
        "products": torch.tensor(table, dtype=torch.int32).reshape(-1, 9).numpy(),
        "coefficients": torch.tensor([p.coefficient for p in code.products], dtype=torch.float32).numpy(),
        "rows": code.rows,
        "weights": [(info.outputs, info.inputs) for info in compiled.weights],
        "io": [place.n for place in compiled.io],
        "gradients": compiled.gradient_sizes,
        "steps": code.steps,
        "energies": code.energies,
    }
