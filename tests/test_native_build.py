"""The native engine built with sanitizers and run on the code of small networks: addresses, undefined behaviour, races, barriers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from native_case import write_case
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import host
from pckernels.compiler import Compiled
from pckernels.instructions import Code
from pckernels.interpreter import execute
from pckernels.memory import Memory

CSRC = Path(__file__).resolve().parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
HOST_SOURCES = [f"host/{name}.cpp" for name in ("isa", "analysis", "check", "run", "threads", "workspace")]
RACE = 66  # the exit status of a program in which ThreadSanitizer found a race

# Compilers take their time on a busy machine.
pytestmark = [pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"), pytest.mark.timeout(900), pytest.mark.xdist_group("g++")]


def build(folder: Path, name: str, sources: list[str], *flags: str) -> Path:
    target = folder / name
    command = [str(COMPILER), "-std=c++17", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", *flags, "-o", str(target)]
    done = subprocess.run([*command, *(str(CSRC / source) for source in sources)], capture_output=True, text=True, check=False)
    if done.returncode and "cannot find" in done.stderr and "san" in done.stderr:
        pytest.skip("this compiler comes without its sanitizers")
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env={**os.environ, **environment})


@dataclass
class Example:
    """What one call of a network executes, and the outcome that the interpreter has for it."""

    code: Code
    memory: Memory
    batch: int

    def results(self) -> list[Tensor]:
        """io, gradients and energies when the interpreter is done."""
        execute(self.code, self.memory, self.batch)
        return [*self.memory.io, *self.memory.gradients, self.memory.energies]


def example(module: nn.Module, rule: object, x: Tensor, target: Tensor, loss: str = "squared_error") -> Example:
    """Catches the code on its way to the engine, which need not be there."""
    found: list[Example] = []

    def catch(compiled: Compiled, memory: Memory, batch: int, factor: float) -> None:
        io = [tensor.reshape(batch, -1).clone() for tensor in memory.io]
        found.append(Example(compiled.code, Memory([w.clone() for w in memory.weights], io, memory.gradients, memory.energies), batch))
        execute(compiled.code, memory, batch, factor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "execute", catch)
        network = pck.PCNetwork(module, rule=rule, loss=loss, backend="host")
        network.backward(x, target)
    for tensor in found[0].memory.io:
        tensor.nan_to_num_()
    return found[0]


def mlp(batch: int) -> Example:
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return example(module, pck.Strict(steps=3, rate=0.1, momentum=0.5), torch.randn(batch, 5), torch.randn(batch, 3))


def cnn() -> Example:
    convolutions = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.GELU(), nn.AvgPool2d(2)]
    module = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4, 3))
    return example(module, pck.Strict(steps=2, rate=0.1), torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 1]), "cross_entropy")


EXAMPLES: dict[str, Callable[[], Example]] = {"mlp": lambda: mlp(5), "single": lambda: mlp(1), "cnn": cnn}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def race_test(folder: Path) -> Path:
    return build(folder, "race_test", ["tests/race_test.cpp", "host/check.cpp", "host/analysis.cpp"], "-O1", "-g1", "-fsanitize=thread")


def check_results(path: Path, expected: Example, gradients: bool) -> None:
    """The results of a test program are those of the interpreter."""
    want = expected.results()
    floats = sum(tensor.numel() for tensor in want[:-1])
    raw = path.read_bytes()
    got = torch.cat([torch.from_numpy(numpy.frombuffer(raw[: 4 * floats], numpy.float32).copy()).double(), doubles(raw[4 * floats :])])
    parts = got.split([tensor.numel() for tensor in want])
    kept = [*range(len(expected.memory.io)), *(range(len(expected.memory.io), len(want) - 1) if gradients else ()), len(want) - 1]
    for k in kept:
        torch.testing.assert_close(parts[k], want[k].flatten().double(), rtol=1e-4, atol=1e-5)


def doubles(raw: bytes) -> Tensor:
    return torch.from_numpy(numpy.frombuffer(raw, numpy.float64).copy())


def test_products(folder: Path) -> None:
    source = CSRC / "tests" / "products_test.cpp"
    if not source.exists():
        pytest.skip("products_test.cpp is not there")
    here = ["-march=native"] if platform.machine() in ("x86_64", "aarch64") else []
    program = build(folder, "products_test", ["tests/products_test.cpp"], "-O2", "-fno-math-errno", "-fno-trapping-math", *here)
    done = run(program)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_thread_team_has_no_races(race_test: Path, folder: Path, name: str) -> None:
    found, case, results = EXAMPLES[name](), folder / f"{name}.case", folder / f"{name}.results"
    write_case(case, found.code, found.memory, found.batch)
    for stage in (0, 1):
        done = run(race_test, case, results, "--threads", 3, "--stage", stage)
        assert done.returncode == 0, done.stderr[:4000]
        check_results(results, found, gradients=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_barrier_is_needed(race_test: Path, folder: Path, name: str) -> None:
    """Without a barrier there is a race, and it is found; the first of a phase may be there for want of knowing better."""
    found, case = EXAMPLES[name](), folder / f"{name}.case"
    write_case(case, found.code, found.memory, found.batch)
    starts = {sum(len(phase.instructions) for phase in found.code.phases[:k]) for k in range(len(found.code.phases))}
    flags = [index for index, instruction in enumerate(found.code.instructions) if instruction.barrier]
    unseen = [k for k, index in enumerate(flags) if index not in starts and not races(race_test, case, folder, k)]
    assert not unseen, [str(found.code.instructions[flags[k]]) for k in unseen]


def races(program: Path, case: Path, folder: Path, ignored: int) -> bool:
    done = run(program, case, folder / "ignored", "--threads", 3, "--ignore", ignored, TSAN_OPTIONS=f"exitcode={RACE} halt_on_error=1")
    assert done.returncode in (0, RACE), done.stderr[:4000]
    return done.returncode == RACE


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_host_engine_is_clean(folder: Path, sanitizer: str) -> None:
    flags = ["-O0", "-g1", "-DPCK_ISA=baseline", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=undefined"]
    program = build(folder, f"host_{sanitizer[:6]}", ["tests/host_test.cpp", *HOST_SOURCES], *flags)
    for name, make in EXAMPLES.items():
        found, case, results = make(), folder / f"{name}.case", folder / f"{name}.results"
        write_case(case, found.code, found.memory, found.batch)
        for threads, tile_groups in ((3, 0), (2, 2)) if sanitizer == "thread" else ((1, 0), (2, 2)):
            done = run(program, case, results, "--threads", threads, "--tile_groups", tile_groups, "--repeat", 2)
            assert done.returncode == 0, f"{name}, {threads} threads: {done.stderr[:4000]}"
            check_results(results, found, gradients=True)
