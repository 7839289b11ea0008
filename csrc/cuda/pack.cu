// Weights in the order in which products read them: see Panel in tables.h. A thread writes 16 bytes.
#include "device.h"
#include "kernels.h"
#include "product_mma.cuh"

namespace pckernels::cuda {
namespace {

struct Matrix {
  const float* weight;
  int depth, width, first_column, all_columns;
  bool transposed;

  // Zero outside.
  __device__ float operator()(int row, int column) const {
    if (row >= depth || column >= width) return 0.0f;
    column += first_column;
    return transposed ? weight[std::ptrdiff_t{column} * depth + row] : weight[std::ptrdiff_t{row} * all_columns + column];
  }
};

__device__ uint4 four_columns(const Matrix& m, int unit) {
  const int stride = (m.width + 3) / 4, row = unit / stride, column = unit % stride * 4;
  float values[4];
  for (int k = 0; k < 4; ++k) values[k] = m(row, column + k);
  uint4 result;
  memcpy(&result, values, sizeof result);
  return result;
}

// The tile that a unit of 16 bytes belongs to, and the thread that will hold it.
struct TilePlace {
  int row, column, member;

  __device__ TilePlace(int unit, int depth, int rows) {
    const int tiles = (depth + rows - 1) / rows, thread = unit % WARP, tile = unit / WARP;
    row = tile % tiles * rows;
    column = tile / tiles * 16 + thread / 4;
    member = thread % 4;
  }
};

__device__ uint4 tile_8(const Matrix& m, int unit) {
  const TilePlace at(unit, m.depth, 8);
  const auto value = [&](int part, int column) { return to_tf32(m(at.row + row_in_tile(at.member, part), at.column + column)); };
  return make_uint4(value(0, 0), value(0, 8), value(1, 0), value(1, 8));
}

__device__ uint4 tile_16(const Matrix& m, int unit, Precision precision) {
  const TilePlace at(unit, m.depth, 16);
  const auto pair = [&](int part, int column) {
    const float low = m(at.row + row_in_tile(at.member, part), at.column + column);
    const float high = m(at.row + row_in_tile(at.member, part + 1), at.column + column);
    return precision == Precision::BF16 ? to_bf16x2(low, high) : to_fp16x2(low, high);
  };
  return make_uint4(pair(0, 0), pair(0, 8), pair(2, 0), pair(2, 8));
}

}  // namespace

__global__ void __launch_bounds__(THREADS) pack_weights(const PackArguments arguments) {
  const int unit = blockIdx.x * THREADS + threadIdx.x;
  if (unit >= arguments.units) return;
  const Packing kind = arguments.packing;
  int found = 0;
  while (found + 1 < arguments.tables.panel_count && unit >= arguments.tables.panels[found + 1].start[static_cast<int>(kind)]) ++found;
  const Panel& panel = arguments.tables.panels[found];
  const Matrix m{arguments.weights[panel.slot], panel.depth, panel.width, panel.first_column, panel.all_columns, panel.transposed != 0};
  const int inside = unit - panel.start[static_cast<int>(kind)];
  uint4* target = reinterpret_cast<uint4*>(arguments.packed) + unit;
  if (kind == Packing::ROWS) {
    *target = four_columns(m, inside);
  } else if (kind == Packing::TILES_8) {
    *target = tile_8(m, inside);
  } else {
    *target = tile_16(m, inside, arguments.precision);
  }
}

void (*const pack_kernel)(PackArguments) = &pack_weights;

}  // namespace pckernels::cuda
