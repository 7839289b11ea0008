"""Triton's kernels beside the CUDA engine and a PyTorch loop captured in a CUDA graph: `python bench/gpu_triton.py --out triton.json`.

Strict inference, T = 20, then the local updates, of an MLP that fits in registers and of one that does not, by each kind of Triton kernel
that can run it (pckernels/triton_planner.py), at batches from 1 to 8192:
kernels alone, over the memory of one call, captured in a CUDA graph. Milliseconds: the median of the repetitions and the middle 80 %. The
loop is that of pckernels/benchmarks/eager.py, as one would write it, with float32 products or TF32 ones. Before anything is timed, its
gradients are held against those of the loop in float64.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from gpu_step import captured, kernels_of, milliseconds, rows_within
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import cuda, triton
from pckernels.benchmarks import eager

BATCHES = (1, 8, 64, 512, 4096, 8192)
STEPS, RATE = 20, 0.1
MODELS = {"MLP 784-300-300-10": (784, 300, 300, 10), "MLP 784-64-64-10": (784, 64, 64, 10)}
VARIANTS = {"MLP 784-300-300-10": ("pinned", "scratch"), "MLP 784-64-64-10": ("on_chip", "pinned", "scratch")}
PRECISIONS = ("fp32", "tf32", "bf16")
BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton}
TOLERANCE = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}  # of gradients: one sample on the other side of a kink is 2e-4 already


def mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k, n in itertools.pairwise(sizes):
        layers += [nn.Linear(k, n), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).cuda()


def exact_gradients(module: nn.Sequential, x: Tensor, target: Tensor) -> list[Tensor]:
    return eager.mlp(copy.deepcopy(module).double(), x.double(), target.double(), STEPS, RATE)


def error(found: list[Tensor], exact: list[Tensor], scale: float) -> float:
    """The largest relative error of a gradient."""
    return max(float((scale * a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def of_loop(module: nn.Sequential, x: Tensor, target: Tensor, seconds: float) -> Iterator[dict[str, Any]]:
    exact = exact_gradients(module, x, target)
    for precision in ("fp32", "tf32"):
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            off = error(eager.mlp(module, x, target, STEPS, RATE), exact, 1.0)
            run = captured(lambda: eager.mlp(module, x, target, STEPS, RATE))
            yield checked(f"PyTorch loop in a CUDA graph, {precision}", off, precision) | milliseconds(run, seconds)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False


def of_backend(name: str, module: nn.Sequential, x: Tensor, target: Tensor, seconds: float, **options: str) -> Iterator[dict[str, Any]]:
    exact, backend = exact_gradients(module, x, target), BACKENDS[name]
    network = pck.PCNetwork(module, pck.Strict(STEPS, RATE), backend=name)
    for precision in PRECISIONS:
        with backend.options(precision, **options):
            kernels = kernels_of(backend, network, x, target)
            found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
            off = error(found, exact, float(len(x)))  # PCNetwork divides by the batch
            row = checked(", ".join((name, *options.values(), precision, "kernels in a CUDA graph")), off, precision)
            yield row | {"plan": network.infer(x, target).plan} | milliseconds(captured(kernels), seconds)


def checked(method: str, off: float, precision: str) -> dict[str, Any]:
    return {"method": method, "relative_error": off, "ok": off < TOLERANCE[precision]}


def attempted(rows: Iterator[dict[str, Any]], case: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """What could be measured; a failure is a row that says so."""
    found: list[dict[str, Any]] = []
    try:
        found.extend({**case, **row} for row in rows)
    except Exception as failure:
        found.append({**case, "method": f"{name}: FAILED", "ok": False, "error": f"{type(failure).__name__}: {failure}"})
    return found


def cases(model: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    module, case = mlp(MODELS[model]), {"model": model, "batch": batch}
    x, target = torch.randn(batch, 784, device="cuda"), torch.randn(batch, 10, device="cuda")
    rows = attempted(of_loop(module, x, target, seconds), case, "PyTorch loop")
    for name in BACKENDS:
        support = pck.backends()[name]
        if support.ok:
            for options in [{"variant": variant} for variant in VARIANTS[model]] if name == "triton" else [{}]:
                found = of_backend(name, module, x, target, seconds, **options)
                rows += attempted(found, case, " ".join((name, *options.values())))
        else:
            rows.append({**case, "method": name, "ok": name != "triton", "error": support.reason})
    return rows


def line(row: dict[str, Any]) -> str:
    found = f"{row['median']:10.4f} ms  off by {row['relative_error']:.1e}" if "median" in row else row["error"]
    return f"{row['model']:20} {row['batch']:5}  {row['method']:48} {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_triton.json"))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each measurement")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which no new case begins")
    arguments = parser.parse_args()
    measured = rows_within(arguments.limit, MODELS, BATCHES, lambda model, batch: cases(model, batch, arguments.seconds))
    rows = [row for some in measured for row in some]
    import triton as compiler

    versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": compiler.__version__}
    arguments.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(line(row) for row in rows))
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
