"""pck.backward: against loss.backward(), against c_k(T) counted by hand, and against dense Jacobians written in NumPy."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from pckernels.autograd import backward, depth
from pckernels.coefficients import coefficients, largest
from pckernels.errors import InferenceDiverged, Unsupported
from pckernels.node_errors import PathLengths
from pckernels.nodes import vjp

STEPS = (0, 1, 5, 37, 200)
RATES = (0.05, 0.3, 1.0, 1.5)


def doubles(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def collect(parameters, run, loss):
    """The gradients that `run(loss)` leaves, starting from none."""
    for parameter in parameters:
        parameter.grad = None
    run(loss)
    return [parameter.grad for parameter in parameters]


def relative(got, want):
    """||got - want|| / ||want||; where want is 0, got must be 0."""
    if want.norm() == 0:
        return 0.0 if got.norm() == 0 else math.inf
    return float((got - want).norm() / want.norm())


def assert_close(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= tolerance


def binomial_tail(k, steps, rate):
    """c_k(T) = P(Binomial(T, rate) >= k) by its sum, for rate <= 1."""
    return sum(math.comb(steps, j) * rate**j * (1 - rate) ** (steps - j) for j in range(k, steps + 1))


def mlp(*sizes, dtype=torch.float64):
    torch.manual_seed(1)
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*layers).to(dtype)


def half_squared_error(prediction, target):
    return 0.5 * ((prediction - target) ** 2).sum()


# Programs: each returns (parameters, loss) with its graph. Together they hold every kind of node that the walker must treat.


def chain():
    model = mlp(4, 5, 5, 3)
    return list(model.parameters()), half_squared_error(model(doubles(6, 4)), doubles(6, 3, seed=1))


def skip_graph():
    first, second, third = mlp(4, 4), mlp(4, 4), mlp(4, 4)
    h = first(doubles(6, 4))
    g = torch.tanh(second(h)) + h
    y = third(torch.cat([g, h * g], 0)) + g.repeat(2, 1)
    return [*first.parameters(), *second.parameters(), *third.parameters()], (y**2).mean()


def shared_weights():
    layer = mlp(4, 4)[0]
    h = doubles(6, 4)
    for _ in range(4):
        h = torch.tanh(layer(h)) + 0.5 * h @ layer.weight.t()
    return list(layer.parameters()), (h * h).sum()


def lstm_cells():
    torch.manual_seed(0)
    cell, readout = nn.LSTMCell(3, 4).double(), mlp(4, 2)
    h = c = doubles(2, 4)
    losses = []
    for x in doubles(5, 2, 3):
        h, c = cell(x, (h, c))
        losses.append((readout(h) ** 2).sum())
    return [*cell.parameters(), *readout.parameters()], torch.stack(losses).sum()


def recurrent(kind, dtype=torch.float64):
    def build():
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Linear(3, 3), "rnn": kind(3, 4, num_layers=2), "readout": nn.Linear(4, 2)}).to(dtype)
        states, last = model["rnn"](torch.tanh(model["embed"](doubles(5, 2, 3).to(dtype))))
        last = last[0] if isinstance(last, tuple) else last
        return list(model.parameters()), (model["readout"](states) ** 2).sum() + last.sum()

    return build


def batch_norm_cnn():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.GELU()),
        *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3)),
    ).double()
    return list(model.parameters()), F.cross_entropy(model(doubles(5, 2, 8, 8)), torch.tensor([0, 1, 2, 0, 1]))


def attention():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    embedding = nn.Embedding(7, 4).double()
    y = model(embedding(torch.tensor([[0, 1, 2], [3, 3, 6]])))
    return [*embedding.parameters(), *model.parameters()], (y * doubles(2, 3, 4)).sum()


def in_place_views():
    weight, other = doubles(3, 4).requires_grad_(), doubles(4, seed=1).requires_grad_()
    x = torch.tanh(weight) * 2
    x[0] = other * 3
    x[1].mul_(other)
    x[2].add_(x[0])
    return [weight, other], (x.t().reshape(2, 6).sin() ** 2).sum()


def broadcasts_and_casts():
    weight, bias, scale = doubles(3, 1).requires_grad_(), doubles(4, seed=1).requires_grad_(), doubles(1, seed=2).requires_grad_()
    bias_later, single = torch.tanh(bias), (weight * 2).float()  # nodes whose consumers broadcast, and widen, them
    y = torch.sin(single.double() + bias_later) * scale.exp()
    return [weight, bias, scale], (y * y).mean()


def several_outputs():
    weight = doubles(6, 4).requires_grad_()
    a, b, c = torch.tanh(weight).split(2)
    d = torch.exp(a * 0.1).unbind(1)
    values, _ = (c * 2).max(dim=1)
    return [weight], (a * b).sum() + (d[0] * d[2]).sum() + values.sum()


def twice_used():
    weight = doubles(4).requires_grad_()
    h = weight.sin()
    return [weight], ((h * h) * h).sum() + weight.view(2, 2).t().reshape(-1).dot(h)


def complex_inside():
    weight = doubles(8).requires_grad_()
    return [weight], (torch.fft.fft(torch.tanh(weight)).abs() ** 3).sum()


class Fork(torch.autograd.Function):
    """Two tensors and a number in; an index that takes no gradient and two tensors out; the second may get no gradient."""

    @staticmethod
    def forward(ctx, x, factor, y, constant):
        index = x.argmax(1)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(x, y)
        ctx.factor = factor
        return x * y * factor, index, x + constant, y.clone()

    @staticmethod
    def backward(ctx, product, index, total, copy):
        x, y = ctx.saved_tensors
        return product * y * ctx.factor + total, None, product * x * ctx.factor + copy, None


class NoGradient(torch.autograd.Function):
    """A function that declines to answer for one of its inputs, and takes undefined gradients as they are."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.set_materialize_grads(False)
        return x * 2, y * 3

    @staticmethod
    def backward(ctx, first, second):
        return None if first is None else first * 2, None


