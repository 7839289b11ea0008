// What happens element by element: activations, arithmetic, and the moves of the dynamics. Every body reads and writes its own element
// alone, so `out` may be one of the operands.
#pragma once

#include "activations.h"

namespace pckernels::PCK_ISA {

template <class Team>
PCK_DEVICE void fill(Team& team, const Instruction& i) {
  float* out = team.array(i.out);
  const float value = i.f[0];
  team.for_each(i.n, [=](auto at) { at.put(out, splat<typename decltype(at)::Lane>(value)); });
}

// p0 blocks of p1 rows, every p2 rows of out from every p3 rows of a.
template <class Team>
PCK_DEVICE void copy(Team& team, const Instruction& i) {
  const float* a = team.array(i.a);
  float* out = team.array(i.out);
  const float factor = i.f[0];
  const bool accumulate = i.accumulate;
  const std::ptrdiff_t out_step = std::ptrdiff_t{i.p[2]} * Team::LANES, step = std::ptrdiff_t{i.p[3]} * Team::LANES;
  team.for_blocks(i.p[0], i.p[1], [=](auto at, int block) { at.put(out + block * out_step, factor * at(a + block * step), accumulate); });
}

template <class Team>
PCK_DEVICE void act(Team& team, const Instruction& i) {
  const float* a = team.array(i.a);
  float* out = team.array(i.out);
  with_activation(i.p[0], i.f, [&](auto f) { team.for_each(i.n, [=](auto at) { at.put(out, f.value(at(a))); }); });
}

template <class Team>
PCK_DEVICE void act_change(Team& team, const Instruction& i) {
  const float *z = team.array(i.a), *dz = team.array(i.b), *value = team.array(i.c);
  float* out = team.array(i.out);
  with_activation(i.p[0], i.f, [&](auto f) {
    team.for_each(i.n, [=](auto at) {
      auto m = at(nullptr);
      if constexpr (decltype(f)::READS_VALUE) m = value ? at(value) : f.value(at(z));
      at.put(out, f.change(at(z), at(dz), m));
    });
  });
}

// The value m that comes with the instruction is f(z): it serves where z has not moved. With p1 it is the value that moves with its change.
template <class Team>
PCK_DEVICE void act_grad(Team& team, const Instruction& i) {
  const float *g = team.array(i.a), *z = team.array(i.b), *dz = team.array(i.c);
  const float* value = dz ? nullptr : team.array(i.d);
  float* out = team.array(i.out);
  const bool accumulate = i.accumulate, by_value = i.p[1] != 0;
  with_activation(i.p[0], i.f, [&](auto f) {
    team.for_each(i.n, [=](auto at) {
      const auto moved = at(z) + at(dz);
      auto m = at(nullptr);
      if constexpr (decltype(f)::READS_VALUE) m = by_value ? moved : value ? at(value) : f.value(moved);
      at.put(out, at(g) * f.slope(moved, m), accumulate);
    });
  });
}

template <class Team>
PCK_DEVICE void add(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *b = team.array(i.b);
  float* out = team.array(i.out);
  const float of_a = i.f[0], of_b = i.f[1];
  const bool accumulate = i.accumulate;
  team.for_each(i.n, [=](auto at) { at.put(out, of_a * at(a) + of_b * at(b), accumulate); });
}

template <class Team>
PCK_DEVICE void mul(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *b = team.array(i.b);
  float* out = team.array(i.out);
  team.for_each(i.n, [=](auto at) { at.put(out, at(a) * at(b)); });
}

template <class Team>
PCK_DEVICE void mul_change(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *da = team.array(i.b), *c = team.array(i.c), *dc = team.array(i.d);
  float* out = team.array(i.out);
  team.for_each(i.n, [=](auto at) { at.put(out, at(a) * at(dc) + at(da) * (at(c) + at(dc))); });
}

template <class Team>
PCK_DEVICE void mul_grad(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *b = team.array(i.b), *c = team.array(i.c);
  float* out = team.array(i.out);
  const bool accumulate = i.accumulate;
  team.for_each(i.n, [=](auto at) { at.put(out, at(a) * (at(b) + at(c)), accumulate); });
}

template <class Team>
PCK_DEVICE void error(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *b = team.array(i.b);
  float* out = team.array(i.out);
  team.for_each(i.n, [=](auto at) { at.put(out, at(a) - at(b)); });
}

template <class Team>
PCK_DEVICE void move(Team& team, const Instruction& i) {
  const float *error = team.array(i.a), *feedback = team.array(i.b);
  float *velocity = team.array(i.c), *out = team.array(i.out);
  const float rate = i.f[0], momentum = i.f[1], precision = i.f[2];
  team.for_each(i.n, [=](auto at) {
    auto speed = at(feedback) - precision * at(error);
    if (velocity) {
      speed = momentum * at(velocity) + speed;
      at.put(velocity, speed);
    }
    at.put(out, at(out) + rate * speed);
  });
}

template <class Team>
PCK_DEVICE void relax(Team& team, const Instruction& i) {
  const float* feedback = team.array(i.a);
  float* out = team.array(i.out);
  const float rate = i.f[0], keep = 1.0f - rate;
  team.for_each(i.n, [=](auto at) { at.put(out, keep * at(out) + rate * at(feedback)); });
}

template <class Team>
PCK_DEVICE void norm(Team& team, const Instruction& i) {
  const float* a = team.array(i.a);
  const float* b = i.b == ABSENT ? a : team.array(i.b);
  team.sum_each(i, i.n, i.f[0], [=](auto at) { return at(a) * at(b); });
}

}  // namespace pckernels::PCK_ISA
