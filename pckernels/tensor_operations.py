"""What the operations of instructions.py do to tensors (B, n), each by as few calls of PyTorch as there are; any floating dtype.

interpreter.py says what they mean. Here they must be fast, and the same at every run: nothing adds up in an order that a device chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from pckernels import interpreter
from pckernels.instructions import Activation, Loss
from pckernels.interpreter import ConvShape, PoolShape

aten = torch.ops.aten


# Activations


def activation_constants(kind: Activation, z: Tensor) -> tuple[Tensor, ...]:
    """What `activation_change` needs of a pre-activation that stays as it is."""
    if kind is Activation.RELU:
        return z.clamp_max(0.0), z.clamp_min(0.0).neg_()
    if kind in _IN_DOUBLE:
        return (interpreter.activate(kind, (), z.double()),)
    return ()


def activation_change(
    kind: Activation, f: Sequence[float], z: Tensor, dz: Tensor, m: Tensor, constants: tuple[Tensor, ...] | None = None
) -> Tensor:
    """f(z + dz) - f(z) without cancellation, from m = f(z) where that helps."""
    known = activation_constants(kind, z) if constants is None else constants
    if kind is Activation.RELU:  # above zero max(dz, -z), below max(z + dz, 0)
        below, negated = known
        return torch.maximum(dz + below, negated)
    if kind in _IN_DOUBLE:
        return interpreter.activate(kind, f, torch.add(z.double(), dz)).sub_(known[0]).to(z.dtype)
    if kind is Activation.TANH:
        return _tanh_change(z, dz, m)
    if kind is Activation.SIGMOID:
        return 0.5 * _tanh_change(0.5 * z, 0.5 * dz, 2.0 * m - 1.0)
    return interpreter.change(kind, f, z, dz)


_IN_DOUBLE = (Activation.GELU, Activation.GELU_TANH)  # no short form: twice the digits


def _tanh_change(z: Tensor, dz: Tensor, m: Tensor) -> Tensor:
    # For large changes the quotient would cancel, and the difference does not.
    s = dz.tanh()
    small = s * torch.addcmul(torch.ones_like(m), m, m, value=-1.0) / torch.addcmul(torch.ones_like(m), m, s)
    return torch.where(dz.abs() < 0.5, small, (z + dz).tanh() - m)


def activation_feedback(kind: Activation, f: Sequence[float], g: Tensor, at: Tensor, by_value: bool) -> Tensor:
    """g f'(z): `at` is z, or with `by_value` f(z). PyTorch's choice of slope where there is a kink."""
    if by_value:
        return aten.tanh_backward(g, at) if kind is Activation.TANH else aten.sigmoid_backward(g, at)
    slopes: dict[Activation, Callable[[], Tensor]] = {
        Activation.AFFINE: lambda: f[0] * g,
        Activation.RELU: lambda: aten.threshold_backward(g, at, 0.0),
        Activation.LEAKY_RELU: lambda: aten.leaky_relu_backward(g, at, f[0], False),
        Activation.TANH: lambda: aten.tanh_backward(g, at.tanh()),
        Activation.SIGMOID: lambda: aten.sigmoid_backward(g, at.sigmoid()),
        Activation.GELU: lambda: aten.gelu_backward(g, at),
        Activation.GELU_TANH: lambda: aten.gelu_backward(g, at, approximate="tanh"),
        Activation.HARDTANH: lambda: aten.hardtanh_backward(g, at, f[0], f[1]),
        Activation.SILU: lambda: aten.silu_backward(g, at),
    }
    return slopes[kind]()


# Convolutions: rows (B, n) in, rows out


def images(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, n) as (B, *shape)."""
    return rows.reshape(len(rows), *shape)


