"""What this machine can do, measured in the same run: the rate of products, and of memory near and far."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from pckernels.benchmarks.ledger import LINEAR, Count, Ledger, executions
from pckernels.benchmarks.timing import milliseconds
from pckernels.compiler import Compiled
from pckernels.instructions import CONVOLUTIONS, Op

SHAPES = ((64, 300, 300), (256, 512, 512), (1024, 1024, 1024))  # rows, inputs, outputs
SHAPES_ON_GPU = (*SHAPES, (8192, 8192, 8192))
FAR, MIDDLE = 1 << 26, 1 << 20  # elements: 256 MiB, in no cache; 4 MiB, in the last one
NEAR = (1 << 13, 1 << 14, 1 << 15)  # 32 to 128 KiB, in a core's own


@dataclass(frozen=True)
class Ceilings:
    """Measured, with PyTorch's own kernels and the threads of the run.

    Attributes:
        products: multiply-adds a second in float32, the best of several sizes.
        device, cache, chip: bytes a second, read and written: of memory far larger than any cache; of the last cache (a GPU's L2); of a
            core's own caches. No PyTorch kernel measures a GPU's shared memory: there `chip` is what its clock allows.
    """

    products: float
    device: float
    cache: float
    chip: float

    def floor(self, count: Count, resident: bool) -> float:
        """Milliseconds that no implementation on these ceilings goes below: the slowest level alone, all others hidden behind it."""
        return 1e3 * max(self._multiplying(count, resident), count.device / self.device, count.chip / self.chip)

    def _multiplying(self, count: Count, resident: bool) -> float:
        reading = 0.0 if resident else count.weights / self.cache
        return max(count.products / self.products, reading)


def measure(device: torch.device, seconds: float = 0.3) -> Ceilings:
    """Best of repeated runs, `seconds` for each size: a neighbour's load slows a run and speeds none up."""
    on_gpu = device.type == "cuda"
    products = max(_products(shape, device, seconds) for shape in (SHAPES_ON_GPU if on_gpu else SHAPES))
    far, middle = (_moving(elements, device, seconds) for elements in (FAR, MIDDLE))
    near = max(middle, *(_moving(elements, device, seconds) for elements in NEAR))
    return Ceilings(products, far, middle, max(middle, shared_memory_rate(torch.cuda.get_device_properties(device))) if on_gpu else near)


SHARED_BYTES = 128  # that a multiprocessor's shared memory moves in a clock: 32 banks of 4 bytes


def shared_memory_rate(properties: Any) -> float:
    """Bytes a second of all multiprocessors' shared memory; 0 where PyTorch does not know the clock."""
    return float(properties.multi_processor_count) * SHARED_BYTES * 1e3 * getattr(properties, "clock_rate", 0)


def _products(shape: tuple[int, int, int], device: torch.device, seconds: float) -> float:
    rows, inputs, outputs = shape
    a, b = torch.randn(rows, inputs, device=device), torch.randn(inputs, outputs, device=device)
    out = torch.empty(rows, outputs, device=device)
    return rows * inputs * outputs / _best(lambda: torch.mm(a, b, out=out), device, seconds)


def _moving(elements: int, device: torch.device, seconds: float) -> float:
    """a + b -> a: two reads and a write."""
    a, b = torch.zeros(elements, device=device), torch.ones(elements, device=device)
    calls = max(1, min(64, (1 << 20) // elements))  # so that what a call costs does not count

    def run() -> None:
        for _ in range(calls):
            a.add_(b)

    return 3 * 4 * elements * calls / _best(run, device, seconds)


def _best(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of many runs."""
    run()
    best, deadline = float("inf"), time.monotonic() + seconds
    while time.monotonic() < deadline:
        best = min(best, milliseconds(run, device) / 1e3)
    return best


def report(found: Ledger, ceilings: Ceilings, resident: bool) -> dict[str, object]:
    """A ledger in numbers, with the times that the ceilings allow it."""
    total, step = found.total, found.step
    return {
        "multiply_adds": total.products,
        "multiply_adds_a_step": step.products,
        "device_bytes": total.device,
        "weight_bytes_read_by_tiles": total.weights,
        "chip_bytes": total.chip,
        "chip_bytes_a_step": step.chip,
        "state_bytes_a_sample": found.arena,
        "tiles": found.tiles,
        "bytes_leaving_the_chip_a_step": found.leaving(resident),
        "bytes_leaving_with_a_launch_an_operation": step.chip + step.device + step.weights,
        "floor_ms": ceilings.floor(total, resident),
    }


def products_alone(compiled: Compiled, batch: int, device: torch.device, seconds: float = 0.5) -> float:
    """Milliseconds that the call's products take by PyTorch's own kernels, each at its own shape: the ceiling of what is built on them."""
    counted: Counter[tuple[Op, tuple[int, ...]]] = Counter()
    for phase in compiled.code.phases:
        for i in phase.instructions:
            if i.op in LINEAR or i.op in CONVOLUTIONS:
                counted[i.op, i.p] += executions(phase, i)
    runs = [(_product(op, p, batch, device), times) for (op, p), times in counted.items()]
    for p in compiled.code.products:
        runs.append((_outer_product(batch * p.positions, p.outputs, p.inputs, device), 1))
    return sum(1e3 * _best(run, device, seconds / max(1, len(runs))) * n for run, n in runs)


def _outer_product(rows: int, outputs: int, inputs: int, device: torch.device) -> Callable[[], object]:
    g, x = torch.randn(rows, outputs, device=device), torch.randn(rows, inputs, device=device)
    return lambda: torch.mm(g.t(), x)


def _product(op: Op, p: tuple[int, ...], batch: int, device: torch.device) -> Callable[[], object]:
    if op in LINEAR:
        rows, inputs, outputs = batch * p[0], p[1], p[2]
        weight = torch.randn(outputs, inputs, device=device)
        x = torch.randn(rows, inputs if op is Op.LINEAR else outputs, device=device)
        return (lambda: torch.mm(x, weight.t())) if op is Op.LINEAR else (lambda: torch.mm(x, weight))
    return _convolution(op, p, batch, device)


def _convolution(op: Op, p: tuple[int, ...], batch: int, device: torch.device) -> Callable[[], object]:
    image, weight = (batch, *p[:3]), (p[3], p[0] // p[12], *p[4:6])
    how: Any = {"stride": p[6:8], "padding": p[8:10], "dilation": p[10:12], "groups": p[12]}
    x, w, g = (torch.randn(*shape, device=device) for shape in (image, weight, (batch, p[3], p[13], p[14])))
    if op is Op.CONV:
        return lambda: F.conv2d(x, w, **how)
    if op is Op.CONV_T:
        return lambda: torch.nn.grad.conv2d_input(image, w, g, **how)
    return lambda: torch.nn.grad.conv2d_weight(x, weight, g, **how)
