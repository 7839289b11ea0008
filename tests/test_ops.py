"""The ops: schemas, fakes, out variants, compilation, and the guard against silently lost gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pckernels as pck
from pckernels import ops
from pckernels.backends import host
from pckernels.compiler import Compiled
from pckernels.memory import Packed

OPS = torch.ops.pckernels


@pytest.fixture
def relaxation() -> tuple[Compiled, list[Tensor], list[Tensor], int]:
    """The code, weights and inputs of one strict inference on a small network, and its batch size."""
    if not pck.backends()["host"].ok:
        pytest.skip(f"host: {pck.backends()['host'].reason}")
    seen: list[tuple[Compiled, list[Tensor], list[Tensor], int]] = []

    def spied(code: Compiled, memory: Packed, batch: int, factor: float) -> None:
        seen.append((code, [weight.detach() for weight in memory.weights], list(memory.inputs), batch))
        run(code, memory, batch, factor)

    run = host.execute
    network = pck.PCNetwork(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), pck.Strict(5, 0.1), backend="host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "execute", spied)
        network.backward(torch.randn(4, 6), torch.randn(4, 3))
    return seen[-1]  # the first may be a product W W^T


def dense() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(5, 4), torch.randn(3, 4), torch.randn(3), torch.randn(5, 3)


def test_predict_error() -> None:
    x, weight, bias, value = dense()
    mu, error = OPS.predict_error(x, weight, bias, value, "tanh")
    torch.testing.assert_close(mu, (x @ weight.t() + bias).tanh())
    torch.testing.assert_close(error, value - mu)
    assert torch.equal(OPS.predict_error(x, weight, None, value, "identity")[0], torch.nn.functional.linear(x, weight))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_predict_error_knows_every_activation(activation: str) -> None:
    x, weight, bias, value = dense()
    z = torch.nn.functional.linear(x, weight, bias)
    expected = z if activation == "identity" else getattr(torch.nn.functional, activation)(z)
    torch.testing.assert_close(OPS.predict_error(x, weight, bias, value, activation)[0], expected)


def test_value_update() -> None:
    value, error, feedback, velocity = torch.randn(4, 5, 3)
    new, moved = OPS.value_update(value, error, feedback, velocity, 0.1, 0.5, 2.0)
    torch.testing.assert_close(moved, 0.5 * velocity + feedback - 2.0 * error)
    torch.testing.assert_close(new, value + 0.1 * moved)


def test_local_update_is_the_gradient_of_the_energy() -> None:
    x, weight, bias, value = dense()
    weight.requires_grad_(), bias.requires_grad_()
    (0.5 * (value - torch.nn.functional.linear(x, weight, bias)).square().sum()).backward()
    with torch.no_grad():
        _, error = OPS.predict_error(x, weight, bias, value, "identity")
        found = OPS.local_update(error, x)
    torch.testing.assert_close(found[0], weight.grad)
    torch.testing.assert_close(found[1], bias.grad)


def test_relax_runs_a_whole_inference(relaxation: tuple[Compiled, list[Tensor], list[Tensor], int]) -> None:
    code, weights, inputs, batch = relaxation
    *_, energies = OPS.relax(weights, inputs, ops.number_of(code), batch, -1.0)
    total = energies.sum(1)
    assert energies.shape == (6, 2) and bool((total[1:] < total[:-1]).all())
    assert torch.isfinite(energies).all()


def test_out_variants_write_what_the_others_return(relaxation: tuple[Compiled, list[Tensor], list[Tensor], int]) -> None:
    code, weights, inputs, batch = relaxation
    expected = OPS.relax(weights, inputs, ops.number_of(code), batch, -1.0)
    out = [torch.full_like(tensor, float("nan")) for tensor in expected]
    OPS.relax.out(weights, inputs, ops.number_of(code), batch, -1.0, out=out)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    x, weight, bias, value = dense()
    a, b = torch.empty(5, 3), torch.empty(5, 3)
    OPS.predict_error.out(x, weight, bias, value, "relu", prediction=a, error=b)
    assert torch.equal(a, OPS.predict_error(x, weight, bias, value, "relu")[0])
    OPS.value_update.out(value, b, b, b, 0.1, new_value=value, new_velocity=b)
    grad, sums = torch.empty(3, 4), torch.empty(3)
    OPS.local_update.out(b, x, weight=grad, bias=sums)
    assert torch.equal(grad, OPS.local_update(b, x)[0])


def test_opcheck(relaxation: tuple[Compiled, list[Tensor], list[Tensor], int]) -> None:
    code, weights, inputs, batch = relaxation
    number = ops.number_of(code)
    x, weight, bias, value = dense()
    out = [torch.empty_like(tensor) for tensor in OPS.relax(weights, inputs, number, batch, -1.0)]
    torch.library.opcheck(OPS.relax.default, (weights, inputs, number, batch, -1.0))
    torch.library.opcheck(OPS.relax.out, (weights, inputs, number, batch, -1.0), {"out": out})
    torch.library.opcheck(OPS.predict_error.default, (x, weight, bias, value, "tanh"))
    torch.library.opcheck(OPS.predict_error.out, (x, weight, None, value, "tanh"), {"prediction": value.clone(), "error": value.clone()})
    torch.library.opcheck(OPS.value_update.default, (value, value.clone(), value.clone(), value.clone(), 0.1))
    torch.library.opcheck(OPS.local_update.default, (value, x))


def test_compiled_without_a_graph_break(relaxation: tuple[Compiled, list[Tensor], list[Tensor], int]) -> None:
    code, weights, inputs, batch = relaxation
    number = ops.number_of(code)

    def step(x: Tensor, weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
        energies = OPS.relax(weights, inputs, number, batch, -1.0)[-1]
        mu, error = OPS.predict_error(x, weight, bias, value, "relu")
        moved, _ = OPS.value_update(value, error, mu, mu, 0.1, 0.0)
        return energies.sum() + moved.sum() + OPS.local_update(error, x)[0].sum()

    arguments = dense()
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments), step(*arguments))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("predict_error", lambda x, w, b, v: OPS.predict_error(x, w, b, v, "relu")),
        ("value_update", lambda x, w, b, v: OPS.value_update(v, v, v, w @ x.t(), 0.1)),
        ("local_update", lambda x, w, b, v: OPS.local_update(x @ w.t(), x)),
    ],
)
def test_a_gradient_is_never_lost_silently(name: str, call: object) -> None:
    x, weight, bias, value = dense()
    value = value.t() if name == "value_update" else value
    with pytest.raises(RuntimeError, match=rf"torch.ops.pckernels.{name} cannot be differentiated.*detach the inputs"):
        call(x, weight.requires_grad_(), bias, value)  # type: ignore[operator]
    with torch.no_grad():
        assert not any(tensor.requires_grad for tensor in call(x, weight, bias, value))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x, w, b, v: OPS.predict_error(x, w, b, v, "swish"), ValueError, "activation must be one of 'identity', 'relu'"),
        (lambda x, w, b, v: OPS.predict_error(x, w, b, x, "relu"), ValueError, r"the prediction's shape \(5, 3\); got \(5, 4\)"),
        (lambda x, w, b, v: OPS.local_update(v, x[:2]), ValueError, "a row for each sample"),
    ],
)
def test_bad_arguments(call: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(*dense())  # type: ignore[operator]


def test_codes_keep_their_numbers(relaxation: tuple[Compiled, list[Tensor], list[Tensor], int]) -> None:
    code = relaxation[0]
    assert ops.code_of(ops.number_of(code)) is code
    with pytest.raises(ValueError, match="There is no code number 987654"):
        OPS.relax(relaxation[1], relaxation[2], 987654, 4, 1.0)
