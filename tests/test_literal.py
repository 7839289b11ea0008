"""The literal dynamics differentiate one vertex at a time, and skip exactly what has not moved."""

import pytest
import torch
from torch import nn

import pckernels as pck
from pckernels.backends import feedforward, learning


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.head(h * torch.tanh(self.c(torch.tanh(self.b(h)))))


def leaves(tensor):
    """The tensors that autograd would reach from here."""
    found, waiting, seen = [], [tensor.grad_fn], set()
    if tensor.requires_grad and tensor.grad_fn is None:
        return [tensor]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [next_node for next_node, _ in node.next_functions]
    return found


LITERAL = [pck.Strict(4, 0.1), pck.FixedPrediction(4, 0.5, solver="iterate"), pck.ZeroDivergence(solver="iterate")]
RELAXED = [pck.Relaxed(rule, "learned", False, "learned") for rule in LITERAL]


@pytest.mark.parametrize("rule", [*LITERAL, *RELAXED], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("kind", ["skip", "lstm"])
def test_no_differentiation_spans_two_vertices(monkeypatch, rule, kind):
    torch.manual_seed(0)
    if kind == "skip":
        module, x, target, batch_dim = Skip().double(), torch.randn(3, 4).double(), torch.randn(3, 2).double(), 0
    else:
        module, x, target, batch_dim = (
            nn.LSTM(3, 4).double(),
            torch.randn(3, 2, 3).double(),
            (torch.randn(3, 2, 4).double(), (None, None)),
            1,
        )
    calls, locals_ = [], []
    make = feedforward.Bound._local
    monkeypatch.setattr(feedforward.Bound, "_local", lambda *args: locals_.append(make(*args)) or locals_[-1])
    original, grad = feedforward.vjp, torch.autograd.grad

    def spy(local, error, wrt):
        mine = {id(tensor) for tensor in (*local.parents.values(), *wrt)}
        others = {id(parent) for other in locals_ if other is not local for parent in other.parents.values()}
        reached = {id(leaf) for leaf in leaves(local.mu)}
        assert not reached & (others - mine)
        assert len(reached) <= len(local.parents) + len(local.taps) + len(local.vertex.weights)
        calls.append(local.vertex.name)
        return original(local, error, wrt)

    engine_calls = []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda outputs, *args, **kwargs: engine_calls.append(outputs) or grad(outputs, *args, **kwargs)
    )
    for module_ in (feedforward, learning):
        monkeypatch.setattr(module_, "vjp", spy)
    pck.PCNetwork(module, rule, batch_dim=batch_dim).backward(x, target)
    assert len(calls) > 5
    single = [outputs for outputs in engine_calls if isinstance(outputs, tuple) and len(outputs) == 1]
    assert len(single) <= len(calls)
    assert len(engine_calls) - len(single) <= 1  # the one that brings slices of a weight back to the weight


def test_strict_recomputes_no_prediction_whose_parents_rest(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    computed = []
    original = feedforward.Bound._local
    monkeypatch.setattr(
        feedforward.Bound, "_local", lambda self, vertex, values: computed.append(vertex.name) or original(self, vertex, values)
    )
    pck.PCNetwork(module, pck.Strict(3, 0.1)).infer(torch.randn(3, 4).double(), torch.randn(3, 2).double())
    assert computed.count("0") == 1  # all its parents are clamped: hoisted
    # The light cone: 4 moves in step 1, 2 in step 2, 0 in step 3; a prediction follows when its parent has moved.
    assert (computed.count("output"), computed.count("4"), computed.count("2")) == (1 + 3, 1 + 2, 1 + 1)


def test_hidden_errors_at_the_start_are_exactly_zero():
    torch.manual_seed(0)
    module = Skip()
    for steps in (0, 1):
        moment = pck.PCNetwork(module, pck.Strict(steps, 0.1)).infer(torch.randn(3, 4), torch.randn(3, 2), record=True).history[0]
        assert all(not moment.errors[name].any() for name in moment.errors if name != "output")


def test_displacements_keep_the_digits_of_small_errors():
    """On a chain of small gain the errors are 1e-12 of the values: computed as v - mu, float64 would keep 4 digits of them."""
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8, dtype=torch.float64), nn.Tanh())]
    module = nn.Sequential(*layers, nn.Linear(8, 2, dtype=torch.float64))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.02) if p.dim() == 2 else p.fill_(0.5)
    x, target = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    found = pck.PCNetwork(module, pck.ZeroDivergence(solver="iterate")).infer(x, target).errors
    expected = pck.PCNetwork(module, pck.ZeroDivergence()).infer(x, target).errors
    sizes = [float(expected[name].norm()) for name in expected]
    assert min(sizes) < 1e-8 * max(sizes)
    for name, error in expected.items():
        assert (found[name] - error).norm() <= 1e-12 * error.norm(), name
