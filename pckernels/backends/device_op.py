"""torch.ops.pckernels.relax on CUDA tensors: by the native engine, and by Triton's kernels where the engine was not built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pckernels import ops
from pckernels.backends import cuda, triton
from pckernels.compiler import Compiled
from pckernels.errors import Unsupported
from pckernels.memory import Packed

Launch = Callable[[Compiled, Packed, int, float], None]


@dataclass(frozen=True)
class Choice:
    """Who runs the op, and why; launch is None where nobody can."""

    launch: Launch | None
    reason: str


@lru_cache(maxsize=1)
def choice() -> Choice:
    """The engine if it can run at all: what it then refuses is refused, as its options may have asked for."""
    has_engine, why_not = cuda.availability()
    if has_engine:
        return Choice(cuda.launch, "the cuda backend")
    has_triton, nor = triton.availability()
    if has_triton:
        return Choice(triton.launch, f"the triton backend; not cuda: {why_not}")
    return Choice(None, f"nobody; not cuda: {why_not}; not triton: {nor}")


def relax(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float, *, out: list[Tensor]) -> None:
    """relax.out. Raises Unsupported: neither backend is there, or the one that is refuses the code."""
    chosen = choice()
    if chosen.launch is None:
        raise Unsupported(f"torch.ops.pckernels.relax cannot run on CUDA tensors here: {chosen.reason}.")
    found = ops.code_of(code)
    chosen.launch(found, Packed.of(found, batch, weights, inputs, out), batch, factor)


def _on_device(weights: list[Tensor], inputs: list[Tensor], code: int, batch: int, factor: float, *, out: list[Tensor]) -> None:
    with torch.cuda.device(out[-1].device):
        relax(weights, inputs, code, batch, factor, out=out)


def register() -> None:
    """Make it the op's kernel for CUDA tensors: once a process."""
    ops.LIBRARY.impl("relax.out", ops._guarded("relax.out", _on_device), "CUDA")
