// A lane type holds one number for each of a few lanes: here float, one lane; a Team may bring a wider one with the same functions
// (the host's is host/lanes.h). Code that is written once takes the lane type as a template parameter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef PCK_ISA
#error "define PCK_ISA, the namespace of the instruction set"
#endif

#ifndef PCK_DEVICE
#ifdef __CUDACC__
#define PCK_DEVICE __device__
#else
#define PCK_DEVICE
#endif
#endif

namespace pckernels::PCK_ISA {

PCK_DEVICE inline std::uint32_t bits(float x) {
  std::uint32_t result;
  memcpy(&result, &x, sizeof result);
  return result;
}

PCK_DEVICE inline float from_bits(std::uint32_t x) {
  float result;
  memcpy(&result, &x, sizeof result);
  return result;
}

PCK_DEVICE inline float select(bool condition, float yes, float no) { return condition ? yes : no; }

PCK_DEVICE inline bool all(bool condition) { return condition; }

template <class Lane>
PCK_DEVICE Lane load(const float* source) {
  Lane result;
  memcpy(&result, source, sizeof result);
  return result;
}

template <class Lane>
PCK_DEVICE void store(float* target, Lane value) {
  memcpy(target, &value, sizeof value);
}

template <class Lane>
PCK_DEVICE Lane splat(float x) {
  return Lane{} + x;
}

// Where a body of the engine stands: a lane type's worth of lanes of one row. Arrays are given by their first row; absent ones are zeros.
template <class LaneType>
struct At {
  using Lane = LaneType;
  std::ptrdiff_t offset;
  const float* valid;  // 1 for the lanes that hold a sample, otherwise 0

  PCK_DEVICE Lane operator()(const float* array) const { return array ? load<Lane>(array + offset) : Lane{}; }
  PCK_DEVICE void put(float* array, Lane value) const { store(array + offset, value); }
  PCK_DEVICE void put(float* array, Lane value, bool accumulate) const { put(array, accumulate ? (*this)(array) + value : value); }
  // Zero in the lanes without a sample, whatever the value is there.
  PCK_DEVICE Lane if_valid(Lane value) const { return select(load<Lane>(valid) > 0.0f, value, Lane{}); }
};

}  // namespace pckernels::PCK_ISA
