"""The PyTorch contract of PCNetwork for the rules that descend F in other ways than Strict."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

RULES: dict[str, pck.rules.Rule] = {
    "error_optimization": pck.ErrorOptimization(4, 0.2, momentum=0.5),
    "nudged": pck.Strict(4, 0.2, momentum=0.5, nudge=-0.2),
    "centered": pck.Strict(9, 0.2, sweep="red_black", tolerance=2e-2, nudge=("centered", 0.4)),
    "incremental": pck.Incremental(4, 0.2, 0.05, momentum=0.5),
}
WILD: dict[str, pck.rules.Rule] = {
    "error_optimization": pck.ErrorOptimization(60, 40.0),
    "nudged": pck.Strict(60, 40.0, nudge=0.5),
    "centered": pck.Strict(60, 40.0, nudge=("centered", 0.5)),
    "incremental": pck.Incremental(60, 40.0, 0.1),
}

Gradients = dict[str, Tensor]


class Skip(nn.Module):
    """A skip, a tied weight and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.block, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(torch.tanh(h + self.block(torch.tanh(self.block(h)))))


class Normed(nn.Module):
    """What is drawn and measured in the feed-forward pass lies behind a value node that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.head = nn.Linear(4, 5), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.second(torch.tanh(self.first(x))))
        return self.head(nn.functional.dropout(torch.tanh(h), 0.4, self.training))


@pytest.fixture
def case(float64: None) -> tuple[nn.Module, Tensor, Tensor]:
    return Skip(), torch.randn(4, 5), torch.randn(4, 3)


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> pck.rules.Rule:
    return RULES[request.param]


def gradients(module: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def learned(
    module: nn.Module, rule: pck.rules.Rule, x: Tensor, target: Tensor, scale: float | Tensor = 1.0, **options: object
) -> Gradients:
    module.zero_grad()
    pck.PCNetwork(module, rule, **options).backward(x, target, scale=scale)
    return gradients(module)


def moves_weights(rule: pck.rules.Rule) -> bool:
    """Then values depend on the reduction, and samples meet in the weights."""
    return isinstance(rule, pck.Incremental)


def with_still_weights(rule: pck.rules.Rule) -> pck.rules.Rule:
    return dataclasses.replace(rule, weight_rate=0.0) if isinstance(rule, pck.Incremental) else rule


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


def test_every_parameter_that_is_read_learns(case, rule) -> None:
    module, x, target = case
    found = learned(module, rule, x, target)
    assert found.keys() == {name for name, _ in module.named_parameters() if not name.startswith("unused")}
    assert all(gradient.any() for gradient in found.values())


def test_reduction_and_scale_multiply_gradients_alone(case, rule) -> None:
    module, x, target = case
    by_sum = learned(module, rule, x, target, reduction="sum")
    for scale in (8.0, torch.tensor(8.0)):
        assert_same(learned(module, rule, x, target, scale, reduction="sum"), {name: 8 * value for name, value in by_sum.items()})
    one, other = (pck.PCNetwork(module, rule, reduction=reduction).infer(x, target) for reduction in ("sum", "mean"))
    assert torch.allclose(one.loss, 4 * other.loss, rtol=1e-12)
    if not moves_weights(rule):
        assert_same(learned(module, rule, x, target), {name: value / 4 for name, value in by_sum.items()})
        assert torch.equal(one.energy, other.energy)
        assert all(torch.equal(one.errors[name], other.errors[name]) for name in one.errors)


def test_two_calls_add(case, rule) -> None:
    module, x, target = case
    once = learned(module, rule, x, target)
    pck.PCNetwork(module, rule).backward(x, target)
    assert_same(gradients(module), {name: 2 * value for name, value in once.items()})


def test_frozen_parameters_take_part_and_get_no_gradient(case, rule) -> None:
    module, x, target = case
    module.head.weight.requires_grad_(False)
    found = learned(module, rule, x, target)
    assert "head.weight" not in found and found["inner.weight"].any()
    module.head.weight.data.mul_(2.0)
    assert not torch.allclose(learned(module, rule, x, target)["inner.weight"], found["inner.weight"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_same_under_no_grad_and_inference_mode(case, rule, mode) -> None:
    module, x, target = case
    expected = learned(module, rule, x, target)
    module.zero_grad()
    with mode():
        pck.PCNetwork(module, rule).backward(x * 1.0, target * 1.0)
    assert_same(gradients(module), expected, 0.0)


def test_infer_leaves_everything_alone(case, rule) -> None:
    module, x, target = case
    before = copy.deepcopy(module.state_dict())
    inference = pck.PCNetwork(module, rule).infer(x, target, record=True)
    steps = rule.dynamics.steps
    assert inference.energy.shape == (len(inference.history),)
    assert len(inference.history) == steps + 1 or (rule.dynamics.tolerance and 2 < len(inference.history) <= steps)
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert inference.energy[-1] < inference.energy[0]
    beta = rule.dynamics.nudges[0]
    assert torch.allclose(inference.history[0].errors["output"], beta * (target - module(x)), rtol=1e-12)
    assert torch.equal(inference.values["output"], target) == (not rule.dynamics.is_nudged)
    feed_forward = pck.PCNetwork(module, rule).infer(x)
    assert torch.equal(feed_forward.values["output"], module(x))


def test_samples_do_not_mix(case, rule) -> None:
    module, x, target = case
    network = pck.PCNetwork(module, with_still_weights(rule))
    together, alone = network.infer(x, target).errors, [network.infer(x[k : k + 1], target[k : k + 1]).errors for k in range(len(x))]
    for name, error in together.items():
        assert torch.allclose(error, torch.cat([one[name] for one in alone]), rtol=1e-12, atol=1e-14), name


def test_an_empty_batch_learns_nothing(case, rule) -> None:
    module, x, target = case
    found = learned(module, rule, x[:0], target[:0])
    assert not any(gradient.any() for gradient in found.values()) and found


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.a(x))
        return self.b(h), self.c(h)


def test_another_loss_and_another_structure(rule, float64: None) -> None:
    module, x, classes = Pair(), torch.randn(4, 5), torch.randint(3, (4,))
    named = pck.PCNetwork(module, rule, loss="cross_entropy").infer(x, (classes, None))

    def loss(output: tuple[Tensor, Tensor], target: tuple[Tensor, None]) -> Tensor:
        return nn.functional.cross_entropy(output[0], target[0], reduction="none")

    own = pck.PCNetwork(module, rule, loss=loss).infer(x, (classes, None))
    assert torch.allclose(named.energy, own.energy, rtol=1e-12)
    assert all(torch.allclose(named.errors[name], own.errors[name], rtol=1e-10, atol=1e-15) for name in named.errors)


def test_statistics_and_masks_of_the_feed_forward_pass_hold(rule, float64: None) -> None:
    module, x, target = Normed(), torch.randn(6, 4), torch.randn(6, 2)
    network = pck.PCNetwork(module, with_still_weights(rule))
    network.backward(x, target)
    assert int(module.norm.num_batches_tracked) == 1
    history = network.infer(x, target, record=True).history
    pre = [module.second(moment.values["first"]).detach() for moment in history]
    mask = (history[0].values["second"] != 0) / 0.6
    assert 0 < mask.count_nonzero() < mask.numel()
    spread = (pre[0].var(0, unbiased=False) + module.norm.eps).sqrt()
    assert not torch.allclose(pre[-1], pre[0])
    for z, moment in zip(pre, history, strict=True):
        expected = mask * torch.tanh((z - pre[0].mean(0)) / spread)
        assert torch.allclose(moment.values["second"] - moment.errors["second"], expected, rtol=1e-10, atol=1e-12)


def test_it_runs_in_float32_on_the_engine_or_the_plan_says_why_not(case, rule) -> None:
    module, x, target = case
    inference = pck.PCNetwork(module.float(), rule).infer(x.float(), target.float())
    if not rule.dynamics.learn_at_each_step and rule.dynamics.tolerance is None:
        assert inference.backend == "host"
        return
    assert inference.backend == "reference" and "not host: " in inference.plan and 'backend="graph"' in inference.plan
    with pytest.raises(pck.Unsupported, match="host backend cannot run this call"):
        pck.PCNetwork(module, rule, backend="host").infer(x.float(), target.float())


def test_autocast_keeps_state_and_gradients_in_float32(rule) -> None:
    module, x, target = Skip(), torch.randn(4, 5), torch.randn(4, 3)
    network, exact = pck.PCNetwork(module, rule), learned(module, rule, x, target)
    module.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inference = network.backward(x, target)
    assert {value.dtype for value in [*inference.values.values(), *gradients(module).values()]} == {torch.float32}
    assert any(not torch.equal(value, exact[name]) for name, value in gradients(module).items())
    assert_same(gradients(module), exact, 0.1)


@pytest.mark.parametrize("name", WILD)
def test_divergence_changes_nothing(case, name) -> None:
    module, x, target = case
    network, optimizer = pck.PCNetwork(module, WILD[name]), torch.optim.Adam(module.parameters(), 0.1)
    pck.PCNetwork(module, pck.ZeroDivergence()).step(x, target, optimizer)
    before = gradients(module), copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls: list[Callable[[], object]] = [lambda: network.backward(x, target), lambda: network.step(x, target, optimizer)]
    for call in calls:
        with pytest.raises(pck.InferenceDiverged, match="smaller rate"):
            call()
        assert_same(gradients(module), before[0], 0.0)
        assert all(torch.equal(value, before[1][name]) for name, value in module.state_dict().items())
        assert_equal_states(optimizer.state_dict(), before[2])


def assert_equal_states(found: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal_states(found[key], value)
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor) and torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("name", WILD)
def test_a_deferred_check_adds_nothing_and_raises_on_reading(case, name) -> None:
    module, x, target = case
    bad = pck.PCNetwork(module, WILD[name], check="deferred").backward(x, target)
    assert not any(value.any() for value in gradients(module).values())
    for read in (lambda: bad.loss, lambda: bad.energy):
        with pytest.raises(pck.InferenceDiverged):
            read()


BAD_RULES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: pck.ErrorOptimization(2.0, 0.1), TypeError, "steps must be an int"),
    (lambda: pck.ErrorOptimization(-1, 0.1), ValueError, "0 or more"),
    (lambda: pck.ErrorOptimization(2, 0.0), ValueError, "rate must be finite and greater than 0"),
    (lambda: pck.ErrorOptimization(2, "fast"), TypeError, "rate must be a float"),
    (lambda: pck.ErrorOptimization(2, 0.1, momentum=1.0), ValueError, "momentum must be"),
    (lambda: pck.Strict(2, 0.1, nudge=0), ValueError, "nudge must be finite and not 0"),
    (lambda: pck.Strict(2, 0.1, nudge=float("nan")), ValueError, "nudge must be finite and not 0"),
    (lambda: pck.Strict(2, 0.1, nudge=True), TypeError, "nudge must be a float beta"),
    (lambda: pck.Strict(2, 0.1, nudge="centered"), TypeError, "nudge must be a float beta, or the tuple"),
    (lambda: pck.Strict(2, 0.1, nudge=["centered", 0.1]), TypeError, "nudge must be a float beta, or the tuple"),
    (lambda: pck.Strict(2, 0.1, nudge=("centered",)), ValueError, "nudge must be beta or"),
    (lambda: pck.Strict(2, 0.1, nudge=("left", 0.1)), ValueError, "nudge must be beta or"),
    (lambda: pck.Strict(2, 0.1, nudge=("centered", -0.1)), ValueError, "beta of a centered nudge must be finite and greater than 0"),
    (lambda: pck.Strict(2, 0.1, nudge=("centered", "0.1")), TypeError, "beta of a centered nudge must be a float"),
    (lambda: pck.FixedPrediction(2, 0.1, nudge=0.1), TypeError, "nudge= is an option of Strict, not of FixedPrediction; drop it"),
    (lambda: pck.ZeroDivergence(nudge=0.1), TypeError, "nudge= is an option of Strict, not of ZeroDivergence"),
    (
        lambda: pck.ErrorOptimization(2, 0.1, solver="sweep"),
        TypeError,
        "solver= is an option of FixedPrediction and Zero",
    ),
    (lambda: pck.Incremental(2, 0.1, solver="closed_form"), TypeError, "solver= is an option of .* not of Incremental"),
    (lambda: pck.Incremental(2, 0.1, nudge=0.1), TypeError, "nudge= is an option of Strict, not of Incremental"),
    (lambda: pck.Incremental(2, 0.1, -0.1), ValueError, "weight_rate must be finite and at least 0"),
    (lambda: pck.Incremental(2, 0.1, "slow"), TypeError, "weight_rate must be a float"),
    (lambda: pck.Incremental(2, -0.1, 0.1), ValueError, "rate must be finite and greater than 0"),
    (lambda: pck.Strict(2, 0.1, weight_rate=0.1), TypeError, "weight_rate= is an option of Incremental, not of Strict"),
    (lambda: pck.Strict(2, 0.1, speed=3), TypeError, "unexpected keyword argument 'speed'"),
    (lambda: pck.ErrorOptimization(2, 0.1, sweep="sideways"), ValueError, "sweep must be one of"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD_RULES)
def test_bad_arguments_are_refused_in_a_sentence(make, error, words) -> None:
    with pytest.raises(error, match=words):
        make()
