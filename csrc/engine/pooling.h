// Pooling of images (channels, height, width), one row of the arena for each pixel. A unit of work is a row of pixels of the result.
//
// Where a maximum came from is kept as the pixel's number, a float in each lane; gradients are gathered row by row,
// so that each result has one writer.
#pragma once

#include "lane.h"
#include "instruction.h"

namespace pckernels::PCK_ISA {

struct PoolShape {
  int channels, height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, out_h, out_w;
  bool inside_only;

  PCK_DEVICE explicit PoolShape(const std::int32_t* p)
      : channels(p[0]),
        height(p[1]),
        width(p[2]),
        kernel_h(p[4]),
        kernel_w(p[5]),
        stride_h(p[6]),
        stride_w(p[7]),
        pad_h(p[8]),
        pad_w(p[9]),
        dilation_h(p[10]),
        dilation_w(p[11]),
        out_h(p[13]),
        out_w(p[14]),
        inside_only(p[15] == 1) {}

  // The elements of window (oh, ow) that lie inside the image, as body(pixel of the image).
  template <class Body>
  PCK_DEVICE void for_window(int oh, int ow, Body body) const {
    for (int kh = 0; kh < kernel_h; ++kh) {
      const int h = oh * stride_h - pad_h + kh * dilation_h;
      if (h < 0 || h >= height) continue;
      for (int kw = 0; kw < kernel_w; ++kw) {
        const int w = ow * stride_w - pad_w + kw * dilation_w;
        if (w >= 0 && w < width) body(h * width + w);
      }
    }
  }

  // The rows of windows that hold elements of row h of the image, as body(oh), in their order.
  template <class Body>
  PCK_DEVICE void for_window_rows(int h, Body body) const {
    const int reach = h + pad_h - (kernel_h - 1) * dilation_h;
    const int low = reach > 0 ? (reach + stride_h - 1) / stride_h : 0, high = (h + pad_h) / stride_h;
    for (int oh = low; oh <= high && oh < out_h; ++oh) {
      if ((h + pad_h - oh * stride_h) % dilation_h == 0) body(oh);
    }
  }

  // What an average divides by, as torch.nn.functional.avg_pool2d.
  PCK_DEVICE float divisor(int oh, int ow) const {
    const int h = oh * stride_h - pad_h, w = ow * stride_w - pad_w;
    if (!inside_only) return static_cast<float>(overlap(h, kernel_h, -pad_h, height + pad_h) * overlap(w, kernel_w, -pad_w, width + pad_w));
    return static_cast<float>(overlap(h, kernel_h, 0, height) * overlap(w, kernel_w, 0, width));
  }

