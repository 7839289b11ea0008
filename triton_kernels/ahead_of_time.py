"""Every Triton kernel compiled without a GPU, and held against budget.json: `python -m pckernels.triton.ahead_of_time [--write] [NAME ..]`.

A module with kernels has a function `builds()` that yields a `Build` for each configuration that may run, and a line in MODULES. Each is
compiled for every architecture; the registers come from cuobjdump, the shared memory from Triton. A row over its budget, without a
budget, with a stack frame (which is where registers spill to) or beyond the chip's shared memory is an error; a row may allow a "stack",
by hand. Each release of Triton compiles in its own way and has rows of its own. --write widens those of the installed one to what is
found now, registers rounded up to the 8 that the chip hands out at once. NAME: the beginnings of the rows that are wanted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

MODULES = ("cross_entropy", "local_update", "max_pool", "relax", "relax_mlp", "relax_mlp_pinned", "rows", "step_update", "tables")
BUDGET = Path(__file__).parent / "budget.json"
ARCHITECTURES = {"sm_80": 80, "sm_90": 90}
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # what a block may opt into
Resources = dict[str, int]  # registers, stack, shared
Rows = dict[str, Resources]  # "kernel configuration sm_80" -> its resources

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants.

    Attributes:
        name: of its rows, such as "local_update fp32".
        kernel: the @triton.jit function.
        signature: of each argument that is not a constant, its type, such as "*fp32", "i32", or a tuple of types.
        constants: the constexpr arguments.
        options: of Triton: num_warps, num_stages.
        apart: pointer arguments that need not be multiples of 16 bytes, as all others are that PyTorch allocates.
        multiples: integer arguments that are multiples of 16, as most shapes are: vectors may then be loaded and stored.
        mma: whether its products run on tensor cores (True) or must not (False); None: it has none.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4})
    apart: tuple[str, ...] = ()
    multiples: tuple[str, ...] = ()
    mma: bool | None = None


@dataclass(frozen=True)
class Result:
    """What the compiler made of a build for one architecture."""

    resources: Resources
    ptx: str


def builds() -> Iterator[Build]:
    """Every build of every module."""
    for name in MODULES:
        yield from import_module(f"pckernels.triton.{name}").builds()


def compile_build(build: Build, architecture: str) -> Result:
    """Compile for an architecture of ARCHITECTURES. Raises RuntimeError in the interpreter, which has no compiler."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it.")
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    compiled = triton.compile(_source(build), target=target, options=dict(build.options))
    return Result({**_usage(compiled.asm["cubin"]), "shared": compiled.metadata.shared}, compiled.asm["ptx"])


def _source(build: Build) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in build.signature and name not in build.constants]
    if missing or len(build.signature) + len(build.constants) != len(names):
        raise ValueError(f"{build.name}: signature and constants must name each argument of the kernel once; missing: {missing}.")
    aligned = [path for name, kind in signature.items() if name not in build.apart for path in _pointers(names.index(name), kind)]
    aligned += [(names.index(name),) for name in build.multiples]
    kind = GluonASTSource if build.kernel.is_gluon() else ASTSource
    return kind(build.kernel, signature, constexprs=dict(build.constants), attrs={path: [["tt.divisibility", 16]] for path in aligned})


def _pointers(place: int, kind: Any) -> list[tuple[int, ...]]:
    """Where the pointers of an argument stand."""
    if isinstance(kind, tuple):
        return [(place, *path) for k, part in enumerate(kind) for path in _pointers(k, part)]
    return [(place,)] if isinstance(kind, str) and kind.startswith("*") else []


