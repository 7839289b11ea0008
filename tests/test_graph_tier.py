"""The graph tier: exact in float64, its steps replayable, its memory flat. (test_backends has it in float32, beside the engine.)"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from test_backends import MODELS, data
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pckernels as pck
from pckernels import replay, tensor_machine
from pckernels.backends import graph
from pckernels.instructions import Op
from pckernels.interpreter import PoolShape
from pckernels.tensor_operations import average, average_feedback, maxima, maxima_change, maxima_feedback


def found(network: pck.PCNetwork, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Everything that a call finds."""
    network.zero_grad()
    inference = network.backward(x, target)
    result = {f"value of {name}": value for name, value in inference.values.items()}
    result.update({f"error of {name}": error for name, error in inference.errors.items()})
    result.update({f"gradient of {name}": p.grad for name, p in network.named_parameters() if p.grad is not None})
    return {name: tensor.clone() for name, tensor in (result | {"energy": inference.energy, "loss": inference.loss}).items()}


def assert_is_the_reference(name: str, rule: pck.rules.Rule, loss: str = "squared_error") -> None:
    """In float64."""
    module = MODELS[name].build().double()
    x, target = (tensor.double() if tensor.is_floating_point() else tensor for tensor in data(name, 5, loss))
    ours, reference = (found(pck.PCNetwork(module, rule, loss=loss, backend=backend), x, target) for backend in ("graph", "reference"))
    assert set(ours) == set(reference)
    for key, expected in reference.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-11, atol=1e-12, msg=key)


def test_every_operation_has_a_body() -> None:
    """But those that only the blocks of a cluster have."""
    assert set(tensor_machine._RUN) == set(Op) - {Op.MEET, Op.GATHER}


