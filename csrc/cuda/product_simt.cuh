// Products in fp32 arithmetic: out (positions, width) = [out +] v (positions, depth) M [+ bias], one row of the arena for each number; the
// positions of out are `step` rows apart.
//
// A warp computes 16 columns of M times up to 8 lanes. Four neighbouring threads share a row of M (64 bytes), the 8 groups of four take
// every 8th row each; what the groups found is then added up by halving, which leaves every thread with a part of the result.
#pragma once

#include "device.h"

namespace pckernels::cuda {

template <int COUNT>
struct Lanes {
  // COUNT consecutive lanes of one row.
  static __device__ __forceinline__ void read(const float* source, float (&lanes)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
      for (int k = 0; k < COUNT; k += 4) {
        const float4 part = *reinterpret_cast<const float4*>(source + k);
        lanes[k] = part.x, lanes[k + 1] = part.y, lanes[k + 2] = part.z, lanes[k + 3] = part.w;
      }
    } else {
#pragma unroll
      for (int k = 0; k < COUNT; ++k) lanes[k] = source[k];
    }
  }
};

// Of 2 HALF sums, which this thread and the one at `mask` both have a part of, each is left with HALF whole ones: the first, or the second.
template <int HALF>
__device__ __forceinline__ void halve(float* sums, int mask) {
  const bool upper = threadIdx.x & mask;
#pragma unroll
  for (int k = 0; k < HALF; ++k) {
    const float keep = upper ? sums[k + HALF] : sums[k], give = upper ? sums[k] : sums[k + HALF];
    sums[k] = keep + shuffle_xor(give, mask);
  }
}

template <int LANES>
struct SimtProduct {
  static constexpr int TAKEN = LANES < 8 ? LANES : 8, SLICES = LANES / TAKEN;  // lanes of a warp's unit; units over all lanes
  static constexpr int COLUMNS = 4, SPLITS = 8;
  static constexpr int LEFT = TAKEN > 1 ? TAKEN / 2 : 1;  // results of a thread

  static __device__ void run(const char* panel, const float* bias, const float* v, float* out, int positions, int depth, int width,
                             int step, bool accumulate) {
    const int stride = (width + 3) / 4, blocks = (stride + COLUMNS - 1) / COLUMNS;
    const int warps = blockDim.x / WARP;
    for (int unit = threadIdx.x / WARP; unit < positions * SLICES * blocks; unit += warps) {
      const int slice = unit / blocks % SLICES, position = unit / blocks / SLICES;
      const int column = unit % blocks * COLUMNS + threadIdx.x % COLUMNS;
      float sums[4 * TAKEN] = {};
      const float* from = v + position * depth * LANES + slice * TAKEN;
      if (column < stride) multiply(reinterpret_cast<const float4*>(panel) + column, stride, from, depth, sums);
      halve<2 * TAKEN>(sums, 16);
      halve<TAKEN>(sums, 8);
      if constexpr (TAKEN > 1) {
        halve<TAKEN / 2>(sums, 4);
      } else {
        sums[0] += shuffle_xor(sums[0], 4);
      }
      write(sums, bias, out + position * step * LANES + slice * TAKEN, column, width, accumulate);
    }
  }

 private:
  static __device__ __forceinline__ void multiply(const float4* m, int stride, const float* v, int depth, float (&sums)[4 * TAKEN]) {
#pragma unroll 4
    for (int row = threadIdx.x % WARP / COLUMNS; row < depth; row += SPLITS) {
      const float4 weights = m[row * stride];
      float lanes[TAKEN];
      Lanes<TAKEN>::read(v + row * LANES, lanes);
#pragma unroll
      for (int k = 0; k < TAKEN; ++k) {
        sums[k] += weights.x * lanes[k];
        sums[TAKEN + k] += weights.y * lanes[k];
        sums[2 * TAKEN + k] += weights.z * lanes[k];
        sums[3 * TAKEN + k] += weights.w * lanes[k];
      }
    }
  }

  // The halvings left column bit 1 to thread bit 4, column bit 0 to bit 3, and the upper half of the lanes to bit 2.
  static __device__ __forceinline__ void write(const float* sums, const float* bias, float* out, int column, int width, bool accumulate) {
    const int place = column * 4 + (threadIdx.x >> 4 & 1) * 2 + (threadIdx.x >> 3 & 1), part = threadIdx.x >> 2 & 1;
    if (place >= width || (TAKEN == 1 && part == 1)) return;
    float* target = out + place * LANES + part * LEFT;
    const float start = bias ? bias[place] : 0.0f;
#pragma unroll
    for (int k = 0; k < LEFT; ++k) target[k] = (accumulate ? target[k] : 0.0f) + (sums[k] + start);
  }
};

}  // namespace pckernels::cuda
