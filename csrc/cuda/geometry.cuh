// The geometry of a convolution, and where the threads of a warp stand.
#pragma once

#include "device.h"

namespace pckernels::cuda {

// torch.conv2d for one sample, in the order of Instruction::p.
struct ConvShape {
  int channels, height, width, out_channels, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, out_h,
      out_w;

  __device__ explicit ConvShape(const std::int32_t* p)
      : channels(p[0]),
        height(p[1]),
        width(p[2]),
        out_channels(p[3]),
        kernel_h(p[4]),
        kernel_w(p[5]),
        stride_h(p[6]),
        stride_w(p[7]),
        pad_h(p[8]),
        pad_w(p[9]),
        dilation_h(p[10]),
        dilation_w(p[11]),
        groups(p[12]),
        out_h(p[13]),
        out_w(p[14]) {}

  __device__ int inputs() const { return channels / groups; }  // of a group
  __device__ int outputs() const { return out_channels / groups; }

  // The pixel of the input behind (oh, ow) and place (kh, kw) of the kernel, or -1 beside the image.
  __device__ int pixel(int oh, int ow, int kh, int kw) const {
    const int h = oh * stride_h - pad_h + kh * dilation_h, w = ow * stride_w - pad_w + kw * dilation_w;
    return h >= 0 && h < height && w >= 0 && w < width ? h * width + w : -1;
  }

  // The output pixel that reads (h, w) through (kh, kw), or -1.
  __device__ int reader(int h, int w, int kh, int kw) const {
    const int oh = place(h + pad_h - kh * dilation_h, stride_h, out_h), ow = place(w + pad_w - kw * dilation_w, stride_w, out_w);
    return oh >= 0 && ow >= 0 ? oh * out_w + ow : -1;
  }

 private:
  __device__ static int place(int offset, int stride, int count) {
    if (offset < 0 || offset % stride != 0) return -1;
    return offset / stride < count ? offset / stride : -1;
  }
};

// The sum over a warp, in every thread, in a fixed order.
template <class T>
__device__ T warp_sum(T value) {
  for (int mask = WARP / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace pckernels::cuda