def custom_functions():
    weight, other = doubles(3, 4).requires_grad_(), doubles(3, 4, seed=1).requires_grad_()
    product, _, total, _ = Fork.apply(weight.sin(), 2.0, other.tanh(), doubles(3, 4, seed=2))
    first, second = NoGradient.apply(product.sin(), total.cos())
    return [weight, other], (first * total).sum() + second.sum()


def checkpointed():
    torch.manual_seed(0)
    block, head = mlp(4, 4, 4), mlp(4, 2)
    h = block(doubles(3, 4).requires_grad_())
    return [*block.parameters(), *head.parameters()], (head(checkpoint(block, h, use_reentrant=False)) ** 2).sum()


def full_backward_hooks():
    model = mlp(4, 5, 3)
    for layer in model:
        layer.register_full_backward_hook(lambda *_: None)
    return list(model.parameters()), half_squared_error(model(doubles(6, 4).requires_grad_()), doubles(6, 3, seed=1))


def weight_decay():
    model = mlp(4, 5, 3)
    penalty = sum((p**2).sum() for p in model.parameters())
    return list(model.parameters()), half_squared_error(model(doubles(6, 4)), doubles(6, 3, seed=1)) + 0.01 * penalty


EXACT = {
    **{f.__name__: f for f in (chain, skip_graph, shared_weights, lstm_cells, batch_norm_cnn, attention, in_place_views)},
    **{f.__name__: f for f in (several_outputs, twice_used, complex_inside, custom_functions)},
    **{f.__name__: f for f in (checkpointed, full_backward_hooks, weight_decay)},
    **{f"nn.{kind.__name__}": recurrent(kind) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
}
SINGLE = {"broadcasts_and_casts": broadcasts_and_casts, "fused nn.LSTM": recurrent(nn.LSTM, torch.float32)}
PROGRAMS = {**EXACT, **SINGLE}


def tolerance(name):
    return 1e-12 if name in EXACT else 2e-6


# Exactness


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_sweep_is_loss_backward_bit_for_bit(name):
    parameters, loss = PROGRAMS[name]()
    want = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    for steps in (None, depth(loss), depth(loss) + 3):
        got = collect(parameters, lambda loss, steps=steps: backward(loss, steps=steps, retain_graph=True), loss)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_literal_steps_reach_backprop_after_depth_steps_and_not_before(name):
    parameters, loss = PROGRAMS[name]()
    want = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    long = depth(loss)
    got = collect(parameters, lambda loss: backward(loss, long, solver="iterate", retain_graph=True), loss)
    assert_close(got, want, tolerance(name))
    # Between stacked layers a path may go through `stack` from one time step to another, where the Jacobian is 0.
    short = long // 2 if name.startswith("nn.") else long - 1
    for solver in ("iterate", "closed_form"):
        early = collect(parameters, lambda loss, solver=solver: backward(loss, short, solver=solver, retain_graph=True), loss)
        assert max(relative(a, b) for a, b in zip(early, want, strict=True)) > 1e-6


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", [*EXACT, "broadcasts_and_casts"])
def test_closed_form_equals_iterate(name, rate):
    parameters, loss = PROGRAMS[name]()
    delta = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    for steps in STEPS[:4] if name in ("checkpointed", "lstm_cells", "nn.LSTM", "nn.GRU") else STEPS:
        got, want = (
            collect(parameters, lambda loss, s=solver, t=steps: backward(loss, t, rate, s, retain_graph=True), loss)
            for solver in ("closed_form", "iterate")
        )
        growth = largest(steps, rate, depth(loss))
        for a, b, full in zip(got, want, delta, strict=True):
            assert (a - b).norm() <= tolerance(name) * growth * max(full.norm(), b.norm())


def test_iterate_agrees_after_200_steps_on_unrolled_cells():
    parameters, loss = lstm_cells()
    got, want = (
        collect(parameters, lambda loss, s=s: backward(loss, 200, 0.1, s, retain_graph=True), loss) for s in ("closed_form", "iterate")
    )
    assert_close(got, want, 1e-12)


@pytest.mark.parametrize("rate", (0.05, 0.3, 1.0))
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ("closed_form", "iterate"))
def test_a_chain_learns_c_k_of_delta(steps, rate, solver):
    # From the loss: scale 0, sum 1, power 2, subtract 3, then Linear 4, Tanh 5, Linear 6, Tanh 7, Linear 8.
    parameters, loss = chain()
    delta = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    got = collect(parameters, lambda loss: backward(loss, steps, rate, solver), loss)
    for gradient, full, k in zip(got, delta, (8, 8, 6, 6, 4, 4), strict=True):
        want = binomial_tail(k, steps, rate) * full
        assert (gradient - want).norm() <= 1e-12 * full.norm()


