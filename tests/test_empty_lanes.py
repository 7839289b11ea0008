"""auto leaves a few samples of large convolutions to PyTorch's: the engine computes 16 lanes, whether or not there is a sample in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pckernels as pck
from pckernels import dispatch
from pckernels.backends import host
from pckernels.benchmarks.models import CNN, VGG
from pckernels.call import Call

STRICT, EXACT = pck.Strict(8, 0.05), pck.ZeroDivergence()


class Chosen(Exception):
    pass


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs: the choice is raised."""
    choose = dispatch.choose

    def stop(name: str, call: Call) -> None:
        backend, _, why = choose(name, call)
        raise Chosen(f"{backend}: {why}")

    monkeypatch.setattr(dispatch, "choose", stop)


def narrower(part: int) -> nn.Module:
    """VGG5 with so much fewer channels."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 128 // part), (128 // part, 256 // part), (256 // part, 512 // part), (512 // part, 512 // part)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GELU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048 // part, 10))


# What was faster when whole calls of both were timed, but where it was within a third.
MEASURED = [
    *((VGG.build, STRICT, batch, "reference") for batch in (1, 2, 4, 8)),
    *((lambda: narrower(4), STRICT, batch, backend) for batch, backend in ((1, "reference"), (4, "reference"), (16, "host"))),
    *((lambda: narrower(8), STRICT, batch, "host") for batch in (4, 8)),
    *((CNN.build, STRICT, batch, "host") for batch in (1, 2, 4, 8, 16)),
    (VGG.build, EXACT, 4, "reference"),
    (CNN.build, EXACT, 1, "host"),
    (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 2048), nn.ReLU(), nn.Linear(2048, 10)), STRICT, 1, "host"),
]


@pytest.mark.skipif(not pck.backends()["host"].ok, reason=f"host: {pck.backends()['host'].reason}")
@pytest.mark.parametrize(("build", "rule", "batch", "backend"), MEASURED)
def test_auto_takes_what_was_faster(chosen, build, rule, batch, backend) -> None:
    network = pck.PCNetwork(build(), rule)
    with pytest.raises(Chosen) as raised:
        network.infer(torch.zeros(batch, 3, 32, 32), torch.zeros(batch, 10))
    said = str(raised.value)
    assert said.startswith(f"{backend}: ")
    if backend == "reference":
        assert f"compute 16 lanes, of which this batch fills {batch}, and PyTorch's are faster then" in said
    network.backend = "host"
    with pytest.raises(Chosen, match=r"host: $"):  # who asks for it has it
        network.infer(torch.zeros(batch, 3, 32, 32), torch.zeros(batch, 10))


def test_full_tiles_are_never_left() -> None:
    assert all(host._PYTORCHS * batch >= -(-batch // host._LANES) * host._LANES for batch in range(9, 200))
