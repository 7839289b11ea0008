"""What is measured beside the cases: time to a given gradient error, the slope of time in T, and memory as T grows."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pckernels.backends import selection
from pckernels.benchmarks import timing
from pckernels.benchmarks.cases import EXACT, PAPER_MLP, RATE, rule_name, strict
from pckernels.benchmarks.ledger import ledger
from pckernels.benchmarks.models import Model
from pckernels.benchmarks.runner import Setting, tile_of
from pckernels.benchmarks.verification import autograd_gradients, gradients_of, require_agreement, whole_distance
from pckernels.dispatch import backends
from pckernels.network import PCNetwork
from pckernels.rules import FixedPrediction, Rule

STEPS = (1, 10, 100, 1000)  # of the memory's row
SLOPE_STEPS = (20, 40, 80, 160)
BATCH = 64


def backend_for(device: torch.device) -> str:
    """The engine that runs on a device, or the reference where none was built."""
    name = "cuda" if device.type == "cuda" else "host"
    return name if backends()[name].ok else "reference"


# Time to a given gradient error


def error_rules() -> Iterator[tuple[str, list[Rule]]]:
    """Families of rules that converge to backprop's gradient, with growing T."""
    for rate in (0.1, 0.5, 1.0):
        steps = {0.1: (5, 10, 20, 40, 80, 160), 0.5: (2, 4, 8, 16, 32), 1.0: (1, 2, 3)}[rate]
        yield f"fixed prediction, rate {rate:g}", [FixedPrediction(T, rate, solver="iterate") for T in steps]
    yield "fixed prediction, rate 0.1, closed form", [FixedPrediction(T, RATE) for T in (5, 10, 20, 40, 80, 160)]
    yield "zero divergence", [EXACT]


def errors(setting: Setting, seconds: float) -> dict[str, Any]:
    """For the paper's MLP: milliseconds and the distance of the whole gradient from autograd's in float64, rule by rule."""
    module, x, target = _drawn(PAPER_MLP, setting)
    wanted = autograd_gradients(_double(module), x.cpu().double(), target.cpu().double())
    points: list[dict[str, Any]] = []
    for family, rules in error_rules():
        for rule in rules:
            network = PCNetwork(module, rule, backend=backend_for(setting.device), **PAPER_MLP.pc)
            module.zero_grad(set_to_none=True)
            network.backward(x, target)
            off = whole_distance(gradients_of(module), wanted)
            points.append({"family": family, "rule": rule_name(rule), "off": off, "run": partial(_call, network, x, target)})
    own = whole_distance(autograd_gradients(module, x, target), wanted)
    points.append({"family": "autograd", "rule": "loss.backward()", "off": own, "run": partial(autograd_gradients, module, x, target)})
    times = timing.rounds({str(k): point["run"] for k, point in enumerate(points)}, seconds, setting.device)
    for k, point in enumerate(points):
        del point["run"]
        point["ms"] = statistics.median(times[str(k)])
    return {"model": PAPER_MLP.name, "batch": BATCH, "points": points}


# Time and memory in T


def slope(setting: Setting, seconds: float) -> dict[str, Any]:
    """Milliseconds of strict inference at several T, the least-squares slope, how straight it is, and what the ledger allows a step."""
    module, x, target = _drawn(PAPER_MLP, setting)
    networks = {T: PCNetwork(module, strict(T), backend=backend_for(setting.device), **PAPER_MLP.pc) for T in SLOPE_STEPS}
    _require_right(networks[SLOPE_STEPS[0]], module, x, target)
    runs = {str(T): partial(_call, network, x, target) for T, network in networks.items()}
    found = timing.rounds(runs, seconds, setting.device)
    times = {T: statistics.median(found[str(T)]) for T in SLOPE_STEPS}
    measured, start = statistics.linear_regression(list(times), list(times.values()))
    bend = max(abs(times[T] - start - measured * T) / times[T] for T in times)
    code = selection.code_for(networks[SLOPE_STEPS[0]].trace(x), strict(SLOPE_STEPS[0]).dynamics, BATCH)
    assert not isinstance(code, str), code
    tile, resident = tile_of(code, BATCH, setting.device)
    step = ledger(code, BATCH, tile).step
    return {
        "model": PAPER_MLP.name,
        "batch": BATCH,
        "ms": {str(T): ms for T, ms in times.items()},
        "ms_a_step": measured,
        "bend": bend,
        "in_turn_ms_a_step": setting.ceilings.in_turn(step, resident),
        "floor_ms_a_step": setting.ceilings.floor(step, resident),
    }


def memory(batch: int = 256) -> dict[str, Any] | None:
    """Bytes by which one call raises the peak of the process at each T, after a first call of the same T; None where nobody can tell.

    Results that grow by nature are the energies, 8 bytes a vertex and step. Peaks are of resident pages, so a few dozen KiB are noise.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    module = PAPER_MLP.build()
    x, target = PAPER_MLP.data(batch)
    found = {}
    for steps in STEPS:
        network = PCNetwork(module, strict(steps), backend=backend_for(x.device), **PAPER_MLP.pc)
        _call(network, x, target)
        found[str(steps)] = peak_of(partial(_call, network, x, target))
    return {"model": PAPER_MLP.name, "batch": batch, "bytes": found, "state_bytes": state_bytes(module, x, batch)}


def state_bytes(module: torch.nn.Module, x: torch.Tensor, batch: int) -> dict[str, int]:
    """T -> bytes of the arena and of results for the whole batch, which the code fixes beforehand."""
    found = {}
    for steps in STEPS:
        code = selection.code_for(PCNetwork(module, strict(steps), **PAPER_MLP.pc).trace(x), strict(steps).dynamics, batch)
        assert not isinstance(code, str), code
        found[str(steps)] = 4 * batch * (code.code.rows + code.kept_size + code.scratch_size)
    return found


def peak_of(run: Any) -> int:
    """Bytes by which the process's peak of resident memory rises during a call (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmHWM")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def _call(network: PCNetwork, x: torch.Tensor, target: torch.Tensor) -> None:
    network.module.zero_grad(set_to_none=True)
    network.backward(x, target)


def _require_right(network: PCNetwork, module: torch.nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    _call(network, x, target)
    found, exact = gradients_of(module), _double(module)
    exact.zero_grad(set_to_none=True)
    PCNetwork(exact, network.rule, backend="reference", **PAPER_MLP.pc).backward(x.cpu().double(), target.cpu().double())
    require_agreement("ours", whole_distance(found, gradients_of(exact)), 1e-3, "time in T")


def _double(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).cpu().double()


def _drawn(model: Model, setting: Setting) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, (x, target) = model.build(), model.data(BATCH)
    return module.to(setting.device), x.to(setting.device), target.to(setting.device)