@pytest.mark.parametrize("solver", ("closed_form", "iterate"))
def test_distances_count_from_the_output(solver):
    model = mlp(4, 5, 5, 3)
    prediction = model(doubles(6, 4))
    loss = half_squared_error(prediction, doubles(6, 3, seed=1))
    parameters = list(model.parameters())
    assert (depth(loss), depth(loss, prediction)) == (8, 4)
    delta = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    got = collect(parameters, lambda loss: backward(loss, 7, 0.3, solver, output=prediction), loss)
    assert_close(got, [binomial_tail(k, 7, 0.3) * full for k, full in zip((4, 4, 2, 2, 0, 0), delta, strict=True)], 1e-12)


def test_zero_steps_teach_what_is_at_distance_zero_alone():
    model = mlp(4, 5, 3)
    prediction = model(doubles(6, 4))
    loss = half_squared_error(prediction, doubles(6, 3, seed=1))
    want = collect(list(model.parameters()), lambda loss: loss.backward(retain_graph=True), loss)
    got = collect(list(model.parameters()), lambda loss: backward(loss, 0, 0.5, output=prediction), loss)
    assert [float(g.norm()) for g in got[:2]] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(got[2:], want[2:], strict=True))


# An oracle that shares nothing with autograd: random programs, dense Jacobians and the steps in NumPy


class Program:
    """A random DAG of vectors of width D: linear maps with two shared matrices, tanh, sums and products; a linear readout."""

    def __init__(self, seed, width=3, length=8):
        random = np.random.default_rng(seed)
        self.weights = [random.normal(size=(width, width)) for _ in range(2)]
        self.x, self.readout = random.normal(size=width), random.normal(size=width)
        self.ops = [("linear", 0, None)]  # vertex 0 reads the input; (operation, first parent, second parent or matrix)
        for vertex in range(1, length):
            op = random.choice(["linear", "tanh", "add", "mul"])
            first, second = random.integers(vertex), random.integers(vertex)
            self.ops.append((str(op), int(first), int(random.integers(2)) if op == "linear" else int(second)))
        self.taps = sorted({length - 1, int(random.integers(length))})  # the loss reads these, each by a dot product

    def torch_loss(self):
        weights = [torch.tensor(w, requires_grad=True) for w in self.weights]
        readout, values = torch.tensor(self.readout), []
        for i, (op, a, b) in enumerate(self.ops):
            parent = torch.tensor(self.x) if i == 0 else values[a]
            if op == "linear":
                values.append(weights[b or 0] @ parent)
            elif op == "tanh":
                values.append(parent.tanh())
            else:
                values.append(parent + values[b] if op == "add" else parent * values[b])
        terms = [values[tap].dot(readout) for tap in self.taps]
        return weights, terms[0] if len(terms) == 1 else terms[0] + terms[1]

    def forward(self):
        values = []
        for i, (op, a, b) in enumerate(self.ops):
            parent = self.x if i == 0 else values[a]
            if op == "linear":
                values.append(self.weights[b or 0] @ parent)
            elif op == "tanh":
                values.append(np.tanh(parent))
            else:
                values.append(parent + values[b] if op == "add" else parent * values[b])
        return values

    def jacobians(self, values):
        """(child, parent) -> d mu_child / d v_parent, parents that appear twice added up."""
        found = {}
        for i, (op, a, b) in enumerate(self.ops):
            if i == 0:
                continue
            if op == "linear":
                local = [(a, self.weights[b])]
            elif op == "tanh":
                local = [(a, np.diag(1 - np.tanh(values[a]) ** 2))]
            elif op == "add":
                local = [(a, np.eye(len(values[a]))), (b, np.eye(len(values[a])))]
            else:
                local = [(a, np.diag(values[b])), (b, np.diag(values[a]))]
            for parent, jacobian in local:
                found[i, parent] = found.get((i, parent), 0) + jacobian
        return found

    def gradients(self, steps, rate):
        """Fixed prediction by the book. With two taps, the sum is the loss, and each dot product relaxes like any vertex."""
        values, n = self.forward(), len(self.ops)
        jacobians = self.jacobians(values)
        errors = [np.zeros_like(self.x) for _ in range(n)]
        dots = [1.0] if len(self.taps) == 1 else [0.0, 0.0]
        for _ in range(steps):
            drive = [np.zeros_like(self.x) for _ in range(n)]
            for dot, tap in zip(dots, self.taps, strict=True):
                drive[tap] = drive[tap] + self.readout * dot
            for (child, parent), jacobian in jacobians.items():
                drive[parent] = drive[parent] + jacobian.T @ errors[child]
            errors = [(1 - rate) * e + rate * d for e, d in zip(errors, drive, strict=True)]
            if len(dots) == 2:
                dots = [(1 - rate) * dot + rate for dot in dots]
        gradients = [np.zeros_like(w) for w in self.weights]
        for i, (op, a, b) in enumerate(self.ops):
            if op == "linear":
                gradients[b or 0] += np.outer(errors[i], self.x if i == 0 else values[a])
        return gradients, max(np.abs(e).max() for e in errors)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), steps=st.integers(0, 30), rate=st.floats(0.02, 1.6), solver=st.sampled_from(["closed_form", "iterate"]))
