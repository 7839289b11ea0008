"""Inputs whose batch or dtype is not what the module takes are refused by every backend before anything changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck

RULES = [pck.Strict(2, 0.1), pck.ZeroDivergence()]
BACKENDS = [name for name, support in pck.backends().items() if support.ok and name in ("reference", "host", "graph")]


class Last(nn.Module):
    """Reads a sequence, and answers at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.RNN(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x)[0][-1])


class Answer(nn.Module):
    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.answer = nn.Linear(4, 3), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.layer(x))


def assert_refused(network: pck.PCNetwork, x: Tensor, y: Tensor, error: type[Exception], text: str) -> None:
    optimizer = torch.optim.Adam(network.parameters())
    before = [p.detach().clone() for p in network.parameters()]
    for act in (lambda: network.backward(x, y), lambda: network.step(x, y, optimizer), lambda: network.infer(x, y)):
        with pytest.raises(error, match=text):
            act()
    assert all(p.grad is None for p in network.parameters()) and not optimizer.state
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


# The batch


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_first_input_needs_its_batch_dim(rule: pck.Strict | pck.ZeroDivergence) -> None:
    x, y = torch.randn(7, 5, 4), torch.randn(5, 3)
    assert_refused(pck.PCNetwork(Last(), rule), x, y, ValueError, "batch of 7 samples is missing.*batch_dim=")
    pck.PCNetwork(Last(), rule, batch_dim=1).backward(x, y)


def test_a_single_sample_needs_a_batch() -> None:
    assert_refused(pck.PCNetwork(Answer(torch.tanh), RULES[0]), torch.randn(4), torch.randn(3), ValueError, "batch of 4 samples is missing")


@pytest.mark.parametrize(
    ("answer", "target"),
    [(torch.sum, torch.zeros(())), (lambda h: h.mean(0), torch.zeros(3)), (lambda h: h.mean(0, keepdim=True), torch.zeros(1, 3))],
    ids=["a scalar", "a mean over the batch", "one row"],
)
def test_an_output_without_samples_is_refused(answer: Callable[[Tensor], Tensor], target: Tensor) -> None:
    assert_refused(pck.PCNetwork(Answer(answer), RULES[0]), torch.randn(5, 4), target, ValueError, "batch of 5 samples is missing")


def test_a_mean_over_as_many_samples_as_features_is_refused() -> None:
    network = pck.PCNetwork(Answer(lambda h: h.mean(0)), RULES[0])
    assert_refused(network, torch.randn(3, 4), torch.zeros(3), ValueError, "batch of 3 samples is missing")


def test_a_graph_of_one_batch_size_is_held_to_that_size() -> None:
    x = torch.randn(5, 4)
    pck.PCNetwork(Answer(lambda h: torch.tanh(h.view(5, 3))), RULES[0]).backward(x, torch.randn(5, 3))
    cut = pck.PCNetwork(Answer(lambda h: torch.tanh(h.view(5, 3)[:4])), RULES[0])
    assert_refused(cut, x, torch.randn(4, 3), ValueError, "batch of 5 samples is missing")


@pytest.mark.parametrize("batch", [0, 1, 2, 5])
@pytest.mark.parametrize(
    "answer",
    [lambda h: h.flatten(), lambda h: h.T, lambda h: h],
    ids=["samples folded into an axis", "the batch last", "the batch first"],
)
def test_an_output_with_samples_is_taken(answer: Callable[[Tensor], Tensor], batch: int) -> None:
    module = Answer(answer)
    x = torch.randn(batch, 4)
    pck.PCNetwork(module, RULES[0]).backward(x, torch.zeros_like(module(x)))
    assert module.layer.weight.grad is not None


# The dtype


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int32])
def test_integers_into_a_product_are_refused_by_every_backend(backend: str, dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.ones(5, 4).to(dtype)
    for rule in RULES:
        assert_refused(pck.PCNetwork(module, rule, backend=backend), x, torch.randn(5, 3), TypeError, "linear takes floating-point numbers")


@pytest.mark.parametrize("bias", [True, False])
def test_integers_into_a_convolution_are_refused(bias: bool) -> None:
    module = nn.Sequential(nn.Conv1d(2, 3, 3, bias=bias), nn.Flatten())
    assert_refused(pck.PCNetwork(module, RULES[0]), torch.ones(5, 2, 4).long(), torch.randn(5, 6), TypeError, "rejects these inputs")


def test_words_and_integers_that_are_cast_are_taken() -> None:
    module = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3))
    pck.PCNetwork(module, RULES[0]).backward(torch.ones(5, 2).long(), torch.randn(5, 3))
    cast = Answer(torch.tanh)
    cast.layer.register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    pck.PCNetwork(cast, RULES[0]).backward(torch.ones(5, 4).long(), torch.randn(5, 3))
    assert cast.layer.weight.grad is not None and module[0].weight.grad is not None
