"""The native engine beside what one would use instead: a careful loop by hand, and an autograd step of the same model.

    python bench/native.py [mlp-64 mlp-1 cnn-20 cnn-100 rnn-1 lstm-64 ...] [--threads N] [--repeats N] [--json FILE]

Whole calls from Python, alternating in one process; medians and the ratio. Gradients are compared before anything is timed.
`products` is the time that the call's matrix products alone take with PyTorch's: the ceiling of anything built on them.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import eager
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.backends import host


class RNN(nn.Module):
    def __init__(self, inputs: int = 57, hidden: int = 256, classes: int = 18):
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, bias=False, batch_first=True)
        self.readout = nn.Linear(hidden, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0][:, -1])


class LSTM(nn.Module):
    def __init__(self, inputs: int = 65, hidden: int = 256, classes: int = 65):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.lstm(x)[0])


@dataclass(frozen=True)
class Case:
    """A model, its data, T, the rival (a function of eager.py, or "autograd"), and the ratio to reach."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: tuple[int, ...]
    steps: int
    rival: str
    goal: float
    value_nodes: str | tuple[str, ...] = "layer"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))


CNN_NODES = ("conv1", "pool", "conv2", "fc1", "fc2", "fc3")
CASES = {
    "mlp-64": Case(mlp, (64, 784), (64, 10), 20, "mlp", 0.5),
    "mlp-1": Case(mlp, (1, 784), (1, 10), 20, "mlp", 0.25),
    "cnn-20": Case(pck.nn.CNNModule, (64, 3, 32, 32), (64, 10), 20, "autograd", 3.0, CNN_NODES),
    "cnn-100": Case(pck.nn.CNNModule, (64, 3, 32, 32), (64, 10), 100, "autograd", 14.0, CNN_NODES),
    "rnn-1": Case(RNN, (1, 8, 57), (1, 18), 20, "rnn", 0.33),
    "lstm-64": Case(LSTM, (64, 50, 65), (64, 50, 65), 20, "lstm", 0.4),
}
RATE = 0.1


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


class Contest:
    """One case: our call, the rival's, and the check that both compute the same."""

    def __init__(self, name: str, backend: str):
        self.name, self.case = name, CASES[name]
        torch.manual_seed(0)
        self.module, self.x, self.target = self.case.module(), torch.randn(self.case.shape), torch.randn(self.case.target)
        nodes = self.case.value_nodes
        rule = pck.Strict(self.case.steps, RATE)
        self.network = pck.PCNetwork(
            self.module, rule, reduction="sum", backend=backend, value_nodes=nodes if isinstance(nodes, str) else list(nodes)
        )

    def ours(self) -> None:
        self.module.zero_grad()
        self.network.backward(self.x, self.target)

    def rival(self) -> None:
        if self.case.rival == "autograd":
            self.module.zero_grad()
            (0.5 * (self.target - self.module(self.x)).square().sum()).backward()
        else:
            eager.LOOPS[self.case.rival](self.module, self.x, self.target, self.case.steps, RATE)

    def check(self) -> float:
        """How far our gradients are from the rival's, or from the reference's where the rival computes something else."""
        self.ours()
        found = [parameter.grad.clone() for parameter in self.module.parameters()]
        if self.case.rival != "autograd":
            return distance(found, eager.LOOPS[self.case.rival](self.module, self.x, self.target, self.case.steps, RATE))
        self.network.backend, before = "reference", self.network.backend
        self.ours()
        self.network.backend = before
        return distance(found, [parameter.grad for parameter in self.module.parameters()])


TOLERANCE = {"mlp": 2e-2, "rnn": 2e-2, "lstm": 2e-2, "autograd": 2e-1}  # what values kept as values lose in float32


def measure(name: str, repeats: int, backend: str) -> dict[str, object]:
    contest = Contest(name, backend)
    off = contest.check()
    if not off <= TOLERANCE[contest.case.rival]:
        raise SystemExit(f"{name}: the gradients are {off:.1e} apart, more than {TOLERANCE[contest.case.rival]:.0e}; nothing was timed.")
    times: dict[str, list[float]] = {"ours": [], "rival": []}
    for _ in range(repeats + 2):
        for side, run in (("ours", contest.ours), ("rival", contest.rival)):
            start = time.perf_counter()
            run()
            times[side].append(1e3 * (time.perf_counter() - start))
    ours, rival = (times[side][2:] for side in ("ours", "rival"))
    return {
        "case": name,
        "steps": contest.case.steps,
        "rival": contest.case.rival,
        "ours_ms": statistics.median(ours),
        "rival_ms": statistics.median(rival),
        "ours_range_ms": [min(ours), max(ours)],
        "rival_range_ms": [min(rival), max(rival)],
        "ratio": statistics.median(ours) / statistics.median(rival),
        "goal": contest.case.goal,
        "off": off,
        "repeats": repeats,
    }


LINE = "{case:8s} T={steps:<4d} ours {ours_ms:9.3f} ms  {rival:>8s} {rival_ms:9.3f} ms  ratio {ratio:6.3f}  goal {goal:5.2f}  off {off:.1e}"


def _repeats(name: str) -> int:
    return 7 if name.startswith(("lstm", "cnn-100")) else 31 if name.startswith("cnn") else 101


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="case", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=0, help="calls of each; 0 chooses by the case")
    parser.add_argument("--backend", default="host")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name in arguments.cases:
        results.append(measure(name, arguments.repeats or _repeats(name), arguments.backend))
        print(LINE.format(**results[-1]), flush=True)
    if arguments.json:
        about = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "engine": host.availability()[1],
            "threads": arguments.threads,
        }
        with open(arguments.json, "w") as file:
            json.dump({**about, "results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
