"""Small calls through every kernel of the cuda backend, for compute-sanitizer: `compute-sanitizer python bench/gpu_small.py`."""

from __future__ import annotations

import sys

import torch
from torch import nn

import pckernels as pck
from pckernels.backends import cuda
from pckernels.planner import LANES, lanes_of, products_on, tiers_on


def infer(module: nn.Module, rule: pck.rules.Rule, shape: tuple[int, ...], batch: int) -> bool:
    network = pck.PCNetwork(module.cuda(), rule, backend="cuda")
    inference = network.backward(torch.randn(batch, *shape, device="cuda"), torch.randn(batch, 3, device="cuda"))
    return bool(inference.energy.isfinite().all()) and all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)


def main() -> int:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 20), nn.ReLU(), nn.Linear(20, 3))
    cnn = nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(3),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    good = True
    limits = cuda.limits(torch.device("cuda", 0))
    for precision in LANES:
        for product in products_on(limits, precision):
            for tier in tiers_on(limits):
                for lanes in lanes_of(precision, product, tier):
                    with cuda.options(precision, tier, lanes, product):
                        good &= infer(mlp, pck.Strict(3, 0.1, momentum=0.5), (7,), lanes + 3)
    with cuda.options(lanes=4):
        good &= infer(cnn, pck.Strict(2, 0.1), (2, 9, 9), 6)
        good &= infer(cnn, pck.ZeroDivergence(), (2, 9, 9), 6)
    torch.cuda.synchronize()
    print("all finite" if good else "NOT FINITE")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
