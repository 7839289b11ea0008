"""What is measured beside the cases: time to a given gradient error, the slope of time in T and its prediction, memory as T grows."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pckernels.backends import selection
from pckernels.benchmarks import timing, work
from pckernels.benchmarks.cases import CNN, EXACT, PAPER_MLP, RATE, rule_name, strict
from pckernels.benchmarks.ledger import ledger
from pckernels.benchmarks.models import NAMES_RNN, Model, deep_mlp
from pckernels.benchmarks.probes import Probes, Times
from pckernels.benchmarks.runner import Setting, tile_of
from pckernels.benchmarks.verification import autograd_gradients, gradients_of, require_agreement, whole_distance
from pckernels.compiler import Compiled
from pckernels.dispatch import backends
from pckernels.errors import Unsupported
from pckernels.network import PCNetwork
from pckernels.rules import FixedPrediction, Rule

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


@dataclass(frozen=True)
class Slope:
    """A model and a rule whose time a step is predicted, and the T at which it is measured."""

    model: Model
    rule: Callable[[int], Rule]
    steps: tuple[int, ...] = (20, 40, 80, 160)


SLOPES = (
    Slope(PAPER_MLP, strict),
    Slope(PAPER_MLP, lambda steps: FixedPrediction(steps, RATE, solver="iterate")),
    Slope(CNN, strict, (5, 10, 20, 40)),
)


def slopes(setting: Setting, seconds: float) -> list[dict[str, Any]]:
    """For each of SLOPES: milliseconds at several T, the slope, how straight it is, and the slope that the ledger predicts."""
    return [slope(which, setting, seconds) for which in SLOPES]


def slope(which: Slope, setting: Setting, seconds: float) -> dict[str, Any]:
    """One of them, in time of the processor, so that what others do on the machine counts neither here nor in the prediction.

    What a unit of work costs (probes.py) is measured in the same rounds; how much work a step is, the ledger has counted (work.py).
    """
    module, x, target = _drawn(which.model, setting)
    networks = {T: PCNetwork(module, which.rule(T), backend=backend_for(setting.device), **which.model.pc) for T in which.steps}
    row = {"model": which.model.name, "rule": rule_name(which.rule(which.steps[0])).split(" T=")[0], "batch": BATCH}
    try:
        _require_right(networks[which.steps[0]], x, target)
        code = selection.code_for(networks[which.steps[0]].trace(x), which.rule(which.steps[0]).dynamics, BATCH)
        if isinstance(code, str):
            raise Unsupported(code)
        alone = Probes.of(code, BATCH, setting.device)
        runs = alone.runs()
        runs.update({str(T): partial(_call, network, x, target) for T, network in networks.items()})
        found = timing.rounds(runs, seconds, setting.device, clock=timing.processor_clock(setting.device))
    except Unsupported as error:
        return {**row, "not_measured": str(error)}
    times = {T: statistics.median(found[str(T)]) for T in which.steps}
    return {**row, **line_through(times), **predicted(alone, found), **_floor(code, setting)}


DEPTHS, WIDTH = (4, 32), 128
DEPTH_STEPS = (20, 60, 100)


def depths(setting: Setting, seconds: float) -> dict[str, Any]:
    """Milliseconds of a strict step at two depths, each the slope of time in T, and its floor."""
    row: dict[str, Any] = {"model": f"MLP of width {WIDTH}", "batch": BATCH}
    networks: dict[tuple[int, int], PCNetwork] = {}
    runs: dict[str, Callable[[], object]] = {}
    floors: dict[str, float] = {}
    try:
        for depth in DEPTHS:
            model = deep_mlp(depth, WIDTH)
            module, x, target = _drawn(model, setting)
            name = fitting_backend(PCNetwork(module, strict(DEPTH_STEPS[0]), **model.pc), x, target, setting.device)
            row[f"backend_{depth}"] = name
            for steps in DEPTH_STEPS:
                networks[depth, steps] = network = PCNetwork(module, strict(steps), backend=name, **model.pc)
                runs[f"{depth}: {steps}"] = partial(_call, network, x, target)
            _require_right(networks[depth, DEPTH_STEPS[0]], x, target)
            code = selection.code_for(network.trace(x), strict(DEPTH_STEPS[0]).dynamics, BATCH)
            floors[str(depth)] = 0.0 if isinstance(code, str) else _floor(code, setting)["floor_ms_a_step"]
    except Unsupported as error:
        return {**row, "not_measured": str(error)}
    found = timing.rounds(runs, seconds, setting.device)
    medians = {depth: {T: statistics.median(found[f"{depth}: {T}"]) for T in DEPTH_STEPS} for depth in DEPTHS}
    return {
        **row,
        "ms_a_step": {str(depth): line_through(times)["ms_a_step"] for depth, times in medians.items()},
        "floor_ms_a_step": floors,
    }


def fitting_backend(network: PCNetwork, x: torch.Tensor, target: torch.Tensor, device: torch.device) -> str:
    """The engine where it takes the call, else the tier that takes any."""
    for name in (backend_for(device), "graph"):
        try:
            network.backend = name
            network.infer(x, target)
        except Unsupported:
            continue
        return name
    raise Unsupported("no backend but the reference runs it")


def line_through(times: Mapping[int, float]) -> dict[str, Any]:
    """Milliseconds at each T, the slope, and by what part of its time the point that lies furthest off the line is off."""
    measured, start = statistics.linear_regression(list(times), list(times.values()))
    bend = max(abs(ms - start - measured * T) / ms for T, ms in times.items())
    return {"ms": {str(T): ms for T, ms in times.items()}, "ms_a_step": measured, "bend": bend}


def predicted(alone: Probes, times: Times) -> dict[str, Any]:
    """Milliseconds of a step by the ledger's counts, each times what one of its kind costs by the probes."""
    costs = alone.costs(times)
    counts = sorted(work.work(alone.compiled, alone.batch).items(), key=lambda item: -item[1] * costs[item[0]])
    parts = [{"what": str(kind), "count": count, "ns": 1e6 * costs[kind], "ms": count * costs[kind]} for kind, count in counts]
    return {"predicted_ms_a_step": sum(count * costs[kind] for kind, count in counts), "parts": parts}