def _usage(cubin: bytes) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        run = subprocess.run([cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    return parsed(run.stdout)


def parsed(text: str) -> Resources:
    """Registers and bytes of stack in the words of cuobjdump."""
    found = _USAGE.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources:\n{text}")
    return {"registers": int(found[1]), "stack": int(found[2]) + int(found[3])}


@lru_cache(maxsize=1)
def cuobjdump() -> str:
    """The program in Triton's wheel, or on the PATH."""
    import triton

    packed = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(packed) if packed.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("There is no cuobjdump, neither in Triton's wheel nor on the PATH; install the CUDA toolkit.")
    return found


def compile_all(wanted: Sequence[str] = ()) -> dict[str, Result]:
    """Every build on every architecture, by row; in JOBS processes (2)."""
    rows = [(build.name, architecture) for build in builds() for architecture in ARCHITECTURES]
    rows = [row for row in rows if not wanted or row[0].startswith(tuple(wanted))]
    # Forked, a process would share locks with the threads of PyTorch.
    with ProcessPoolExecutor(int(os.environ.get("JOBS", "2")), get_context("spawn")) as pool:
        found = pool.map(_compile_row, *zip(*rows, strict=True), chunksize=4) if rows else []
        return {" ".join(row): result for row, result in zip(rows, found, strict=True)}


def _compile_row(name: str, architecture: str) -> Result:
    return compile_build(_by_name()[name], architecture)


@lru_cache(maxsize=1)
def _by_name() -> dict[str, Build]:
    found: dict[str, Build] = {}
    for build in builds():
        if build.name in found:
            raise ValueError(f"Two builds are named {build.name!r}.")
        found[build.name] = build
    return found


def complaints(found: Rows, budget: Rows, wanted: Sequence[str] = ()) -> list[str]:
    """What is over budget, in sentences."""
    known = {key for key in budget if not wanted or key.startswith(tuple(wanted))}
    result = [f"{key} has a budget and is not compiled." for key in sorted(known - found.keys())]
    for key, resources in found.items():
        limit = SHARED_BYTES[key.rpartition(" ")[2]]
        if resources["shared"] > limit:
            result.append(f"{key} takes {resources['shared']} of shared; the chip has {limit}.")
        if key not in budget:
            result.append(f"{key} has no row in budget.json.")
        for what, amount in resources.items():
            allowed = budget.get(key, {}).get(what, 0 if what == "stack" else amount)
            if amount > allowed:
                result.append(f"{key} takes {amount} of {what}; its budget is {allowed}.")
    return result


def table(found: Rows) -> str:
    width = max([20, *map(len, found)])
    lines = [f"{'kernel':{width}} registers  stack  shared"]
    return "\n".join(lines + [f"{k:{width}} {r['registers']:9} {r['stack']:6} {r['shared']:7}" for k, r in found.items()])


def widened(budget: Rows, found: Rows, names: Iterable[str]) -> Rows:
    """The budget with room for what is found, without the rows of kernels that are gone."""
    rows = {key: row for key, row in budget.items() if key.rpartition(" ")[0] in set(names)}
    for key, resources in found.items():
        needed = {"registers": -(-resources["registers"] // 8) * 8, "shared": resources["shared"]}
        before = rows.get(key, {})
        rows[key] = {**before, **{what: max(amount, before.get(what, 0)) for what, amount in needed.items()}}
    return dict(sorted(rows.items()))


def release() -> str:
    """Of the installed Triton, such as "3.9"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def read_budget(of: str) -> Rows:
    """The rows for a release of Triton. Raises ValueError: budget.json has none."""
    budgets = _read_budgets()
    if of not in budgets:
        raise ValueError(
            f"budget.json has rows for Triton {' and '.join(budgets)}, and none for {of}. Install one of these, or look at what "
            f"`python -m pckernels.triton.ahead_of_time --write` puts there, and commit it."
        )
    return budgets[of]


def _read_budgets() -> dict[str, Rows]:
    return json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}


def _write_budget(of: str, found: Rows) -> None:
    budgets = _read_budgets()
    budgets[of] = widened(budgets.get(of, {}), found, _by_name())
    BUDGET.write_text(json.dumps(dict(sorted(budgets.items())), indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    wanted = [argument for argument in arguments if argument != "--write"]
    if "--write" not in arguments:
        read_budget(release())  # that there is one, before it takes minutes
    found = {key: result.resources for key, result in compile_all(wanted).items()}
    print(table(found))
    if "--write" in arguments:
        _write_budget(release(), found)
    wrong = complaints(found, read_budget(release()), wanted)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
