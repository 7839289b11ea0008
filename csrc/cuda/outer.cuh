// Weights' gradients after all tiles: sum over terms and rows of coefficient * g^T x. A block computes SIDE x SIDE of one gradient over its
// part of the rows (the parts are added up later, in their order), DEPTH rows at a time from shared memory.
#pragma once

#include "device.h"
#include "kernels.h"

namespace pckernels::cuda {

constexpr int DEPTH = 16;
constexpr int STRIDE = SIDE + 8;  // 8 banks from one row to the next: mma's reads of 4 rows by 8 columns do not meet

struct OuterTile {
  float g[DEPTH][STRIDE], x[DEPTH][STRIDE];
};

// Rows first .. first + DEPTH of one term: of g from column n, of x from column k. Zero outside.
__device__ inline void load_rows(const OuterArguments& arguments, const Term& term, const GradientSum& sum, std::int64_t first,
                                 std::int64_t end, int n, int k, OuterTile& tile) {
  const float *g = arguments.io[term.g_slot], *x = arguments.io[term.x_slot] + term.x_offset;
  for (int item = threadIdx.x; item < DEPTH * SIDE; item += THREADS) {
    const int row = item / SIDE, column = item % SIDE;
    const std::int64_t at = first + row;
    const bool inside = at < end;
    tile.g[row][column] = inside && n + column < sum.outputs ? term.coefficient * g[at * sum.outputs + n + column] : 0.0f;
    const std::int64_t start = at / term.positions * term.x_stride + at % term.positions * sum.inputs;
    tile.x[row][column] = inside && k + column < sum.inputs ? x[start + k + column] : 0.0f;
  }
}

// Product: its members `multiply(tile)` and `write(body)`, which calls body(row, column, value).
template <class Product>
__device__ void compute_outer(const OuterArguments& arguments, OuterTile& tile, Product product) {
  int found = 0;
  const GradientSum* sums = arguments.tables.sums;
  while (found + 1 < arguments.tables.sum_count && static_cast<int>(blockIdx.x) >= sums[found + 1].first_tile) ++found;
  const GradientSum& sum = sums[found];
  const int index = blockIdx.x - sum.first_tile, n = index / sum.tiles_across * SIDE, k = index % sum.tiles_across * SIDE;
  const bool sums_errors = sum.bias_at != ABSENT && k == 0 && threadIdx.x < SIDE;
  float error_sum = 0.0f;
  for (int t = sum.first_term; t < sum.first_term + sum.terms; ++t) {
    const Term& term = arguments.tables.terms[t];
    const std::int64_t rows = std::int64_t{arguments.batch} * term.positions;
    const std::int64_t end = rows * (blockIdx.y + 1) / arguments.splits;
    for (std::int64_t first = rows * blockIdx.y / arguments.splits; first < end; first += DEPTH) {
      load_rows(arguments, term, sum, first, end, n, k, tile);
      __syncthreads();
      product.multiply(tile);
      for (int row = 0; sums_errors && row < DEPTH; ++row) error_sum += tile.g[row][threadIdx.x];
      __syncthreads();
    }
  }
  float* partial = arguments.partial + std::ptrdiff_t{static_cast<int>(blockIdx.y)} * arguments.size;
  product.write([&](int row, int column, float value) {
    if (n + row < sum.outputs && k + column < sum.inputs) {
      partial[sum.weight_at + std::ptrdiff_t{n + row} * sum.inputs + k + column] = value;
    }
  });
  if (sums_errors && n + static_cast<int>(threadIdx.x) < sum.outputs) partial[sum.bias_at + n + threadIdx.x] = error_sum;
}

}  // namespace pckernels::cuda
