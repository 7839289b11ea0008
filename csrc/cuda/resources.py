"""What every CUDA kernel takes of the chip, as ptxas says, held against budget.json: `python csrc/cuda/resources.py [--write]`.

A kernel over its budget, without a row, that spills, has a stack frame or makes wgmma wait for each product is an error. --write makes
the rows what is found now, registers rounded up to the 8 that the chip hands out at once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
BUDGET = FOLDER / "budget.json"
ARCHITECTURES = {"sm_80": "arch=compute_80,code=sm_80", "sm_90a": "arch=compute_90a,code=sm_90a"}
Resources = dict[str, dict[str, int]]  # "kernel sm_80" -> registers, spills, stack, shared

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized.* in (?:the )?function '(\w+)'")  # C7510 and its kin
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


def compile_all() -> tuple[Resources, dict[str, str]]:
    """Resources of every kernel on every architecture, and the PTX of every file, by its name."""
    sources = sorted(FOLDER.glob("*.cu"))
    workers = int(os.environ.get("JOBS", "2"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(lambda source: _compiled(source, Path(folder)), sources))
    resources: Resources = {}
    for part, _ in found:
        resources.update(part)
    return resources, {source.stem: ptx for source, (_, ptx) in zip(sources, found, strict=True)}


def _compiled(source: Path, folder: Path) -> tuple[Resources, str]:
    target = folder / source.stem
    target.mkdir()
    options = [option for code in ARCHITECTURES.values() for option in ("-gencode", code)]
    command = ["nvcc", "-std=c++17", "-O3", *options, "-Xptxas", "-v,--warn-on-spills", "-keep", "-keep-dir", str(target)]
    run = subprocess.run([*command, "-c", str(source), "-o", str(target / "object")], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"nvcc could not compile {source.name}:\n{run.stderr}")
    ptx = sorted(target.glob("*.ptx"))[-1]  # of the newer architecture
    return parsed(source.stem, run.stdout + run.stderr), ptx.read_text(encoding="utf-8")


def parsed(name: str, log: str) -> Resources:
    """The resources in ptxas's words. A file holds one kernel, or none."""
    found: Resources = {}
    key = ""
    serialized: set[str] = set()
    functions: dict[str, str] = {}
    for line in log.splitlines():
        if warning := _SERIALIZED.search(line):
            serialized.add(warning[1])
        if entry := _ENTRY.search(line):
            key = f"{name} {entry[2]}"
            functions[key] = entry[1]
            if key in found:
                raise RuntimeError(f"{name}.cu holds more than one kernel.")
            found[key] = {}
        elif key and (frame := _FRAME.search(line)):
            found[key].update(stack=int(frame[1]), spills=int(frame[2]) + int(frame[3]))
        elif key and (used := _USED.search(line)):
            found[key].update(registers=int(used[1]), shared=int(used[2] or 0))
    for key, function in functions.items():
        if function in serialized:  # ptxas does not say for which architecture
            found[key]["serialized products"] = 1
    return found


def complaints(found: Resources, budget: Resources) -> list[str]:
    """What is over budget, in sentences."""
    result = [f"{key} has a budget and is not compiled." for key in budget.keys() - found.keys()]
    for key, resources in found.items():
        if key not in budget:
            result.append(f"{key} has no row in budget.json.")
        for what, amount in resources.items():
            allowed = budget.get(key, {}).get(what, amount) if what in ("registers", "shared") else 0
            if amount > allowed:
                result.append(f"{key} takes {amount} of {what}; its budget is {allowed}.")
    return result


def table(found: Resources) -> str:
    lines = [f"{'kernel':24} registers  spills  stack  static shared"]
    return "\n".join(
        lines + [f"{k:24} {r['registers']:9} {r['spills']:7} {r['stack']:6} {r['shared']:14}" for k, r in sorted(found.items())]
    )


def main() -> int:
    if shutil.which("nvcc") is None:
        print("There is no nvcc on the PATH.")
        return 2
    found, _ = compile_all()
    print(table(found))
    if "--write" in sys.argv[1:]:
        rows = {key: {"registers": -(-found[key]["registers"] // 8) * 8, "shared": found[key]["shared"]} for key in sorted(found)}
        BUDGET.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        return 0
    wrong = complaints(found, json.loads(BUDGET.read_text(encoding="utf-8")))
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
