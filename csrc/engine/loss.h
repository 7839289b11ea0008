// The losses, and the errors -f0 dL/dmu that they put at an output: f0 is 1, or what a nudge weighs the loss by.
#pragma once

#include "functions.h"
#include "instruction.h"

namespace pckernels::PCK_ISA {

// mu + dmu is subtracted one after the other, so that a small change of mu keeps its digits.
template <class Team>
PCK_DEVICE void squared_error(Team& team, const Instruction& i) {
  const float *mu = team.array(i.a), *dmu = team.array(i.b), *target = team.array(i.c);
  float* out = team.array(i.out);
  const float factor = i.f[0];
  team.sum_each(i, i.n, factor, [=](auto at) {
    const auto error = at.if_valid((at(target) - at(mu)) - at(dmu));
    at.put(out, factor * error);
    return 0.5f * error * error;
  });
}

// log sum exp - logit of the class; the error is one_hot - softmax. A negative class: the position is not read.
template <class Team>
PCK_DEVICE void cross_entropy(Team& team, const Instruction& i) {
  const float *mu = team.array(i.a), *dmu = team.array(i.b), *target = team.array(i.c);
  float* out = team.array(i.out);
  const int classes = i.p[1];
  const float factor = i.f[0];
  team.sum_units(i, i.n / classes, factor, [=](auto at, int position) {
    using Lane = typename decltype(at)::Lane;
    const std::ptrdiff_t start = std::ptrdiff_t{position} * classes * Team::LANES;
    const auto logit = [=](int k) { return at(mu + start + k * Team::LANES) + (dmu ? at(dmu + start + k * Team::LANES) : Lane{}); };
    const Lane wanted = at(target + std::ptrdiff_t{position} * Team::LANES);
    Lane top = logit(0);
    for (int k = 1; k < classes; ++k) top = select(logit(k) <= top, top, logit(k));
    Lane sum{}, chosen{};
    for (int k = 0; k < classes; ++k) {
      const Lane above = logit(k) - top;
      sum = sum + exponential(above);
      chosen = select(wanted == static_cast<float>(k), above, chosen);
    }
    const Lane scale = factor / sum;
    for (int k = 0; k < classes; ++k) {
      const Lane softmax = exponential(logit(k) - top) * scale;
      const Lane error = select(wanted == static_cast<float>(k), factor - softmax, -softmax);
      at.put(out + start + k * Team::LANES, at.if_valid(select(wanted < 0.0f, Lane{}, error)));
    }
    return select(wanted < 0.0f, Lane{}, logarithm(sum) - chosen);
  });
}

template <class Team>
PCK_DEVICE void loss(Team& team, const Instruction& i) {
  if (static_cast<Loss>(i.p[0]) == Loss::SQUARED_ERROR) return squared_error(team, i);
  cross_entropy(team, i);
}

}  // namespace pckernels::PCK_ISA
