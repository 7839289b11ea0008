"""A training step by predictive coding on a GPU, beside autograd: `python bench/gpu_step.py --out step.json`.

For each model and batch: autograd as it is and captured in a CUDA graph; strict PC of T = 20 and the exact rule in one sweep, as a user
calls them and as kernels alone, captured in a CUDA graph; on tensor cores by mma and, where the GPU has it, by wgmma. Milliseconds:
the median of the repetitions, and the middle 80 %. The exact rule's gradients are held against autograd's before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import cuda
from pckernels.benchmarks.timing import recorded
from pckernels.planner import products_on, tiers_on

BATCHES = (1, 16, 64, 256, 1024, 4096)
RULES = {"strict T=20": pck.Strict(20, 0.1), "exact": pck.ZeroDivergence()}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-300-300-10": (mlp, (784,)),
    "MLP 784-128-64-10": (small_mlp, (784,)),
    "CNN": (pck.nn.CNNModule, (3, 32, 32)),
}


def operands(model: str) -> list[tuple[str, str]]:
    """Precisions and products to measure. Those of the small MLP leave room for wgmma's tiles of 32 samples."""
    precisions = ("fp32", "tf32", "bf16") if model.startswith("MLP") else ("fp32",)
    limits = cuda.limits(torch.device("cuda", 0))
    return [(precision, product) for precision in precisions for product in products_on(limits, precision)]


def milliseconds(run: Callable[[], Any], seconds: float) -> dict[str, float]:
    """Of one call, by CUDA events around each, for about so many seconds."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times: list[float] = []
    deadline = time.monotonic() + seconds
    while len(times) < 10 or (time.monotonic() < deadline and len(times) < 500):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    tenth = len(times) // 10
    return {"median": statistics.median(times), "low": times[tenth], "high": times[-1 - tenth], "repetitions": len(times)}


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    return recorded(run)[0]


def autograd_step(module: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad(set_to_none=False)
        (0.5 * (module(x) - target).square().sum() / len(x)).backward()

    return step


def kernels_of(backend: ModuleType, network: pck.PCNetwork, x: Tensor, target: Tensor) -> Callable[[], None]:
    """The kernels of one call, to be launched again over its memory. The call leaves its gradients with the parameters."""
    seen: list[tuple[Any, ...]] = []
    name = "execute" if backend is cuda else "launch"
    entry, launch = getattr(backend, name), backend.launch

    def remember(*arguments: Any) -> None:
        seen.append(arguments)
        launch(*arguments)

    setattr(backend, name, remember)
    try:
        network.zero_grad()
        network.backward(x, target)
    finally:
        setattr(backend, name, entry)

    def again() -> None:
        for each in seen:
            launch(*each)

    return again


def disagreement(module: nn.Module, x: Tensor, target: Tensor) -> float:
    """Largest relative error of the exact rule's gradients against autograd's, in fp32: cuDNN's convolutions are TF32 otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        autograd_step(module, x, target)()
    expected = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    pck.PCNetwork(module, pck.ZeroDivergence(), backend="cuda").backward(x, target)
    found = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def measured(model: str, batch: int, seconds: float) -> Iterator[dict[str, Any]]:
    build, shape = MODELS[model]
    torch.manual_seed(0)
    module = build().cuda()
    x, target = torch.randn(batch, *shape, device="cuda"), torch.randn(batch, 10, device="cuda")
    case = {"model": model, "batch": batch}
    off = disagreement(module, x, target)
    yield {
        **case,
        "method": "gradients of the exact rule against autograd",
        "relative_error": off,
        "ok": off < 1e-3,
    }  # one sample on the other side of a kink is 2e-4
    step = autograd_step(module, x, target)
    yield {**case, "method": "autograd", **milliseconds(step, seconds)}
    yield {**case, "method": "autograd, CUDA graph", **milliseconds(captured(step), seconds)}
    for name, rule in RULES.items():
        for precision, product in operands(model):
            with cuda.options(precision, product=product):
                network = pck.PCNetwork(module, rule, backend="cuda")
                plan = network.infer(x, target).plan
                kernels = kernels_of(cuda, network, x, target)
                label = f"PC {name}, {precision} {product}"
                yield {**case, "method": f"{label}, kernels in a CUDA graph", "plan": plan, **milliseconds(captured(kernels), seconds)}
                if precision == "fp32":
                    yield {**case, "method": f"{label}, backward()", **milliseconds(lambda net=network: net.backward(x, target), seconds)}  # type: ignore[misc]
    if model.startswith("MLP"):
        yield from by_tier(module, x, target, case, seconds)


def by_tier(module: nn.Module, x: Tensor, target: Tensor, case: dict[str, Any], seconds: float) -> Iterator[dict[str, Any]]:
    """Strict PC on each tier: what the planner should have chosen, and how far its count of cycles is off."""
    for precision in ("fp32", "bf16"):
        for tier in tiers_on(cuda.limits(x.device)):
            method = f"PC strict T=20, {precision}, {tier} tier"
            with cuda.options(precision, tier):
                network = pck.PCNetwork(module, RULES["strict T=20"], backend="cuda")
                try:
                    plan = network.infer(x, target).plan
                except pck.Unsupported as refusal:
                    yield {**case, "method": method, "error": str(refusal)}
                    continue
                yield {**case, "method": method, "plan": plan, **milliseconds(captured(kernels_of(cuda, network, x, target)), seconds)}


def attempted(model: str, batch: int, seconds: float) -> list[dict[str, Any]]:
    """What could be measured; a failure is a row that says so."""
    rows: list[dict[str, Any]] = []
    try:
        rows.extend(row for row in measured(model, batch, seconds))
    except Exception as error:
        rows.append({"model": model, "batch": batch, "method": "FAILED", "ok": False, "error": f"{type(error).__name__}: {error}"})
    return rows


def rows_within(
    limit: float, models: Iterable[str], batches: Iterable[int], measure: Callable[[str, int], list[dict[str, Any]]]
) -> Iterator[list[dict[str, Any]]]:
    """What is measured of each model at each batch; of those that would begin after `limit` seconds, a row that says so."""
    began, models = time.monotonic(), list(models)
    for batch in batches:
        for model in models:
            if time.monotonic() - began > limit:
                yield [{"model": model, "batch": batch, "method": "left out", "error": "no time left"}]
            else:
                yield measure(model, batch)


def line(row: dict[str, Any]) -> str:
    found = f"{row['median']:10.4f} ms" if "median" in row else str(row.get("error", f"{row.get('relative_error', 0.0):.1e}"))
    return f"{row['model']:20} {row['batch']:5}  {row['method']:48} {found}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu_step.json"))
    parser.add_argument("--seconds", type=float, default=0.25, help="for each measurement")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which no new case begins")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for some in rows_within(arguments.limit, MODELS, BATCHES, lambda model, batch: attempted(model, batch, arguments.seconds)):
        rows += some
        device = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
        arguments.out.write_text(json.dumps(device, indent=1) + "\n", encoding="utf-8")
    print("\n".join(line(row) for row in rows))
    return 0 if all(row.get("ok", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
