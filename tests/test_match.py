"""`match=` against the codes' own equations, written down here in float64; and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

Array = np.ndarray


def blocks(batch: int = 5) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    sizes = (4, 7, 6, 5, 3)
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes[:-1])]
    module = nn.Sequential(*layers, nn.Linear(*sizes[-2:])).double()
    return module, torch.randn(batch, 4).double(), torch.randn(batch, 3).double()


def convolutions(batch: int = 5) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A CNN as the codes have them: a list of blocks, pooling one of them."""
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh()), nn.Sequential(nn.Conv2d(3, 4, 2), nn.Tanh())
    module = nn.Sequential(
        first, nn.MaxPool2d(2), second, nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh()), nn.Linear(5, 3)
    ).double()
    return module, torch.randn(batch, 2, 8, 8).double(), torch.randn(batch, 3).double()


MODELS = {"mlp": blocks, "cnn": convolutions}


def network(module: nn.Module, rule: pck.rules.Rule, **options: object) -> pck.PCNetwork:
    names = [str(k) for k in range(len(module))]
    return pck.PCNetwork(module, rule, value_nodes=names, **options)


# Torch2PC: eps = prediction - value


def pull(layer: nn.Module, v: Tensor, eps: Tensor) -> Tensor:
    return torch.autograd.functional.vjp(layer, v, eps)[1]


def taught(module: nn.Sequential, v: list[Tensor], eps: list[Tensor]) -> dict[str, Tensor]:
    found = {}
    for k, layer in enumerate(module):
        if not list(layer.parameters()):
            continue
        grads = torch.autograd.grad(layer(v[k].detach()), list(layer.parameters()), eps[k + 1])
        found |= {f"{k}.{name}": g for (name, _), g in zip(layer.named_parameters(), grads, strict=True)}
    return found


def forward(module: nn.Sequential, x: Tensor) -> list[Tensor]:
    v = [x]
    for layer in module:
        v.append(layer(v[-1]).detach())
    return v


def output_error(loss: Callable[[Tensor], Tensor], mu: Tensor) -> Tensor:
    leaf = mu.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def torch2pc_fixed(module: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor], rate: float, steps: int) -> dict[str, Tensor]:
    mu = forward(module, x)
    v, eps = list(mu), [torch.zeros_like(each) for each in mu]
    eps[-1] = output_error(loss, mu[-1])
    for _ in range(steps):
        for k in reversed(range(1, len(module))):
            eps[k] = mu[k] - v[k]
            v[k] = v[k] + rate * (eps[k] - pull(module[k], mu[k], eps[k + 1]))
    return taught(module, mu, eps)


def torch2pc_strict(module: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor], rate: float, steps: int) -> dict[str, Tensor]:
    return taught(module, *torch2pc_states(module, x, loss, rate, steps))


def torch2pc_states(
    module: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor], rate: float, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    v = forward(module, x)
    eps = [torch.zeros_like(each) for each in v]
    for _ in range(steps):
        eps[-1] = output_error(loss, module[-1](v[-2]))
        for k in reversed(range(1, len(module))):
            eps[k] = module[k - 1](v[k - 1]).detach() - v[k]
            v[k] = v[k] + rate * (eps[k] - pull(module[k], v[k], eps[k + 1]))
    return v, eps


@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("kind", ["strict", "closed_form", "iterate"])
@pytest.mark.parametrize(("name", "reduction"), [("squared_error", "mean"), ("squared_error", "sum"), ("cross_entropy", "mean")])
@pytest.mark.parametrize("model", MODELS)
def test_torch2pc(model: str, name: str, kind: str, steps: int, reduction: str) -> None:
    module, x, y = MODELS[model]()
    target = y if name == "squared_error" else torch.tensor([0, 2, 1, 1, 0])

    def loss(mu: Tensor) -> Tensor:
        each = 0.5 * (mu - y).square().sum(1) if name == "squared_error" else nn.functional.cross_entropy(mu, target, reduction="none")
        return getattr(each, reduction)()

    rule = pck.Strict(steps, 0.3) if kind == "strict" else pck.FixedPrediction(steps, 0.3, kind)
    expected = (torch2pc_strict if kind == "strict" else torch2pc_fixed)(module, x, loss, 0.3, steps)
    found = network(module, rule, loss=name, reduction=reduction, match="torch2pc")
    inference = found.backward(x, target)
    for key, p in found.module.named_parameters():
        assert torch.allclose(p.grad, expected[key], rtol=1e-11, atol=1e-15), key
    assert inference.loss.item() == pytest.approx(loss(module(x)).item(), rel=1e-12)
    plain = network(module, rule, loss=name, reduction=reduction)
    plain.zero_grad()
    plain.backward(x, target)
    assert not all(torch.allclose(p.grad, expected[key], rtol=1e-6) for key, p in module.named_parameters())


