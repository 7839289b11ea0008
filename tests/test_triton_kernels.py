"""Triton kernels one by one, against plain PyTorch in float64: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from fast_interpreter import install
from torch import Tensor
from triton_case import DEVICE, relative_error, require_a_way_to_run

from pckernels import interpreter
from pckernels.instructions import Activation, Code, OuterProduct
from pckernels.memory import Memory

require_a_way_to_run()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from pckernels.triton import activations, functions, local_update  # noqa: E402

if DEVICE == "cpu":
    install()

SLOPES_ALONE = (Activation.AFFINE, Activation.LEAKY_RELU)  # whose change may be a slope times dz, whatever z is
BY_VALUE = (Activation.TANH, Activation.SIGMOID)
PARAMETERS = {Activation.AFFINE: (0.7, 0.3), Activation.LEAKY_RELU: (0.1, 0.0), Activation.HARDTANH: (-1.0, 0.8)}


@triton.jit
def _activation_by_constant(z, dz, out, f0, f1, KIND: tl.constexpr, BY_VALUE: tl.constexpr, n, BLOCK: tl.constexpr):
    _activation(z, dz, out, f0, f1, KIND, BY_VALUE, n, BLOCK)


@triton.jit
def _activation(z, dz, out, f0, f1, kind, by_value, n, BLOCK: tl.constexpr):
    """The four functions, one after the other in rows of out (4, n)."""
    at = tl.arange(0, BLOCK)
    here = at < n
    z, dz = tl.load(z + at, mask=here, other=0.0), tl.load(dz + at, mask=here, other=0.0)
    m = activations.act(kind, z, f0, f1)
    dm = activations.act_change(kind, z, dz, m, f0, f1)
    slope = activations.act_grad(kind, z + dz, f0, f1)
    tl.store(out + at, m, mask=here)
    tl.store(out + n + at, dm, mask=here)
    tl.store(out + 2 * n + at, slope, mask=here)
    if by_value:
        slope = activations.act_grad_of_value(kind, m + dm)
    tl.store(out + 3 * n + at, slope, mask=here)


@pytest.mark.parametrize("kind", list(Activation))
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 5.0])
@pytest.mark.parametrize("kernel", [_activation, _activation_by_constant], ids=["run-time", "constexpr"])
def test_activations(kind: Activation, size: float, kernel: triton.JITFunction) -> None:
    z, dz = 2 * torch.randn(500), size * torch.randn(500)
    f = PARAMETERS.get(kind, (0.0, 0.0))
    out = torch.full((4, 500), float("nan"), device=DEVICE)
    kernel[(1,)](z.to(DEVICE), dz.to(DEVICE), out, *f, int(kind), int(kind in BY_VALUE), 500, 512)
    for found, wanted in zip(out, _expected(kind, f, z.double(), dz.double()), strict=True):
        assert relative_error(found, wanted) < 1e-6


def _expected(kind: Activation, f: tuple[float, ...], z: Tensor, dz: Tensor) -> list[Tensor]:
    slope = interpreter.slope(kind, f, z + dz)
    return [interpreter.activate(kind, f, z), interpreter.change(kind, f, z, dz), slope, slope]


@pytest.mark.parametrize("kind", list(Activation))
def test_nan_goes_through_an_activation(kind: Activation) -> None:
    z = torch.tensor([float("nan"), 0.5, 0.5], device=DEVICE)
    dz = torch.tensor([0.1, float("nan"), 0.1], device=DEVICE)
    out = torch.zeros(4, 3, device=DEVICE)
    _activation[(1,)](z, dz, out, *PARAMETERS.get(kind, (0.0, 0.0)), int(kind), 0, 3, 4)
    assert out.isnan()[:2].tolist() == [[True, False, False], [kind not in SLOPES_ALONE, True, False]]


@triton.jit
def _functions(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x + at, mask=at < n, other=1.0)
    tl.store(out + at, functions.exponential(x), mask=at < n)
    tl.store(out + n + at, functions.hyperbolic_tangent(x), mask=at < n)
    tl.store(out + 2 * n + at, functions.logarithm(1.0 + tl.abs(x)), mask=at < n)
    tl.store(out + 3 * n + at, functions.sigmoid(x), mask=at < n)
    tl.store(out + 4 * n + at, functions.normal_cdf(x, functions.bell(x)), mask=at < n)


def test_elementary_functions() -> None:
    x = torch.cat([torch.linspace(-20, 20, 1999), torch.tensor([-86.9, -87.0, 0.0, 1e-30, 88.0])])
    out = torch.full((5, len(x)), float("nan"), device=DEVICE)
    _functions[(1,)](x.to(DEVICE), out, len(x), 2048)
    wide = x.double()
    exact = [wide.exp(), wide.tanh(), (1.0 + x.abs()).double().log(), wide.sigmoid()]
    for found, wanted in zip(out.cpu().double(), exact, strict=False):
        normal = wanted.abs() > 1.2e-38
        assert ((found - wanted) / wanted)[normal].abs().max() < 1e-6
    assert (out[4].cpu().double() - torch.special.ndtr(wide)).abs().max() < 2e-7


def outer_case(positions: int, inputs: int, outputs: int, spare: int = 0, offset: int = 0, weight: int = 0, bias: int = 1) -> OuterProduct:
    """A product that learns gradient 0 and 1 from io 0 (errors) and io 1."""
    return OuterProduct(weight, bias, 0, 1, positions, inputs, outputs, positions * inputs + spare, offset, coefficient=0.5)


def learned(products: list[OuterProduct], io: list[Tensor], sizes: tuple[int, ...], batch: int, precision: str = "fp32") -> list[Tensor]:
    gradients = [torch.full((size,), float("nan"), device=DEVICE) for size in sizes]
    local_update.learn(products, [tensor.float().to(DEVICE) for tensor in io], gradients, batch, -1.5, precision)
    return gradients


def expected_update(products: list[OuterProduct], io: list[Tensor], sizes: tuple[int, ...], batch: int) -> list[Tensor]:
    """By the interpreter of the engine's instructions, in float64."""
    shapes = {p.weight: (p.outputs, p.inputs) for p in products if p.weight >= 0}
    gradients = [torch.zeros(shapes.get(slot, (size,)), dtype=torch.float64) for slot, size in enumerate(sizes)]
    code = Code((), 0, 0, len(io), len(sizes), 0, 1, tuple(products))
    interpreter.execute(code, Memory([], [tensor.double() for tensor in io], gradients, torch.zeros(1, 1).double()), batch, -1.5)
    return [gradient.flatten() for gradient in gradients]


