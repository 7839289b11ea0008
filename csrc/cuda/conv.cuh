// Convolutions in fp32 arithmetic. A thread computes 4 channels times 4 pixels of a row for one lane, so that neither a weight nor a pixel
// is read for a single multiplication; threads of a warp differ in the lane first, so that they share weights.
#pragma once

#include "geometry.cuh"

namespace pckernels::cuda {

constexpr int BLOCK = 4;  // channels, and pixels, of a thread

// Where a thread's unit stands: 4 channels of a group, from `channel` (`live` of them exist), 4 pixels of row h from w on.
struct ConvUnit {
  int lane, group, channel, live, h, w;

  // `per_group` channels in each of the groups, of images (height, width).
  __device__ ConvUnit(int unit, int lanes, int per_group, int height, int width) {
    const int across = (width + BLOCK - 1) / BLOCK, blocks = (per_group + BLOCK - 1) / BLOCK;
    lane = unit % lanes, unit /= lanes;
    w = unit % across * BLOCK, unit /= across;
    h = unit % height, unit /= height;
    group = unit / blocks;
    channel = unit % blocks * BLOCK;
    live = per_group - channel < BLOCK ? per_group - channel : BLOCK;
    channel += group * per_group;
  }
  static __device__ int count(int lanes, int groups, int per_group, int height, int width) {
    return lanes * ((width + BLOCK - 1) / BLOCK) * height * ((per_group + BLOCK - 1) / BLOCK) * groups;
  }
};

// Calls body(kh, kw, place) for every place of the kernel.
template <class Body>
__device__ __forceinline__ void for_kernel(const ConvShape& s, Body body) {
#pragma unroll 1
  for (int kh = 0; kh < s.kernel_h; ++kh) {
#pragma unroll 1
    for (int kw = 0; kw < s.kernel_w; ++kw) body(kh, kw, kh * s.kernel_w + kw);
  }
}

// sums[channel][pixel] += weight of the channel times x of the pixel. weights are `step` apart.
__device__ __forceinline__ void multiply_block(const float* weights, int step, int live, const float (&x)[BLOCK],
                                               float (&sums)[BLOCK][BLOCK]) {
#pragma unroll
  for (int channel = 0; channel < BLOCK; ++channel) {
    const float weight = channel < live ? weights[channel * step] : 0.0f;
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) sums[channel][k] += weight * x[k];
  }
}

// out: the row of the unit's first channel and pixel. size: pixels of an image.
template <int LANES>
__device__ __forceinline__ void write_block(const float (&sums)[BLOCK][BLOCK], const float* bias, float* out, int size, int live,
                                            int pixels, bool accumulate) {
#pragma unroll
  for (int channel = 0; channel < BLOCK; ++channel) {
    const float start = bias && channel < live ? bias[channel] : 0.0f;
#pragma unroll
    for (int k = 0; k < BLOCK; ++k) {
      if (channel >= live || k >= pixels) continue;
      float& target = out[(channel * size + k) * LANES];
      target = (accumulate ? target : 0.0f) + (sums[channel][k] + start);
    }
  }
}

template <int LANES>
__device__ void conv(const float* weights, const float* bias, const float* x, float* out, const ConvShape& s, bool accumulate) {
  const int inputs = s.inputs(), outputs = s.outputs(), kernel = s.kernel_h * s.kernel_w;
  const int count = ConvUnit::count(LANES, s.groups, outputs, s.out_h, s.out_w);
#pragma unroll 1
  for (int index = threadIdx.x; index < count; index += blockDim.x) {
    const ConvUnit unit(index, LANES, outputs, s.out_h, s.out_w);
    float sums[BLOCK][BLOCK] = {};
#pragma unroll 1
    for (int c = 0; c < inputs; ++c) {
      const float* image = x + (unit.group * inputs + c) * s.height * s.width * LANES + unit.lane;
      const float* of_channel = weights + (unit.channel * inputs + c) * kernel;
      for_kernel(s, [&](int kh, int kw, int place) {
        float pixels[BLOCK];
#pragma unroll
        for (int k = 0; k < BLOCK; ++k) {
          const int pixel = s.pixel(unit.h, unit.w + k, kh, kw);
          pixels[k] = pixel >= 0 ? image[pixel * LANES] : 0.0f;
        }
        multiply_block(of_channel + place, inputs * kernel, unit.live, pixels, sums);
      });
    }
    float* target = out + ((unit.channel * s.out_h + unit.h) * s.out_w + unit.w) * LANES + unit.lane;
    write_block<LANES>(sums, bias ? bias + unit.channel : nullptr, target, s.out_h * s.out_w, unit.live, s.out_w - unit.w, accumulate);
  }
}

// The transpose gathers: each pixel of the input asks which outputs read it.
template <int LANES>
__device__ void conv_t(const float* weights, const float* g, float* out, const ConvShape& s, bool accumulate) {
  const int inputs = s.inputs(), outputs = s.outputs(), kernel = s.kernel_h * s.kernel_w, size = s.out_h * s.out_w;
  const int count = ConvUnit::count(LANES, s.groups, inputs, s.height, s.width);
#pragma unroll 1
  for (int index = threadIdx.x; index < count; index += blockDim.x) {
    const ConvUnit unit(index, LANES, inputs, s.height, s.width);
    float sums[BLOCK][BLOCK] = {};
    for_kernel(s, [&](int kh, int kw, int place) {
      int readers[BLOCK];
#pragma unroll
      for (int k = 0; k < BLOCK; ++k) readers[k] = unit.w + k < s.width ? s.reader(unit.h, unit.w + k, kh, kw) : -1;
#pragma unroll 1
      for (int o = unit.group * outputs; o < (unit.group + 1) * outputs; ++o) {
        float errors[BLOCK];
#pragma unroll
        for (int k = 0; k < BLOCK; ++k) errors[k] = readers[k] >= 0 ? g[(o * size + readers[k]) * LANES + unit.lane] : 0.0f;
        multiply_block(weights + (o * inputs + unit.channel - unit.group * inputs) * kernel + place, kernel, unit.live, errors, sums);
      }
    });
    float* target = out + ((unit.channel * s.height + unit.h) * s.width + unit.w) * LANES + unit.lane;
    write_block<LANES>(sums, nullptr, target, s.height * s.width, unit.live, s.width - unit.w, accumulate);
  }
}

}  // namespace pckernels::cuda
