// Products with a weight matrix.
//
// With 16 lanes an output row is a vector of samples. A block of kRows output rows times kVectors vectors stays in registers while k runs;
// every weight is broadcast. The vectors of a block are neighbours among the columns: the vectors of all positions and lane groups. The
// weights of kRows output rows, [k][kRows], are a panel. A slice of kDepth inputs of one block's columns stays in the first-level cache
// while the panels of kPanels blocks of rows, which stay in the second-level cache, pass by.
//
// With one lane the weights are the vectors: dots along the rows of the weight, and for the transpose sums of its rows. The weight
// is read as it is, in the order of memory, so packing would not gain anything and has no panels.
#pragma once

#include "products.h"
#include "simd.h"

namespace pckernels::PCK_ISA {

#if defined(PCK_SIMD_AVX512)
constexpr int kRegisters = 32;
constexpr int kRows = 12, kVectors = 2;
#elif defined(PCK_SIMD_NEON)
constexpr int kRegisters = 32;
constexpr int kRows = 6, kVectors = 4;
#elif defined(PCK_PORTABLE_ROWS)
constexpr int kRegisters = 16;
constexpr int kRows = PCK_PORTABLE_ROWS, kVectors = PCK_PORTABLE_VECTORS;
#else
constexpr int kRegisters = 16;
constexpr int kRows = 6, kVectors = 2;
#endif
constexpr int kDepth = kVectors * kWidth > kLanes ? 192 : 384;
constexpr int kPanels = 192 * 1024 / (4 * kRows * kDepth);

template <class T>
constexpr T smaller(T a, T b) {
  return a < b ? a : b;
}

template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

struct Range {
  int begin, end;
};

// The share's part of 0 .. count.
inline Range part_of(long count, Share share) {
  return {static_cast<int>(count * share.rank / share.size), static_cast<int>(count * (share.rank + 1) / share.size)};
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with the constant n, 1 <= n <= MAX.
template <int MAX, class F>
inline void with_constant(int n, F&& f) {
  if constexpr (MAX == 1) {
    f(Constant<1>{});
  } else {
    if (n == MAX)
      f(Constant<MAX>{});
    else
      with_constant<MAX - 1>(n, f);
  }
}

// The weights of one block of output rows, in the three layouts that kernels read: weight (r, k) is data[r * row() + k * step()].
struct PanelRows {
  const float* data;
  static constexpr std::ptrdiff_t row() { return 1; }
  static constexpr std::ptrdiff_t step() { return kRows; }
};

struct RowMajorRows {
  const float* data;
  std::ptrdiff_t stride;
  std::ptrdiff_t row() const { return stride; }
  static constexpr std::ptrdiff_t step() { return 1; }
};

struct ColumnMajorRows {
  const float* data;
  std::ptrdiff_t stride;
  static constexpr std::ptrdiff_t row() { return 1; }
  std::ptrdiff_t step() const { return stride; }
};

// sums[r][v] += sum over k < depth of weight[r * row + k * weight_step] * in[v][k * in_step ..], the loop of all products.
template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void accumulate_block(
    vec (&sums)[ROWS][VECTORS], const float* weight, std::ptrdiff_t row, std::ptrdiff_t weight_step, const float* const* in,
    std::ptrdiff_t in_step, std::ptrdiff_t depth) {
  for (std::ptrdiff_t k = 0; k < depth; ++k) {
    vec x[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) x[v] = load(in[v] + k * in_step);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vec w = splat(weight[r * row + k * weight_step]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
}

// How a block of outputs begins: with what is there, with the bias, with both, or with zeros.
struct Start {
  bool with_output;
  const float* bias;  // of the first row of the block, or null
};

template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void start_block(vec (&sums)[ROWS][VECTORS], Start start, float* const* out, std::ptrdiff_t out_row) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    const vec bias = start.bias ? splat(start.bias[r]) : vec{};
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) sums[r][v] = start.with_output ? load(out[v] + r * out_row) + bias : bias;
  }
}

template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void store_block(const vec (&sums)[ROWS][VECTORS], float* const* out, std::ptrdiff_t out_row) {
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) store(out[v] + r * out_row, sums[r][v]);
}

// The vectors of the columns of one block.
struct Columns {
  const float* in[kVectors];
  float* out[kVectors];
};

// The outputs from row `first` on: start + sum over k < depth of weights(r, k) in[k].
template <int ROWS, int VECTORS, class Rows>
inline void multiply_block(Rows rows, Start start, const Columns& columns, int first, int depth) {
  const float* in[VECTORS];
  float* out[VECTORS];
  for (int v = 0; v < VECTORS; ++v) {
    in[v] = columns.in[v];
    out[v] = columns.out[v] + static_cast<std::ptrdiff_t>(first) * kLanes;
  }
  vec sums[ROWS][VECTORS];
  start_block(sums, start, out, kLanes);
  accumulate_block(sums, rows.data, rows.row(), rows.step(), in, kLanes, depth);
  store_block(sums, out, kLanes);
}