def test_random_programs_against_dense_jacobians(seed, steps, rate, solver):
    program = Program(seed)
    weights, loss = program.torch_loss()
    backward(loss, steps, rate, solver)
    want, _ = program.gradients(steps, rate)
    full, _ = program.gradients(100, 1.0)
    growth = largest(steps, rate, 10)
    for weight, expected, delta in zip(weights, want, full, strict=True):
        got = np.zeros_like(expected) if weight.grad is None else weight.grad.numpy()
        assert np.linalg.norm(got - expected) <= 1e-11 * growth * max(np.linalg.norm(expected), np.linalg.norm(delta))


# Paths, merging and cost


def test_depth_counts_arithmetic_and_not_views():
    weight = doubles(3, 4).requires_grad_()
    plain = (weight.tanh() * 2).sum()
    viewed = (
        (weight.t()[:, None].expand(4, 2, 3).select(1, 0).tanh().to(torch.float32).reshape(-1).view(2, 6).contiguous() * 2).sum().view(())
    )
    assert depth(plain) == depth(viewed) == 2
    assert depth(weight.sum()) == 0
    assert depth(doubles(1).requires_grad_()) == 0
    assert depth(torch.cat([weight * 2, weight]).sum()) == 2


@pytest.mark.parametrize("view", [lambda y: y.view(3, 6).t(), lambda y: y.unbind(1)[0], lambda y: y[1:3].float()])
def test_a_view_of_the_output_moves_no_distance(view):
    model = mlp(4, 5, 3)
    prediction = model(doubles(6, 4))
    seen = view(prediction)
    parameters, loss = list(model.parameters()), (seen * seen).sum()
    got = collect(parameters, lambda loss: backward(loss, 3, 0.3, output=seen, retain_graph=True), loss)
    want = collect(parameters, lambda loss: backward(loss, 3, 0.3, output=prediction, retain_graph=True), loss)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    full = collect(parameters, lambda loss: loss.backward(), loss)
    assert_close(got, [binomial_tail(k, 3, 0.3) * g for k, g in zip((2, 2, 0, 0), full, strict=True)], 1e-12)


def test_hooks_of_modules_move_no_distance():
    plain, hooked = mlp(4, 5, 3), mlp(4, 5, 3)
    seen = []
    for layer in hooked:
        layer.register_full_backward_hook(lambda module, *_: seen.append(module))
    gradients = []
    for model in (plain, hooked):
        loss = half_squared_error(model(doubles(6, 4).requires_grad_()), doubles(6, 3, seed=1))
        gradients.append(collect(list(model.parameters()), lambda loss: backward(loss, 4, 0.3), loss))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert seen == [hooked[2], hooked[1], hooked[0]]


def test_beside_the_output_distances_count_from_what_is_exact():
    """penalty = (w * w).sum() joins the loss after the output: add is exact, sum 1, mul 2; above the output tanh is 1."""
    weight, above = doubles(4).requires_grad_(), doubles(4, seed=1).requires_grad_()
    output = above.tanh() * 2
    loss = (output * output).sum() + (weight * weight).sum()
    gradients = collect([weight, above], lambda loss: backward(loss, 7, 0.3, output=output, retain_graph=True), loss)
    full = collect([weight, above], lambda loss: loss.backward(), loss)
    assert_close(gradients, [binomial_tail(2, 7, 0.3) * full[0], binomial_tail(1, 7, 0.3) * full[1]], 1e-12)


