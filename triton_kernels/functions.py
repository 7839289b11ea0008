"""Elementary functions in float32, from arithmetic and bits alone, so that the interpreter and every GPU compute the same thing.

The minimax fits and bounds are those of csrc/engine/functions.h. Triton's own `exp` loses a digit for large arguments, and its `tanh`
belongs to a device library that the interpreter does not have. NaN comes out where it goes in.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(x):
    """e^x for x in [-87, 88], beyond that its value at the nearer end."""
    y = tl.where(x > -87.0, x, -87.0)  # of NaN too, which has no integer
    y = tl.where(y > 88.0, 88.0, y)
    # Nearest integer of y / log 2. Not by adding 1.5 * 2^23: a compiler that contracts products may move that rounding.
    n = tl.floor(y * 1.44269504 + 0.5)
    r = (y - n * 0.693359375) - n * -2.12194440e-4
    p = 5.000000101e-01 + r * (1.666651289e-01 + r * (4.166618728e-02 + r * (8.369598410e-03 + r * 1.395171725e-03)))
    p = 1.0 + (r + r * r * p)
    scaled = (p.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, scaled)


@triton.jit
def tanh_small(x):
    """tanh x for |x| < 0.6, without losing digits near 0."""
    y = x * x
    p = -5.395247532e-02 + y * (2.173443838e-02 + y * (-8.267087555e-03 + y * 2.231061054e-03))
    p = -3.333333178e-01 + y * (1.333324779e-01 + y * p)
    return x + x * y * p


@triton.jit
def hyperbolic_tangent(x):
    """tanh x."""
    size = tl.abs(x)
    large = 1.0 - 2.0 / (exponential(2.0 * size) + 1.0)
    return tl.where(size < 0.6, tanh_small(x), tl.where(x < 0.0, -large, large))


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exponential(-x))


@triton.jit
def logarithm(x):
    """log x for x >= 1."""
    moved = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # so that the mantissa runs from sqrt(1/2) to sqrt(2)
    exponent = (moved >> 23).to(tl.float32)
    r = ((moved & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = -1.662455314e-01 + r * (1.418119611e-01 + r * (-1.312876763e-01 + r * (1.288162240e-01 + r * -7.859545868e-02)))
    p = 3.333331673e-01 + r * (-2.500081043e-01 + r * (2.000228608e-01 + r * p))
    rest = exponent * -2.12194440e-4 + r * r * (r * p - 0.5)
    return tl.where(x != x, x, exponent * 0.693359375 + (r + rest))


@triton.jit
def bell(x):
    """e^(-x^2 / 2), the Gaussian without its factor."""
    return exponential(-0.5 * x * x)


@triton.jit
def normal_cdf(x, bell_x):
    """Phi(x), the normal distribution function; bell_x = bell(x)."""
    u = 1.0 / (1.0 + 0.35 * tl.abs(x))
    p = 7.378587858e-02 + u * (-1.905590401e-01 + u * (1.158107839e-01 + u * -2.388238996e-02))
    p = 1.322677269e-01 + u * (6.881074630e-02 + u * (4.660221403e-02 + u * p))
    tail = bell_x * (-1.559628782e-05 + u * (1.399298187e-01 + u * (1.372498505e-01 + u * p)))
    return tl.where(x < 0.0, tail, 1.0 - tail)
