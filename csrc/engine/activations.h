// Activations: value f(z), change f(z + dz) - f(z) without cancellation, and slope f'(z) with PyTorch's choice where there is a kink.
//
// change and slope are also given m = f(z). A difference of two values carries an absolute error of one unit in the last place of the
// value; a change computed here carries a relative error of a few units, as long as |dz| is below the bound that is named. Beyond the bound
// the change is as large as the values are, and their difference is as good. Comparisons are written so that NaN goes through.
#pragma once

#include "functions.h"
#include "instruction.h"

namespace pckernels::PCK_ISA {

// Whether change and slope read m; without it callers need not load or compute it.
struct IgnoresValue {
  static constexpr bool READS_VALUE = false;
};
struct ReadsValue {
  static constexpr bool READS_VALUE = true;
};

struct Affine : IgnoresValue {
  float scale, shift;

  PCK_DEVICE explicit Affine(const float* f) : scale(f[0]), shift(f[1]) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return scale * z + shift;
  }
  template <class L>
  PCK_DEVICE L change(L, L dz, L) const {
    return scale * dz;
  }
  template <class L>
  PCK_DEVICE L slope(L, L) const {
    return splat<L>(scale);
  }
};

struct Relu : IgnoresValue {
  PCK_DEVICE explicit Relu(const float*) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return select(z <= 0.0f, L{}, z);
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const L moved = z + dz;
    return select(z > 0.0f, select(moved <= 0.0f, -z, dz), value(moved));
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    return select(z <= 0.0f, L{}, splat<L>(1.0f));
  }
};

struct LeakyRelu : IgnoresValue {
  float negative;

  PCK_DEVICE explicit LeakyRelu(const float* f) : negative(f[0]) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return select(z > 0.0f, z, negative * z);
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const L moved = z + dz;
    const L from_above = select(moved > 0.0f, dz, negative * moved - z);
    const L from_below = select(moved > 0.0f, moved - negative * z, negative * dz);
    return select(z > 0.0f, from_above, from_below);
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    return select(z > 0.0f, splat<L>(1.0f), splat<L>(negative));
  }
};

// Bound: |dz| < 0.5. Above it the quotient would cancel when z and dz have opposite signs.
struct Tanh : ReadsValue {
  PCK_DEVICE explicit Tanh(const float*) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return hyperbolic_tangent(z);
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L m) const {
    const auto is_small = absolute(dz) < 0.5f;
    const L s = tanh_small(dz);
    const L small = s * (1.0f - m * m) / (1.0f + m * s);
    return all(is_small) ? small : select(is_small, small, value(z + dz) - m);  // near equilibrium all are
  }
  template <class L>
  PCK_DEVICE L slope(L, L m) const {
    return 1.0f - m * m;
  }
};

// Bound: |dz| < 1. The form of tanh for halves, with 1 - t^2 = 4 m (1 - m) where t = tanh(z / 2) = 2 m - 1.
struct Sigmoid : ReadsValue {
  PCK_DEVICE explicit Sigmoid(const float* = nullptr) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return 1.0f / (1.0f + exponential(-z));
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L m) const {
    const auto is_small = absolute(dz) < 1.0f;
    const L s = tanh_small(0.5f * dz);
    const L small = 2.0f * s * (m * (1.0f - m)) / (1.0f + (2.0f * m - 1.0f) * s);
    return all(is_small) ? small : select(is_small, small, value(z + dz) - m);
  }
  template <class L>
  PCK_DEVICE L slope(L, L m) const {
    return m * (1.0f - m);
  }
};

// f(z + dz) - f(z) = dz Phi(z + dz) + z dPhi. Bound: |dz| < 0.5, where dPhi is the integral of the density from z to z + dz by its Taylor
// series about the middle (Hermite polynomials; the first term left out is below 1e-8 of the sum where the density is not negligible).
struct Gelu : IgnoresValue {
  static constexpr float DENSITY = 0.3989422804f;  // 1 / sqrt(2 pi)