// One product with 16 lanes: out (positions, outputs) = start + in (positions, inputs) times the weights.
struct LaneProduct {
  int outputs, inputs;
  const float* bias;
  const float* in;
  float* out;
  int positions;
  bool accumulate;
  Groups groups;

  int vectors() const { return positions * groups.count * kVectorsPerGroup; }

  // The columns from vector number `first`, at most kVectors of them, from input k on. Returns their number.
  int columns(int first, int k, Columns& result) const {
    const int count = smaller(kVectors, vectors() - first);
    for (int v = 0; v < count; ++v) {
      const int part = (first + v) % kVectorsPerGroup, place = (first + v) / kVectorsPerGroup;
      const std::ptrdiff_t position = place % positions, offset = place / positions * groups.stride + part * kWidth;
      result.in[v] = in + offset + (position * inputs + k) * kLanes;
      result.out[v] = out + offset + position * outputs * kLanes;
    }
    return count;
  }
};

// The panels first <= p < last times the columns from vector number `vector`, for inputs k .. k + depth. rows_of(p, k) gives the weights.
template <class RowsOf>
inline void multiply_panels(const LaneProduct& product, RowsOf rows_of, Range panels, int vector, int k, int depth) {
  Columns columns;
  with_constant<kVectors>(product.columns(vector, k, columns), [&](auto vectors) {
    for (int p = panels.begin; p < panels.end; ++p) {
      const int r = p * kRows;
      const Start start{product.accumulate || k > 0, product.bias && k == 0 ? product.bias + r : nullptr};
      with_constant<kRows>(smaller(kRows, product.outputs - r), [&](auto rows) {
        multiply_block<rows.value, vectors.value>(rows_of(p, k), start, columns, r, depth);
      });
    }
  });
}

// Blocks are numbered panel by panel, and a share takes consecutive ones: whole panels except for the first and the last.
template <class RowsOf>
inline void multiply(const LaneProduct& product, RowsOf rows_of, Share share) {
  const int panels = divide_up(product.outputs, kRows), column_blocks = divide_up(product.vectors(), kVectors);
  const Range blocks = part_of(static_cast<long>(panels) * column_blocks, share);
  if (blocks.begin == blocks.end) return;
  const int slices = larger(1, divide_up(product.inputs, kDepth));
  for (int s = 0; s < slices; ++s) {
    const Range slice = part_of(product.inputs, {s, slices});
    for (int p = blocks.begin / column_blocks; p * column_blocks < blocks.end; p += kPanels)
      for (int c = 0; c < column_blocks; ++c) {
        const int begin = divide_up(larger(0, blocks.begin - c), column_blocks), end = divide_up(larger(0, blocks.end - c), column_blocks);
        multiply_panels(
            product, rows_of, {larger(begin, p), smaller(end, p + kPanels)}, c * kVectors, slice.begin, slice.end - slice.begin);
      }
  }
}

template <>
inline std::size_t packed_floats<16>(int outputs, int inputs) {
  const std::size_t forward = static_cast<std::size_t>(divide_up(outputs, kRows)) * kRows * inputs;
  const std::size_t backward = static_cast<std::size_t>(divide_up(inputs, kRows)) * kRows * outputs;
  return larger(forward, backward);
}

// Panels are [p][k][kRows]; rows beyond the last are left unwritten, and kernels do not read them.
template <>
inline void pack_forward<16>(const float* w, int outputs, int inputs, float* panels, Share share) {
  const Range range = part_of(divide_up(outputs, kRows), share);
  for (int p = range.begin; p < range.end; ++p) {
    const int rows = smaller(kRows, outputs - p * kRows);
    const float* source = w + static_cast<std::ptrdiff_t>(p) * kRows * inputs;
    float* target = panels + static_cast<std::ptrdiff_t>(p) * kRows * inputs;
    with_constant<kRows>(rows, [&](auto count) {
      for (int k = 0; k < inputs; ++k)
        for (int r = 0; r < count.value; ++r) target[k * kRows + r] = source[static_cast<std::ptrdiff_t>(r) * inputs + k];
    });
  }
}

