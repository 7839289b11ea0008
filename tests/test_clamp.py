"""Clamps, free inputs and partial targets: what they mean, whom they suit, and the sentences that refuse the rest."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.block, self.head = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head(torch.tanh(h + self.block(h)))


RULES: dict[str, pck.rules.Rule] = {
    "strict": pck.Strict(6, 0.1, momentum=0.5),
    "tolerance": pck.Strict(60, 0.2, tolerance=1e-3),
    "centered": pck.Strict(6, 0.1, nudge=("centered", 0.3)),
    "incremental": pck.Incremental(6, 0.1, 0.01),
    "error_optimization": pck.ErrorOptimization(6, 0.1),
}


@pytest.fixture
def case(float64: None) -> tuple[nn.Module, Tensor, Tensor]:
    return Skip(), torch.randn(4, 5), torch.randn(4, 3)


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> pck.rules.Rule:
    return RULES[request.param]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_what_is_held_stays_at_every_step_and_what_is_free_moves(case, rule) -> None:
    module, x, target = case
    value, mask, where = torch.randn(4, 7), torch.rand(7) > 0.5, torch.rand(4, 5) > 0.5
    inference = pck.PCNetwork(module, rule).infer(
        x, target, record=True, clamp={"inner": value, "block": (value, mask)}, free={"x": pck.Free(where, precision=0.1)}
    )
    for moment in inference.history:
        assert torch.equal(moment.values["inner"], value)
        assert torch.equal(moment.values["block"][:, mask], value[:, mask])
        assert torch.equal(moment.values["x"][~where], x[~where])
    assert (inference.values["x"] != x)[where].all()
    assert (inference.values["block"] != inference.history[0].values["block"])[:, ~mask].all()


def test_the_start_is_the_feed_forward_pass_through_what_is_held(case, rule) -> None:
    """A held node alone has an error at t = 0; the loss is that of the predictions behind it."""
    module, x, target = case
    value = torch.randn(4, 7)
    inference = pck.PCNetwork(module, rule).infer(x, target, record=True, clamp={"inner": value})
    start = inference.history[0]
    inner = torch.tanh(module.inner(x)).detach()
    output = module.head(torch.tanh(value + module.block(value))).detach()
    assert torch.allclose(start.errors["inner"], value - inner, rtol=1e-12)
    assert not start.errors["block"].any() and not start.errors["add"].any()
    assert torch.allclose(inference.loss, 0.5 * (target - output).square().sum() / 4, rtol=1e-12)
    beta = 0.3 if rule.dynamics.is_nudged else 1.0
    assert torch.allclose(inference.energy[0], 0.5 * (value - inner).square().sum() + beta * 4 * inference.loss, rtol=1e-12)


def test_a_clamp_at_the_feed_forward_value_changes_nothing_at_the_start(case) -> None:
    """Held where it would have been anyway, and where T = 0 leaves it."""
    module, x, target = case
    pcn = pck.PCNetwork(module, pck.Strict(0, 0.1))
    values = pcn.infer(x).values
    pcn.backward(x, target)
    plain = gradients(module)
    module.zero_grad()
    pcn.backward(x, target, clamp={"inner": values["inner"], "add": (values["add"], torch.tensor(True))})
    assert all(torch.allclose(value, plain[name], rtol=1e-12, atol=1e-15) for name, value in gradients(module).items())


def test_a_mask_of_nothing_is_no_clamp(case, rule) -> None:
    module, x, target = case
    nothing = torch.zeros(1, dtype=torch.bool)
    found = []
    for options in ({}, {"clamp": {"inner": (torch.full((4, 7), math.nan), nothing)}, "free": {"x": pck.Free(nothing)}}):
        module.zero_grad()
        inference = pck.PCNetwork(module, rule).backward(x, target, target_mask=~nothing, **options)
        found.append((inference, gradients(module)))
    (plain, learned), (masked, other) = found
    assert torch.allclose(plain.energy, masked.energy, rtol=1e-12)
    for name, value in plain.values.items():
        assert torch.allclose(value, masked.values[name], rtol=1e-12, atol=1e-15)
    assert torch.equal(masked.values["x"], x)
    assert all(torch.allclose(value, other[name], rtol=1e-11, atol=1e-14) for name, value in learned.items())


def test_a_held_node_screens_what_lies_before_it_from_the_loss(case, rule) -> None:
    module, x, target = case
    value = torch.randn(4, 7)
    found = []
    for wanted in (target, target + 1):
        module.zero_grad()
        pck.PCNetwork(module, rule).backward(x, wanted, clamp={"inner": value})
        found.append(gradients(module))
    if not rule.dynamics.is_nudged:
        assert torch.allclose(found[0]["inner.weight"], found[1]["inner.weight"], rtol=1e-12) and found[0]["inner.weight"].any()
    assert not torch.allclose(found[0]["head.weight"], found[1]["head.weight"])


def test_samples_do_not_meet(case, rule) -> None:
    if isinstance(rule, pck.Incremental):
        rule = pck.Incremental(6, 0.1, 0.0)
    module, x, target = case
    value, where, known = torch.randn(4, 7), torch.rand(4, 5) > 0.5, torch.rand(4, 3) > 0.5
    pcn = pck.PCNetwork(module, rule)

    def infer(part: slice) -> pck.Inference:
        clamp, free = {"block": (value[part], value[part] > 0)}, {"x": pck.Free(where[part], precision=0.5)}
        return pcn.infer(x[part], target[part], clamp=clamp, free=free, target_mask=known[part])

    whole, part = infer(slice(None)), infer(slice(1, 3))
    for name, value_ in part.values.items():
        assert torch.allclose(whole.values[name][1:3], value_, rtol=1e-11, atol=1e-13), name


@pytest.mark.parametrize(
    "rule",
    [pck.Strict(5, 0.1), pck.ZeroDivergence(), pck.FixedPrediction(9, 0.3), pck.FixedPrediction(9, 0.3, solver="iterate")],
    ids=["strict", "zero", "closed_form", "iterate"],
)
def test_a_partial_target_suits_every_rule(case, rule) -> None:
    """It is a loss like another, here written out as one."""
    module, x, target = case
    known = torch.rand(4, 3) > 0.5
    module.zero_grad()
    inference = pck.PCNetwork(module, rule).backward(x, torch.where(known, target, math.nan), target_mask=known)
    found = gradients(module)
    module.zero_grad()
    by_hand = pck.PCNetwork(module, rule, loss=lambda output, y: (0.5 * (output - y).square() * known).sum(1)).backward(x, target)
    assert torch.allclose(inference.loss, by_hand.loss, rtol=1e-12)
    assert torch.allclose(inference.energy, by_hand.energy, rtol=1e-12)
    assert all(torch.allclose(value, found[name], rtol=1e-11, atol=1e-14) for name, value in gradients(module).items())
    assert torch.equal(inference.values["output"], torch.where(known, target, by_hand.values["output"]))
    assert not inference.errors["output"][~known].any()


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, gain: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x * gain))
        return {"near": h, "far": self.b(h)}


def test_several_inputs_and_outputs(float64: None) -> None:
    """One input of two is free; one output has a mask, the other none: then its whole target counts."""
    module = Two()
    x, gain, near, far = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 3), torch.randn(5, 2)
    known = torch.rand(5, 3) > 0.5
    inference = pck.PCNetwork(module, pck.Strict(8, 0.1)).infer(
        x, gain, target={"near": near, "far": far}, free=["gain"], target_mask={"near": known, "far": None}
    )
    assert set(inference.values) == {"gain", "mul", "a", "output.0", "output.1"} and (inference.values["gain"] != gain).all()
    assert torch.equal(inference.values["output.1"], far)
    assert torch.equal(inference.values["output.0"][known], near[known]) and not inference.errors["output.0"][~known].any()


def test_a_generative_model_learns_without_labels(float64: None) -> None:
    """Latent inputs free at every step: the weights find the plane in which the data lie."""
    plane = torch.randn(2, 8)
    data = torch.randn(32, 2) @ plane
    module = nn.Linear(2, 8)
    pcn, optimizer = pck.PCNetwork(module, pck.Strict(15, 0.1, momentum=0.5)), torch.optim.Adam(module.parameters(), 0.05)
    losses = []
    for _ in range(60):
        inference = pcn.step(torch.zeros(32, 2), data, optimizer, free={"input": pck.Free(precision=1e-2)})
        losses.append(float(inference.energy[-1]))
    assert losses[-1] < 0.05 * losses[0], losses


def test_incremental_steps_with_clamps_too(case) -> None:
    module, x, target = case
    before = copy.deepcopy(module.state_dict())
    value = torch.randn(4, 7)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    inference = pck.PCNetwork(module, pck.Incremental(5, 0.1)).step(x, target, optimizer, clamp={"inner": value}, free="x")
    assert torch.equal(inference.values["inner"], value) and not torch.equal(inference.values["x"], x)
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "deferred", "plain"])
def test_modes_change_nothing(case, mode: str) -> None:
    module, x, target = case
    options: dict[str, Any] = {
        "clamp": {"block": (torch.randn(4, 7), torch.rand(7) > 0.5)},
        "free": "x",
        "target_mask": torch.rand(3) > 0.2,
    }
    plain = pck.PCNetwork(module, pck.Strict(5, 0.1)).infer(x, target, **options)
    context = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad}.get(mode, torch.enable_grad)
    with context():
        if mode == "inference_mode":
            options["clamp"] = {"block": tuple(each.clone() for each in options["clamp"]["block"])}
        found = pck.PCNetwork(module, pck.Strict(5, 0.1), check="deferred" if mode == "deferred" else "sync").infer(x, target, **options)
    assert torch.equal(found.energy, plain.energy) and torch.equal(found.values["x"], plain.values["x"])


def test_batchnorm_measures_what_passes_through_the_clamp(float64: None) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    value, x, target = torch.randn(6, 4), torch.randn(6, 3), torch.randn(6, 2)
    twin = copy.deepcopy(module)
    pck.PCNetwork(module, pck.Strict(3, 0.1)).infer(x, target, clamp={"0": value})
    twin[2](twin[1](value))
    assert torch.allclose(module[2].running_mean, twin[2].running_mean, rtol=1e-12)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an unknown name": (
        {"clamp": {"nowhere": torch.zeros(4, 7)}},
        ValueError,
        "no value node 'nowhere' to clamp; there are 'inner', 'block'",
    ),
    "an output": ({"clamp": {"output": torch.zeros(4, 3)}}, ValueError, "is an output, which its target clamps. Give target="),
    "an input": ({"clamp": {"x": torch.zeros(4, 5)}}, ValueError, "is an input, which is clamped already. free= lets it move"),
    "a tensor without a name": ({"clamp": torch.zeros(4, 7)}, TypeError, "clamp must be a dict"),
    "a mask without a name": ({"free": torch.ones(4, 5)}, TypeError, "free must be an input's name"),
    "a list": ({"clamp": ["inner"]}, TypeError, "clamp must be a dict"),
    "a number": ({"clamp": {"inner": 1.0}}, TypeError, "must be a tensor, or a tuple"),
    "a triple": ({"clamp": {"inner": (1, 2, 3)}}, TypeError, "must be a tensor, or a tuple"),
    "another shape": ({"clamp": {"inner": torch.zeros(7)}}, ValueError, r"must have the value node's shape \(4, 7\); got \(7,\)"),
    "another batch": ({"clamp": {"inner": torch.zeros(3, 7)}}, ValueError, r"shape \(4, 7\); got \(3, 7\)"),
    "another dtype": ({"clamp": {"inner": torch.zeros(4, 7).float()}}, TypeError, "Convert it with .to"),
    "another device": ({"clamp": {"inner": torch.zeros(4, 7, device="meta")}}, ValueError, "Move one with .to"),
    "a mask of numbers": ({"clamp": {"inner": (torch.zeros(4, 7).double(), torch.ones(4, 7))}}, TypeError, "must be a bool tensor"),
    "a mask of another shape": ({"clamp": {"inner": (torch.zeros(4, 7), torch.ones(6).bool())}}, ValueError, "must broadcast to shape"),
    "a mask that is larger": ({"clamp": {"inner": (torch.zeros(4, 7), torch.ones(2, 4, 7).bool())}}, ValueError, "must broadcast to"),
    "NaN": ({"clamp": {"inner": torch.full((4, 7), math.nan)}}, pck.InferenceDiverged, "not finite"),
    "to free a value node": ({"free": "inner"}, ValueError, "is a value node, which is free already"),
    "to free an output": ({"free": "output"}, ValueError, "is an output, which follows"),
    "to free what is not there": ({"free": "z"}, ValueError, "no floating-point input 'z' to free; there is 'x'"),
    "free a number": ({"free": 3}, TypeError, "free must be an input's name"),
    "free a dict of masks": ({"free": {"x": torch.ones(4, 5).bool()}}, TypeError, "must be a pckernels.Free"),
    "free where numbers are": ({"free": {"x": pck.Free(torch.ones(4, 5))}}, TypeError, "must be a bool tensor"),
    "a mean of another shape": ({"free": {"x": pck.Free(precision=1.0, mean=torch.zeros(3).double())}}, ValueError, "must broadcast to"),
    "a mean of another dtype": ({"free": {"x": pck.Free(precision=1.0, mean=torch.zeros(5).float())}}, TypeError, "Convert it"),
    "a target mask of another shape": ({"target_mask": torch.ones(4, 4).bool()}, ValueError, "must broadcast to shape"),
    "a target mask of numbers": ({"target_mask": torch.ones(4, 3)}, TypeError, "must be a bool tensor"),
    "a target mask of another structure": (
        {"target_mask": [torch.ones(4, 3).bool()]},
        TypeError,
        "target_mask of 'output' must be a bool tensor; got list",
    ),
}


@pytest.mark.parametrize(("name", "how"), [(name, ("infer", "backward", "step")[k % 3]) for k, name in enumerate(BAD)])
def test_what_does_not_fit_is_told_in_a_sentence_and_changes_nothing(case, name: str, how: str) -> None:
    module, x, target = case
    options, error, words = BAD[name]
    options = {key: _in_float64(value, error) for key, value in options.items()}
    optimizer = torch.optim.Adam(module.parameters())
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        if how == "step":
            pck.PCNetwork(module, pck.Strict(3, 0.1)).step(x, target, optimizer, **options)
        else:
            getattr(pck.PCNetwork(module, pck.Strict(3, 0.1)), how)(x, target, **options)
    assert not gradients(module) and not optimizer.state_dict()["state"]
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def _in_float64(value: Any, error: type[Exception]) -> Any:
    """The tables above are made before a test says float64."""
    if isinstance(value, dict):
        return {key: _in_float64(each, error) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_in_float64(each, error) for each in value)
    return value.double() if isinstance(value, Tensor) and value.dtype is torch.float32 and error is not TypeError else value


@pytest.mark.parametrize("rule", [pck.ZeroDivergence(), pck.ZeroDivergence("iterate"), pck.FixedPrediction(3, 1.0)], ids=str)
def test_exact_rules_refuse(case, rule) -> None:
    module, x, target = case
    for options in ({"clamp": {"inner": torch.zeros(4, 7)}}, {"free": "x"}):
        with pytest.raises(pck.Unsupported, match="Use Strict, Incremental or ErrorOptimization"):
            pck.PCNetwork(module, rule).backward(x, target, **options)


def test_a_nudge_to_one_side_takes_no_clamp_but_frees_inputs(case) -> None:
    module, x, target = case
    pcn = pck.PCNetwork(module, pck.Strict(3, 0.1, nudge=0.2))
    with pytest.raises(pck.Unsupported, match=r'Use nudge=\("centered", beta\)'):
        pcn.infer(x, target, clamp={"inner": torch.zeros(4, 7)})
    assert not torch.equal(pcn.infer(x, target, free="x").values["x"], x)


@pytest.mark.parametrize("rule", [pck.Strict(3, 0.1, nudge=0.2), pck.ZeroDivergence()], ids=str)
def test_a_name_that_no_rule_clamps_is_told_before_the_rule(case, rule) -> None:
    """Or the remedy would be a rule, which then has another."""
    module, x, target = case
    for name in ("an output", "an input", "an unknown name"):
        options, error, words = BAD[name]
        with pytest.raises(error, match=words):
            pck.PCNetwork(module, rule).infer(x, target, **options)


def test_without_a_target_nothing_relaxes(case) -> None:
    module, x, _ = case
    for options in ({"clamp": {"inner": torch.zeros(4, 7)}}, {"free": "x"}, {"target_mask": torch.ones(4, 3).bool()}):
        with pytest.raises(ValueError, match="need a target; give one, with a target_mask that is false"):
            pck.PCNetwork(module, pck.Strict(3, 0.1)).infer(x, **options)


def test_other_losses_have_their_own_masks(case) -> None:
    module, x, target = case
    mask = torch.ones(4, 3).bool()
    with pytest.raises(ValueError, match="give the class -100"):
        pck.PCNetwork(module, pck.Strict(3, 0.1), loss="cross_entropy").infer(x, torch.zeros(4).long(), target_mask=mask)
    with pytest.raises(ValueError, match="let target= hold the mask"):
        pck.PCNetwork(module, pck.Strict(3, 0.1), loss=lambda o, y: o.sum(1)).infer(x, target, target_mask=mask)


def test_an_input_without_a_batch_cannot_move(float64: None) -> None:
    with pytest.raises(pck.Unsupported, match="has no batch: it would move for all samples together"):
        pck.PCNetwork(Two(), pck.Strict(2, 0.1)).infer(
            torch.randn(5, 4), torch.randn(4), target={"near": torch.randn(5, 3), "far": torch.randn(5, 2)}, free="gain"
        )


@pytest.mark.parametrize("backend", ["host", "triton", "cuda"])
def test_other_backends_refuse_and_the_reference_runs(backend: str) -> None:
    """In float32, which they take."""
    module, x, target = Skip(), torch.randn(4, 5), torch.randn(4, 3)
    calls = {"clamps value nodes": {"free": "x"}, "known in part": {"target_mask": torch.ones(4, 3).bool()}}
    for words, options in calls.items():
        inference = pck.PCNetwork(module, pck.Strict(3, 0.1)).infer(x, target, **options)
        assert inference.backend == "reference" and words in inference.plan
        if pck.backends()[backend].ok:
            with pytest.raises(pck.Unsupported, match=f"{words}.*reference"):
                pck.PCNetwork(module, pck.Strict(3, 0.1), backend=backend).infer(x, target, **options)


def test_free_says_what_it_does_not_take() -> None:
    with pytest.raises(ValueError, match="precision must be"):
        pck.Free(precision=-1.0)
    with pytest.raises(TypeError, match="mean must be"):
        pck.Free(mean="0")
