"""Deep residual perceptrons under muPC and under PyTorch's own parametrisation, on scikit-learn's digits.

For each parametrisation the rate of inference and of the weights are chosen at 8 layers, on a validation part of the training set,
and taken to 64 and 128 layers as they are; for the standard one once more at 64 layers, so that no transfer is to blame. As many
inference steps as layers, so that the error reaches the first. Choices are made with one seed, and tests with others.

    python examples/mupc.py --out docs/mupc.png --json docs/mupc.json
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pckernels as pck
from pckernels.jsonfile import add_json_argument, write_json

WIDTH, BATCH, CLASSES = 64, 64, 10
RATES = (0.1, 0.3, 0.5)
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RUNS = (("muPC", True, 8, (8, 64, 128)), ("standard", False, 8, (8, 64, 128)), ("standard", False, 64, (64,)))
Data = tuple[Tensor, Tensor]


class Block(nn.Module):
    """x + W relu(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(torch.relu(x))


def perceptron(layers: int, scaled: bool, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, WIDTH), *(Block() for _ in range(layers - 2)), nn.Linear(WIDTH, CLASSES))
    return pck.mupc(module) if scaled else module


def digits() -> tuple[Data, Data, Data]:
    """Training, validation and test images (N, 64), standardised over all pixels, with their classes."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(classes)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = (x[order] - x.mean()) / x.std(), y[order]
    return (x[:1216], y[:1216]), (x[1216:1472], y[1216:1472]), (x[1472:], y[1472:])


def accuracy(module: nn.Module, data: Data) -> float:
    """NaN is no class: a network that has diverged is right about nothing."""
    with torch.no_grad():
        output = module(data[0])
    right = (output.argmax(1) == data[1]) & output.isfinite().all(1)
    return float(right.double().mean())


def train(
    layers: int, scaled: bool, rate: float, learning_rate: float, data: Data, test: Data, epochs: int, seed: int = 0
) -> tuple[list[float], str]:
    """The accuracy on `test` after each epoch, and what ended the run early."""
    module = perceptron(layers, scaled, seed)
    nodes = [str(k) for k in range(layers)]
    network = pck.PCNetwork(module, pck.Strict(steps=layers, rate=rate), value_nodes=nodes)
    optimizer = torch.optim.Adam(module.parameters(), learning_rate)
    found = [accuracy(module, test)]
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(data[0]), generator=order).split(BATCH):
            try:
                network.step(data[0][batch], nn.functional.one_hot(data[1][batch], CLASSES).float(), optimizer)
            except pck.InferenceDiverged as error:
                return found, str(error)
        found.append(accuracy(module, test))
    return found, ""


def choose(scaled: bool, layers: int, data: Data, validation: Data, epochs: int) -> tuple[float, float, float]:
    """The rates with the best validation accuracy at a depth, and that accuracy."""
    best = (0.0, 0.0, -1.0)
    for rate, learning_rate in itertools.product(RATES, LEARNING_RATES):
        curve, end = train(layers, scaled, rate, learning_rate, data, validation, epochs)
        last = 0.0 if end else curve[-1]
        print(f"  rate {rate:g}, learning rate {learning_rate:g}: {last:.3f} {end}", flush=True)
        best = max(best, (rate, learning_rate, last), key=lambda each: each[2])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", help="a figure")
    add_json_argument(parser)
    args = parser.parse_args()
    data, validation, test = digits()
    results = []
    for name, scaled, chosen_at, depths in RUNS:
        print(f"{name}: rates at {chosen_at} layers")
        rate, learning_rate, found = choose(scaled, chosen_at, data, validation, args.epochs)
        print(f"{name}: rate {rate:g}, learning rate {learning_rate:g} (validation accuracy {found:.3f})")
        for layers, seed in itertools.product(depths, range(1, 1 + args.seeds)):
            start = time.perf_counter()
            curve, end = train(layers, scaled, rate, learning_rate, data, test, args.epochs, seed)
            seconds = time.perf_counter() - start
            print(f"{name}, {layers} layers, seed {seed}: test accuracy {curve[-1]:.3f}, {seconds:.0f} s {end}", flush=True)
            results.append(
                {
                    "parametrisation": name,
                    "chosen_at": chosen_at,
                    "layers": layers,
                    "seed": seed,
                    "rate": rate,
                    "learning_rate": learning_rate,
                    "accuracy": curve,
                    "seconds": seconds,
                    "end": end,
                }
            )
    if args.json:
        write_json(args.json, results)
    if args.out:
        draw(results, args.out)


def draw(results: list[dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, name in zip(axes, ("muPC", "standard"), strict=True):
        for k, (_, _, chosen_at, depths) in enumerate(run for run in RUNS if run[0] == name):
            for j, layers in enumerate(depths):
                runs = [run for run in results if (run["parametrisation"], run["chosen_at"], run["layers"]) == (name, chosen_at, layers)]
                for n, run in enumerate(runs):
                    label = f"{layers} layers" + (", rates chosen there" if k else "")
                    ax.plot(run["accuracy"], color=f"C{j + 3 * k}", marker="o", alpha=0.7, label=None if n else label)
        ax.set_title(f"{name} parametrisation")
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.axhline(1 / CLASSES, color="grey", lw=0.8, ls=":")
        ax.legend(loc="center right")
    axes[0].set_ylabel("test accuracy")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
