// Sums of outer products: the gradient of a weight matrix from rows of plain (row-major) matrices.
//
// Rows of all terms are taken in chunks. A chunk's columns are packed: g as [panel][row][kRows], times the coefficient, and x as
// [panel][row][kOuterColumns]; then every pair of panels is a block of sums in registers, which is added to the gradient.
#pragma once

#include "products_linear.h"

namespace pckernels::PCK_ISA {

constexpr int kOuterColumns = kVectors * kWidth;
constexpr int kOuterRows = 128;                          // rows of a chunk
constexpr int kOuterG = 48 * 1024, kOuterX = 32 * 1024;  // floats of packed g and x

// The rows of one chunk.
struct OuterChunk {
  const float* g[kOuterRows];
  const float* x[kOuterRows];
  float coefficient[kOuterRows];
  int rows;
};

// Walks over the rows of all terms.
struct OuterRows {
  const OuterTerm* terms;
  int count, term;
  long row;
  float factor;

  void fill(OuterChunk& chunk, int outputs, int inputs) {
    chunk.rows = 0;
    for (; term < count; ++term, row = 0) {
      const OuterTerm& t = terms[term];
      for (; row < t.rows; ++row) {
        if (chunk.rows == kOuterRows) return;
        chunk.g[chunk.rows] = t.g + row * outputs;
        chunk.x[chunk.rows] = t.x + row / t.positions * t.x_stride + row % t.positions * inputs;
        chunk.coefficient[chunk.rows++] = factor * t.coefficient;
      }
    }
  }
};

struct OuterScratch {
  alignas(64) float g[kOuterG + kOuterRows * kRows];
  alignas(64) float x[kOuterX + kOuterRows * kOuterColumns];
};

inline OuterScratch& outer_scratch() {
  static thread_local OuterScratch scratch;
  return scratch;
}

// Packed panels of g lie this far apart: rows and one vector, because packing writes whole vectors.
inline std::ptrdiff_t g_panel(int rows) { return static_cast<std::ptrdiff_t>(rows) * kRows + kWidth; }

// Row r of the chunk, columns range.begin .. range.end.
inline void pack_g_row(const OuterChunk& chunk, int r, Range range, int outputs, float* target) {
  constexpr int vectors = (kRows + kWidth - 1) / kWidth;
  const vec factor = splat(chunk.coefficient[r]);
  const float* from = chunk.g[r];
  int n = range.begin;
  // What a vector holds beyond kRows is overwritten by the next row.
  for (; n < range.end && n + vectors * kWidth <= outputs; n += kRows, target += g_panel(chunk.rows))
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(target + v * kWidth, load(from + n + v * kWidth) * factor);
  for (; n < range.end; n += kRows, target += g_panel(chunk.rows))
    for (int i = 0; i < smaller(kRows, range.end - n); ++i) target[i] = from[n + i] * chunk.coefficient[r];
}

inline void pack_g(const OuterChunk& chunk, Range range, int outputs, float* target) {
  for (int r = 0; r < chunk.rows; ++r) pack_g_row(chunk, r, range, outputs, target + r * kRows);
}

// x is read along its rows; columns beyond the last are zeros.
inline void pack_x(const OuterChunk& chunk, Range columns, float* target) {
  const std::ptrdiff_t panel = static_cast<std::ptrdiff_t>(chunk.rows) * kOuterColumns;
  for (int r = 0; r < chunk.rows; ++r) {
    float* to = target + r * kOuterColumns;
    int k = columns.begin;
    for (; k + kOuterColumns <= columns.end; k += kOuterColumns, to += panel)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(to + v * kWidth, load(chunk.x[r] + k + v * kWidth));
    for (int v = 0; k < columns.end && v < kVectors; ++v) {
      const int count = larger(0, smaller(kWidth, columns.end - k - v * kWidth));
      store(to + v * kWidth, load_first(chunk.x[r] + k + v * kWidth * (count > 0), count));
    }
  }
}

inline void sum_bias(const float* packed, int rows, Range range, bool first, float* bias) {
  for (int n = range.begin; n < range.end; n += kRows, packed += g_panel(rows)) {
    float sums[kRows] = {};
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < kRows; ++i) sums[i] += packed[r * kRows + i];
    for (int i = 0; i < smaller(kRows, range.end - n); ++i) bias[n + i] = first ? sums[i] : bias[n + i] + sums[i];
  }
}

