// Elementary functions over any lane type, from arithmetic and bits alone, so that every instruction set computes the same thing.
// The polynomials are minimax fits; relative errors are within 2 units in the last place where the exact result is normal. NaN
// comes out where it goes in.
#pragma once

#include "lane.h"

namespace pckernels::PCK_ISA {

template <class L>
PCK_DEVICE L absolute(L x) {
  return from_bits(bits(x) & 0x7fffffffu);
}

template <class L>
PCK_DEVICE L with_sign_of(L size, L sign) {
  return from_bits(bits(size) | (bits(sign) & 0x80000000u));
}

template <class L>
PCK_DEVICE L polynomial(L, float c0) {
  return splat<L>(c0);
}

// c0 + c1 x + c2 x^2 + ..
template <class L, class... Rest>
PCK_DEVICE L polynomial(L x, float c0, Rest... rest) {
  return c0 + x * polynomial(x, rest...);
}

// e^x for x in [-87, 88], beyond that its value at the nearer end.
template <class L>
PCK_DEVICE L exponential(L x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  L y = select(x < -87.0f, splat<L>(-87.0f), x);
  y = select(y > 88.0f, splat<L>(88.0f), y);
  const L shifted = y * 1.44269504f + round;
  const L n = shifted - round;
  const L r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  const L p = 1.0f + (r + r * r * polynomial(r, 5.000000101e-01f, 1.666651289e-01f, 4.166618728e-02f, 8.369598410e-03f, 1.395171725e-03f));
  return select(x != x, x, from_bits(bits(p) + (bits(shifted) << 23)));
}

// tanh x for |x| < 0.6, without losing digits near 0.
template <class L>
PCK_DEVICE L tanh_small(L x) {
  const L y = x * x;
  return x +
         x * y *
             polynomial(y, -3.333333178e-01f, 1.333324779e-01f, -5.395247532e-02f, 2.173443838e-02f, -8.267087555e-03f, 2.231061054e-03f);
}

template <class L>
PCK_DEVICE L hyperbolic_tangent(L x) {
  const L size = absolute(x);
  const L large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return select(size < 0.6f, tanh_small(x), with_sign_of(large, x));
}

// log x for x >= 1.
template <class L>
PCK_DEVICE L logarithm(L x) {
  const auto moved = bits(x) - 0x3f3504f3u;  // so that the mantissa runs from sqrt(1/2) to sqrt(2)
  const L exponent = from_bits((moved >> 23) | 0x4b000000u) - 8388608.0f;
  const L r = from_bits((moved & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const L p = polynomial(r, 3.333331673e-01f, -2.500081043e-01f, 2.000228608e-01f, -1.662455314e-01f, 1.418119611e-01f, -1.312876763e-01f,
                         1.288162240e-01f, -7.859545868e-02f);
  const L rest = exponent * -2.12194440e-4f + r * r * (r * p - 0.5f);
  return select(x != x, x, exponent * 0.693359375f + (r + rest));
}

// e^(-x^2 / 2), the Gaussian without its factor.
template <class L>
PCK_DEVICE L bell(L x) {
  return exponential(-0.5f * x * x);
}

// Phi(x), the normal distribution function; bell_x = bell(x).
template <class L>
PCK_DEVICE L normal_cdf(L x, L bell_x) {
  const L u = 1.0f / (1.0f + 0.35f * absolute(x));
  const L tail = bell_x * polynomial(u, -1.559628782e-05f, 1.399298187e-01f, 1.372498505e-01f, 1.322677269e-01f, 6.881074630e-02f,
                                     4.660221403e-02f, 7.378587858e-02f, -1.905590401e-01f, 1.158107839e-01f, -2.388238996e-02f);
  return select(x < 0.0f, tail, 1.0f - tail);
}

}  // namespace pckernels::PCK_ISA
