"""Activations, for every kernel: value, change and slope, with PyTorch's choice where there is a kink.

A new activation is a member of pckernels.instructions.Activation, its three functions here, and a line in `act`, `act_change` and
`act_grad`. `kind` may be a constexpr, and the others vanish, or a run-time integer, and the kernel branches; f0 and f1 are the
activation's parameters. All of it is float32 and element by element. The reference is pckernels/interpreter.py: activate, change,
slope, slope_of_value.

A difference of two values carries an absolute error of one unit in the last place of the value. A change computed here carries a
relative error of a few units as long as |dz| is below the bound that is named; beyond it the change is as large as the values are,
and their difference is as good. Comparisons are written so that NaN goes through. See csrc/engine/activations.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pckernels.instructions import Activation

from .functions import bell, hyperbolic_tangent, normal_cdf, sigmoid, tanh_small

AFFINE = tl.constexpr(int(Activation.AFFINE))
RELU = tl.constexpr(int(Activation.RELU))
LEAKY_RELU = tl.constexpr(int(Activation.LEAKY_RELU))
TANH = tl.constexpr(int(Activation.TANH))
SIGMOID = tl.constexpr(int(Activation.SIGMOID))
GELU = tl.constexpr(int(Activation.GELU))
GELU_TANH = tl.constexpr(int(Activation.GELU_TANH))
HARDTANH = tl.constexpr(int(Activation.HARDTANH))
SILU = tl.constexpr(int(Activation.SILU))


@triton.jit
def act(kind, z, f0, f1):
    """f(z)."""
    out = z
    if kind == AFFINE:
        out = f0 * z + f1
    elif kind == RELU:
        out = relu(z)
    elif kind == LEAKY_RELU:
        out = tl.where(z > 0.0, z, f0 * z)
    elif kind == TANH:
        out = hyperbolic_tangent(z)
    elif kind == SIGMOID:
        out = sigmoid(z)
    elif kind == GELU:
        out = z * normal_cdf(z, bell(z))
    elif kind == GELU_TANH:
        out = z * gelu_gate(z)
    elif kind == HARDTANH:
        out = hardtanh(z, f0, f1)
    elif kind == SILU:
        out = z * sigmoid(z)
    return out


@triton.jit
def act_change(kind, z, dz, m, f0, f1):
    """f(z + dz) - f(z) without cancellation; m = f(z), which TANH and SIGMOID alone read."""
    out = dz
    if kind == AFFINE:
        out = f0 * dz
    elif kind == RELU:
        out = relu_change(z, dz)
    elif kind == LEAKY_RELU:
        out = leaky_relu_change(z, dz, f0)
    elif kind == TANH:
        out = tanh_change(z, dz, m)
    elif kind == SIGMOID:
        out = sigmoid_change(z, dz, m)
    elif kind == GELU:
        out = gelu_change(z, dz)
    elif kind == GELU_TANH:
        out = gelu_tanh_change(z, dz)
    elif kind == HARDTANH:
        out = hardtanh_change(z, dz, f0, f1)
    elif kind == SILU:
        out = silu_change(z, dz)
    return out


@triton.jit
def act_grad(kind, z, f0, f1):
    """f'(z); where z has moved, z is the sum z + dz."""
    out = z
    if kind == AFFINE:
        out = tl.where(z == z, f0, z)
    elif kind == RELU:
        out = tl.where(z <= 0.0, 0.0, 1.0)
    elif kind == LEAKY_RELU:
        out = tl.where(z > 0.0, 1.0, f0)
    elif kind == TANH:
        out = act_grad_of_value(TANH, hyperbolic_tangent(z))
    elif kind == SIGMOID:
        out = act_grad_of_value(SIGMOID, sigmoid(z))
    elif kind == GELU:
        out = gelu_slope(z)
    elif kind == GELU_TANH:
        out = gelu_tanh_slope(z)
    elif kind == HARDTANH:
        out = tl.where(z > f0, tl.where(z < f1, 1.0, 0.0), 0.0)
    elif kind == SILU:
        out = silu_slope(z)
    return out


@triton.jit
def act_grad_of_value(kind, m):
    """f' from the value m = f(z): of TANH and SIGMOID alone. Where the value has moved, m is the sum m + dm."""
    out = 1.0 - m * m
    if kind == SIGMOID:
        out = m * (1.0 - m)
    return out


@triton.jit
def relu(z):
    return tl.where(z <= 0.0, 0.0, z)


@triton.jit
def relu_change(z, dz):
    moved = z + dz
    return tl.where(z > 0.0, tl.where(moved <= 0.0, -z, dz), relu(moved))


