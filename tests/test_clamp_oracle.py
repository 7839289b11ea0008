"""Held value nodes, free inputs and partial targets, against numpy loops: values, errors and energies at every step, and what the
weights learn; and on linear models against the Gaussian conditional mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from oracle import rules, strict_models
from oracle.clamped import ClampedLoop
from oracle.compare import assert_all_equal_up_to_cancellation
from oracle.extended import Expected
from oracle.strict import Trajectory
from oracle.strict_models import Case, to_numpy
from torch import Tensor, nn

import pckernels as pck

BUILDERS: dict[str, Callable[[type], Case]] = {
    "mlp": lambda real: strict_models.mlp(real, "tanh"),
    "cnn": strict_models.cnn,
    "resnet": strict_models.resnet,
}
NODES = {"mlp": ("0", "4"), "cnn": ("pool", "fc1"), "resnet": ("conv1", "add")}  # held in part, and in whole
COURSES = {
    "jacobi": {"sweep": "jacobi", "momentum": 0.0},
    "top_down": {"sweep": "top_down", "momentum": 0.0},
    "momentum_red_black": {"sweep": "red_black", "momentum": 0.6},
}
SETTINGS = ("part", "whole", "free", "free in part", "all")
STEPS, RATE = 4, 0.07


@dataclass
class Setting:
    """The same clamps for the network and for the loop in some precision."""

    options: dict[str, object]
    loop: Callable[[type], ClampedLoop]


@cache
def network(name: str) -> tuple[Case, pck.PCNetwork, str]:
    case = BUILDERS[name](np.float64)
    options = {"loss": case.loss, "reduction": "sum", "value_nodes": case.value_nodes, "backend": "reference"}
    found = pck.PCNetwork(case.module, pck.Strict(0, 0.1), **options)
    return case, found, found.trace(case.x).inputs[0]


@cache
def setting(name: str, which: str) -> Setting:
    """Clamps and their masks, drawn once; masks that broadcast over the batch among them."""
    case, net, source = network(name)
    generator = torch.Generator().manual_seed(7)
    shapes = {key: value.shape for key, value in net.infer(case.x).values.items()}

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    partly, wholly = NODES[name]
    clamp: dict[str, object] = {}
    if which in ("part", "all"):
        clamp[partly] = draw(shapes[partly]), draw(shapes[partly][1:]) > 0  # one mask for all samples
    if which in ("whole", "all"):
        clamp[wholly] = draw(shapes[wholly])
    free = {"free": pck.Free(), "free in part": pck.Free(draw(case.x.shape) > 0, 0.3, draw(case.x.shape[1:]))}.get(which)
    free = pck.Free(draw(case.x.shape) > 0, 0.3) if which == "all" else free
    known = draw(shapes["output"]) > -0.5 if case.loss == "squared_error" else None
    options = {"clamp": clamp, "free": {source: free} if free else (), "target_mask": known}

    def loop(real: type) -> ClampedLoop:
        held = {key: as_held(value, real) for key, value in clamp.items()}
        prior = None
        if free is not None:
            mean = to_numpy(free.mean, real) if isinstance(free.mean, Tensor) else real(free.mean)
            prior = free.precision, mean
            if free.where is not None:
                held[source] = to_numpy(case.x, real), ~free.where.numpy()
        return ClampedLoop(BUILDERS[name](real).oracle, source, held, prior, None if known is None else known.numpy())

    return Setting(options, loop)


def as_held(given: object, real: type) -> tuple[np.ndarray, np.ndarray]:
    value, mask = given if isinstance(given, tuple) else (given, torch.ones(1, dtype=torch.bool))
    return to_numpy(value, real), mask.numpy()


def assert_follows(name: str, which: str, rule: pck.rules.Rule, expected: Expected) -> None:
    case, net, _ = network(name)
    options, net.rule = setting(name, which).options, rule
    recorded = net.infer(case.x, case.target, record=True, **options)
    assert len(recorded.history) == len(expected.exact.values)
    expected.energies(recorded.energy)
    for t, state in enumerate(recorded.history):
        expected.state(state.values, state.errors, t)
    case.module.zero_grad()
    inference = net.backward(case.x, case.target, **options)
    expected.state(inference.values, inference.errors, len(recorded.history) - 1)
    expected.gradients({key: p.grad for key, p in case.module.named_parameters()})


def both(name: str, which: str, run: Callable[[ClampedLoop], object]) -> Expected:
    exact, rough = (run(setting(name, which).loop(real)) for real in (np.longdouble, np.float64))
    return Expected(exact, rough)


@pytest.mark.parametrize("which", SETTINGS)
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_strict_equals_the_loop(name: str, course: str, which: str) -> None:
    for steps in (0, STEPS):
        expected = both(name, which, lambda loop, steps=steps: loop.run(steps, RATE, **COURSES[course]))
        assert_follows(name, which, pck.Strict(steps, RATE, **COURSES[course]), expected)


@pytest.mark.parametrize("which", ["part", "free in part", "all"])
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_incremental_equals_the_loop(name: str, course: str, which: str) -> None:
    expected = both(name, which, lambda loop: rules.incremental(loop, STEPS, RATE, 0.05, **COURSES[course])[0])
    assert_follows(name, which, pck.Incremental(STEPS, RATE, 0.05, **COURSES[course]), expected)


@pytest.mark.parametrize("which", SETTINGS)
@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize("name", BUILDERS)
def test_error_optimization_equals_the_loop(name: str, course: str, which: str) -> None:
    for steps in (0, STEPS):
        expected = both(name, which, lambda loop, steps=steps: loop.optimize_errors(steps, RATE, **COURSES[course]))
        assert_follows(name, which, pck.ErrorOptimization(steps, RATE, **COURSES[course]), expected)


@pytest.mark.parametrize("which", SETTINGS)
@pytest.mark.parametrize("name", BUILDERS)
def test_centered_nudging_equals_the_loop(name: str, which: str) -> None:
    """What a held node keeps from the loss cancels to nothing."""
    case, net, _ = network(name)
    net.rule = pck.Strict(STEPS, RATE, momentum=0.6, nudge=("centered", 0.3))
    exact = nudged(setting(name, which).loop(np.longdouble), (0.3, -0.3))
    case.module.zero_grad()
    inference = net.backward(case.x, case.target, **setting(name, which).options)
    assert_all_equal_up_to_cancellation({n: v for n, v in inference.values.items() if n != "output"}, tensors(exact.values[-1]), 1e-12)
    assert_all_equal_up_to_cancellation({"energy": inference.energy}, {"energy": torch.tensor(np.array(exact.energies, float))}, 1e-12)
    found = {key: p.grad for key, p in case.module.named_parameters()}
    assert_all_equal_up_to_cancellation(found, tensors(exact.gradients), 1e-11)


def tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(array, dtype=np.float64)) for name, array in arrays.items()}


def nudged(loop: ClampedLoop, betas: tuple[float, ...]) -> Trajectory:
    """As the loop itself at each beta; the gradients' mean, each over its beta."""
    loss, error = loop.loss
    runs = []
    for beta in betas:
        loop.loss = (lambda mu, y, b=beta: b * loss(mu, y)), (lambda mu, y, b=beta: b * error(mu, y))
        runs.append(loop.run(STEPS, RATE, momentum=0.6))
    runs[0].gradients = {
        name: sum(run.gradients[name] / beta for run, beta in zip(runs, betas, strict=True)) / 2 for name in runs[0].gradients
    }
    return runs[0]


