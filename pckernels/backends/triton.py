"""The triton backend: the engines' instructions by kernels in Triton, float32, all steps in one kernel, on PyTorch's current stream.

With TRITON_INTERPRET=1 (read when Triton is first imported) the kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, util
from typing import Any

import torch
from torch import Tensor

from pckernels.backends import native, selection
from pckernels.backends.options import Scope
from pckernels.call import Call, Outcome
from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.instructions import Op
from pckernels.memory import Packed
from pckernels.planner import Limits
from pckernels.triton_planner import Options, Plan, plan

options = Scope(Options)
INTERPRETED = Limits(80, 0, 1)  # what the interpreter plans for: no shared memory, and two programs, so that one takes several tiles


def interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def availability() -> tuple[bool, str]:
    """Whether there is Triton, and something to run it on. (Neither Triton nor CUDA is initialised for it.)"""
    if util.find_spec("triton") is None:
        return False, "Triton is not installed: `pip install triton`"
    if interpreted():
        return True, "Triton kernels in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)"
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return False, "PyTorch finds no CUDA device; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, for tests"
    return True, "Triton kernels for NVIDIA GPUs, float32, all steps in one kernel"


def refusal(call: Call) -> str | None:
    """Why the kernels cannot run a call, or None."""
    return selection.refusal_on(device_of(call), call, plan_for)


def device_of(call: Call) -> torch.device | str:
    """The one device of a call's tensors, or why there is none."""
    kind, place = ("cpu", "the CPU in Triton's interpreter") if interpreted() else ("cuda", "a CUDA device")
    return selection.device_of(call, kind, place)


def plan_for(compiled: Compiled | str, batch: int, device: torch.device) -> Plan | str:
    """How code runs on a batch under the options of this context."""
    assert isinstance(compiled, Compiled)
    wanted = options.get()
    if interpreted() and wanted.precision == "bf16":
        return "Triton's interpreter gets products of bf16 wrong; fp16 and fp32 are right there, and bf16 on a GPU"
    return _planned(compiled, batch, limits(device), wanted)


@lru_cache(maxsize=1024)
def _planned(compiled: Compiled, batch: int, limits: Limits, wanted: Options) -> Plan | str:
    return plan(compiled, batch, limits, wanted)


@lru_cache(maxsize=64)
def limits(device: torch.device) -> Limits:
    """What a device has."""
    if device.type == "cpu":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return Limits.of(10 * properties.major + properties.minor, properties.multi_processor_count)


def run(call: Call) -> Outcome:
    """One inference, in order with whatever else is on the current stream."""
    return native.run_on(device_of(call), call, launch, plan_for)


# Launching


def launch(compiled: Compiled, memory: Packed, batch: int, factor: float) -> None:
    """Run code over contiguous float32 tensors of one device: results, gradients and energies are written. Nothing waits for the GPU."""
    device = memory.energies.device
    found = plan_for(compiled, batch, device)
    if isinstance(found, str):  # of an op's call, or of the feed-forward pass that a complaint makes: nobody has asked before
        raise Unsupported(found)
    with _on(device):
        if found.variant == "on_chip":
            kernels("relax_mlp").run(compiled, memory, batch, factor, found.precision, found.shape.lanes)
        elif found.variant == "pinned":
            shape, room = found.shape, limits(device).shared_bytes
            kernels("relax_mlp_pinned").run(compiled, memory, batch, factor, room, found.precision, shape.lanes, shape.warps)
        else:
            _Launch(compiled, memory, batch, found).run(factor)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def kernels(name: str) -> Any:
    """A module of kernels. Importing one imports Triton."""
    return import_module(f"pckernels.triton.{name}")


@dataclass(frozen=True)
class Tables:
    """Code on a device: instructions, phases, and where in a program's own sums each gradient slot that the loop learns has its part."""

    words: Tensor
    phases: Tensor
    learned_at: Tensor
    learned: dict[int, tuple[int, int]]  # slot: first element, elements
    learned_size: int


@lru_cache(maxsize=256)
def tables(compiled: Compiled, device: torch.device) -> Tables:
    learning = {i.slot for i in compiled.code.instructions if i.op in (Op.CONV_LEARN, Op.SUM_LEARN)}
    learned, size = {}, 0
    for slot in sorted(learning):
        learned[slot] = (size, compiled.gradient_sizes[slot])
        size += compiled.gradient_sizes[slot]
    with torch.device("cpu"):
        words, phases = compiled.code.encoded()
        starts = [learned.get(slot, (0, 0))[0] for slot in range(max(1, len(compiled.gradients)))]
        learned_at = torch.tensor(starts, dtype=torch.int32)
    return Tables(words.to(device), phases.to(device), learned_at.to(device), learned, size)


class _Launch:
    """One run of code: its tables and scratch memory, kernel by kernel."""

    def __init__(self, compiled: Compiled, memory: Packed, batch: int, plan: Plan):
        self.compiled, self.code, self.memory, self.batch, self.plan = compiled, compiled.code, memory, batch, plan
        self.device = memory.energies.device
        self.tables = tables(compiled, self.device)

    def run(self, factor: float) -> None:
        tiles = -(-self.batch // self.plan.shape.lanes)
        learned = self._new(self.plan.programs, self.tables.learned_size).zero_()
        energies = self._new(tiles, self.code.steps + 1, self.code.energies, dtype=torch.float64).zero_()
        if self.code.phases:
            self._relax(learned, energies)
        kernels("tables").sum_parts(energies, self.memory.energies, 1.0, add=False)
        self._learn(learned, factor)

    def _relax(self, learned: Tensor, energies: Tensor) -> None:
        plan, shape = self.plan, self.plan.shape
        kernels("relax").relax[(plan.programs,)](
            self.tables.words,
            self.tables.phases,
            len(self.code.phases),
            self._addresses(self.memory.weights),
            self._addresses(self.memory.io),
            self._new(plan.programs, self.code.rows, plan.shape.lanes),
            self.code.rows,
            learned,
            self.tables.learned_at,
            self.tables.learned_size,
            energies,
            energies[0].numel(),
            self.code.energies,
            self.batch,
            PRECISION=plan.precision,
            **shape.constants,
            num_warps=shape.warps,
        )

    def _addresses(self, tensors: Any) -> Tensor:
        """A table of addresses on the device."""
        module = kernels("tables")
        step = module.ADDRESSES
        table = self._new(max(1, len(tensors)), dtype=torch.int64)
        for first in range(0, len(tensors), step):
            some = [tensor.data_ptr() for tensor in tensors[first : first + step]]
            module.write_addresses[(1,)](table, first, len(some), *some, *[0] * (step - len(some)))
        return table

    def _learn(self, learned: Tensor, factor: float) -> None:
        """Outer products, and what the programs have summed in the loop; a gradient that nothing has reached is 0."""
        code, gradients = self.code, self.memory.gradients
        kernels("local_update").learn(code.products, self.memory.io, gradients, self.batch, factor, self.plan.precision)
        done = {slot for product in code.products for slot in (product.weight, product.bias)}
        for slot, gradient in enumerate(gradients):
            if slot in self.tables.learned:
                start, size = self.tables.learned[slot]
                kernels("tables").sum_parts(learned[:, start : start + size], gradient, factor, add=slot in done)
            elif slot not in done:
                gradient.zero_()

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)
