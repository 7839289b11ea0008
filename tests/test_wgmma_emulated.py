"""The emulated wgmma, decoded from registers and descriptors, against a plain product; what is done wrong gives wrong numbers or stops."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
EMULATION = CSRC / "cuda" / "emulation"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("there is no g++ to compile the emulator with")
    target = tmp_path_factory.mktemp("wgmma") / "wgmma_test"
    flags = ["-std=c++17", "-O1", "-DPCK_EMULATED", f"-I{EMULATION}", f"-I{CSRC / 'cuda'}"]
    command = [compiler, *flags, str(CSRC / "tests" / "wgmma_test.cpp"), str(EMULATION / "fibers.cpp"), "-o", str(target)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-4000:]
    return target


def run(program: Path, flaw: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, flaw], capture_output=True, text=True, check=False, timeout=120)


def test_the_product_is_the_plain_one(program: Path) -> None:
    """Bit for bit, of whole numbers, with 16 and 32 columns, in three formats and three layouts of B, by both blocks of a cluster."""
    done = run(program, "none")
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("flaw", ["start", "leading", "stride", "proxy fence", "operand", "memory"])
def test_a_flaw_gives_wrong_numbers(program: Path, flaw: str) -> None:
    """In the descriptor; no proxy fence; an operand in a register or in memory overwritten before the wait."""
    done = run(program, flaw)
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr


@pytest.mark.parametrize(
    ("flaw", "text"),
    [
        ("swizzle", "a descriptor asks for swizzling"),
        ("descriptors", "the threads of a warpgroup give different descriptors"),
        ("fence", "no wgmma.fence stands between"),
        ("commit", "asynchronous work that it has not waited for"),
        ("wait", "asynchronous work that it has not waited for"),
    ],
)
def test_a_flaw_is_named(program: Path, flaw: str, text: str) -> None:
    done = run(program, flaw)
    assert done.returncode != 0 and text in done.stderr
