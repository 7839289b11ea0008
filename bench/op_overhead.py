"""What a call of an op costs before it computes anything, on tensors of a few numbers: medians in microseconds.

    python bench/op_overhead.py [--repeats N]

`engine` is the compiled extension called directly; `relax` the same work through torch.ops.pckernels.relax.out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import pckernels as pck
from pckernels import engine, ops
from pckernels.backends import native
from pckernels.backends.binding import Execute
from pckernels.compiler import Compiled
from pckernels.memory import Packed


def smallest() -> tuple[Compiled, Packed]:
    """The code of one inference step of a network of three numbers, with its tensors."""
    found: list[tuple[Compiled, Packed]] = []
    run = native.run

    def spied(call: pck.call.Call, execute: Execute) -> object:
        def keep(code: Compiled, memory: Packed, batch: int, factor: float) -> None:
            found.append((code, memory))
            execute(code, memory, batch, factor)

        return run(call, keep)

    native.run = spied
    pck.PCNetwork(nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1)), pck.Strict(1, 0.1), backend="host").backward(
        torch.ones(1, 1), torch.ones(1, 1)
    )
    native.run = run
    return found[-1]


def median(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5000)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    code, memory = smallest()
    weights, inputs, out, number = [each.detach() for each in memory.weights], list(memory.inputs), memory.written, ops.number_of(code)
    x, w, v = torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1)
    direct = median(lambda: engine.execute(code, memory, 1, -1.0), repeats)
    through = median(lambda: torch.ops.pckernels.relax.out(weights, inputs, number, 1, -1.0, out=out), repeats)
    tensors = len(weights) + len(inputs) + len(out)
    print(f"engine {direct:6.1f} us   relax.out {through:6.1f} us   overhead of the op {through - direct:5.1f} us ({tensors} tensors)")
    for name, call, plain in (
        ("value_update", lambda: torch.ops.pckernels.value_update(v, v, v, v, 0.1), lambda: ops._value_update(v, v, v, v, 0.1)),
        ("local_update", lambda: torch.ops.pckernels.local_update(v, x), lambda: ops._local_update(v, x)),
        (
            "predict_error",
            lambda: torch.ops.pckernels.predict_error(x, w, None, v, "tanh"),
            lambda: ops._predict_error(x, w, None, v, "tanh"),
        ),
    ):
        print(f"{name:14s} {median(call, repeats):6.1f} us, its PyTorch operations alone {median(plain, repeats):6.1f} us")


if __name__ == "__main__":
    main()