@pytest.mark.parametrize("name", ["mlp", "skip", "cnn", "residual", "lstm"])
@pytest.mark.parametrize(
    "rule",
    [
        pck.Strict(7, 0.1, momentum=0.5),
        pck.Strict(3, 0.1, sweep="top_down"),
        pck.FixedPrediction(5, 0.3, solver="iterate"),
        pck.ZeroDivergence(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_it_is_the_reference_in_float64(name: str, rule: pck.rules.Rule) -> None:
    assert_is_the_reference(name, rule)


# Replaying


class Recorded(TorchDispatchMode):
    """The operations of a step with the very tensors that they read and wrote, as a CUDA graph keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a step may not wait for the device"
        result = func(*args, **(kwargs or {}))
        self.launches.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, result in self.launches:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder:
    """Stands in for CUDA's: what a recording has changed is put back, since on a device a recording runs nothing."""

    made: ClassVar[list[Recorded]] = []

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        machine = next(iter(reversed(graph._recordings.values()))).machine
        state = machine.state
        before = [tensor.clone() for tensor in state]
        recorded = Recorded()
        with recorded:
            step()
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        self.made.append(recorded)
        return recorded.replay


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """The CPU records and replays as a CUDA device would."""
    monkeypatch.setattr(replay, "can_record", lambda device: True)
    monkeypatch.setattr(replay, "Recorder", Recorder)
    Recorder.made.clear()
    graph.forget()
    yield Recorder.made
    graph.forget()


@pytest.mark.parametrize("name", ["mlp", "cnn", "residual", "lstm"])
@pytest.mark.parametrize(
    "rule",
    [
        pck.Strict(8, 0.1, momentum=0.5),
        pck.Strict(8, 0.1, nudge=0.5),  # an output that moves: its change is read after the loop alone
        pck.FixedPrediction(9, 0.3, solver="iterate", order="global"),
        pck.ZeroDivergence(),
    ],
    ids=["strict", "nudged", "fixed", "exact"],
)
def test_replayed_steps_are_the_steps(recording: list[Recorded], name: str, rule: pck.rules.Rule) -> None:
    """The first call runs plainly, the second records, the third replays what it recorded; each with other data."""
    module = MODELS[name].build()
    network, plain = pck.PCNetwork(module, rule, backend="graph"), pck.PCNetwork(module, rule, backend="reference")
    for call in range(4):
        torch.manual_seed(call)
        x, target = torch.randn(5, *MODELS[name].shape), torch.randn(5, *MODELS[name].target)
        ours, expected = found(network, x, target), found(plain, x, target)
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-3, atol=2e-5, msg=f"{key} of call {call}")
        with torch.no_grad():
            for parameter in module.parameters():  # as an optimizer would, in place
                parameter.mul_(1.01)
    has_steps = not isinstance(rule, pck.ZeroDivergence)
    stages = [recorded for recorded in recording if recorded.launches]
    assert bool(stages) == has_steps
    assert len(stages) <= 8  # one for each stage of the light cone, not one for each step or call


def test_a_parameter_that_has_moved_elsewhere_is_recorded_anew(recording: list[Recorded]) -> None:
    module = MODELS["mlp"].build()
    network = pck.PCNetwork(module, pck.Strict(3, 0.1), backend="graph")
    x, target = data("mlp", 5, "squared_error")
    for _ in range(2):
        network.backward(x, target)
    before = len(recording)
    with torch.no_grad():
        module[2].weight = nn.Parameter(module[2].weight * 2)
    expected = found(pck.PCNetwork(module, network.rule, backend="reference"), x, target)
    for _ in range(3):
        ours = found(network, x, target)
        torch.testing.assert_close(ours["energy"], expected["energy"])
    assert len(recording) == 2 * before


def test_recordings_are_few_and_can_be_forgotten(recording: list[Recorded]) -> None:
    network = pck.PCNetwork(MODELS["mlp"].build(), pck.Strict(2, 0.1), backend="graph")
    for batch in range(1, 9):
        network.infer(*data("mlp", batch, "squared_error"))
    assert len(graph._recordings) == graph._KEPT
    kept = [weakref.ref(recording.machine) for recording in graph._recordings.values()]
    graph.forget()
    gc.collect()
    assert all(machine() is None for machine in kept)


# Memory


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_memory_does_not_grow_with_the_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: dict[int, set[int]] = {}
    step = tensor_machine.Machine.step

    def counted(machine: tensor_machine.Machine, stage: Any) -> None:
        step(machine, stage)
        if stage.repeats:
            counts[machine.code.steps].add(sum(tensor.numel() for tensor in machine.tensors.values()))

    monkeypatch.setattr(tensor_machine.Machine, "step", counted)
    network = pck.PCNetwork(MODELS[name].build(), pck.Strict(1, 0.1), backend="graph")
    for steps in (10, 40):
        counts[steps] = set()
        network.rule = pck.Strict(steps, 0.1)
        network.infer(*data(name, 3, "squared_error"))
    assert max(counts[40]) == max(counts[10])


# Refusals


def test_what_it_refuses() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    network = pck.PCNetwork(module.to(torch.bfloat16), pck.Strict(2, 0.1), backend="graph")
    reason = "it runs float32 or float64, one of them at a time; this call has torch.bfloat16"
    with pytest.raises(pck.Unsupported, match=f"The graph backend cannot run this call: {reason}"):
        network.backward(torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(2, 2, dtype=torch.bfloat16))


# Pooling, whose windows have a short way where they lie side by side


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 2), (2, 1), (1, 0), (1, 2)), ((2, 3), (2, 3), (0, 0), (1, 1))],
)
def test_pooling_is_pytorchs(kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    x = torch.randn(3, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    dx = 0.3 * torch.randn_like(x)
    pooled = nn.functional.max_pool2d(x, kernel, stride, padding, dilation)
    shape = PoolShape([2, 7, 9, 0, *kernel, *stride, *padding, *dilation, 0, *pooled.shape[2:], 0])
    values, places = maxima(shape, x.detach().flatten(1))
    torch.testing.assert_close(values, pooled.detach().flatten(1))
    g = torch.randn_like(pooled)
    torch.testing.assert_close(maxima_feedback(shape, g.flatten(1), places), torch.autograd.grad(pooled, x, g)[0].flatten(1))
    moved, there = maxima_change(shape, x.detach().flatten(1), dx.flatten(1), values)
    leaf = (x + dx).detach().requires_grad_()
    expected = nn.functional.max_pool2d(leaf, kernel, stride, padding, dilation)
    torch.testing.assert_close(moved, (expected - pooled).detach().flatten(1))
    torch.testing.assert_close(maxima_feedback(shape, g.flatten(1), there), torch.autograd.grad(expected, leaf, g)[0].flatten(1))


@pytest.mark.parametrize(("padding", "inside_only"), [((0, 0), 0), ((1, 1), 0), ((1, 1), 1)])
def test_averages_are_pytorchs(padding: tuple[int, int], inside_only: int) -> None:
    x = torch.randn(3, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    pooled = nn.functional.avg_pool2d(x, (3, 2), (2, 2), padding, False, not inside_only)
    shape = PoolShape([2, 7, 9, 0, 3, 2, 2, 2, *padding, 1, 1, 0, *pooled.shape[2:], inside_only])
    torch.testing.assert_close(average(shape, x.detach().flatten(1)), pooled.detach().flatten(1))
    g = torch.randn_like(pooled)
    torch.testing.assert_close(average_feedback(shape, g.flatten(1)), torch.autograd.grad(pooled, x, g)[0].flatten(1))