def convolution(shape: ConvShape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(images(x, shape.input), weight.view(shape.weight), bias, *shape.settings).flatten(1)


def convolution_feedback(shape: ConvShape, g: Tensor, weight: Tensor) -> Tensor:
    return conv2d_input([len(g), *shape.input], weight.view(shape.weight), images(g, shape.output), *shape.settings).flatten(1)


def convolution_update(shape: ConvShape, g: Tensor, x: Tensor) -> Tensor:
    return conv2d_weight(images(x, shape.input), list(shape.weight), images(g, shape.output), *shape.settings)


# Pooling. A place is the number of an element: of the image where windows lie side by side, otherwise of the window.


def maxima(shape: PoolShape, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each window and its place."""
    x = images(x, shape.input)
    return _side_by_side_maxima(shape, x) if shape.is_side_by_side else _maxima(shape.windows(x))


def maxima_constants(shape: PoolShape, x: Tensor, m: Tensor) -> Tensor:
    """x_j - m for the elements of each window, m the maxima of x: what `maxima_change` needs of an input that stays as it is."""
    x, m = images(x, shape.input), images(m, shape.output)
    if not shape.is_side_by_side:
        return shape.windows(x) - m.flatten(2).unsqueeze(2)
    difference = x.clone()  # beyond the last window it is not read
    inside = difference[:, :, : m.shape[2] * shape.kernel[0], : m.shape[3] * shape.kernel[1]]
    inside.sub_(m.repeat_interleave(shape.kernel[0], 2).repeat_interleave(shape.kernel[1], 3))
    return difference


def maxima_change(shape: PoolShape, x: Tensor, dx: Tensor, m: Tensor, constants: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """max_j ((x_j - m) + dx_j) over each window, and its place."""
    before = maxima_constants(shape, x, m) if constants is None else constants
    change = images(dx, shape.input)
    return _side_by_side_maxima(shape, before + change) if shape.is_side_by_side else _maxima(before + shape.windows(change, 0.0))


def _side_by_side_maxima(shape: PoolShape, x: Tensor) -> tuple[Tensor, Tensor]:
    values, places = F.max_pool2d(x, shape.kernel, shape.stride, return_indices=True)
    return values.flatten(1), places.flatten(1)


def _maxima(windows: Tensor) -> tuple[Tensor, Tensor]:
    values, places = windows.max(2)
    return values.flatten(1), places.flatten(1)


def maxima_feedback(shape: PoolShape, g: Tensor, places: Tensor) -> Tensor:
    """g of each window to the place of its maximum. Overlapping windows add place by place, so in one order."""
    g, places = images(g, shape.output), images(places, shape.output)
    if shape.is_side_by_side:
        empty = g.new_zeros(len(g), shape.channels, shape.height * shape.width)
        return empty.scatter_(2, places.flatten(2), g.flatten(2)).flatten(1)
    return shape.spread(lambda place: torch.where(places == place, g, 0.0), g)


def average(shape: PoolShape, x: Tensor) -> Tensor:
    return shape.average(images(x, shape.input)).flatten(1)


def average_feedback(shape: PoolShape, g: Tensor) -> Tensor:
    x = g.new_empty(len(g), *shape.input)  # of which the backward pass reads the shape alone
    options = (list(shape.kernel), list(shape.stride), list(shape.padding), False, not shape.inside_only, None)
    return aten.avg_pool2d_backward(images(g, shape.output), x, *options).flatten(1)


# The loss


def loss(kind: Loss, classes: int, mu: Tensor, change: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) losses and the error -dL/dmu at mu + change."""
    if kind is Loss.SQUARED_ERROR:
        error = target - mu if change is None else (target - mu) - change
        return 0.5 * error.square().sum(1), error
    logits = (mu if change is None else mu + change).reshape(len(mu), -1, classes)
    labels = target.long()
    read = (labels >= 0).to(mu.dtype)
    chosen = labels.clamp_min(0).unsqueeze(2)
    logs = logits.log_softmax(2)
    error = torch.zeros_like(logs).scatter_(2, chosen, 1.0).sub_(logs.exp()).mul_(read.unsqueeze(2))
    return -(logs.gather(2, chosen).squeeze(2) * read).sum(1), error.flatten(1)