template <>
inline void pack_backward<16>(const float* w, int outputs, int inputs, float* panels, Share share) {
  const Range range = part_of(divide_up(inputs, kRows), share);
  for (int p = range.begin; p < range.end; ++p) {
    const int rows = smaller(kRows, inputs - p * kRows);
    float* target = panels + static_cast<std::ptrdiff_t>(p) * kRows * outputs;
    with_constant<kRows>(rows, [&](auto count) {
      for (int n = 0; n < outputs; ++n)
        std::memcpy(target + n * kRows, w + static_cast<std::ptrdiff_t>(n) * inputs + p * kRows, 4 * count.value);
    });
  }
}

template <>
inline void linear<16>(
    const Weight& w, const float* bias, const float* x, float* out, int positions, bool accumulate, Groups groups, Share share) {
  const LaneProduct product{w.outputs, w.inputs, bias, x, out, positions, accumulate, groups};
  const std::ptrdiff_t inputs = w.inputs;
  if (w.forward)
    multiply(product, [&](int p, int k) { return PanelRows{w.forward + (p * inputs + k) * kRows}; }, share);
  else
    multiply(product, [&](int p, int k) { return RowMajorRows{w.data + p * kRows * inputs + k, inputs}; }, share);
}

template <>
inline void linear_t<16>(const Weight& w, const float* g, float* out, int positions, bool accumulate, Groups groups, Share share) {
  const LaneProduct product{w.inputs, w.outputs, nullptr, g, out, positions, accumulate, groups};
  const std::ptrdiff_t inputs = w.inputs, outputs = w.outputs;
  if (w.backward)
    multiply(product, [&](int p, int n) { return PanelRows{w.backward + (p * outputs + n) * kRows}; }, share);
  else
    multiply(product, [&](int p, int n) { return ColumnMajorRows{w.data + n * inputs + p * kRows, inputs}; }, share);
}

template <>
inline std::size_t packed_floats<1>(int, int) {
  return 0;
}

template <>
inline void pack_forward<1>(const float*, int, int, float*, Share) {}

template <>
inline void pack_backward<1>(const float*, int, int, float*, Share) {}

constexpr int kDotRows = 8;       // of the weight, for one position
constexpr int kDotPositions = 3;  // at most, with fewer rows so that all sums stay in registers
constexpr int kDotRowsOfPositions = kRegisters == 32 ? 8 : 4;
constexpr int kDotStep = 16;  // rows that should still be in cache for the next positions
constexpr int kAxpyRows = 8;
constexpr int kShareFloats = 16;  // outputs are shared by cache lines

// The parts of positions and of outputs that a share takes: positions where there are enough of them.
struct PlainShare {
  Range positions, outputs;

  PlainShare(int position_count, int output_count, Share share) : positions{0, position_count}, outputs{0, output_count} {
    if (position_count >= 4 * share.size) {
      positions = part_of(position_count, share);
    } else {
      const Range lines = part_of(divide_up(output_count, kShareFloats), share);
      outputs = {lines.begin * kShareFloats, smaller(lines.end * kShareFloats, output_count)};
    }
  }
};

// One product with one lane and one group.
struct PlainProduct {
  const float* w;
  std::ptrdiff_t outputs, inputs;  // of the weight
  const float* bias;
  const float* in;
  float* out;
  bool accumulate;
};

// Rows from n on times positions from p on. Every sum runs over k in the same order whatever the block.
template <int ROWS, int POSITIONS>
inline void dot_block(const PlainProduct& product, int n, int p) {
  const std::ptrdiff_t inputs = product.inputs;
  const float* w = product.w + n * inputs;
  const float* x = product.in + p * inputs;
  vec sums[ROWS][POSITIONS] = {};
  const auto add = [&](auto get) {
    vec in[POSITIONS];
#pragma GCC unroll 4
    for (int j = 0; j < POSITIONS; ++j) in[j] = get(x + j * inputs);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const vec weight = get(w + r * inputs);
#pragma GCC unroll 4
      for (int j = 0; j < POSITIONS; ++j) sums[r][j] = fma(weight, in[j], sums[r][j]);
    }
  };
  std::ptrdiff_t k = 0;
  for (; k + kWidth <= inputs; k += kWidth) add([k](const float* from) { return load(from + k); });
  const int rest = static_cast<int>(inputs - k);
  if (rest > 0) add([k, rest](const float* from) { return load_first(from + k, rest); });
  float* out = product.out + p * product.outputs + n;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < POSITIONS; ++j) {
      float& target = out[j * product.outputs + r];
      const float start = (product.accumulate ? target : 0.0f) + (product.bias ? product.bias[n + r] : 0.0f);
      target = start + sum(sums[r][j]);
    }
}

template <int ROWS, int POSITIONS>
inline void dot_rows(const PlainProduct& product, Range rows, int p) {
  int n = rows.begin;
  for (; n + ROWS <= rows.end; n += ROWS) dot_block<ROWS, POSITIONS>(product, n, p);
  if constexpr (ROWS > 1) dot_rows<ROWS / 2, POSITIONS>(product, {n, rows.end}, p);
}

