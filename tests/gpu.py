"""The tests of test_backends on a GPU: a backend there is held against the reference on the CPU, in float64."""

from __future__ import annotations

import copy
from functools import lru_cache

import test_backends as backends
from torch import Tensor

import pckernels as pck


@lru_cache
def moved(backend: str, network: pck.PCNetwork) -> pck.PCNetwork:
    """The same parameters on the GPU."""
    return pck.PCNetwork(copy.deepcopy(network.module).cuda(), pck.ZeroDivergence(), backend=backend)


def on_gpu(backend: str, network: pck.PCNetwork, rule: pck.rules.Rule, loss: str, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Everything that a call there finds."""
    found = backends.run(moved(backend, network), rule, loss, x.cuda(), target.cuda())
    return {name: value.cpu() for name, value in found.items()}


def assert_as_good(backend: str, name: str, rule: pck.rules.Rule, batch: int, loss: str = "squared_error") -> None:
    backends.hold(name, rule, batch, loss, lambda network, x, target: on_gpu(backend, network, rule, loss, x, target))
