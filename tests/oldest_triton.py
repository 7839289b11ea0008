"""Triton's kernels compiled with the oldest release that setup.py allows: `python tests/oldest_triton.py FOLDER [NAME ..]`.

The release is installed into FOLDER, unless it is there, and nothing else changes: what the environment has stays. Then
tests/test_triton_build.py runs with it; with NAMEs, the beginnings of rows of budget.json, those kernels alone are compiled and held
against their budgets. Compiling uses JOBS processes (2).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def oldest() -> str:
    """Such as "3.6"."""
    found = re.search(r"triton>=(\d+\.\d+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert found is not None
    return found[1]


def install(version: str, folder: Path) -> None:
    if not (folder / f"triton-{version}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"triton=={version}"], check=True)


def environment(folder: Path) -> dict[str, str]:
    """This one, in which `import triton` finds the folder's before any other, and compiles."""
    found = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    found.pop("TRITON_INTERPRET", None)
    return found


def main(arguments: Sequence[str]) -> int:
    folder, names = Path(arguments[0]).resolve(), arguments[1:]
    version = oldest()
    install(f"{version}.0", folder)
    there = environment(folder)
    program = "from pckernels.triton import ahead_of_time; print(ahead_of_time.release())"
    seen = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=there, capture_output=True, text=True, check=True).stdout.strip()
    if seen != version:
        print(f"Triton {seen} was imported in place of {version} from {folder}.")
        return 1
    ours = ["pckernels.triton.ahead_of_time", *names] if names else ["pytest", "tests/test_triton_build.py"]
    return subprocess.run([sys.executable, "-m", *ours], cwd=ROOT, env=there, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