@pytest.mark.parametrize("name", BUILDERS)
def test_the_loop_of_errors_descends_its_own_energy(name: str) -> None:
    """The oracle checks itself: its drives are -dF/dstate by central differences."""
    loop, rng = setting(name, "all").loop(np.float64), np.random.default_rng(0)
    state = {u.name: 0.3 * rng.standard_normal(loop._feed_forward()[u.name].shape) for u in loop.hidden}
    drives = loop.drives(state)
    for u in loop.hidden:
        direction = rng.standard_normal(state[u.name].shape)
        high, low = (energy(loop, state | {u.name: state[u.name] + h * direction}) for h in (1e-6, -1e-6))
        assert (high - low) / 2e-6 == pytest.approx(-float((drives[u.name] * direction).sum()), rel=1e-5, abs=1e-6)


def energy(loop: ClampedLoop, state: dict[str, np.ndarray]) -> float:
    v, mu = loop.follow(state)
    return loop._energy(loop._errors(v, mu), mu)


# Linear models have Gaussian equilibria

DEEP_RULES = {
    "strict": pck.Strict(1500, 0.1, momentum=0.9),
    "red_black": pck.Strict(1500, 0.15, momentum=0.8, sweep="red_black"),
    "error_optimization": pck.ErrorOptimization(1500, 0.05, momentum=0.9),
}


