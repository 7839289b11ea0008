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
    """What Case.run takes for an engine: programs run on the emulated kernels, cut as this says."""

    def __init__(self, built: Any, lanes: int, precision: str = "fp32", tier: str = "stream", blocks: int = 0, staged: int = 0):
        self.built, self.cut = built, (tier, lanes, precision, blocks, "wgmma" if staged else "", staged)

    def Program(self, **settings: Any) -> Program:  # noqa: N802
        """As the engine's class of this name."""
        return Program(self.built.Program(**settings), self.cut)


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