 private:
  PCK_DEVICE static int overlap(int start, int length, int low, int high) {
    const int end = start + length < high ? start + length : high;
    return end - (start > low ? start : low);
  }
};

// The first maximum of value(at, pixel) over each window; the pixel's number within its channel's image plus the channel's start is kept.
template <class Team, class Value>
PCK_DEVICE void take_maxima(Team& team, const PoolShape& shape, float* out, float* where, Value value) {
  team.for_units(shape.channels * shape.out_h, [=](auto at, int unit) {
    using Lane = typename decltype(at)::Lane;
    const int channel = unit / shape.out_h, image = channel * shape.height * shape.width;
    for (int ow = 0; ow < shape.out_w; ++ow) {
      const int result = unit * shape.out_w + ow;
      Lane best = splat<Lane>(-__builtin_huge_valf()), place = splat<Lane>(-1.0f);
      shape.for_window(unit % shape.out_h, ow, [&](int pixel) {
        const Lane x = value(at, image + pixel, result), here = splat<Lane>(static_cast<float>(image + pixel));
        const Lane later = select(x > best, here, select(x != x, here, place));
        best = select(x > best, x, select(x != x, x, best));
        place = select(place < 0.0f, here, later);
      });
      at.put(out + std::ptrdiff_t{result} * Team::LANES, best);
      if (where) at.put(where + std::ptrdiff_t{result} * Team::LANES, place);
    }
  });
}

template <class Team>
PCK_DEVICE void maxpool(Team& team, const Instruction& i) {
  const float* a = team.array(i.a);
  take_maxima(team, PoolShape(i.p), team.array(i.out), team.array(i.b),
              [=](auto at, int pixel, int) { return at(a + std::ptrdiff_t{pixel} * Team::LANES); });
}

// max_j((a_j - M) + b_j): at a small change b this keeps the digits that max_j(a_j + b_j) - M would lose.
template <class Team>
PCK_DEVICE void maxpool_change(Team& team, const Instruction& i) {
  const float *a = team.array(i.a), *da = team.array(i.b), *maxima = team.array(i.c);
  take_maxima(team, PoolShape(i.p), team.array(i.out), team.array(i.d), [=](auto at, int pixel, int result) {
    const std::ptrdiff_t row = std::ptrdiff_t{pixel} * Team::LANES;
    const auto below = at(a + row) - at(maxima + std::ptrdiff_t{result} * Team::LANES);
    return da ? below + at(da + row) : below;
  });
}

// Each pixel of out is the sum over the windows that hold it, in their order, of part(at, window, oh, ow, pixel).
template <class Team, class Part>
PCK_DEVICE void spread(Team& team, const PoolShape& shape, float* out, bool accumulate, Part part) {
  team.for_units(shape.channels * shape.height, [=](auto at, int unit) {
    using Lane = typename decltype(at)::Lane;
    float* row = out + std::ptrdiff_t{unit} * shape.width * Team::LANES;
    for (int w = 0; w < shape.width && !accumulate; ++w) at.put(row + w * Team::LANES, Lane{});
    shape.for_window_rows(unit % shape.height, [&](int oh) {
      const int first = (unit / shape.height * shape.out_h + oh) * shape.out_w;
      for (int ow = 0; ow < shape.out_w; ++ow) {
        int w = ow * shape.stride_w - shape.pad_w;
        for (int kw = 0; kw < shape.kernel_w; ++kw, w += shape.dilation_w) {
          if (w >= 0 && w < shape.width) at.put(row + w * Team::LANES, part(at, first + ow, oh, ow, unit * shape.width + w), true);
        }
      }
    });
  });
}

template <class Team>
PCK_DEVICE void maxpool_grad(Team& team, const Instruction& i) {
  const float *g = team.array(i.a), *where = team.array(i.b);
  spread(team, PoolShape(i.p), team.array(i.out), i.accumulate, [=](auto at, int window, int, int, int pixel) {
    const std::ptrdiff_t row = std::ptrdiff_t{window} * Team::LANES;
    return select(at(where + row) == static_cast<float>(pixel), at(g + row), at(nullptr));
  });
}

template <class Team>
PCK_DEVICE void avgpool(Team& team, const Instruction& i) {
  const float* a = team.array(i.a);
  float* out = team.array(i.out);
  const bool accumulate = i.accumulate;
  const PoolShape shape(i.p);
  team.for_units(shape.channels * shape.out_h, [=](auto at, int unit) {
    using Lane = typename decltype(at)::Lane;
    const int oh = unit % shape.out_h, image = unit / shape.out_h * shape.height * shape.width;
    for (int ow = 0; ow < shape.out_w; ++ow) {
      Lane sum{};
      shape.for_window(oh, ow, [&](int pixel) { sum = sum + at(a + std::ptrdiff_t{image + pixel} * Team::LANES); });
      at.put(out + std::ptrdiff_t{unit * shape.out_w + ow} * Team::LANES, sum / shape.divisor(oh, ow), accumulate);
    }
  });
}

template <class Team>
PCK_DEVICE void avgpool_t(Team& team, const Instruction& i) {
  const float* g = team.array(i.a);
  const PoolShape shape(i.p);
  spread(team, shape, team.array(i.out), i.accumulate,
         [=](auto at, int window, int oh, int ow, int) { return at(g + std::ptrdiff_t{window} * Team::LANES) / shape.divisor(oh, ow); });
}

}  // namespace pckernels::PCK_ISA
