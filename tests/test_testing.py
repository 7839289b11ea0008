"""`pckernels.testing`: it passes what is right, fails what is wrong with a table, and changes nothing of the user's."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels.coefficients import coefficients
from pckernels.measure import Probe, gradient_errors, largest_error
from pckernels.testing import assert_converges, assert_exact_gradient, bound

RATES = (0.05, 0.3, 1.0, 1.5)
STEPS = (0, 1, 5, 37, 200)


class Skip(nn.Module):
    """Two inputs, a skip, a product, dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(2, 4)
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        a = torch.tanh(self.norm(self.a(x)))
        return self.out(self.drop(a + self.b(a) * self.c(z)))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def data(*widths: int) -> list[Tensor]:
    return [torch.randn(6, width, dtype=torch.float64) for width in widths]


@pytest.mark.parametrize("rule", [pck.FixedPrediction(2, 1.0, solver="iterate"), pck.ZeroDivergence("iterate"), pck.ZeroDivergence()])
def test_exact_rules_pass(rule: pck.rules.Rule) -> None:
    x, target = data(3, 2)
    assert_exact_gradient(chain(), x, target, rule, 1e-12)


def test_a_rule_that_is_not_exact_fails_with_a_table() -> None:
    x, target = data(3, 2)
    with pytest.raises(AssertionError) as caught:
        assert_exact_gradient(chain(), x, target, pck.FixedPrediction(1, 1.0), 1e-12)
    marked = {line.split()[0]: line.endswith("<-") for line in str(caught.value).splitlines()[2:]}
    assert marked == {"0.weight": True, "0.bias": True, "2.weight": False, "2.bias": False, "4.weight": False, "4.bias": False}


def test_the_tolerance_decides() -> None:
    x, target = data(3, 2)
    rule = pck.FixedPrediction(20, 0.5)  # 1 - c_2(20) = 2e-5
    assert_exact_gradient(chain(), x, target, rule, 1e-4)
    with pytest.raises(AssertionError, match=r"relative error"):
        assert_exact_gradient(chain(), x, target, rule, 1e-6)


@pytest.mark.parametrize("shape", ["tuple", "dict"])
def test_several_inputs(shape: str) -> None:
    x, z, target = data(3, 2, 2)
    inputs = (x, z) if shape == "tuple" else {"x": x, "z": z}
    assert_exact_gradient(Skip().double(), inputs, target, pck.FixedPrediction(8, 1.0, solver="iterate"), 1e-12)
    assert_converges(Skip().double(), inputs, target, rate=0.3, steps=5)


def test_a_network_keeps_its_loss_and_value_nodes() -> None:
    (x,) = data(3)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    network = pck.PCNetwork(chain(), rule=pck.Strict(3, 0.1), loss="cross_entropy", value_nodes=["1", "4"])
    assert_exact_gradient(network, x, labels, pck.FixedPrediction(1, 1.0, solver="iterate"), 1e-12)
    with pytest.raises(AssertionError):
        assert_exact_gradient(network, x, labels, pck.FixedPrediction(0, 1.0), 1e-12)
    assert network.rule == pck.Strict(3, 0.1)


def test_the_loss_of_a_plain_module_may_be_named_or_given() -> None:
    x, target = data(3, 2)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    assert_exact_gradient(chain(), x, labels, pck.ZeroDivergence(), 1e-12, loss="cross_entropy")
    assert_exact_gradient(chain(), x, target, pck.ZeroDivergence(), 1e-12, loss=lambda y, t: (y - t).abs().sum(-1))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("steps", STEPS)
def test_chains_and_graphs_converge_as_predicted(rate: float, steps: int) -> None:
    x, z, target = data(3, 2, 2)
    assert_converges(chain(), x, target, rate, steps)
    assert_converges(Skip().double(), (x, z), target, rate, steps)


def test_errors_elsewhere_fail_with_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = data(3, 2)
    monkeypatch.setattr("pckernels.measure.coefficients", lambda steps, rate, longest: [1.0] + [rate] * longest)
    with pytest.raises(AssertionError, match=r"vertex .*relative error") as caught:
        assert_converges(chain(), x, target, rate=0.3, steps=5)
    assert "<-" in str(caught.value)


def test_the_bound_sees_the_twelfth_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, target = data(3, 2)
    monkeypatch.setattr("pckernels.measure.coefficients", lambda *a: [c * (1 + 3e-12) for c in coefficients(*a)])
    with pytest.raises(AssertionError, match=r"errors are not where c_k\(50\) puts them"):
        assert_converges(chain(), x, target, rate=0.3, steps=50)


def test_nothing_of_the_user_is_changed() -> None:
    x, z, target = data(3, 2, 2)
    module = Skip().double()
    module.a.weight.grad = torch.ones_like(module.a.weight)
    before, draws = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert_exact_gradient(module, (x, z), target, pck.ZeroDivergence(), 1e-12)
    assert_converges(module, (x, z), target, 0.5, 3)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(module.a.weight.grad, torch.ones_like(module.a.weight))
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if name != "a.weight")
    assert torch.equal(torch.get_rng_state(), draws)


def test_no_trial_sees_what_another_left() -> None:
    x, z, target = data(3, 2, 2)
    probe = Probe(Skip().double(), (x, z), target)
    before, first = copy.deepcopy(probe.network.state_dict()), probe.gradients(pck.ZeroDivergence())
    for trial in (probe.autograd_gradients, probe.live_gradients, probe.path_parts):
        trial()
        assert all(torch.equal(value, before[name]) for name, value in probe.network.state_dict().items())
    assert gradient_errors(probe.gradients(pck.ZeroDivergence()), first) == dict.fromkeys(first, 0.0)


def test_relative_errors_count_zero_and_missing_gradients() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert gradient_errors({"a": zero, "b": one, "c": None}, {"a": zero, "b": zero, "c": one}) == {"a": 0.0, "b": math.inf, "c": math.inf}
    assert gradient_errors({"a": None, "b": one}, {"a": None, "b": None}) == {"a": 0.0, "b": math.inf}
    assert math.isnan(largest_error({"a": one, "b": one * math.nan}, {"a": one, "b": one}))


def test_bad_arguments_are_those_of_the_rule() -> None:
    x, target = data(3, 2)
    with pytest.raises(ValueError, match=r"\(0, 2\)"):
        assert_converges(chain(), x, target, rate=2.5, steps=3)
    with pytest.raises(TypeError, match="steps must be an int"):
        assert_converges(chain(), x, target, rate=0.5, steps=3.0)  # type: ignore[arg-type]


def test_the_bound_counts_units_of_rounding() -> None:
    assert bound(torch.float64) == 1e-12
    assert bound(torch.float32) == pytest.approx(1e-12 * 2**29)