  PCK_DEVICE explicit Gelu(const float*) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return z * normal_cdf(z, bell(z));
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const auto is_small = absolute(dz) < 0.5f;
    const L place = select(is_small, z + 0.5f * dz, z + dz);
    const L density = bell(place);
    const L before = normal_cdf(z, bell(z));
    const L step = select(is_small, DENSITY * dz * density * series(place, 0.5f * dz), normal_cdf(place, density) - before);
    return dz * (before + step) + z * step;
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    const L density = bell(z);
    return normal_cdf(z, density) + DENSITY * z * density;
  }

 private:
  // Mean of the density from place - h to place + h, over the density at place.
  template <class L>
  PCK_DEVICE static L series(L place, L h) {
    const L a = select(absolute(place) > 12.0f, splat<L>(144.0f), place * place), b = h * h;
    const L he2 = a - 1.0f;
    const L he4 = polynomial(a, 3.0f, -6.0f, 1.0f);
    const L he6 = polynomial(a, -15.0f, 45.0f, -15.0f, 1.0f);
    const L he8 = polynomial(a, 105.0f, -420.0f, 210.0f, -28.0f, 1.0f);
    return 1.0f + b * (he2 * (1.0f / 6) + b * (he4 * (1.0f / 120) + b * (he6 * (1.0f / 5040) + b * (he8 * (1.0f / 362880)))));
  }
};

// z P with P = sigmoid(2 u): f(z + dz) - f(z) = dz (P + dP) + z dP, dP the sigmoid's change, 2 du from its factored form.
struct GeluTanh : IgnoresValue {
  static constexpr float SCALE = 1.5957691216f, CUBIC = 0.044715f;  // 2 sqrt(2 / pi)

  PCK_DEVICE explicit GeluTanh(const float*) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return z * gate(z);
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const L before = gate(z);
    const L moved = SCALE * dz * (1.0f + CUBIC * (3.0f * z * (z + dz) + dz * dz));
    const L step = Sigmoid().change(inner(z), moved, before);
    return dz * (before + step) + z * step;
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    const L p = gate(z);
    return p + z * Sigmoid().slope(z, p) * (SCALE * (1.0f + 3.0f * CUBIC * z * z));
  }

 private:
  template <class L>
  PCK_DEVICE static L inner(L z) {
    return SCALE * z * (1.0f + CUBIC * z * z);
  }
  template <class L>
  PCK_DEVICE static L gate(L z) {
    return Sigmoid().value(inner(z));
  }
};

struct Hardtanh : IgnoresValue {
  float low, high;

  PCK_DEVICE explicit Hardtanh(const float* f) : low(f[0]), high(f[1]) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return select(z < low, splat<L>(low), select(z > high, splat<L>(high), z));
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const L moved = z + dz;
    const L from_inside = select(moved < low, low - z, select(moved > high, high - z, dz));
    const L from_outside = value(moved) - value(z);
    return select(z > low, select(z < high, from_inside, from_outside), from_outside);
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    return select(z > low, select(z < high, splat<L>(1.0f), L{}), L{});
  }
};

// z P with P = sigmoid(z): f(z + dz) - f(z) = dz (P + dP) + z dP.
struct Silu : IgnoresValue {
  PCK_DEVICE explicit Silu(const float*) {}
  template <class L>
  PCK_DEVICE L value(L z) const {
    return z * Sigmoid().value(z);
  }
  template <class L>
  PCK_DEVICE L change(L z, L dz, L) const {
    const L before = Sigmoid().value(z);
    const L step = Sigmoid().change(z, dz, before);
    return dz * (before + step) + z * step;
  }
  template <class L>
  PCK_DEVICE L slope(L z, L) const {
    const L p = Sigmoid().value(z);
    return p + z * Sigmoid().slope(z, p);
  }
};

// Calls body with the activation of this kind; f holds its parameters.
template <class Body>
PCK_DEVICE void with_activation(int kind, const float* f, Body body) {
  switch (static_cast<Activation>(kind)) {
    case Activation::AFFINE: return body(Affine(f));
    case Activation::RELU: return body(Relu(f));
    case Activation::LEAKY_RELU: return body(LeakyRelu(f));
    case Activation::TANH: return body(Tanh(f));
    case Activation::SIGMOID: return body(Sigmoid(f));
    case Activation::GELU: return body(Gelu(f));
    case Activation::GELU_TANH: return body(GeluTanh(f));
    case Activation::HARDTANH: return body(Hardtanh(f));
    case Activation::SILU: return body(Silu(f));
  }
}

}  // namespace pckernels::PCK_ISA