def test_several_outputs_are_all_at_distance_zero():
    weight = doubles(4).requires_grad_()
    hidden = weight.tanh()
    output = hidden.sin()
    loss = (output * output).sum() + hidden.sum()
    got = collect([weight], lambda loss: backward(loss, 0, 0.3, output=[output, hidden], retain_graph=True), loss)
    want = collect([weight], lambda loss: loss.backward(), loss)
    assert torch.equal(got[0], want[0])


class SinCos(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, sin, cos):
        (x,) = ctx.saved_tensors
        return sin * x.cos() - cos * x.sin()


@pytest.mark.parametrize("solver", ("closed_form", "iterate"))
def test_one_output_of_a_node_with_several(solver):
    """The output is exact; the node's other result is reached without passing it, so it holds an error that relaxes."""
    weight = doubles(4).requires_grad_()
    output, other = SinCos.apply(weight)
    loss = (output * output).sum() + 3 * other.sum()
    (got,) = collect([weight], lambda loss: backward(loss, 7, 0.3, solver, output=output), loss)
    # From the add, which is exact: the product by 3 is at 1, the sum at 2, the cosine at 3.
    want = 2 * weight.sin() * weight.cos() - binomial_tail(3, 7, 0.3) * 3 * weight.sin()
    assert_close([got], [want.detach()], 1e-14)