@triton.jit
def leaky_relu_change(z, dz, negative):
    moved = z + dz
    from_above = tl.where(moved > 0.0, dz, negative * moved - z)
    from_below = tl.where(moved > 0.0, moved - negative * z, negative * dz)
    return tl.where(z > 0.0, from_above, from_below)


@triton.jit
def tanh_change(z, dz, m):
    """Bound: |dz| < 0.5. Above it the quotient would cancel when z and dz have opposite signs."""
    s = tanh_small(dz)
    small = s * (1.0 - m * m) / (1.0 + m * s)
    return tl.where(tl.abs(dz) < 0.5, small, hyperbolic_tangent(z + dz) - m)


@triton.jit
def sigmoid_change(z, dz, m):
    """Bound: |dz| < 1. The form of tanh for halves, with 1 - t^2 = 4 m (1 - m) where t = tanh(z / 2) = 2 m - 1."""
    s = tanh_small(0.5 * dz)
    small = 2.0 * s * (m * (1.0 - m)) / (1.0 + (2.0 * m - 1.0) * s)
    return tl.where(tl.abs(dz) < 1.0, small, sigmoid(z + dz) - m)


# Factors stand behind tensors: in the interpreter a constexpr times a tensor is a constexpr, which `where` refuses.
DENSITY = tl.constexpr(0.3989422804)  # 1 / sqrt(2 pi)


@triton.jit
def gelu_change(z, dz):
    """f(z + dz) - f(z) = dz Phi(z + dz) + z dPhi. Bound: |dz| < 0.5, where dPhi is the integral of the density by its Taylor series."""
    is_small = tl.abs(dz) < 0.5
    place = tl.where(is_small, z + 0.5 * dz, z + dz)
    density = bell(place)
    before = normal_cdf(z, bell(z))
    step = tl.where(is_small, dz * DENSITY * density * mean_density(place, 0.5 * dz), normal_cdf(place, density) - before)
    return dz * (before + step) + z * step


@triton.jit
def mean_density(place, h):
    """Mean of the normal density from place - h to place + h, over the density at place: Hermite polynomials, |h| < 0.25."""
    a = tl.where(tl.abs(place) > 12.0, 144.0, place * place)
    b = h * h
    he2 = a - 1.0
    he4 = 3.0 + a * (-6.0 + a)
    he6 = -15.0 + a * (45.0 + a * (-15.0 + a))
    he8 = 105.0 + a * (-420.0 + a * (210.0 + a * (-28.0 + a)))
    return 1.0 + b * (he2 * (1.0 / 6) + b * (he4 * (1.0 / 120) + b * (he6 * (1.0 / 5040) + b * (he8 * (1.0 / 362880)))))


@triton.jit
def gelu_slope(z):
    density = bell(z)
    return normal_cdf(z, density) + z * DENSITY * density


SCALE = tl.constexpr(1.5957691216)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def gelu_tanh_change(z, dz):
    """z P with P the sigmoid of `gelu_inner`: dz (P + dP) + z dP, with the inner change from its factored form."""
    before = gelu_gate(z)
    moved = dz * SCALE * (1.0 + (3.0 * z * (z + dz) + dz * dz) * CUBIC)
    step = sigmoid_change(gelu_inner(z), moved, before)
    return dz * (before + step) + z * step


@triton.jit
def gelu_tanh_slope(z):
    p = gelu_gate(z)
    return p + z * (p * (1.0 - p)) * ((1.0 + 3.0 * z * z * CUBIC) * SCALE)


@triton.jit
def gelu_inner(z):
    return z * SCALE * (1.0 + z * z * CUBIC)


@triton.jit
def gelu_gate(z):
    return sigmoid(gelu_inner(z))


@triton.jit
def silu_change(z, dz):
    """z P with P = sigmoid(z): dz (P + dP) + z dP."""
    before = sigmoid(z)
    step = sigmoid_change(z, dz, before)
    return dz * (before + step) + z * step


@triton.jit
def silu_slope(z):
    p = sigmoid(z)
    return p + z * (p * (1.0 - p))


@triton.jit
def hardtanh(z, low, high):
    return tl.where(z < low, low, tl.where(z > high, high, z))


@triton.jit
def hardtanh_change(z, dz, low, high):
    moved = z + dz
    from_inside = tl.where(moved < low, low - z, tl.where(moved > high, high - z, dz))
    from_outside = hardtanh(moved, low, high) - hardtanh(z, low, high)
    return tl.where(z > low, tl.where(z < high, from_inside, from_outside), from_outside)
