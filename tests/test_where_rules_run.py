"""The table of docs/engine.md is what the backends do. CUDA and Triton refuse what host refuses: one compiler serves them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import pckernels as pck

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
STRICT, FIXED = pck.Strict(2, 0.1), pck.FixedPrediction(2, 0.3, solver="iterate")
Run = Callable[[str], object]


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def calling(rule: pck.rules.Rule, dtype: torch.dtype = torch.float32, options: dict[str, object] | None = None, **given: object) -> Run:
    """A call with this rule, network options and call options, on a backend that is named."""

    def run(backend: str) -> object:
        network = pck.PCNetwork(chain().to(dtype), rule, backend=backend, **(options or {}))
        return network.backward(torch.ones(2, 4, dtype=dtype), torch.ones(2, 3, dtype=dtype), **given)

    return run


def stepping(backend: str) -> object:
    network = pck.PCNetwork(chain(), pck.Incremental(2, 0.1), backend=backend)
    return network.step(torch.ones(2, 4), torch.ones(2, 3), torch.optim.SGD(network.parameters(), 0.1))


def recording(backend: str) -> object:
    return pck.PCNetwork(chain(), STRICT, backend=backend).infer(torch.ones(2, 4), torch.ones(2, 3), record=True)


ROWS: dict[str, Run] = {
    "`Strict`, any sweep, momentum": calling(pck.Strict(2, 0.1, 0.5, "red_black")),
    "`Strict(tolerance=)`": calling(pck.Strict(2, 0.1, tolerance=1e-3)),
    "`Strict(nudge=)`": calling(pck.Strict(2, 0.1, nudge=("centered", 0.1))),
    "`ErrorOptimization`": calling(pck.ErrorOptimization(2, 0.1)),
    "`FixedPrediction`, steps and closed form": lambda backend: [calling(FIXED)(backend), calling(pck.FixedPrediction(2, 0.3))(backend)],
    "`ZeroDivergence`": calling(pck.ZeroDivergence()),
    '`ZeroDivergence(solver="iterate")`': calling(pck.ZeroDivergence(solver="iterate")),
    "`Incremental`, `backward` and `infer`": calling(pck.Incremental(2, 0.1, 0.01)),
    "`Incremental`, `step`": stepping,
    "`Relaxed(feedback=, derivative=)`": calling(pck.Relaxed(STRICT, "learned", False)),
    "`Relaxed(error_weights=)`": calling(pck.Relaxed(STRICT, error_weights="learned")),
    "`precision=`": calling(STRICT, options={"precision": {"0": 2.0}}),
    "`match=`": calling(pck.FixedPrediction(2, 0.3, solver="iterate"), options={"match": "millidge2020", "reduction": "sum"}),
    "`clamp=`": calling(STRICT, clamp={"0": torch.zeros(2, 5)}),
    "`free=`": calling(STRICT, free="input"),
    "`target_mask=`": calling(STRICT, target_mask=torch.tensor([True, False, True])),
    "`infer(record=True)`": recording,
    "float64": calling(STRICT, torch.float64),
}


def rows() -> dict[str, list[str]]:
    """First cell -> the others, of the table under this heading."""
    table = PAGE.split("## What runs where")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in cells[2:]}


def test_the_table_has_every_row() -> None:
    assert list(rows()) == list(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_row(name: str) -> None:
    found = []
    for backend in ("reference", "host", "graph"):
        try:
            ROWS[name](backend)
            found.append("yes")
        except pck.Unsupported as error:
            assert f"The {backend} backend cannot run this call: " in str(error)
            found.append("no")
    assert rows()[name] == found