class Loose(torch.autograd.Function):
    """Answers in another shape and dtype than its input's, which the engine allows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.double() * (1 + 2j)).expand(2, 3)


@pytest.mark.filterwarnings("error")
def test_a_product_takes_its_producers_shape_and_dtype():
    node = Loose.apply(torch.ones(3, requires_grad=True) * 2).grad_fn
    (gradient,) = vjp(node, [torch.tensor([1.0, 2.0, 3.0])])
    assert gradient.dtype == torch.float32 and gradient.tolist() == [2.0, 4.0, 6.0]


def count_products(monkeypatch):
    import pckernels.node_graph as node_graph

    calls, original = [], node_graph.vjp
    monkeypatch.setattr(node_graph, "vjp", lambda node, gradients: calls.append(node) or original(node, gradients))
    return calls


def test_a_chain_costs_one_product_a_node(monkeypatch):
    calls = count_products(monkeypatch)
    _, loss = chain()
    backward(loss, 37, 0.1)
    assert len(calls) == len(set(calls)) > 0


def test_what_has_arrived_to_rounding_costs_no_walk(monkeypatch):
    calls = count_products(monkeypatch)
    parameters, loss = skip_graph()
    want = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    got = collect(parameters, lambda loss: backward(loss, 400, 0.3), loss)
    assert not calls and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_cannot_arrive_costs_nothing(monkeypatch):
    calls = count_products(monkeypatch)
    _, loss = chain()
    backward(loss, 2, 0.3)
    assert len(calls) == 3  # scale, sum and power; what the power sends on to distance 3 is dropped


def test_equal_coefficients_share_a_length():
    lengths = PathLengths([1.0, 1.0, 1.0, 0.5, 0.0, 0.0], 1e-15)
    assert [lengths.carried(k, 0) for k in range(6)] == [0, 0, 0, 3, None, None]
    assert lengths.carried(1, 1) == 0 and lengths.carried(1, 2) == 1  # the third step ahead tells them apart
    assert lengths.carried(4, 1) is None and not lengths.all_one
    assert PathLengths(coefficients(6, 1.0, 6), 1e-15).all_one


# Hooks and the contract of .grad


def test_leaf_hooks_run_once_and_what_they_return_counts():
    parameters, loss = chain()
    want = collect(parameters, lambda loss: backward(loss, 6, 0.3, retain_graph=True), loss)
    calls = []
    handles = [parameters[0].register_hook(lambda g: calls.append("hook") or 2 * g)]
    handles.append(parameters[0].register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone())))
    got = collect(parameters, lambda loss: backward(loss, 6, 0.3, retain_graph=True), loss)
    assert calls[0] == "hook" and len(calls) == 2 and torch.equal(calls[1], 2 * want[0])
    assert torch.equal(got[0], 2 * want[0]) and torch.equal(got[2], want[2])
    for handle in handles:
        handle.remove()


def test_hooks_on_intermediate_tensors_see_the_feedback_once():
    first, second = doubles(4, 4).requires_grad_(), doubles(4, 4, seed=1).requires_grad_()
    hidden = doubles(4, 4, seed=2) @ first
    output = hidden @ second
    hidden.retain_grad()
    seen = []
    hidden.register_hook(lambda g: seen.append(g) or 100 * g)
    backward((output * output).sum(), 1, 0.5, output=output)
    feedback = (2 * output @ second.t()).detach()
    assert len(seen) == 1
    assert_close([seen[0], first.grad], [feedback, 0.5 * doubles(4, 4, seed=2).t() @ feedback], 1e-14)
    assert torch.equal(hidden.grad, 100 * seen[0])


def test_one_sweep_runs_hooks_on_intermediate_tensors_as_backward_does():
    weight = doubles(4).requires_grad_()
    hidden = weight.tanh()
    hidden.register_hook(lambda g: 3 * g)
    loss = hidden.sin().sum()
    want = collect([weight], lambda loss: loss.backward(retain_graph=True), loss)
    assert torch.equal(collect([weight], backward, loss)[0], want[0])


def test_a_second_call_adds_when_the_graph_is_kept():
    for arguments in ({}, {"steps": 6, "rate": 0.3}):
        parameters, loss = chain()
        once = [g.clone() for g in collect(parameters, lambda loss, a=arguments: backward(loss, **a, retain_graph=True), loss)]
        before = [p.grad for p in parameters]
        backward(loss, **arguments)
        assert all(torch.equal(p.grad, 2 * g) for p, g in zip(parameters, once, strict=True))
        assert all(p.grad is g for p, g in zip(parameters, before, strict=True))  # added in place


@pytest.mark.parametrize("arguments", [{}, {"steps": 6, "rate": 0.3}, {"steps": 6, "rate": 0.3, "solver": "iterate"}])
def test_a_freed_graph_is_named(arguments):
    parameters, loss = chain()
    backward(loss, **arguments)
    before = [p.grad.clone() for p in parameters]
    with pytest.raises(RuntimeError, match="has been freed by an earlier backward call"):
        backward(loss, **arguments)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, before, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"steps": 6, "rate": 0.3}])
def test_inputs_alone_learn(arguments):
    parameters, loss = chain()
    want = collect(parameters, lambda loss: backward(loss, **arguments, retain_graph=True), loss)
    some = [parameters[1], parameters[4]]
    got = collect(parameters, lambda loss: backward(loss, **arguments, inputs=some, retain_graph=True), loss)
    assert [g is None for g in got] == [True, False, True, True, False, True]
    assert torch.equal(got[1], want[1]) and torch.equal(got[4], want[4])
    got = collect(parameters, lambda loss: backward(loss, **arguments, inputs=parameters[0], retain_graph=True), loss)
    assert torch.equal(got[0], want[0]) and got[5] is None
    stranger = doubles(3).requires_grad_()
    assert collect([stranger], lambda loss: backward(loss, **arguments, inputs=stranger), loss) == [None]


def test_inputs_leave_out_nodes_that_they_do_not_need(monkeypatch):
    calls = count_products(monkeypatch)
    parameters, loss = chain()
    backward(loss, 37, 0.1, inputs=parameters[-1])
    assert len(calls) == 4  # scale, sum, power, subtract; the last Linear holds the error


@pytest.mark.parametrize("arguments", [{}, {"steps": 9, "rate": 0.3}])
def test_frozen_and_unused_parameters_keep_none(arguments):
    model, unused = mlp(4, 5, 5, 3), mlp(2, 2)
    model[2].weight.requires_grad_(False)
    backward(half_squared_error(model(doubles(6, 4)), doubles(6, 3, seed=1)), **arguments)
    assert model[2].weight.grad is None and all(p.grad is None for p in unused.parameters())
    assert model[0].weight.grad.norm() > 0
    reference = mlp(4, 5, 5, 3)
    backward(half_squared_error(reference(doubles(6, 4)), doubles(6, 3, seed=1)), **arguments)
    assert torch.equal(model[0].weight.grad, reference[0].weight.grad)


def test_a_leaf_read_at_different_distances_adds_its_updates_up():
    weight = doubles(4).requires_grad_()
    hidden = weight.tanh()  # tanh at 2, the product at 1
    loss = (hidden * weight).sum()
    (got,) = collect([weight], lambda loss: backward(loss, 7, 0.3), loss)
    with torch.no_grad():
        want = binomial_tail(1, 7, 0.3) * weight.tanh() + binomial_tail(2, 7, 0.3) * weight * (1 - weight.tanh() ** 2)
    assert_close([got], [want], 1e-14)


@pytest.mark.parametrize("arguments", [{}, {"steps": 6, "rate": 0.3}])
def test_a_hook_that_raises_leaves_grad_as_it_was(arguments):
    parameters, loss = chain()
    parameters[2].grad = torch.ones_like(parameters[2])
    parameters[5].grad = torch.ones_like(parameters[5])
    kept = parameters[5].grad

    def fail(gradient):
        raise KeyError("mine")

    handle = parameters[0].register_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        backward(loss, **arguments, retain_graph=True)
    assert [p.grad is None for p in parameters] == [True, True, False, True, True, False]
    assert parameters[5].grad is kept and torch.equal(kept, torch.ones_like(kept)) and (parameters[2].grad == 1).all()
    handle.remove()
    got = collect(parameters, lambda loss: backward(loss, **arguments), loss)  # no injected error is left behind
    assert_close(got, collect(parameters, lambda loss: backward(loss, **arguments), chain_like(parameters)), 0.0)


def chain_like(parameters):
    x = doubles(6, 4)
    for weight, bias in ((0, 1), (2, 3), (4, 5)):
        x = F.linear(x if weight == 0 else torch.tanh(x), parameters[weight], parameters[bias])
    return half_squared_error(x, doubles(6, 3, seed=1))


def test_it_works_under_no_grad_and_leaves_no_graph():
    parameters, loss = chain()
    with torch.no_grad():
        backward(loss, 6, 0.3)
    assert all(p.grad is not None and not p.grad.requires_grad for p in parameters)


# What training code does around a loss


@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(sparse):
    def gradient(steps):
        torch.manual_seed(0)
        table, model = nn.Embedding(7, 4, sparse=sparse).double(), mlp(4, 3)
        backward((model(table(torch.tensor([1, 2, 2, 6]))) ** 2).sum(), steps, 1.0 if steps is None else 0.3)
        return table.weight.grad

    partial, full = gradient(5), gradient(None)
    assert partial.is_sparse == full.is_sparse == sparse
    # pow 1, Linear 2, embedding 3
    assert_close([partial.to_dense()], [binomial_tail(3, 5, 0.3) * full.to_dense()], 1e-13)


@pytest.mark.parametrize("solver", ("closed_form", "iterate"))
def test_sparse_gradients_through_arithmetic(solver):
    table = doubles(5, 3).requires_grad_()
    loss = F.embedding(torch.tensor([0, 1, 1]), table * 2, sparse=True).sum()
    (got,) = collect([table], lambda loss: backward(loss, 3, 0.3, solver, retain_graph=True), loss)
    (full,) = collect([table], lambda loss: loss.backward(), loss)
    assert_close([got.to_dense()], [binomial_tail(2, 3, 0.3) * full.to_dense()], 1e-14)


def test_non_reentrant_checkpoint_changes_nothing():
    def gradients(run):
        first, block = mlp(4, 4), mlp(4, 4, 4)
        loss = (run(block, torch.tanh(first(doubles(3, 4)))) ** 2).sum()
        return collect([*first.parameters(), *block.parameters()], lambda loss: backward(loss, 5, 0.3), loss)

    got = gradients(lambda block, h: checkpoint(block, h, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(lambda block, h: block(h)), strict=True))


def test_reentrant_checkpoint_is_refused_where_errors_pass_it():
    first, block = mlp(4, 4), mlp(4, 4, 4)
    loss = (checkpoint(block, torch.tanh(first(doubles(3, 4))), use_reentrant=True) ** 2).sum()
    with pytest.raises(Unsupported, match="use_reentrant=False"):
        backward(loss, 5, 0.3)
    assert all(p.grad is None for p in [*first.parameters(), *block.parameters()])
    backward(loss)
    assert all(p.grad is not None for p in [*first.parameters(), *block.parameters()])


def test_compiled_regions_are_one_vertex():
    model = mlp(4, 5, 3)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(doubles(6, 4)).square().sum()
    got = collect(list(model.parameters()), lambda loss: backward(loss, 3, 0.3), loss)
    full = collect(list(model.parameters()), lambda loss: loss.backward(), model(doubles(6, 4)).square().sum())
    assert_close(got, [binomial_tail(2, 3, 0.3) * g for g in full], 1e-12)
    before = doubles(6, 4).requires_grad_()
    with pytest.raises(Unsupported, match=r"without torch\.compile"):
        backward(compiled(before * 2).square().sum(), 3, 0.3)
    assert before.grad is None


def test_autocast_and_grad_scaler():
    model = mlp(8, 8, 8, 3, dtype=torch.float32)
    parameters = list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(doubles(6, 8).float())
    loss = F.cross_entropy(prediction.float(), torch.tensor([0, 1, 2, 0, 1, 2]))
    full = collect(parameters, lambda loss: loss.backward(retain_graph=True), loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(parameters, 0.0)
    for solver in ("closed_form", "iterate"):
        got = collect(parameters, lambda loss, s=solver: backward(loss, 5, 0.3, s, prediction, retain_graph=True), scaler.scale(loss))
        scaler.unscale_(optimizer)
        want = [binomial_tail(k, 5, 0.3) * g for k, g in zip((4, 4, 2, 2, 0, 0), full, strict=True)]
        assert all(g.dtype == torch.float32 for g in got)
        assert_close(got, want, 12 * 2**-9)  # six bfloat16 roundings lie between the output and the first weight, in either sweep
        scaler.step(optimizer)
        scaler.update()


class Watched(torch.autograd.Function):
    """The identity. Notes the grad mode it is differentiated in, and sends its gradient on the first time alone."""

    @staticmethod
    def forward(ctx, x, modes):
        ctx.modes = modes
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.modes.append(torch.is_grad_enabled())
        return gradient if len(ctx.modes) == 1 else None, None


def test_the_steps_build_no_graph_and_a_changing_answer_is_refused():
    weight, modes = doubles(4).requires_grad_(), []
    with pytest.raises(Unsupported, match="let it return zeros"):
        backward(Watched.apply(weight * 2, modes).sum(), 3, 0.25, "iterate")
    assert modes == [False] * 3  # two steps in which its own error is not 0, and the learning pass
    assert weight.grad is None


# Errors


def refused(exception, match, loss=None, **arguments):
    parameters, own = chain()
    with pytest.raises(exception, match=match):
        backward(own if loss is None else loss, **arguments)
    assert all(p.grad is None for p in parameters)


def test_bad_arguments_are_refused_before_anything_runs():
    weight = doubles(3).requires_grad_()
    refused(TypeError, "loss must be a tensor; got float", loss=1.0)
    refused(ValueError, r"one element; got shape \[3\]", loss=weight * 2)
    refused(ValueError, "does not require grad", loss=doubles(1))
    refused(TypeError, "loss must be real", loss=(weight * 1j).sum())
    refused(ValueError, "rate must lie in", steps=3, rate=2.0)
    refused(ValueError, "rate must lie in", steps=3, rate=0.0)
    refused(ValueError, "give steps for rate=0.5", rate=0.5)
    refused(ValueError, "0 or more", steps=-1)
    refused(TypeError, "steps must be an int", steps=2.0)
    refused(ValueError, "solver must be one of", solver="exact")
    refused(TypeError, "retain_graph must be a bool", retain_graph=None)
    refused(ValueError, "output tensor 0 does not lead to the loss", output=weight * 2)
    refused(ValueError, "every tensor in output must require grad", output=doubles(3))
    refused(ValueError, "output is empty", output=[])
    refused(TypeError, "output must be a tensor or a list of tensors", output="logits")
    refused(TypeError, "inputs must be a tensor or a list of tensors", inputs={"w": weight})
    refused(ValueError, "inputs is empty", inputs=[])
    refused(ValueError, "inputs must be leaf tensors", inputs=weight * 2)
    with pytest.raises(TypeError, match="create_graph"):
        backward(weight.sum(), create_graph=True)


def test_an_output_that_the_loss_does_not_read_is_refused():
    states, (last, _) = nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    with pytest.raises(ValueError, match="output tensor 1 does not lead to the loss"):
        backward(states.sum(), output=[states, last])


@pytest.mark.parametrize("solver", ("closed_form", "iterate"))
def test_an_error_that_is_not_finite_raises(solver):
    parameters, loss = chain()
    parameters[0].grad = torch.ones_like(parameters[0])
    with pytest.raises(
        InferenceDiverged, match=r"The error of \w+ \(shape .*\) is not finite after 5 steps at rate 0.5; .grad is unchanged"
    ):
        backward(loss * math.inf, 5, 0.5, solver)
    assert (parameters[0].grad == 1).all() and all(p.grad is None for p in parameters[1:])


# Data parallel


def train_a_rank(rank, store, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = mlp(4, 5, 3)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    with parallel.no_sync():  # gradients accumulated before are averaged with the rest
        backward(half_squared_error(parallel(doubles(6, 4, seed=rank)), doubles(6, 3)), 5, 0.3)
    backward(half_squared_error(parallel(doubles(6, 4, seed=rank + 2)), doubles(6, 3)), 5, 0.3)
    torch.save([p.grad for p in model.parameters()], f"{results}.{rank}")
    torch.distributed.destroy_process_group()


def test_two_ranks_average_their_updates(tmp_path):
    torch.multiprocessing.spawn(train_a_rank, (str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2)
    got = [torch.load(tmp_path / f"result.{rank}") for rank in range(2)]
    model = mlp(4, 5, 3)
    for seed in range(4):
        backward(half_squared_error(model(doubles(6, 4, seed=seed)), doubles(6, 3)), 5, 0.3)
    for gradients in got:
        assert_close(gradients, [p.grad / 2 for p in model.parameters()], 1e-13)
