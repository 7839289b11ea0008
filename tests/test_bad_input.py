"""Whatever is wrong with arguments, shapes, dtypes, devices or numbers: the documented error, and nothing has moved."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import pckernels as pck

cases = 0


class Classifier(nn.Module):
    """BatchNorm in training mode, so that a forgotten roll-back of running statistics shows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.norm(self.a(x))))


class Pair(nn.Module):
    """Two inputs, one of them words, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.a, self.b = nn.Embedding(6, 4), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, words: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x * self.words(words)))
        return {"near": h, "far": self.b(h)}


@dataclass(frozen=True)
class Good:
    """A call that works; each corruption changes one thing in it."""

    inputs: tuple[Any, ...]
    target: Any


@dataclass(frozen=True)
class Bad:
    loss: str
    corrupt: Callable[[Good], tuple[tuple[Any, ...], Any]]
    errors: tuple[type[Exception], ...]


def on_x(change: Callable[[Tensor], Any]) -> Callable[[Good], tuple[tuple[Any, ...], Any]]:
    return lambda good: ((change(good.inputs[0]), *good.inputs[1:]), good.target)


def on_words(change: Callable[[Tensor], Any]) -> Callable[[Good], tuple[tuple[Any, ...], Any]]:
    return lambda good: ((good.inputs[0], change(good.inputs[1])), good.target)


def on_target(change: Callable[[Any], Any]) -> Callable[[Good], tuple[tuple[Any, ...], Any]]:
    return lambda good: (good.inputs, change(good.target))


def with_nan(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 0] = math.nan
    return x


def with_class(index: int) -> Callable[[Tensor], Tensor]:
    return lambda target: torch.cat([torch.full_like(target[:1], index), target[1:]])


VALUE, TYPE, DIVERGED = (ValueError,), (TypeError,), (pck.InferenceDiverged,)
STRUCTURE = (ValueError, TypeError)
DEVICE = (ValueError, TypeError, pck.Unsupported)

ON_X = {
    "too wide": Bad("any", on_x(lambda x: torch.cat([x, x], 1)), VALUE),
    "too narrow": Bad("any", on_x(lambda x: x[:, :3]), VALUE),
    "no features": Bad("any", on_x(lambda x: x[:, :0]), VALUE),
    "complex": Bad("any", on_x(lambda x: x.to(torch.complex128)), TYPE),
    "a list": Bad("any", on_x(lambda x: x.tolist()), TYPE),
    "a string": Bad("any", on_x(lambda x: "x"), TYPE),
    "None": Bad("any", on_x(lambda x: None), TYPE),
    "meta device": Bad("any", on_x(lambda x: x.to("meta")), DEVICE),
    "NaN": Bad("any", on_x(with_nan), DIVERGED),
    "infinity": Bad("any", on_x(lambda x: x * math.inf), DIVERGED),
    "missing": Bad("any", lambda good: ((), good.target), TYPE),
    "one too many": Bad("any", lambda good: ((*good.inputs, good.inputs[0]), good.target), TYPE),
}
# A matrix product wants its own dtype and a batch; the elementwise product of `Pair` broadcasts and promotes.
ON_LINEAR = {
    "a scalar": Bad("any", on_x(lambda x: x[0, 0]), VALUE),
    "float32": Bad("any", on_x(lambda x: x.float()), TYPE),
    "integers": Bad("any", on_x(lambda x: x.long()), TYPE),
    "booleans": Bad("any", on_x(lambda x: x > 0), TYPE),
}
SQUARED = {
    "target too wide": Bad("squared_error", on_target(lambda t: torch.cat([t, t], 1)), VALUE),
    "target would broadcast": Bad("squared_error", on_target(lambda t: t[:, :1]), VALUE),
    "target of another batch": Bad("squared_error", on_target(lambda t: t[:-1]), VALUE),
    "target transposed": Bad("squared_error", on_target(lambda t: t.T), VALUE),
    "target of integers": Bad("squared_error", on_target(lambda t: t.long()), TYPE),
    "target a list": Bad("squared_error", on_target(lambda t: t.tolist()), TYPE),
    "target a dict": Bad("squared_error", on_target(lambda t: {"y": t}), STRUCTURE),
    "target a tuple": Bad("squared_error", on_target(lambda t: (t, t)), STRUCTURE),
    "target on meta": Bad("squared_error", on_target(lambda t: t.to("meta")), DEVICE),
    "target NaN": Bad("squared_error", on_target(with_nan), DIVERGED),
}
CLASSES = {
    "class too large": Bad("cross_entropy", on_target(with_class(3)), VALUE),
    "class huge": Bad("cross_entropy", on_target(with_class(2**40)), VALUE),
    "class negative": Bad("cross_entropy", on_target(with_class(-1)), VALUE),
    "classes as floats": Bad("cross_entropy", on_target(lambda t: t.double()), TYPE),
    "classes as int32": Bad("cross_entropy", on_target(lambda t: t.int()), TYPE),
    "classes one-hot": Bad("cross_entropy", on_target(lambda t: torch.eye(3, dtype=torch.long)[t]), VALUE),
    "classes of another batch": Bad("cross_entropy", on_target(lambda t: t[:-1]), VALUE),
}
PAIRS = {
    "word too large": Bad("any", on_words(with_class(6)), VALUE),
    "word negative": Bad("any", on_words(with_class(-1)), VALUE),
    "words as floats": Bad("any", on_words(lambda w: w.double()), TYPE),
    "words of another batch": Bad("any", on_words(lambda w: w[:-1]), VALUE),
    "an output without a target": Bad("squared_error", on_target(lambda t: {"near": t["near"]}), STRUCTURE),
    "an unknown output": Bad("squared_error", on_target(lambda t: {**t, "other": t["far"]}), STRUCTURE),
    "one target for two outputs": Bad("squared_error", on_target(lambda t: t["far"]), STRUCTURE),
    "targets as a list": Bad("squared_error", on_target(lambda t: list(t.values())), STRUCTURE),
    "targets exchanged": Bad("squared_error", on_target(lambda t: {"near": t["far"], "far": t["near"]}), VALUE),
}
CORRUPTIONS = {"classifier": {**ON_X, **ON_LINEAR, **SQUARED, **CLASSES}, "pair": {**ON_X, **PAIRS}}
RULES = {
    "strict": pck.Strict(3, 0.05),
    "momentum": pck.Strict(2, 0.05, momentum=0.5, sweep="red_black"),
    "centered": pck.Strict(2, 0.05, nudge=("centered", 0.5)),
    "incremental": pck.Incremental(2, 0.05, 0.01),
    "error_optimization": pck.ErrorOptimization(2, 0.05),
    "fixed": pck.FixedPrediction(4, 0.3),
    "fixed_iterate": pck.FixedPrediction(4, 1.2, solver="iterate"),
    "zero_divergence": pck.ZeroDivergence(),
    "zero_divergence_iterate": pck.ZeroDivergence(solver="iterate"),
}


@cache
def subject(kind: str, rule: str, loss: str) -> tuple[pck.PCNetwork, torch.optim.Optimizer, Good]:
    """A network that has been stepped once, so that the optimizer has state and the trace is cached."""
    torch.manual_seed(0)
    module = (Classifier if kind == "classifier" else Pair)().double()
    network = pck.PCNetwork(module, rule=RULES[rule], loss=loss)
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    good = good_call(kind, loss)
    network.step(*good.inputs, target=good.target, optimizer=optimizer)
    return network, optimizer, good


def good_call(kind: str, loss: str) -> Good:
    x = torch.randn(5, 4, dtype=torch.float64)
    if kind == "pair":
        target = {"near": torch.randn(5, 3).double(), "far": torch.randn(5, 2).double()}
        return Good((x, torch.randint(6, (5,))), target)
    return Good((x,), torch.randint(3, (5,)) if loss == "cross_entropy" else torch.randn(5, 3).double())


def state_of(network: pck.PCNetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    return {"tensors": copy.deepcopy(network.state_dict()), "grads": grads, "optimizer": copy.deepcopy(optimizer.state_dict())}


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, through dicts and lists."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list | tuple) else a == b


def attempt(network: pck.PCNetwork, optimizer: torch.optim.Optimizer, how: str, inputs: tuple[Any, ...], target: Any) -> None:
    if how == "step":
        network.step(*inputs, target=target, optimizer=optimizer)
    else:
        getattr(network, how)(*inputs, target=target)


def assert_refused(act: Callable[[], object], errors: tuple[type[Exception], ...]) -> None:
    global cases
    cases += 1
    with pytest.raises(errors) as caught:
        act()
    assert type(caught.value) in errors, f"{type(caught.value)} is not exactly one of {errors}"
    text = str(caught.value)
    assert len(text.split()) >= 4 and text.rstrip().endswith((".", "?", ")")), f"not a sentence: {text!r}"


@st.composite
def bad_calls(draw: st.DrawFn) -> tuple[str, str, str, str, str]:
    kind = draw(st.sampled_from(list(CORRUPTIONS)))
    name = draw(st.sampled_from(list(CORRUPTIONS[kind])))
    loss = CORRUPTIONS[kind][name].loss
    if loss == "any":
        loss = draw(st.sampled_from(["squared_error", "cross_entropy"])) if kind == "classifier" else "squared_error"
    return kind, name, loss, draw(st.sampled_from(list(RULES))), draw(st.sampled_from(["backward", "step", "infer"]))


@settings(max_examples=60)
@given(bad_calls())
def check(call: tuple[str, str, str, str, str]) -> None:
    kind, name, loss, rule, how = call
    network, optimizer, good = subject(kind, rule, loss)
    bad = CORRUPTIONS[kind][name]
    inputs, target = bad.corrupt(good)
    before = state_of(network, optimizer)
    assert_refused(lambda: attempt(network, optimizer, how, inputs, target), bad.errors)
    assert same(state_of(network, optimizer), before)


def test_random_bad_calls_raise_the_documented_error_and_change_nothing() -> None:
    check()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, bad in CORRUPTIONS.items() for name in bad])
def test_every_corruption_is_refused_by_every_family_of_rule(kind: str, name: str) -> None:
    bad = CORRUPTIONS[kind][name]
    for rule in ("strict", "fixed", "zero_divergence_iterate"):
        network, optimizer, good = subject(kind, rule, "squared_error" if bad.loss == "any" else bad.loss)
        inputs, target = bad.corrupt(good)
        before = state_of(network, optimizer)
        assert_refused(lambda: attempt(network, optimizer, "backward", inputs, target), bad.errors)  # noqa: B023
        assert same(state_of(network, optimizer), before)


@pytest.mark.parametrize("rate", [3.0, 10.0, 1e3, 1e100])
@pytest.mark.parametrize("how", ["backward", "step", "infer"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"sweep": "top_down"}, {"sweep": "red_black"}])
def test_a_diverging_rate_is_reported_and_changes_nothing(rate: float, how: str, options: dict[str, Any]) -> None:
    network, optimizer, good = subject("classifier", "strict", "squared_error")
    wild = pck.PCNetwork(network.module, rule=pck.Strict(200, rate, **options))
    before = state_of(wild, optimizer)
    with pytest.raises(pck.InferenceDiverged, match=r"step \d+.*rate"):
        attempt(wild, optimizer, how, good.inputs, good.target)
    assert same(state_of(wild, optimizer), before)


OPTIONS: dict[str, tuple[dict[str, Any], tuple[type[Exception], ...]]] = {
    "rule is a string": ({"rule": "strict"}, TYPE),
    "rule is a class": ({"rule": pck.Strict}, TYPE),
    "loss has no such name": ({"loss": "squared"}, VALUE),
    "loss is a number": ({"loss": 3}, TYPE),
    "reduction has no such name": ({"reduction": "average"}, VALUE),
    "reduction is None": ({"reduction": None}, TYPE),
    "value_nodes has no such name": ({"value_nodes": "layers"}, VALUE),
    "value_nodes is a number": ({"value_nodes": 2}, TYPE),
    "value_nodes lists a number": ({"value_nodes": ["a", 2]}, TYPE),
    "value_nodes lists no submodule": ({"value_nodes": ["a", "nowhere"]}, VALUE),
    "value_nodes lists one twice": ({"value_nodes": ["a", "a"]}, VALUE),
    "batch_dim is a string": ({"batch_dim": "first"}, TYPE),
    "batch_dim is a float": ({"batch_dim": 0.0}, TYPE),
    "batch_dim is negative": ({"batch_dim": -1}, VALUE),
    "backend has no such name": ({"backend": "tpu"}, VALUE),
    "backend is a number": ({"backend": 1}, TYPE),
    "check has no such name": ({"check": "never"}, VALUE),
    "check is a bool": ({"check": True}, TYPE),
    "precision is negative": ({"precision": -1.0}, VALUE),
    "precision is a tensor": ({"precision": torch.ones(1)}, TYPE),
    "match has no such name": ({"match": "someone"}, VALUE),
    "match is a number": ({"match": 2020}, TYPE),
    "match has no such rule": ({"match": "millidge2020"}, VALUE),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_of_a_constructor(name: str) -> None:
    options, errors = OPTIONS[name]
    assert_refused(lambda: pck.PCNetwork(Classifier().double(), **{"rule": pck.Strict(2, 0.1), **options}), errors)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option_is_refused_when_it_is_set_and_the_old_one_stays(name: str) -> None:
    ((option, value),), errors = OPTIONS[name][0].items(), OPTIONS[name][1]
    network, optimizer, _ = subject("classifier", "strict", "squared_error")
    before, old = state_of(network, optimizer), getattr(network, option)
    assert_refused(lambda: setattr(network, option, value), errors)
    assert getattr(network, option) is old and same(state_of(network, optimizer), before)


CONSTRUCTIONS: dict[str, tuple[Callable[[], object], tuple[type[Exception], ...]]] = {
    "module is a function": (lambda: pck.PCNetwork(torch.tanh, pck.ZeroDivergence()), TYPE),
    "module is a class": (lambda: pck.PCNetwork(Classifier, pck.ZeroDivergence()), TYPE),
    "negative steps": (lambda: pck.Strict(-1, 0.1), VALUE),
    "fractional steps": (lambda: pck.Strict(1.5, 0.1), TYPE),
    "steps True": (lambda: pck.FixedPrediction(True, 0.1), TYPE),
    "steps a string": (lambda: pck.FixedPrediction("10", 0.1), TYPE),
    "rate zero": (lambda: pck.Strict(1, 0.0), VALUE),
    "rate negative": (lambda: pck.Strict(1, -0.1), VALUE),
    "rate NaN": (lambda: pck.Strict(1, math.nan), VALUE),
    "rate infinite": (lambda: pck.Strict(1, math.inf), VALUE),
    "rate None": (lambda: pck.Strict(1, None), TYPE),
    "rate a tensor": (lambda: pck.Strict(1, torch.tensor(0.1)), TYPE),
    "rate 2": (lambda: pck.FixedPrediction(1, 2.0), VALUE),
    "rate 0 fixed": (lambda: pck.FixedPrediction(1, 0.0), VALUE),
    "rate NaN fixed": (lambda: pck.FixedPrediction(1, math.nan), VALUE),
    "momentum 1": (lambda: pck.Strict(1, 0.1, momentum=1.0), VALUE),
    "momentum negative": (lambda: pck.Strict(1, 0.1, momentum=-0.1), VALUE),
    "sweep unknown": (lambda: pck.Strict(1, 0.1, sweep="gauss"), VALUE),
    "sweep a number": (lambda: pck.Strict(1, 0.1, sweep=1), TYPE),
    "tolerance zero": (lambda: pck.Strict(1, 0.1, tolerance=0.0), VALUE),
    "solver unknown": (lambda: pck.FixedPrediction(1, 0.1, solver="closed"), VALUE),
    "order unknown": (lambda: pck.FixedPrediction(1, 0.1, order="local"), VALUE),
    "solver of another rule": (lambda: pck.ZeroDivergence(solver="closed_form"), VALUE),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_bad_constructor_arguments(name: str) -> None:
    build, errors = CONSTRUCTIONS[name]
    assert_refused(build, errors)


@given(
    steps=st.one_of(st.integers(-5, 5), st.floats(), st.none(), st.text(max_size=2), st.booleans()),
    rate=st.one_of(st.floats(), st.integers(-2, 3), st.none(), st.text(max_size=2), st.booleans(), st.complex_numbers()),
)
@settings(max_examples=150)
def test_random_rule_arguments_work_or_raise_a_documented_error(steps: Any, rate: Any) -> None:
    for rule, high in ((pck.Strict, math.inf), (pck.FixedPrediction, 2.0)):
        whole, number = type(steps) is int, type(rate) in (int, float)
        if not (whole and number):
            acceptable = STRUCTURE if (whole and steps < 0) or number else TYPE
            assert_refused(lambda: rule(steps, rate), acceptable)  # noqa: B023
        elif steps < 0 or not 0 < rate < high:
            assert_refused(lambda: rule(steps, rate), VALUE)  # noqa: B023
        else:
            assert rule(steps, rate).steps == steps


class Loss:
    """A custom loss with something wrong in what it returns."""

    def __init__(self, wrong: Callable[[Tensor], Any]):
        self.wrong = wrong

    def __call__(self, output: Tensor, target: Tensor) -> Any:
        return self.wrong(0.5 * ((output - target) ** 2).sum(1))


LOSSES = {
    "a scalar": (lambda losses: losses.sum(), VALUE),
    "another batch": (lambda losses: losses[:-1], VALUE),
    "two columns": (lambda losses: torch.stack([losses, losses], 1), VALUE),
    "a number": (lambda losses: 3.0, TYPE),
    "None": (lambda losses: None, TYPE),
    "integers": (lambda losses: losses.long(), TYPE),
}


@pytest.mark.parametrize("name", LOSSES)
def test_bad_custom_losses(name: str) -> None:
    wrong, errors = LOSSES[name]
    shared, optimizer, good = subject("classifier", "strict", "squared_error")
    network = pck.PCNetwork(shared.module, rule=pck.Strict(2, 0.1), loss=Loss(wrong))
    before = state_of(network, optimizer)
    assert_refused(lambda: network.backward(*good.inputs, target=good.target), errors)
    assert same(state_of(network, optimizer), before)


def test_bad_arguments_of_calls() -> None:
    network, optimizer, good = subject("classifier", "strict", "squared_error")
    (x,), target = good.inputs, good.target
    before = state_of(network, optimizer)
    assert_refused(lambda: network.backward(x, target, scale="loud"), TYPE)
    assert_refused(lambda: network.backward(x, target, volume=3), TYPE)
    assert_refused(lambda: network.backward(x), TYPE)
    assert_refused(lambda: network.step(x, target), TYPE)
    assert_refused(lambda: network.step(x, target, "adam"), TYPE)
    assert_refused(lambda: network.infer(x, target, record="yes"), TYPE)
    assert same(state_of(network, optimizer), before)


def test_batch_dim_beyond_the_input() -> None:
    network = pck.PCNetwork(Classifier().double(), rule=pck.Strict(2, 0.1), batch_dim=5)
    assert_refused(lambda: network.backward(torch.randn(5, 4).double(), torch.randn(5, 3).double()), VALUE)


def test_one_sample_has_no_batch_statistics() -> None:
    """As in PyTorch, whose variance of a single value per channel is refused too; running statistics must not turn into NaN."""
    network, optimizer, good = subject("classifier", "strict", "squared_error")
    before = state_of(network, optimizer)
    assert_refused(lambda: network.backward(good.inputs[0][:1], good.target[:1]), VALUE)
    assert same(state_of(network, optimizer), before)


def test_an_empty_batch_leaves_running_statistics_alone() -> None:
    network, optimizer, good = subject("classifier", "strict", "squared_error")
    before = state_of(network, optimizer)
    inference = network.infer(good.inputs[0][:0], target=good.target[:0])
    assert float(inference.energy.abs().sum()) == 0.0
    after = state_of(network, optimizer)
    after["tensors"]["norm.num_batches_tracked"] = before["tensors"]["norm.num_batches_tracked"]
    assert same(after, before)
