// The products of the host Team: what the SIMD kernels provide and the engine calls. Included once for each instruction set,
// inside a namespace of its own (PCK_ISA), because one library holds several.
//
// Arrays of the arena are [rows][LANES] floats, LANES = 16 (SIMD over samples) or 1 (a single sample, SIMD over rows). A tile
// may hold several lane groups: the same array of group g starts g * stride floats further on, and a product runs over all groups
// while a panel of the weight is in cache. A Share says which part of the output this thread owns: shares are disjoint, so a
// team needs no synchronisation inside a product, and results do not depend on the number of threads, bit for bit.
#pragma once

#include <cstddef>

#ifndef PCK_ISA
#error "define PCK_ISA, the namespace of the instruction set"
#endif

namespace pckernels::PCK_ISA {

struct Share {
  int rank, size;
};

struct Groups {
  int count;
  std::ptrdiff_t stride;
};

// The geometry of torch.conv2d for one sample, in the order of Instruction::p.
struct ConvShape {
  int channels, height, width, out_channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, out_h, out_w;
};

// A weight (N, K), row-major, as products read it. `forward` and `backward` hold its panels where pack_* has been called, otherwise null;
// every product works without them.
struct Weight {
  const float* data;
  int outputs, inputs;
  const float* forward;
  const float* backward;
};

template <int LANES> std::size_t packed_floats(int outputs, int inputs);       // upper bound for either direction
template <int LANES> void pack_forward(const float* w, int outputs, int inputs, float* panels, Share share);   // for linear
template <int LANES> void pack_backward(const float* w, int outputs, int inputs, float* panels, Share share);  // for linear_t

// out (positions, N) = [out +] x (positions, K) W^T [+ bias]
template <int LANES>
void linear(const Weight& w, const float* bias, const float* x, float* out, int positions, bool accumulate, Groups groups, Share share);
// out (positions, K) = [out +] g (positions, N) W
template <int LANES>
void linear_t(const Weight& w, const float* g, float* out, int positions, bool accumulate, Groups groups, Share share);

// LANES = 16 only. w (C_out, C / groups, kh, kw).
void conv(const float* w, const float* bias, const float* x, float* out, const ConvShape& shape, bool accumulate, Groups groups, Share share);
void conv_t(const float* w, const float* g, float* out, const ConvShape& shape, bool accumulate, Groups groups, Share share);
// gradient += factor * sum over lanes and positions of g (x + dx); dx may be null. The share is over output channels.
void conv_learn(const float* g, const float* x, const float* dx, float* gradient, float factor, const ConvShape& shape, Groups groups, Share share);

// One summand of a weight's gradient: rows of g (rows, N) and x (rows, K), row r of x at x + (r / positions) * x_stride + (r % positions) * K.
struct OuterTerm {
  const float* g;
  const float* x;
  long rows;
  int positions;
  std::ptrdiff_t x_stride;
  float coefficient;
};
// gradient (N, K) = factor * sum over terms and rows of coefficient * g^T x; bias (N,) likewise the sums of g, or null. Written, not
// added to. The share is over the rows of the gradient.
void outer_products(const OuterTerm* terms, int count, float* gradient, float* bias, int outputs, int inputs, float factor, Share share);

}  // namespace pckernels::PCK_ISA
