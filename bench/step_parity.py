"""One predictive-coding step beside one autograd step of the same model: same process, alternating, medians and the ratio.

    python bench/step_parity.py [mlp cnn lstm-rate-1 lstm-nested ...] [--repeats N] [--threads N] [--json FILE]

A step is zero_grad, forward, gradients, optimizer. The models are those of the paper: MLP 784-300-300-10 and the CNN
at batch 64, the LSTM with 1,056 hidden units over 50 letters at batch 64. Before anything is timed, the gradients are compared.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pckernels as pck

BATCH = 64


@dataclass(frozen=True)
class Case:
    """A model, its rule, an input and a target, and how far the rule's gradient may lie from autograd's (None: it is not exact)."""

    module: Callable[[], nn.Module]
    rule: pck.FixedPrediction
    x: Callable[[], Tensor]
    target: Callable[[], Tensor]
    deviation: float


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10))


def cnn() -> nn.Module:
    return pck.nn.CNNModule()


class LSTM(nn.Module):
    """Embedded letters to the next letter, at every position."""

    def __init__(self, letters: int = 65, hidden: int = 1056):
        super().__init__()
        self.embedding = nn.Embedding(letters, letters)
        self.embedding.weight.requires_grad_(False)
        self.lstm = nn.LSTM(letters, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, letters)

    def forward(self, letters: Tensor) -> Tensor:
        return self.readout(self.lstm(self.embedding(letters))[0])


def letters() -> Tensor:
    return torch.randint(0, 65, (BATCH, 50))


def next_letters() -> Tensor:
    return nn.functional.one_hot(letters(), 65).float()


def one_hot() -> Tensor:
    return nn.functional.one_hot(torch.randint(0, 10, (BATCH,)), 10).float()


CASES = {
    "mlp": Case(mlp, pck.FixedPrediction(100, 0.1), lambda: torch.randn(BATCH, 784), one_hot, 1e-3),
    "cnn": Case(cnn, pck.FixedPrediction(100, 0.1), lambda: torch.randn(BATCH, 3, 32, 32), one_hot, 1e-1),
    "lstm-rate-1": Case(LSTM, pck.FixedPrediction(200, 1.0), letters, next_letters, 1e-4),
    "lstm-nested": Case(LSTM, pck.FixedPrediction(200, 0.1, order="nested"), letters, next_letters, 1e-4),
}


def autograd_step(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor) -> None:
    optimizer.zero_grad()
    loss = 0.5 * (target - module(x)).square().sum() / len(x)
    loss.backward()
    optimizer.step()


def deviation(module: nn.Module, network: pck.PCNetwork, x: Tensor, target: Tensor) -> float:
    """The largest relative distance of a parameter's gradient from autograd's."""
    still = torch.optim.SGD(module.parameters(), lr=0.0)
    autograd_step(module, still, x, target)
    expected = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    network.backward(x, target)
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def measure(name: str, repeats: int) -> dict[str, object]:
    case = CASES[name]
    torch.manual_seed(0)
    module, x, target = case.module(), case.x(), case.target()
    network = pck.PCNetwork(module, case.rule)
    distance = deviation(module, network, x, target)
    if distance > case.deviation:
        raise SystemExit(f"{name}: the gradient is {distance:.2e} away from autograd's, more than {case.deviation:.0e}; nothing was timed.")
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    times: dict[str, list[float]] = {"autograd": [], "pc": []}
    for _ in range(repeats + 2):
        for learner, step in (
            ("autograd", lambda: autograd_step(module, optimizer, x, target)),
            ("pc", lambda: network.step(x, target, optimizer)),
        ):
            start = time.perf_counter()
            step()
            times[learner].append((time.perf_counter() - start) * 1e3)
    medians = {learner: statistics.median(found[2:]) for learner, found in times.items()}
    return {
        "case": name,
        "autograd_ms": medians["autograd"],
        "pc_ms": medians["pc"],
        "ratio": medians["pc"] / medians["autograd"],
        "deviation": distance,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="case", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=0, help="steps of each learner; 0 chooses by the case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for name in arguments.cases:
        results.append(measure(name, arguments.repeats or (7 if name.startswith("lstm") else 200)))
        line = "{case:12s} autograd {autograd_ms:9.3f} ms   pc {pc_ms:9.3f} ms   ratio {ratio:.3f}   deviation {deviation:.1e}"
        print(line.format(**results[-1]))
    if arguments.json:
        about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.processor() or platform.machine()}
        with open(arguments.json, "w") as file:
            json.dump({**about, "threads": arguments.threads, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