@pytest.mark.parametrize("model", MODELS)
def test_values_and_errors_of_torch2pc_at_every_step(model: str) -> None:
    """Its last moment of values is ours; its errors there are those of the moment before, which ours has in the history."""
    module, x, y = MODELS[model]()
    found = network(module, pck.Strict(6, 0.3), reduction="sum", match="torch2pc").infer(x, y, record=True)
    for steps in range(1, 7):
        v, eps = torch2pc_states(module, x, lambda mu: 0.5 * (mu - y).square().sum(), 0.3, steps)
        for k in range(1, len(module)):
            assert torch.allclose(found.history[steps].values[str(k - 1)], v[k], rtol=1e-11, atol=1e-15)
            assert torch.allclose(found.history[steps - 1].errors[str(k - 1)], -eps[k], rtol=1e-11, atol=1e-15)


# Millidge: eps = value - prediction, F without 1/2


def clamped_pull(layer: nn.Module, v: Tensor, eps: Tensor) -> Tensor:
    back = pull(layer, v, eps)
    return back.clamp(-50, 50) if list(layer.parameters()) else back


def millidge(module: nn.Sequential, x: Tensor, at_output: Tensor, rate: float, steps: int) -> dict[str, Tensor]:
    """What is added to each weight at learning rate 1, by two updates."""
    outs = forward(module, x)
    mus, eps, predictions = list(outs), [torch.zeros_like(each) for each in outs], [torch.zeros_like(each) for each in outs]
    eps[-1] = predictions[-1] = at_output
    for _ in range(steps):
        for j in reversed(range(1, len(module))):
            eps[j] = mus[j] - outs[j]
            predictions[j] = clamped_pull(module[j], outs[j], eps[j + 1])
            mus[j] = mus[j] - rate * 2 * (eps[j] - predictions[j])
    first, second = taught(module, outs, eps), taught(module, outs, predictions)
    return {name: (2 * first[name]).clamp(-50, 50) + (2 * second[name]).clamp(-50, 50) for name in first}


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("steps", [1, 30])
@pytest.mark.parametrize("name", ["squared_error", "cross_entropy"])
@pytest.mark.parametrize("model", MODELS)
def test_millidge2020(model: str, name: str, steps: int, size: float) -> None:
    """With small errors, and with errors that meet the clamps."""
    module, x, y = MODELS[model]()
    if model == "mlp":
        module.insert(2, nn.Flatten())  # a layer without weights, which does not clamp, as pooling is
    y, target = y * size, y * size if name == "squared_error" else torch.tensor([0, 2, 1, 1, 0])
    module[-1].weight.data.mul_(size)
    mu = module(x).detach()
    at_output = 2 * (y - mu) if name == "squared_error" else nn.functional.one_hot(target, 3) - mu.softmax(1)
    expected = millidge(module, x, at_output, 0.1, steps)
    found = network(module, pck.FixedPrediction(steps, 0.1), loss=name, reduction="sum", match="millidge2020")
    inference = found.backward(x, target)
    assert any((value.abs() == 50).any() or (value.abs() == 100).any() for value in expected.values()) == (size > 1)
    for key, p in module.named_parameters():
        assert torch.allclose(p.grad, -expected[key], rtol=1e-11, atol=1e-14), key
    if name == "squared_error":
        assert inference.loss.item() == pytest.approx(0.5 * (mu - y).square().sum().item(), rel=1e-12)


# PCX: the output is clamped to u + beta (y - u)


