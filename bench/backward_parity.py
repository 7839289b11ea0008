"""What pck.backward(loss) at rate 1 costs beside loss.backward(): medians in one process, after the gradients agree.

    python bench/backward_parity.py [--repeats 31] [--json FILE]

The two take turns, so that a busy machine slows both. Forward passes are not timed. `relaxed` is pck.backward at T = 100,
rate 0.1, closed form: an extra sweep for the errors, and more where paths of different lengths meet.
"""

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pckernels.autograd import backward, depth

Forward = Callable[[], Tensor]


def mlp() -> tuple[nn.Module, Forward]:
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))
    x, target = torch.randn(64, 784), torch.randint(10, (64,))
    return model, lambda: F.cross_entropy(model(x), target)


def cnn() -> tuple[nn.Module, Forward]:
    features = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*features, nn.Linear(1600, 200), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 10))
    x, target = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
    return model, lambda: F.cross_entropy(model(x), target)


def lstm() -> tuple[nn.Module, Forward]:
    model, x, target = nn.LSTM(80, 256), torch.randn(50, 16, 80), torch.randn(50, 16, 256)
    return model, lambda: F.mse_loss(model(x)[0], target)


CASES = {"mlp": mlp, "cnn": cnn, "lstm": lstm}
RUNS: dict[str, Callable[[Tensor], None]] = {
    "autograd": Tensor.backward,
    "pck": backward,
    "relaxed": lambda loss: backward(loss, steps=100, rate=0.1),
}


def one(model: nn.Module, forward: Forward, run: Callable[[Tensor], None]) -> float:
    model.zero_grad()
    loss = forward()
    start = perf_counter()
    run(loss)
    return 1e3 * (perf_counter() - start)


def agree(model: nn.Module, forward: Forward) -> bool:
    gradients = []
    for run in (RUNS["autograd"], RUNS["pck"]):
        one(model, forward, run)
        gradients.append([parameter.grad for parameter in model.parameters()])
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def measure(name: str, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, forward = CASES[name]()
    if not agree(model, forward):
        raise SystemExit(f"{name}: pck.backward at rate 1 does not give loss.backward()'s gradients; nothing was timed.")
    times: dict[str, list[float]] = {run: [] for run in RUNS}
    for _ in range(repeats):
        for run, function in RUNS.items():
            times[run].append(one(model, forward, function))
    medians = {run: statistics.median(values) for run, values in times.items()}
    spread = {run: [min(values), max(values)] for run, values in times.items()}
    ratio = medians["pck"] / medians["autograd"]
    return {"case": name, "depth": depth(forward()), "median_ms": medians, "min_max_ms": spread, "ratio": ratio}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    rows = [measure(name, options.repeats) for name in CASES]
    print(f"torch {machine['torch']}, {machine['threads']} thread(s); ms of the backward call, medians of {options.repeats}")
    print(f"{'case':6}{'depth':>6}" + "".join(f"{run:>11}" for run in RUNS) + f"{'pck/autograd':>14}")
    for row in rows:
        print(f"{row['case']:6}{row['depth']:>6}" + "".join(f"{row['median_ms'][run]:11.3f}" for run in RUNS) + f"{row['ratio']:14.3f}")
    if options.json:
        options.json.write_text(json.dumps({**machine, "cases": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
