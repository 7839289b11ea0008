// The lane type of the host's Team: a vector register, with the functions of engine/lane.h from simd.h. Included before the engine,
// whose templates find functions of a built-in type only where they were declared earlier.
#pragma once

#include "simd.h"

namespace pckernels::PCK_ISA {

// A number for each lane of a vec, in double precision. In parts of four, which compilers convert well.
struct WideLanes {
  typedef float Four __attribute__((vector_size(16)));
  typedef double WideFour __attribute__((vector_size(32)));
  WideFour part[kWidth / 4] = {};

  void add(vec x) {
    Four narrow[kWidth / 4];
    std::memcpy(narrow, &x, sizeof x);
    for (int k = 0; k < kWidth / 4; ++k) part[k] += __builtin_convertvector(narrow[k], WideFour);
  }
  double operator[](int lane) const { return part[lane / 4][lane % 4]; }
};

}  // namespace pckernels::PCK_ISA