def pcx(
    module: nn.Sequential, x: Tensor, y: Tensor, rate: float, steps: int, momentum: float, beta: float
) -> tuple[dict[str, Tensor], list[list[Tensor]], list[float]]:
    """What weights learn, and the hidden values and the energy at every step."""
    h = forward(module, x)
    h[-1] = h[-1] - beta * (h[-1] - y)
    trace = [torch.zeros_like(each) for each in h]
    values, energies = [], []
    for t in range(steps + 1):
        free = [each.detach().requires_grad_() for each in h[1:-1]]
        states = [x, *free, h[-1]]
        energy = sum(0.5 * (states[k + 1] - layer(states[k])).square().sum() for k, layer in enumerate(module))
        values.append([each.detach() for each in free])
        energies.append(float(energy.detach()))
        if t == steps:
            break
        for k, gradient in enumerate(torch.autograd.grad(energy, free), 1):
            trace[k] = gradient + momentum * trace[k]
            h[k] = h[k] - rate * trace[k]
    scale = (1.0 / beta if beta < 0 else 1.0) / len(x)
    names, parameters = zip(*module.named_parameters(), strict=True)
    learned = {name: scale * g for name, g in zip(names, torch.autograd.grad(energy, parameters), strict=True)}
    return learned, values, energies


@pytest.mark.parametrize("beta", [None, 0.3, -0.2])
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("model", MODELS)
def test_pcx(model: str, steps: int, beta: float | None) -> None:
    module, x, y = MODELS[model]()
    found = network(module, pck.Strict(steps, 0.1, momentum=0.4, nudge=beta), match="pcx")
    inference = found.backward(x, y)
    expected, values, energies = pcx(module, x, y, 0.1, steps, 0.4, beta or 1.0)
    for key, p in module.named_parameters():
        assert torch.allclose(p.grad, expected[key], rtol=1e-11, atol=1e-15), key
    assert inference.energy.tolist() == pytest.approx(energies, rel=1e-12)
    for moment, state in zip(found.infer(x, y, record=True).history, values, strict=True):
        assert all(torch.allclose(moment.values[str(k)], value, rtol=1e-11, atol=1e-15) for k, value in enumerate(state))
    assert inference.loss.item() == pytest.approx(0.5 * (module(x) - y).square().sum(1).mean().item(), rel=1e-12)
    if beta is not None and steps == 7:
        weighed = network(module, pck.Strict(steps, 0.1, momentum=0.4, nudge=beta))
        weighed.zero_grad()
        weighed.backward(x, y)
        assert not torch.allclose(module[0][0].weight.grad, expected["0.0.weight"], rtol=1e-3)


# Whittington & Bogacz: samples are columns, F has no 1/2 and the other sign


