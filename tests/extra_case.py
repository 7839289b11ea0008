"""Networks with parameters of their own beside the module's: backward weights and precisions, for every backend's tests."""

from __future__ import annotations

import copy
from functools import lru_cache

import test_backends as backends
import torch
from torch import Tensor

import pckernels as pck


def precision_of(kind: str, network: pck.PCNetwork) -> object:
    """Another for each vertex; learned ones beside others that are fixed, or not there."""
    names = [vertex.name for vertex in network.graph.hidden]
    several: dict[str, object] = {name: 0.4 + 0.1 * (k % 9) for k, name in enumerate(names)}
    if kind == "elements":
        generator = torch.Generator().manual_seed(0)
        shapes = {name: network.graph[name].shape[1:] for name in names[::2]}
        return {name: 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    if kind == "learned":
        return {**several, names[0]: "learned", names[-1]: "learned"}
    return several if kind == "several" else 1.3


def weigh(network: pck.PCNetwork, kind: str, x: Tensor) -> None:
    network.rule, network.precision = pck.Strict(0, 0.1), None
    network.trace(x)
    network.precision = precision_of(kind, network)
    network.trace(x)
    for k, log in enumerate(network.extra_parameters().values()):
        if log.dim() == 0:
            log.data.fill_(0.3 - 0.2 * k)


@lru_cache
def networks(name: str) -> tuple[pck.PCNetwork, pck.PCNetwork]:
    """The same parameters in float64, for the reference, and in float32."""
    torch.manual_seed(1)
    module = backends.MODELS[name].build()
    rule = pck.ZeroDivergence()
    return pck.PCNetwork(copy.deepcopy(module).double(), rule, backend="reference"), pck.PCNetwork(module, rule)


def assert_as_good(backend: str, name: str, rule: pck.rules.Rule, batch: int, kind: str | None = None) -> None:
    """As backends.assert_as_good, with the extra parameters of the float32 network in the other one too."""
    wide, narrow = networks(name)
    x, target = backends.data(name, batch, "squared_error")
    for network, inputs in ((narrow, x), (wide, x.double())):
        weigh(network, kind, inputs) if kind else setattr(network, "precision", None)
        network.rule = rule
        network.trace(inputs)
    for key, extra in wide.extra_parameters().items():
        extra.data.copy_(narrow.extra_parameters()[key].detach())
    exact = backends.run(wide, rule, "squared_error", x.double(), target.double())
    found = {}
    for each in ("reference", backend):
        narrow.backend = each
        found[each] = backends.run(narrow, rule, "squared_error", x, target)
    backends.assert_no_worse(found[backend], found["reference"], exact)