@dataclass
class Generative:
    """z ~ N(mean, 1/precision), h = W1 z + b1 + n, x = W2 h + b2 + n: the joint Gaussian of (z, h, x)."""

    module: nn.Sequential
    mean: Tensor
    covariance: Tensor

    @property
    def z(self) -> slice:
        return slice(0, 3)

    @property
    def h(self) -> slice:
        return slice(3, 8)


def generative(precision: float, prior_mean: Tensor) -> Generative:
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    one, two = module[0].weight.detach(), module[1].weight.detach()
    z = torch.cat([torch.eye(3) / precision**0.5, torch.zeros(3, 12)], 1)  # as functions of the independent noises
    h = one @ z + torch.cat([torch.zeros(5, 3), torch.eye(5), torch.zeros(5, 7)], 1)
    x = two @ h + torch.cat([torch.zeros(7, 8), torch.eye(7)], 1)
    noise = torch.cat([z, h, x])
    h_mean = module[0](prior_mean).detach()
    return Generative(module, torch.cat([prior_mean, h_mean, module[1](h_mean).detach()]), noise @ noise.T)


def conditional_mean(model: Generative, seen: Tensor, values: Tensor) -> Tensor:
    """(B, 15): E[z, h, x | the entries `seen` of them], with the seen ones in their places."""
    gain = model.covariance[:, seen] @ torch.linalg.inv(model.covariance[seen][:, seen])
    return model.mean + (values[:, seen] - model.mean[seen]) @ gain.T


@pytest.mark.parametrize("rule", DEEP_RULES)
def test_a_linear_model_relaxes_to_the_conditional_mean(rule: str, float64: None) -> None:
    """The latent input free with a prior, part of the hidden layer held, part of the image known: E[the rest | these]."""
    prior_mean = torch.randn(3)
    model = generative(0.7, prior_mean)
    held, known = torch.tensor([True, False, False, True, False]), torch.tensor([True, False, True, True, False, True, False])
    seen = torch.cat([torch.zeros(3, dtype=torch.bool), held, known])
    values = torch.randn(4, 15)
    pcn = pck.PCNetwork(model.module, DEEP_RULES[rule])
    inference = pcn.infer(
        torch.zeros(4, 3),
        values[:, 8:],
        clamp={"0": (values[:, model.h], held)},
        free={"input": pck.Free(precision=0.7, mean=prior_mean)},
        target_mask=known,
    )
    expected = conditional_mean(model, seen, values)
    assert torch.allclose(inference.values["input"], expected[:, model.z], rtol=1e-9, atol=1e-10)
    assert torch.allclose(inference.values["0"], expected[:, model.h], rtol=1e-9, atol=1e-10)
    # the noise of a known pixel is what is left; an unknown one is as predicted
    assert torch.allclose(inference.values["output"], expected[:, 8:], atol=1e-9)
    quadratic = (values[:, seen] - model.mean[seen]) @ torch.linalg.inv(model.covariance[seen][:, seen])
    assert torch.allclose(inference.energy[-1], 0.5 * (quadratic * (values[:, seen] - model.mean[seen])).sum(), rtol=1e-9)


@pytest.mark.parametrize("rule", ["strict", "error_optimization"])
def test_without_a_prior_one_layer_is_least_squares(rule: str, float64: None) -> None:
    module, target = nn.Linear(3, 7), torch.randn(4, 7)
    inference = pck.PCNetwork(module, DEEP_RULES[rule]).infer(torch.randn(4, 3), target, free="input")
    solution = torch.linalg.lstsq(module.weight, (target - module.bias).T).solution.T
    assert torch.allclose(inference.values["input"], solution.detach(), rtol=1e-9, atol=1e-10)
    assert not inference.errors["input"].any()
