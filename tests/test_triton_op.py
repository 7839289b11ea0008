"""Who runs torch.ops.pckernels.relax on CUDA tensors: decided by what is installed, and told in words."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from chain_case import code_of

import pckernels as pck
from pckernels import ops
from pckernels.backends import cuda, device_op, triton
from pckernels.compiler import Compiled

HERE, MISSING = (True, "here"), (False, "it is missing")


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    device_op.choice.cache_clear()
    yield
    device_op.choice.cache_clear()


def available(monkeypatch: pytest.MonkeyPatch, engine: tuple[bool, str], kernels: tuple[bool, str]) -> None:
    monkeypatch.setattr(cuda, "availability", lambda: engine)
    monkeypatch.setattr(triton, "availability", lambda: kernels)


@pytest.mark.parametrize("kernels", [HERE, MISSING])
def test_the_engine_comes_first(kernels: tuple[bool, str], monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, HERE, kernels)
    assert device_op.choice() == device_op.Choice(cuda.launch, "the cuda backend")


def test_triton_stands_in_for_an_engine_that_was_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, MISSING, HERE)
    assert device_op.choice() == device_op.Choice(triton.launch, "the triton backend; not cuda: it is missing")


def code_and_weights() -> tuple[Compiled, list[torch.Tensor], list[torch.Tensor]]:
    code, net = code_of("two", "tanh", pck.Strict(2, 0.1))
    reads = [torch.randn(3 * place.n) for place in code.io if not place.is_result]
    return code, [p.detach() for p in net.parameters()], reads


def test_where_there_is_neither_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, MISSING, (False, "nor that"))
    wanted = "cannot run on CUDA tensors here: nobody; not cuda: it is missing; not triton: nor that."
    with pytest.raises(pck.Unsupported, match=wanted):
        device_op.relax([], [], 0, 1, 1.0, out=[])


@pytest.mark.skipif(not triton.interpreted(), reason="the kernels run on the CPU with TRITON_INTERPRET=1 alone")
def test_triton_runs_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it runs on CUDA tensors, but for the device: against the host engine's op."""
    available(monkeypatch, MISSING, HERE)
    code, weights, inputs = code_and_weights()
    number = ops.number_of(code)
    expected = torch.ops.pckernels.relax(weights, inputs, number, 3, -1.0)
    found = [torch.full_like(tensor, float("nan")) for tensor in expected]
    device_op.relax(weights, inputs, number, 3, -1.0, out=found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