def _floor(code: Compiled, setting: Setting) -> dict[str, float]:
    tile, resident = tile_of(code, BATCH, setting.device)
    return {"floor_ms_a_step": setting.ceilings.floor(ledger(code, BATCH, tile).step, resident)}


@dataclass(frozen=True)
class Memory:
    """Something whose memory is measured as T grows; backend: None for the engine of the device, where it takes the call."""

    model: Model
    batch: int
    steps: tuple[int, ...] = (1, 10, 100)
    backend: str | None = None


CALLS = 3
MEMORIES = (Memory(PAPER_MLP, 256, (1, 10, 100, 1000)), Memory(NAMES_RNN, 256), Memory(PAPER_MLP, 256, backend="graph"))


def memory(device: torch.device, measured: Sequence[Memory] = MEMORIES) -> list[dict[str, Any]]:
    """For each: bytes by which one call raises the peak of memory at each T, after a first call of the same T; none where nobody can tell.

    Of several calls the one that raised it least: another's may be the allocator, which is still growing its pools.
    Of a GPU, what PyTorch has given out; on the CPU, resident pages of the process, of which a few dozen KiB are noise. Results that
    grow by nature are the energies, 8 bytes a vertex and step. Of an engine, also the bytes of state and results that its code fixes.
    """
    if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
        return []
    return [_memory_of(which, device) for which in measured]


def _memory_of(which: Memory, device: torch.device) -> dict[str, Any]:
    module, (x, target) = which.model.build().to(device), which.model.data(which.batch, device)
    network = PCNetwork(module, strict(which.steps[0]), **which.model.pc)
    network.backend = backend = which.backend or fitting_backend(network, x, target, device)
    found = {}
    for steps in which.steps:
        network.rule = strict(steps)
        _call(network, x, target)
        found[str(steps)] = min(peak_of(partial(_call, network, x, target), device) for _ in range(CALLS))
    row = {"model": which.model.name, "batch": which.batch, "backend": backend, "bytes": found}
    return row if backend == "graph" else {**row, "state_bytes": state_bytes(network, x, which.steps)}


def state_bytes(network: PCNetwork, x: torch.Tensor, steps: Sequence[int]) -> dict[str, int]:
    """T -> bytes of the arena and of results for the whole batch, which an engine's code fixes beforehand."""
    graph, batch = network.trace(x), x.shape[0]
    found = {}
    for count in steps:
        code = selection.code_for(graph, strict(count).dynamics, batch)
        assert not isinstance(code, str), code
        found[str(count)] = 4 * batch * (code.code.rows + code.kept_size + code.scratch_size)
    return found


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes by which the peak rises during a call: of the GPU's memory, or of the process's resident memory (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    before = _status("VmHWM")
    run()
    return max(0, _status("VmHWM") - before)  # the kernel counts pages loosely


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def _call(network: PCNetwork, x: torch.Tensor, target: torch.Tensor) -> None:
    network.module.zero_grad(set_to_none=True)
    network.backward(x, target)


def _require_right(network: PCNetwork, x: torch.Tensor, target: torch.Tensor) -> None:
    _call(network, x, target)
    found, exact = gradients_of(network.module), copy.deepcopy(network)
    exact.module.double().zero_grad(set_to_none=True)
    exact.backend = "reference"
    exact.backward(x.double(), target.double())
    require_agreement("ours", whole_distance(found, gradients_of(exact.module)), 1e-3, "time in T")


def _double(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).cpu().double()


def _drawn(model: Model, setting: Setting) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, (x, target) = model.build(), model.data(BATCH)
    return module.to(setting.device), x.to(setting.device), target.to(setting.device)
