// Between a row-major block of io, a row for each sample, and rows of the arena, a lane for each sample.
#pragma once

#include "../engine/lane.h"

namespace pckernels::PCK_ISA {

typedef float Quad __attribute__((vector_size(16)));

#ifdef __clang__
#define PCK_SHUFFLE(x, y, i, j, k, l) __builtin_shufflevector(x, y, i, j, k, l)
#else
typedef std::int32_t QuadIndex __attribute__((vector_size(16)));
#define PCK_SHUFFLE(x, y, i, j, k, l) __builtin_shuffle(x, y, QuadIndex{i, j, k, l})
#endif

inline void transpose(Quad (&m)[4]) {
  const Quad low01 = PCK_SHUFFLE(m[0], m[1], 0, 4, 1, 5), high01 = PCK_SHUFFLE(m[0], m[1], 2, 6, 3, 7);
  const Quad low23 = PCK_SHUFFLE(m[2], m[3], 0, 4, 1, 5), high23 = PCK_SHUFFLE(m[2], m[3], 2, 6, 3, 7);
  m[0] = PCK_SHUFFLE(low01, low23, 0, 1, 4, 5);
  m[1] = PCK_SHUFFLE(low01, low23, 2, 3, 6, 7);
  m[2] = PCK_SHUFFLE(high01, high23, 0, 1, 4, 5);
  m[3] = PCK_SHUFFLE(high01, high23, 2, 3, 6, 7);
}

#undef PCK_SHUFFLE

// Calls quads(row, sample) for every aligned 4 x 4 block of rows [low, high) and `samples`, and single(row, sample) for what is left over.
template <class Quads, class Single>
void for_quads(int low, int high, int samples, Quads quads, Single single) {
  const int whole_rows = low + (high - low) / 4 * 4, whole_samples = samples / 4 * 4;
  for (int row = low; row < whole_rows; row += 4) {
    for (int sample = 0; sample < whole_samples; sample += 4) quads(row, sample);
  }
  for (int row = low; row < high; ++row) {
    for (int sample = row < whole_rows ? whole_samples : 0; sample < samples; ++sample) single(row, sample);
  }
}

// rows [low, high) of out from a row-major source with `width` elements a row; lanes without a sample are 0.
inline void load_rows(const float* source, std::ptrdiff_t width, float* out, int low, int high, int samples, int lanes) {
  for_quads(
      low, high, samples,
      [=](int row, int sample) {
        Quad m[4];
        for (int k = 0; k < 4; ++k) m[k] = load<Quad>(source + (sample + k) * width + row);
        transpose(m);
        for (int k = 0; k < 4; ++k) store(out + std::ptrdiff_t{row + k} * lanes + sample, m[k]);
      },
      [=](int row, int sample) { out[std::ptrdiff_t{row} * lanes + sample] = source[sample * width + row]; });
  for (int row = low; row < high; ++row) {
    for (int lane = samples; lane < lanes; ++lane) out[std::ptrdiff_t{row} * lanes + lane] = 0.0f;
  }
}

// rows [low, high) of a + b, either of which may be null, to a row-major target.
inline void store_rows(const float* a, const float* b, float* target, std::ptrdiff_t width, int low, int high, int samples, int lanes) {
  const auto sum = [=](auto zero, std::ptrdiff_t place) {
    using Value = decltype(zero);
    return (a ? load<Value>(a + place) : zero) + (b ? load<Value>(b + place) : zero);
  };
  for_quads(
      low, high, samples,
      [=](int row, int sample) {
        Quad m[4];
        for (int k = 0; k < 4; ++k) m[k] = sum(Quad{}, std::ptrdiff_t{row + k} * lanes + sample);
        transpose(m);
        for (int k = 0; k < 4; ++k) store(target + (sample + k) * width + row, m[k]);
      },
      [=](int row, int sample) { target[sample * width + row] = sum(0.0f, std::ptrdiff_t{row} * lanes + sample); });
}

}  // namespace pckernels::PCK_ISA