// One block of the gradient, kRows x kOuterColumns or less.
template <int ROWS>
inline void outer_block(const float* g, const float* x, int depth, bool first, float* gradient, std::ptrdiff_t inputs, int columns) {
  const float* in[kVectors];
  for (int v = 0; v < kVectors; ++v) in[v] = x + v * kWidth;
  vec sums[ROWS][kVectors];
  alignas(64) float edge[ROWS * kOuterColumns];  // instead of the gradient where columns are missing
  const bool whole = columns >= kOuterColumns;
  if (!whole && !first) {
    std::memset(edge, 0, sizeof edge);
    for (int r = 0; r < ROWS; ++r) std::memcpy(edge + r * kOuterColumns, gradient + r * inputs, 4 * columns);
  }
  float* target = whole ? gradient : edge;
  const std::ptrdiff_t row = whole ? inputs : kOuterColumns;
  float* out[kVectors];
  for (int v = 0; v < kVectors; ++v) out[v] = target + v * kWidth;
  for (int r = 0; r < ROWS; ++r) __builtin_prefetch(target + r * row, 1);
  start_block(sums, {false, nullptr}, out, row);
  accumulate_block(sums, g, 1, kRows, in, kOuterColumns, depth);
  if (!first)
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += load(out[v] + r * row);
  store_block(sums, out, row);
  if (!whole)
    for (int r = 0; r < ROWS; ++r) std::memcpy(gradient + r * inputs, edge + r * kOuterColumns, 4 * columns);
}

inline void outer_blocks(
    const OuterScratch& packed, int depth, bool first, float* gradient, Range rows, Range columns, std::ptrdiff_t inputs) {
  const float* x = packed.x;
  for (int k = columns.begin; k < columns.end; k += kOuterColumns, x += static_cast<std::ptrdiff_t>(depth) * kOuterColumns) {
    const float* g = packed.g;
    for (int n = rows.begin; n < rows.end; n += kRows, g += g_panel(depth))
      with_constant<kRows>(smaller(kRows, rows.end - n), [&](auto count) {
        outer_block<count.value>(g, x, depth, first, gradient + n * inputs + k, inputs, columns.end - k);
      });
  }
}

inline void outer_products(
    const OuterTerm* terms, int count, float* gradient, float* bias, int outputs, int inputs, float factor, Share share) {
  const Range panels = part_of(divide_up(outputs, kRows), share);
  const Range mine{panels.begin * kRows, smaller(panels.end * kRows, outputs)};
  long total = 0;
  for (int i = 0; i < count; ++i) total += terms[i].rows;
  const int depth = static_cast<int>(larger(1L, smaller<long>(kOuterRows, total)));
  const int block_rows = larger(1, kOuterG / static_cast<int>(g_panel(depth))) * kRows;
  const int block_columns = divide_up(kOuterX / depth, kOuterColumns) * kOuterColumns;
  OuterScratch& packed = outer_scratch();
  OuterRows walk{terms, count, 0, 0, factor};
  OuterChunk chunk;
  long done = 0;
  do {  // also without any rows, to write zeros
    walk.fill(chunk, outputs, inputs);
    for (int n = mine.begin; n < mine.end; n += block_rows) {
      const Range rows{n, smaller(n + block_rows, mine.end)};
      pack_g(chunk, rows, outputs, packed.g);
      if (bias) sum_bias(packed.g, chunk.rows, rows, done == 0, bias);
      for (int k = 0; k < inputs; k += block_columns) {
        const Range columns{k, smaller(k + block_columns, inputs)};
        pack_x(chunk, columns, packed.x);
        outer_blocks(packed, chunk.rows, done == 0, gradient, rows, columns, inputs);
      }
    }
    done += chunk.rows;
  } while (done < total);
}

}  // namespace pckernels::PCK_ISA
