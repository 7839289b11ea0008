"""Products by either library, on any processor: values, feedback and outer products."""

import pytest
import torch

from pckernels import products

ROWS, INPUTS, OUTPUTS = 64, 512, 512  # large enough for oneDNN in every direction


@pytest.fixture(params=[True, False], ids=["onednn", "blas"])
def library(request, monkeypatch):
    if request.param and products._LINEAR is None:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param)


def test_linear_and_its_feedback(library):
    x, weight, bias = torch.randn(ROWS, INPUTS, requires_grad=True), torch.randn(OUTPUTS, INPUTS), torch.randn(OUTPUTS)
    error = torch.randn(ROWS, OUTPUTS)
    for _ in range(3):  # a weight is rearranged at its second use
        z = products.linear(x, weight, bias)
        torch.testing.assert_close(z, x @ weight.t() + bias, atol=1e-3, rtol=1e-4)
        (found,) = torch.autograd.grad(z, x, error)
        torch.testing.assert_close(found, error @ weight, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("factor", [-0.25, torch.tensor(-0.25)], ids=["number", "tensor"])
@pytest.mark.parametrize("count", [1, 3])
def test_outer_products(library, factor, count):
    errors = [torch.randn(ROWS, OUTPUTS) for _ in range(count)]
    inputs = torch.randn(count * ROWS, INPUTS)
    found = products.outer_products(products.stacked(errors), inputs, factor)
    torch.testing.assert_close(found, -0.25 * torch.cat(errors).t() @ inputs, atol=1e-3, rtol=1e-4)


def test_the_choice_is_a_fact_of_the_processor():
    products.onednn_is_faster.cache_clear()
    first = products.onednn_is_faster()
    products.onednn_is_faster.cache_clear()
    assert products.onednn_is_faster() is first
