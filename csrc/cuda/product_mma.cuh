// Products on tensor cores: the operands rounded to tf32, bf16 or fp16, the sums in fp32. As product_simt.cuh otherwise.
//
// A warp computes 16 columns of M for all lanes. The weight comes packed as the A operand, 16 bytes a thread for each tile; v is B, read
// from the arena and rounded on the way. Which rows of a tile a thread holds is free as long as A and B agree (row_in_tile): with 8 lanes
// no two threads meet in a bank.
#pragma once

#include "device.h"
#include "tables.h"

namespace pckernels::cuda {

// Row of M, inside its tile of 8 or 16 rows, behind number `part` (0 .. 1 or 0 .. 3) of the numbers that thread `member` (0 .. 3) holds of
// a column.
__host__ __device__ constexpr int row_in_tile(int member, int part) { return member + 4 * part; }

struct Tf32 {
  static constexpr int ROWS = 8, PARTS = 2;
  static __device__ __forceinline__ uint2 pack(const float (&x)[PARTS]) { return make_uint2(to_tf32(x[0]), to_tf32(x[1])); }
  static __device__ __forceinline__ void multiply(float (&c)[4], uint4 a, uint2 b) { mma_tf32(c, a, b); }
};
struct Bf16 {
  static constexpr int ROWS = 16, PARTS = 4;
  static __device__ __forceinline__ uint2 pack(const float (&x)[PARTS]) { return make_uint2(to_bf16x2(x[0], x[1]), to_bf16x2(x[2], x[3])); }
  static __device__ __forceinline__ void multiply(float (&c)[4], uint4 a, uint2 b) { mma_bf16(c, a, b); }
};
struct Fp16 {
  static constexpr int ROWS = 16, PARTS = 4;
  static __device__ __forceinline__ uint2 pack(const float (&x)[PARTS]) { return make_uint2(to_fp16x2(x[0], x[1]), to_fp16x2(x[2], x[3])); }
  static __device__ __forceinline__ void multiply(float (&c)[4], uint4 a, uint2 b) { mma_fp16(c, a, b); }
};

// Of sums, the columns first .. first + 15 of a product, which a warp holds as mma leaves them: out [+]= bias + sums.
template <int LANES>
__device__ __forceinline__ void write_columns(const float (&sums)[LANES / 8][4], const float* bias, float* out, int first, int width,
                                              bool accumulate) {
  const int lane = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = first + threadIdx.x % WARP / 4 + half * 8;
    if (place >= width) continue;
    const float start = bias ? bias[place] : 0.0f;
#pragma unroll
    for (int lanes = 0; lanes < LANES / 8; ++lanes) {
      float2* target = reinterpret_cast<float2*>(out + place * LANES + lanes * 8 + lane);
      const float2 before = accumulate ? *target : make_float2(0.0f, 0.0f);
      *target = make_float2(before.x + (sums[lanes][half * 2] + start), before.y + (sums[lanes][half * 2 + 1] + start));
    }
  }
}

template <int LANES, class Format>
struct MmaProduct {
  static constexpr int GROUPS = LANES / 8;  // of lanes: mma's columns

  static __device__ void run(const char* panel, const float* bias, const float* v, float* out, int positions, int depth, int width,
                             int step, bool accumulate) {
    const int blocks = (width + 15) / 16, tiles = (depth + Format::ROWS - 1) / Format::ROWS;
    const int warps = blockDim.x / WARP;
    for (int unit = threadIdx.x / WARP; unit < positions * blocks; unit += warps) {
      const int block = unit % blocks, position = unit / blocks;
      const uint4* weights = reinterpret_cast<const uint4*>(panel) + block * tiles * WARP + threadIdx.x % WARP;
      float sums[GROUPS][4] = {};
      multiply(weights, tiles, v + position * depth * LANES, depth, sums);
      write_columns<LANES>(sums, bias, out + position * step * LANES, block * 16, width, accumulate);
    }
  }

 private:
  static __device__ __forceinline__ void multiply(const uint4* weights, int tiles, const float* v, int depth, float (&sums)[GROUPS][4]) {
    const int member = threadIdx.x % 4, group = threadIdx.x % WARP / 4;
#pragma unroll 4
    for (int tile = 0; tile < tiles; ++tile) {
      const uint4 a = weights[tile * WARP];
#pragma unroll
      for (int lanes = 0; lanes < GROUPS; ++lanes) {
        float x[Format::PARTS];
#pragma unroll
        for (int part = 0; part < Format::PARTS; ++part) {
          const int row = tile * Format::ROWS + row_in_tile(member, part);
          x[part] = row < depth ? v[row * LANES + lanes * 8 + group] : 0.0f;  // beyond its end an array holds anything, NaN too
        }
        Format::multiply(sums[lanes], a, Format::pack(x));
      }
    }
  }
};

// The product of the precision that was asked for.
template <int LANES>
struct TensorProduct {
  static __device__ void run(Precision precision, const char* panel, const float* bias, const float* v, float* out, int positions,
                             int depth, int width, int step, bool accumulate) {
    switch (precision) {
      case Precision::TF32:
        return MmaProduct<LANES, Tf32>::run(panel, bias, v, out, positions, depth, width, step, accumulate);
      case Precision::BF16:
        return MmaProduct<LANES, Bf16>::run(panel, bias, v, out, positions, depth, width, step, accumulate);
      default:
        return MmaProduct<LANES, Fp16>::run(panel, bias, v, out, positions, depth, width, step, accumulate);
    }
  }
};

}  // namespace pckernels::cuda