inline void dots(const PlainProduct& product, const PlainShare& share) {
  for (int n = share.outputs.begin; n < share.outputs.end; n += kDotStep) {
    const Range rows{n, smaller(n + kDotStep, share.outputs.end)};
    for (int p = share.positions.begin; p < share.positions.end;) {
      const int count = smaller(kDotPositions, share.positions.end - p);
      with_constant<kDotPositions>(count, [&](auto positions) {
        dot_rows<positions.value == 1 ? kDotRows : kDotRowsOfPositions, positions.value>(product, rows, p);
      });
      p += count;
    }
  }
}

template <>
inline void linear<1>(
    const Weight& w, const float* bias, const float* x, float* out, int positions, bool accumulate, Groups groups, Share share) {
  const PlainShare mine(positions, w.outputs, share);
  for (int g = 0; g < groups.count; ++g)
    dots({w.data, w.outputs, w.inputs, bias, x + g * groups.stride, out + g * groups.stride, accumulate}, mine);
}

// out[k] = [out[k] +] the sum of ROWS rows of the weight times g[row], for the columns k.
template <int ROWS>
inline void axpy_block(const float* w, std::ptrdiff_t inputs, const float* g, bool with_output, float* out, Range columns) {
  vec factors[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) factors[r] = splat(g[r]);
  std::ptrdiff_t k = columns.begin;
  for (; k + kWidth <= columns.end; k += kWidth) {
    vec sum = with_output ? load(out + k) : vec{};
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum = fma(factors[r], load(w + r * inputs + k), sum);
    store(out + k, sum);
  }
  const int rest = static_cast<int>(columns.end - k);
  if (rest <= 0) return;
  vec sum = with_output ? load_first(out + k, rest) : vec{};
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) sum = fma(factors[r], load_first(w + r * inputs + k, rest), sum);
  store_first(out + k, sum, rest);
}

// One position: the weight is read once, along its rows.
inline void axpy_position(const PlainProduct& product, int p, Range columns) {
  if (columns.begin >= columns.end) return;
  const float* g = product.in + p * product.outputs;
  float* out = product.out + p * product.inputs;
  if (product.outputs == 0 && !product.accumulate) std::memset(out + columns.begin, 0, 4 * (columns.end - columns.begin));
  for (int n = 0; n < product.outputs;) {
    const int rows = smaller<int>(kAxpyRows, product.outputs - n);
    with_constant<kAxpyRows>(rows, [&](auto count) {
      axpy_block<count.value>(product.w + n * product.inputs, product.inputs, g + n, product.accumulate || n > 0, out, columns);
    });
    n += rows;
  }
}

// Several positions from p on: their sums of a few columns stay in registers. Columns are whole vectors.
template <int POSITIONS>
inline void axpy_positions(const PlainProduct& product, int p, Range columns) {
  for (int k = columns.begin; k < columns.end; k += kVectors * kWidth) {
    const float* in[kVectors];
    float* out[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      in[v] = product.w + k + v * kWidth;
      out[v] = product.out + p * product.inputs + k + v * kWidth;
    }
    vec sums[POSITIONS][kVectors];
    start_block(sums, {product.accumulate, nullptr}, out, product.inputs);
    accumulate_block(sums, product.in + p * product.outputs, product.outputs, 1, in, product.inputs, product.outputs);
    store_block(sums, out, product.inputs);
  }
}

inline void axpys(const PlainProduct& product, const PlainShare& share) {
  const Range columns = share.outputs, positions = share.positions;
  const bool one = positions.end - positions.begin == 1;
  const int whole = one ? 0 : (columns.end - columns.begin) / (kVectors * kWidth) * (kVectors * kWidth);
  const Range blocks{columns.begin, columns.begin + whole}, rest{columns.begin + whole, columns.end};
  for (int p = positions.begin; whole > 0 && p < positions.end;) {
    const int count = smaller(kRows, positions.end - p);
    with_constant<kRows>(count, [&](auto n) { axpy_positions<n.value>(product, p, blocks); });
    p += count;
  }
  for (int p = positions.begin; p < positions.end; ++p) axpy_position(product, p, rest);
}

template <>
inline void linear_t<1>(const Weight& w, const float* g, float* out, int positions, bool accumulate, Groups groups, Share share) {
  const PlainShare mine(positions, w.inputs, share);
  for (int i = 0; i < groups.count; ++i)
    axpys({w.data, w.outputs, w.inputs, nullptr, g + i * groups.stride, out + i * groups.stride, accumulate}, mine);
}

}  // namespace pckernels::PCK_ISA
