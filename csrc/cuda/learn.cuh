// Local updates inside the loop, summed over a tile's samples into the block's own array. A warp computes whole elements: one writer each,
// and a fixed order.
#pragma once

#include "conv.cuh"

namespace pckernels::cuda {

// gradient += factor * sum over samples and output pixels of g (x + dx). A warp's unit: 4 output channels, one input channel and place.
template <int LANES>
__device__ void conv_learn(const float* g, const float* x, const float* dx, float* gradient, float factor, const ConvShape& s,
                           int samples) {
  const int inputs = s.inputs(), outputs = s.outputs(), kernel = s.kernel_h * s.kernel_w, size = s.out_h * s.out_w;
  const int blocks = (outputs + BLOCK - 1) / BLOCK, warps = blockDim.x / WARP, thread = threadIdx.x % WARP;
#pragma unroll 1
  for (int unit = threadIdx.x / WARP; unit < s.groups * blocks * inputs * kernel; unit += warps) {
    const int place = unit % kernel, c = unit / kernel % inputs, block = unit / kernel / inputs;
    const int group = block / blocks, o = group * outputs + block % blocks * BLOCK;
    const int live = (group + 1) * outputs - o;
    const int image = (group * inputs + c) * s.height * s.width;
    float sums[BLOCK] = {};
#pragma unroll 1
    for (int item = thread; item < size * LANES; item += WARP) {
      const int lane = item % LANES, result = item / LANES;
      const int pixel = s.pixel(result / s.out_w, result % s.out_w, place / s.kernel_w, place % s.kernel_w);
      if (pixel < 0 || lane >= samples) continue;
      const int at = (image + pixel) * LANES + lane;
      const float value = x[at] + (dx ? dx[at] : 0.0f);
#pragma unroll
      for (int k = 0; k < BLOCK; ++k) sums[k] += k < live ? g[((o + k) * size + result) * LANES + lane] * value : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) {
      const float sum = warp_sum(sums[k]);
      if (thread == 0 && k < live) gradient[((o + k) * inputs + c) * kernel + place] += factor * sum;
    }
  }
}

// gradient (count,) += factor * sum of a (before, count, after) over samples, before and after.
template <int LANES>
__device__ void sum_learn(const float* a, float* gradient, float factor, int before, int count, int after, int samples) {
  const int warps = blockDim.x / WARP, thread = threadIdx.x % WARP;
#pragma unroll 1
  for (int k = threadIdx.x / WARP; k < count; k += warps) {
    float sum = 0.0f;
#pragma unroll 1
    for (int item = thread; item < before * after * LANES; item += WARP) {
      const int lane = item % LANES, place = item / LANES;
      const int row = (place / after * count + k) * after + place % after;
      if (lane < samples) sum += a[row * LANES + lane];
    }
    sum = warp_sum(sum);
    if (thread == 0) gradient[k] += factor * sum;
  }
}

}  // namespace pckernels::cuda