SPLIT = local_update.ROWS_OF_A_PART


@pytest.mark.parametrize("batch", [1, 15, 17, 3 * SPLIT + 5])
@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(1, 8, 10), (1, 100, 33), (3, 1, 129), (2, 65, 64)])
def test_local_update(batch: int, positions: int, inputs: int, outputs: int) -> None:
    product = outer_case(positions, inputs, outputs, spare=7, offset=3)
    io = [torch.randn(batch, positions * outputs), torch.randn(batch, product.x_stride)]
    sizes = (outputs * inputs, outputs)
    for found, wanted in zip(learned([product], io, sizes, batch), expected_update([product], io, sizes, batch), strict=True):
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("batch", [5, 2 * SPLIT])
def test_products_of_one_weight_add_up(batch: int) -> None:
    """Once with a bias of their own, once without, once the bias alone: of a weight that serves twice, and of one that is frozen."""
    products = [outer_case(1, 9, 6), outer_case(1, 9, 6, bias=2), outer_case(1, 9, 6, bias=-1), outer_case(1, 9, 6, weight=-1)]
    io = [torch.randn(batch, 6), torch.randn(batch, 9)]
    sizes = (54, 6, 6)
    for found, wanted in zip(learned(products, io, sizes, batch), expected_update(products, io, sizes, batch), strict=True):
        assert relative_error(found, wanted) < 1e-6


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_local_update_with_rounded_operands(precision: str) -> None:
    batch, product = 40, outer_case(1, 33, 20)
    io = [torch.randn(batch, 20), torch.randn(batch, 33)]
    sizes = (660, 20)
    bits = {"tf32": 2.0**-11, "fp16": 2.0**-11}[precision]
    exact = expected_update([product], [rounded(tensor, precision) for tensor in io], sizes, batch)[0]
    assert relative_error(learned([product], io, sizes, batch, precision)[0], exact) < 4 * bits * batch**0.5


def rounded(tensor: Tensor, precision: str) -> Tensor:
    """As the operand of a product; the interpreter keeps TF32 in float32, a GPU cuts it."""
    return tensor.half().double() if precision == "fp16" else tensor.double()


def test_the_parts_of_a_batch_are_its_own() -> None:
    """A batch is split by its size alone, whatever the GPU, and every row is in one part."""
    for rows in (1, 31, 255, 512, 5000, 10**6):
        for outputs, inputs in ((10, 300), (300, 784), (10, 0)):
            parts, part_rows = local_update.partition(rows, outputs, inputs)
            assert (
                part_rows % local_update.ROWS == 0 and (parts - 1) * part_rows < rows <= parts * part_rows and parts <= local_update.PARTS
            )
    assert local_update.partition(512, 10, 300)[0] == 2
