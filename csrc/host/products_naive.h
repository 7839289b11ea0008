// The products of products.h as plain loops: what the SIMD kernels are compared with, and what the thread team runs under ThreadSanitizer.
#pragma once

#include "products.h"

namespace pckernels::PCK_ISA {

// Calls body(unit) for this share's part of count units.
template <class Body>
void for_share(int count, Share share, Body body) {
  const long low = static_cast<long>(count) * share.rank / share.size, high = static_cast<long>(count) * (share.rank + 1) / share.size;
  for (long unit = low; unit < high; ++unit) body(static_cast<int>(unit));
}

// out (positions, outputs) = [out +] x (positions, inputs) M^T [+ bias], where M[n][k] = w[n * n_step + k * k_step].
template <int LANES>
void naive_product(const float* w, std::ptrdiff_t n_step, std::ptrdiff_t k_step, int outputs, int inputs, const float* bias, const float* x,
                   float* out, int positions, bool accumulate, Groups groups, Share share) {
  for_share(outputs, share, [=](int n) {
    for (int unit = 0; unit < groups.count * positions; ++unit) {
      const std::ptrdiff_t start = unit / positions * groups.stride, position = unit % positions;
      for (int lane = 0; lane < LANES; ++lane) {
        float sum = bias ? bias[n] : 0.0f;
        for (int k = 0; k < inputs; ++k) sum += w[n * n_step + k * k_step] * x[start + (position * inputs + k) * LANES + lane];
        float& result = out[start + (position * outputs + n) * LANES + lane];
        result = accumulate ? result + sum : sum;
      }
    }
  });
}

template <int LANES>
std::size_t packed_floats(int, int) {
  return 0;
}

template <int LANES>
void pack_forward(const float*, int, int, float*, Share) {}

template <int LANES>
void pack_backward(const float*, int, int, float*, Share) {}

template <int LANES>
void linear(const Weight& w, const float* bias, const float* x, float* out, int positions, bool accumulate, Groups groups, Share share) {
  naive_product<LANES>(w.data, w.inputs, 1, w.outputs, w.inputs, bias, x, out, positions, accumulate, groups, share);
}

template <int LANES>
void linear_t(const Weight& w, const float* g, float* out, int positions, bool accumulate, Groups groups, Share share) {
  naive_product<LANES>(w.data, 1, w.inputs, w.inputs, w.outputs, nullptr, g, out, positions, accumulate, groups, share);
}

// Calls body(output channel, place in the kernel, row of x, row of out) for every product of a convolution.
template <class Body>
void for_conv(const ConvShape& s, int out_channel, Body body) {
  const int per_group = s.channels / s.groups, first = out_channel / (s.out_channels / s.groups) * per_group;
  for (int c = 0; c < per_group; ++c) {
    for (int kernel = 0; kernel < s.kernel_h * s.kernel_w; ++kernel) {
      const int weight = (out_channel * per_group + c) * s.kernel_h * s.kernel_w + kernel;
      for (int place = 0; place < s.out_h * s.out_w; ++place) {
        const int h = place / s.out_w * s.stride_h - s.pad_h + kernel / s.kernel_w * s.dilation_h;
        const int w = place % s.out_w * s.stride_w - s.pad_w + kernel % s.kernel_w * s.dilation_w;
        if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
        body(weight, ((first + c) * s.height + h) * s.width + w, out_channel * s.out_h * s.out_w + place);
      }
    }
  }
}

inline void conv(const float* w, const float* bias, const float* x, float* out, const ConvShape& shape, bool accumulate, Groups groups,
                 Share share) {
  constexpr int LANES = 16;
  const int size = shape.out_h * shape.out_w;
  for_share(shape.out_channels, share, [&](int channel) {
    for (int unit = 0; unit < groups.count * LANES; ++unit) {
      const std::ptrdiff_t start = unit / LANES * groups.stride + unit % LANES;
      for (int place = 0; place < size; ++place) {
        float& result = out[start + (std::ptrdiff_t{channel} * size + place) * LANES];
        result = (accumulate ? result : 0.0f) + (bias ? bias[channel] : 0.0f);
      }
      for_conv(shape, channel, [&](int weight, int in, int result) {
        out[start + std::ptrdiff_t{result} * LANES] += w[weight] * x[start + std::ptrdiff_t{in} * LANES];
      });
    }
  });
}

// The share is over input channels: each thread walks over all products and keeps those of its own.
inline void conv_t(const float* w, const float* g, float* out, const ConvShape& shape, bool accumulate, Groups groups, Share share) {
  constexpr int LANES = 16;
  const int size = shape.height * shape.width;
  for_share(shape.channels, share, [&](int channel) {
    for (int unit = 0; unit < groups.count * LANES; ++unit) {
      const std::ptrdiff_t start = unit / LANES * groups.stride + unit % LANES;
      for (int place = 0; place < size && !accumulate; ++place) out[start + (std::ptrdiff_t{channel} * size + place) * LANES] = 0.0f;
      for (int out_channel = 0; out_channel < shape.out_channels; ++out_channel) {
        for_conv(shape, out_channel, [&](int weight, int in, int result) {
          if (in / size == channel) out[start + std::ptrdiff_t{in} * LANES] += w[weight] * g[start + std::ptrdiff_t{result} * LANES];
        });
      }
    }
  });
}

inline void conv_learn(const float* g, const float* x, const float* dx, float* gradient, float factor, const ConvShape& shape,
                       Groups groups, Share share) {
  constexpr int LANES = 16;
  for_share(shape.out_channels, share, [&](int channel) {
    for_conv(shape, channel, [&](int weight, int in, int result) {
      float sum = 0.0f;
      for (int unit = 0; unit < groups.count * LANES; ++unit) {
        const std::ptrdiff_t start = unit / LANES * groups.stride + unit % LANES, place = start + std::ptrdiff_t{in} * LANES;
        sum += g[start + std::ptrdiff_t{result} * LANES] * (x[place] + (dx ? dx[place] : 0.0f));
      }
      gradient[weight] += factor * sum;
    });
  });
}

inline void outer_products(const OuterTerm* terms, int count, float* gradient, float* bias, int outputs, int inputs, float factor,
                           Share share) {
  for_share(outputs, share, [=](int n) {
    for (int k = 0; k < inputs; ++k) gradient[std::ptrdiff_t{n} * inputs + k] = 0.0f;
    if (bias) bias[n] = 0.0f;
    for (const OuterTerm* term = terms; term != terms + count; ++term) {
      for (long row = 0; row < term->rows; ++row) {
        const float* x = term->x + row / term->positions * term->x_stride + row % term->positions * inputs;
        const float g = factor * term->coefficient * term->g[row * outputs + n];
        for (int k = 0; k < inputs; ++k) gradient[std::ptrdiff_t{n} * inputs + k] += g * x[k];
        if (bias) bias[n] += g;
      }
    }
  });
}

}  // namespace pckernels::PCK_ISA
