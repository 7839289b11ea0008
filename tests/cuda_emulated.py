"""The CUDA engine compiled for the CPU, where a block's threads are fibers (csrc/cuda/emulation), in the place of an engine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from pckernels import dispatch, ops
from pckernels.backends import cuda
from pckernels.instructions import Code
from pckernels.memory import Memory
from pckernels.planner import Limits
from pckernels.sharding import sharded

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"


@lru_cache(maxsize=1)
def module(folder: Path) -> Any:
    """The module _cuda_emulated, built in `folder` from the sources as they are. Skips where there is no compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no g++ to compile the CUDA engine for the CPU with")
    found = subprocess.run(
        ["bash", str(CUDA / "emulation" / "build.sh"), str(folder)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    path = folder / f"_cuda_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda_emulated", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


GUARD = 4096  # bytes behind the workspace that nobody may write


def aligned(count: int) -> numpy.ndarray:
    """NaN bytes, at a multiple of 256."""
    raw = numpy.full(count + 256, 0xFF, dtype=numpy.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + count]


class Engine:
    """What Case.run takes for an engine: programs run on the emulated kernels, cut as this says. `staged`: rows of it, by wgmma."""

    def __init__(
        self, built: Any, lanes: int, precision: str = "fp32", tier: str = "stream", blocks: int = 0, staged: int = 0, cluster: int = 1
    ):
        self.built, self.cluster = built, cluster
        self.cut = (tier, lanes, precision, blocks, "wgmma" if staged else "", staged)

    def prepared(self, code: Code) -> Code:
        """The code that the blocks execute."""
        return code if self.cluster == 1 else sharded(code, self.cluster)

    def Program(self, **settings: Any) -> Program:  # noqa: N802
        """As the engine's class of this name."""
        return Program(self.built.Program(**settings, cluster=self.cluster), self.cut)


class Program:
    def __init__(self, program: Any, cut: tuple[str, int, str, int, str, int]):
        self.program, self.cut = program, cut
        self.tables = aligned(len(program.tables()))
        self.tables[:] = numpy.frombuffer(program.tables(), dtype=numpy.uint8)

    def run(
        self,
        weights: Any,
        io: Any,
        gradients: Any,
        energies: int,
        batch: int,
        threads: int = 1,
        factor: float = 1.0,
        tile_groups: int = 0,
    ) -> None:
        size = self.program.workspace_bytes(batch, *self.cut)
        workspace = aligned(size + GUARD)
        memory = (self.tables.ctypes.data, workspace.ctypes.data, size)
        self.program.run(list(weights), list(io), list(gradients), energies, batch, factor, *memory, *self.cut)
        assert (workspace[size:] == 0xFF).all()


def install(built: Any, monkeypatch: pytest.MonkeyPatch, limits: Limits) -> None:
    """The cuda backend then runs the CPU's tensors on the emulated kernels, planned for a GPU of these limits."""
    built_for: dict[tuple[int, int], Program] = {}

    def launch(compiled: Any, memory: Memory, batch: int, factor: float) -> None:
        found = cuda.plan_for(compiled, batch, torch.device("cpu"))
        assert not isinstance(found, str), found
        cut = (found.tier, found.lanes, found.precision, found.blocks, found.product, found.staged)
        key = ops.number_of(compiled), found.cluster
        if key not in built_for:
            built_for[key] = Program(cuda.program_of(built, compiled, found.cluster), cut)
        program = built_for[key]
        program.cut = cut
        assert program.program.shared_bytes(*cut[:3], *cut[4:]) == found.shared_bytes
        pointers = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.io, memory.gradients))
        program.run(*pointers, memory.energies.data_ptr(), batch, factor=factor)

    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "execute", launch)
    monkeypatch.setattr(cuda, "limits", lambda device: limits)
    emulated = dispatch.Backend(dispatch.Support(True, "emulated"), cuda.refusal, lambda call: cuda.run(call))
    monkeypatch.setitem(dispatch._BACKENDS, "cuda", emulated)