def logistic(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def whittington(
    weights: list[Array], biases: list[Array], x: Array, y: Array, rate: float, most: int, applied: str
) -> tuple[list[Array], list[float], float]:
    """-dF/dW of each layer, 2 F at every step, and the last rate. `applied`: f after the weights ("bp"), or before ("bio")."""
    before = (lambda v: v) if applied == "bp" else logistic
    after = logistic if applied == "bp" else (lambda v: v)
    slope = lambda v: logistic(v) * (1.0 - logistic(v))  # noqa: E731
    count = len(weights) + 1
    v = [x]
    for w, b in zip(weights, biases, strict=True):
        v.append(after(w @ before(v[-1]) + b[:, None]))
    v[-1] = y

    def errors() -> tuple[list[Array], list[Array], Array]:
        u = [w @ before(v[k]) + b[:, None] for k, (w, b) in enumerate(zip(weights, biases, strict=True))]
        e = [np.zeros_like(x)] + [v[k + 1] - after(u[k]) for k in range(count - 1)]
        return u, e, -sum((each**2).sum(0) for each in e)

    u, e, last = errors()
    condition = 1e-6 / sum(len(each) for each in v[1:])
    energies = [-float(last.sum())]
    for _ in range(most):
        stop = condition * rate
        if applied == "bp":
            g = [weights[k].T @ (e[k + 1] * slope(u[k])) for k in range(1, count - 1)]
        else:
            g = [(weights[k].T @ e[k + 1]) * slope(v[k]) for k in range(1, count - 1)]
        for k in range(1, count - 1):
            v[k] = v[k] + rate * (-e[k] + g[k - 1])
        u, e, now = errors()
        change, last = now - last, now
        energies.append(-float(now.sum()))
        if (change < 0).any():
            rate /= 2
        elif change.mean() < stop:
            break
    samples = x.shape[1]
    if applied == "bp":
        learned = [(e[k + 1] * slope(u[k])) @ v[k].T / samples for k in range(count - 1)]
    else:
        learned = [e[k + 1] @ logistic(v[k]).T / samples for k in range(count - 1)]
    return learned, energies, rate


def logistic_net(applied: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    order = (lambda a, b: [nn.Linear(a, b), nn.Sigmoid()]) if applied == "bp" else (lambda a, b: [nn.Sigmoid(), nn.Linear(a, b)])
    module = nn.Sequential(*(nn.Sequential(*order(a, b)) for a, b in pairwise((4, 7, 6, 3)))).double()
    for p in module.parameters():
        p.data.mul_(4.0)
    return module, torch.randn(6, 4).double(), torch.rand(6, 3).double()


@pytest.mark.parametrize(("rate", "most", "halved", "stopped"), [(0.1, 30, False, False), (2.5, 12, True, False), (0.6, 600, False, True)])
@pytest.mark.parametrize("applied", ["bp", "bio"])
def test_whittington2017(applied: str, rate: float, most: int, halved: bool, stopped: bool) -> None:
    module, x, y = logistic_net(applied)
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    arrays = [[getattr(layer, kind).detach().numpy() for layer in linear] for kind in ("weight", "bias")]
    learned, energies, last = whittington(*arrays, x.numpy().T, y.numpy().T, rate, most, applied)
    assert (last < rate, len(energies) <= most) == (halved, stopped)
    found = network(module, pck.Strict(most, rate), match="whittington2017")
    inference = found.backward(x, y)
    assert (2 * inference.energy).tolist() == pytest.approx(energies, rel=1e-9)
    for layer, expected in zip(linear, learned, strict=True):
        assert np.allclose(layer.weight.grad.numpy(), -expected, rtol=1e-9, atol=1e-14)


BAD = [
    ({"match": "jpc"}, pck.Strict(3, 0.1), ValueError, "match must be one of 'millidge2020', 'torch2pc'"),
    ({"match": "millidge2020"}, pck.FixedPrediction(3, 0.1), ValueError, "sums gradients over the batch"),
    ({"match": "millidge2020", "reduction": "sum"}, pck.FixedPrediction(3, 1.2), ValueError, "doubles the rate"),
    ({"match": "millidge2020", "reduction": "sum"}, pck.Strict(3, 0.1), ValueError, "that has FixedPrediction, and not Strict"),
    ({"match": 3}, pck.Strict(3, 0.1), TypeError, "match must be a str"),
    ({"match": "torch2pc"}, pck.ZeroDivergence(), ValueError, "that has Strict and FixedPrediction, and not ZeroDivergence"),
    ({"match": "pcx"}, pck.FixedPrediction(3, 0.1), ValueError, "that has Strict, and not FixedPrediction"),
    ({"match": "pcx", "loss": "cross_entropy"}, pck.Strict(3, 0.1), ValueError, "outputs are clamped to targets"),
    ({"match": "pcx"}, pck.Strict(3, 0.1, nudge=("centered", 0.1)), ValueError, "in turn, from one batch to the next"),
    ({"match": "torch2pc"}, pck.Strict(3, 0.1, momentum=0.5), ValueError, "has no momentum, sweep"),
    ({"match": "whittington2017"}, pck.Strict(3, 0.1, sweep="top_down"), ValueError, "has no momentum, sweep"),
    ({"match": "torch2pc"}, pck.FixedPrediction(0, 0.1), ValueError, "takes at least one step"),
]


@pytest.mark.parametrize(("options", "rule", "error", "words"), BAD)
def test_what_the_codes_do_not_have_is_refused_in_a_sentence(options, rule, error, words) -> None:
    with pytest.raises(error, match=words):
        network(blocks()[0], rule, **options)


def test_the_engines_leave_it_to_the_reference() -> None:
    module, x, y = blocks()
    module, x, y = module.float(), x.float(), y.float()
    for match in ("torch2pc", "whittington2017", "pcx"):
        rule = pck.Strict(3, 0.1, nudge=0.5 if match == "pcx" else None)
        inference = network(module, rule, match=match).infer(x, y)
        assert inference.backend == "reference" and "match=" in inference.plan, match
