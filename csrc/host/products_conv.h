// Convolutions with 16 lanes.
//
// conv and conv_t are the same sum over (channel, ky, kx) of weights times vectors of samples; what differs is which places of the image
// the taps of an output meet, and the strides of the weight. A block is kRows output channels times kVectors vectors, neighbours among the
// output places and their samples. Along kx both the weights and the places are evenly spaced: that is the inner loop.
//
// What a rectangle of outputs sees of a slice of the channels is copied first, with zeros beyond the edges: a tile. It is reused by all
// taps and output channels, needs no checks, and lies densely, while planes of an image are often a power of two apart, so that few fit
// into a cache. Without a tile, for the transpose of a strided convolution and where a tile would be too large, every output place
// takes the taps that it meets.
//
// conv_learn sums over places instead: a block is a few output channels times a few taps, every sum a vector over samples.
#pragma once

#include "products_linear.h"

namespace pckernels::PCK_ISA {

constexpr int kConvDepth = 192, kConvTaps = 2 * kConvDepth;  // taps of a slice, about and at most
constexpr int kConvPanels = 192 * 1024 / (4 * kRows * kConvTaps);
constexpr int kTileFloats = 32 * 1024;  // of all channels of a slice
constexpr int kTileColumns = 64;        // outputs of a tile
constexpr int kLearnRows = kRegisters == 32 ? 6 : 4, kLearnTaps = kRegisters == 32 ? 4 : 3;

// The taps of one axis that an output meets: count taps first, first + step, .. at the places place, place + place_step, ..
struct Taps {
  int first, count, place;
};

// One axis of a convolution or of its transpose.
struct Axis {
  int kernel, stride, pad, dilation, places;  // places of the array that is read
  bool transposed;
  int step, place_step;

  Taps at(int output) const { return transposed ? transposed_at(output) : forward_at(output); }

  // For tiles, where neighbouring outputs see places that are equally far apart and all taps are taken.
  bool even() const { return !transposed || stride == 1; }
  int advance() const { return transposed ? 1 : stride; }
  int reach() const { return (kernel - 1) * dilation; }
  int lowest(int output) const { return transposed ? output + pad - reach() : output * stride - pad; }
  int extent(int outputs) const { return (outputs - 1) * advance() + reach() + 1; }
  int first_tap() const { return transposed ? reach() : 0; }

 private:
  Taps forward_at(int output) const {
    const int place = output * stride - pad;
    if (place >= 0 && place + (kernel - 1) * dilation < places) return {0, kernel, place};
    const int first = place < 0 ? divide_up(-place, dilation) : 0;
    const int end = place < places ? smaller(kernel, divide_up(places - place, dilation)) : 0;
    return {first, larger(0, end - first), place + first * dilation};
  }

  // Tap t meets place p with p * stride = output + pad - t * dilation. Those t are `step` apart.
  Taps transposed_at(int output) const {
    Taps taps{0, 0, 0};
    for (int t = 0, from = output + pad; t < kernel && from >= 0; t += taps.count ? step : 1, from = output + pad - t * dilation) {
      const int place = stride == 1 ? from : from % stride ? places : from / stride;
      if (place >= places) continue;
      if (taps.count == 0) taps.first = t, taps.place = place;
      ++taps.count;
    }
    return taps;
  }
};

inline int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

inline Axis make_axis(int kernel, int stride, int pad, int dilation, int places, bool transposed) {
  const int common = common_divisor(stride, dilation);
  return {kernel, stride, pad, dilation, places, transposed, transposed ? stride / common : 1, transposed ? -dilation / common : dilation};
}

// One product with 16 lanes. Channels are those that are read, rows those that are written, both of one group.
struct ConvProduct {
  const float* w;
  const float* bias;
  const float* in;
  float* out;
  bool accumulate;
  Groups groups;
  Axis y, x;
  int channels, rows, conv_groups;
  int in_width, out_width;
  std::ptrdiff_t in_plane, out_plane;        // floats
  std::ptrdiff_t w_group, w_row, w_channel;  // floats

  int places() const { return static_cast<int>(out_plane / kLanes); }
  int panels_of_group() const { return divide_up(rows, kRows); }
};

// A rectangle of outputs.
struct Rectangle {
  int y, x, rows, columns;
};

// How far apart channels and rows of what is read are, in floats: of the image or of a tile.
struct View {
  std::ptrdiff_t plane, row;
};

// The size of rectangles whose tiles of `channels` channels fit, of about kTileColumns outputs; 0 rows if there is none.
inline Rectangle tile_size(const Axis& y, const Axis& x, int out_h, int out_w, int channels) {
  if (!y.even() || !x.even()) return {0, 0, 0, 0};
  const auto fits = [&](int rows, int columns) {
    return static_cast<double>(channels) * y.extent(rows) * x.extent(columns) * kLanes <= kTileFloats;
  };
  int columns = smaller(out_w, kTileColumns), rows = 1;
  while (columns > 1 && !fits(1, columns)) columns = divide_up(columns, 2);
  if (!fits(1, columns)) return {0, 0, 0, 0};
  if (columns == out_w)
    while (rows < out_h && (rows + 1) * columns <= kTileColumns && fits(rows + 1, columns)) ++rows;
  return {0, 0, rows, columns};
}

template <bool WITH_ADDED>
inline void copy_row(const float* from, const float* added, int count, float* target) {
  for (int i = 0; i < count * kLanes; i += kWidth) {
    vec value = load(from + i);
    if constexpr (WITH_ADDED) value += load(added + i);
    store(target + i, value);
  }
}

// Copies what a rectangle of outputs sees of `channels` channels of image [+ added]: [channel][row][column][kLanes].
inline View fill_tile(
    const float* image, const float* added, int channels, const Axis& y, const Axis& x, const Rectangle& outputs, float* tile) {
  const int height = y.extent(outputs.rows), width = x.extent(outputs.columns), top = y.lowest(outputs.y), left = x.lowest(outputs.x);
  const int begin = smaller(larger(0, -left), width), end = larger(begin, smaller(width, x.places - left));
  for (int c = 0; c < channels; ++c)
    for (int r = 0; r < height; ++r, tile += width * kLanes) {
      const int row = top + r;
      const bool inside = row >= 0 && row < y.places && begin < end;
      const int from = inside ? begin : width, to = inside ? end : width;
      std::memset(tile, 0, 4 * from * kLanes);
      std::memset(tile + to * kLanes, 0, 4 * (width - to) * kLanes);
      if (!inside) continue;
      const std::ptrdiff_t offset = ((static_cast<std::ptrdiff_t>(c) * y.places + row) * x.places + left + begin) * kLanes;
      if (added)
        copy_row<true>(image + offset, added + offset, end - begin, tile + begin * kLanes);
      else
        copy_row<false>(image + offset, nullptr, end - begin, tile + begin * kLanes);
    }
  return {static_cast<std::ptrdiff_t>(height) * width * kLanes, static_cast<std::ptrdiff_t>(width) * kLanes};
}

inline float* tile_scratch() {
  alignas(64) static thread_local float tile[kTileFloats];
  return tile;
}

// The weights of some panels for one slice of the channels, [panel][tap][kRows], and where in a tile the taps are from the first tap.
struct ConvSlice {
  Range channels;
  Range panels;
  int taps;  // of all channels
  int offsets[kConvTaps];
  alignas(64) float weights[kConvPanels * kConvTaps * kRows];

  const float* panel(int number) const { return weights + static_cast<std::ptrdiff_t>(number - panels.begin) * taps * kRows; }
};

inline ConvSlice& slice_scratch() {
  static thread_local ConvSlice slice;
  return slice;
}

inline void pack_panel(const ConvProduct& p, int panel, Range channels, float* target) {
  const int group = panel / p.panels_of_group(), row = panel % p.panels_of_group() * kRows, taps = p.y.kernel * p.x.kernel;
  with_constant<kRows>(smaller(kRows, p.rows - row), [&](auto rows) {
    for (int c = channels.begin; c < channels.end; ++c) {
      const float* from = p.w + group * p.w_group + row * p.w_row + c * p.w_channel;
      for (int t = 0; t < taps; ++t, target += kRows)
        for (int r = 0; r < rows.value; ++r) target[r] = from[r * p.w_row + t];
    }
  });
}

inline void fill_slice(const ConvProduct& p, Range channels, Range panels, ConvSlice& slice) {
  slice.channels = channels;
  slice.panels = panels;
  slice.taps = (channels.end - channels.begin) * p.y.kernel * p.x.kernel;
  for (int panel = panels.begin; panel < panels.end; ++panel)
    pack_panel(p, panel, channels, slice.weights + static_cast<std::ptrdiff_t>(panel - panels.begin) * slice.taps * kRows);
}

inline void fill_offsets(const ConvProduct& p, const View& view, ConvSlice& slice) {
  int* to = slice.offsets;
  for (int c = 0; c < slice.channels.end - slice.channels.begin; ++c)
    for (int y = 0; y < p.y.kernel; ++y)
      for (int x = 0; x < p.x.kernel; ++x)
        *to++ = static_cast<int>(c * view.plane + y * p.y.place_step * view.row + x * p.x.place_step * kLanes);
}

// sums[r][v] += sum over taps of weight[tap][r] * in[v][offset of the tap ..].
template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void accumulate_taps(
    vec (&sums)[ROWS][VECTORS], const float* weight, const int* offsets, int taps, const float* const* in) {
  for (const int* end = offsets + taps; offsets != end; ++offsets, weight += kRows) {
    const std::ptrdiff_t offset = *offsets;
    vec x[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) x[v] = load(in[v] + offset);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      const vec w = splat(weight[r]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
}

// The same for the taps y, x of every channel alone, in a tile: at an edge of the image the others would add zeros.
template <int ROWS, int VECTORS>
[[gnu::always_inline]] inline void accumulate_some_taps(
    vec (&sums)[ROWS][VECTORS], const ConvProduct& p, const View& view, const float* weight, Range y, Range x, int channels,
    const float* const* in) {
  const std::ptrdiff_t in_x = p.x.place_step * kLanes;
  for (int c = 0; c < channels; ++c)
    for (int ky = y.begin; ky < y.end; ++ky) {
      const float* from[VECTORS];
      for (int v = 0; v < VECTORS; ++v) from[v] = in[v] + c * view.plane + ky * p.y.place_step * view.row + x.begin * in_x;
      accumulate_block(sums, weight + ((c * p.y.kernel + ky) * p.x.kernel + x.begin) * kRows, 1, kRows, from, in_x, x.end - x.begin);
    }
}

// A rectangle of outputs with the taps that its rows and columns meet.
struct ConvTile {
  Rectangle outputs;
  View view;
  Range y[kTileColumns], x[kTileColumns];

  ConvTile(const ConvProduct& p, const Rectangle& rectangle) : outputs(rectangle), view{} {
    for (int i = 0; i < outputs.rows; ++i) y[i] = range(p.y.at(outputs.y + i));
    for (int i = 0; i < outputs.columns; ++i) x[i] = range(p.x.at(outputs.x + i));
  }

 private:
  static Range range(const Taps& taps) { return {taps.first, taps.first + taps.count}; }
};

inline Range joined(Range a, Range b) {
  if (a.begin == a.end) return b;
  if (b.begin == b.end) return a;
  return {smaller(a.begin, b.begin), larger(a.end, b.end)};
}

// All blocks of one panel over a rectangle of outputs of one lane group. `out` is row 0 of the panel.
template <int ROWS>
inline void conv_tile_panel(
    const ConvProduct& p, const ConvSlice& slice, const ConvTile& t, const float* weights, Start start, const float* tile, float* out) {
  // With few rows more vectors are needed for as many independent sums.
  constexpr int block_vectors = ROWS * 2 <= kRows ? 2 * kVectors : kVectors;
  const int vectors = t.outputs.rows * t.outputs.columns * kVectorsPerGroup;
  for (int first = 0; first < vectors; first += block_vectors) {
    const float* in[block_vectors];
    float* to[block_vectors];
    Range ky{0, 0}, kx{0, 0};
    const int count = smaller(block_vectors, vectors - first);
    for (int v = 0; v < count; ++v) {
      const int part = (first + v) % kVectorsPerGroup * kWidth, place = (first + v) / kVectorsPerGroup;
      const int y = place / t.outputs.columns, x = place % t.outputs.columns;
      in[v] = tile + (y * p.y.advance() + p.y.first_tap()) * t.view.row + (x * p.x.advance() + p.x.first_tap()) * kLanes + part;
      to[v] = out + (static_cast<std::ptrdiff_t>(t.outputs.y + y) * p.out_width + t.outputs.x + x) * kLanes + part;
      ky = joined(ky, t.y[y]);
      kx = joined(kx, t.x[x]);
    }
    const bool all = ky.end - ky.begin == p.y.kernel && kx.end - kx.begin == p.x.kernel;
    with_constant<block_vectors>(count, [&](auto n) {
      vec sums[ROWS][n.value];
      start_block(sums, start, to, p.out_plane);
      if (all)
        accumulate_taps(sums, weights, slice.offsets, slice.taps, in);
      else
        accumulate_some_taps(sums, p, t.view, weights, ky, kx, slice.channels.end - slice.channels.begin, in);
      store_block(sums, to, p.out_plane);
    });
  }
}

inline void conv_tile(const ConvProduct& p, const Rectangle& outputs, int lane_group, ConvSlice& slice) {
  const std::ptrdiff_t offset = lane_group * p.groups.stride;
  const int panels_of_group = p.panels_of_group();
  const bool first = slice.channels.begin == 0;
  float* tile = tile_scratch();
  ConvTile t(p, outputs);
  int filled = -1;
  for (int panel = slice.panels.begin; panel < slice.panels.end; ++panel) {
    const int group = panel / panels_of_group, first_row = panel % panels_of_group * kRows;
    const std::ptrdiff_t channel = group * p.channels + slice.channels.begin, row = group * p.rows + first_row;
    if (group != filled) {
      t.view = fill_tile(p.in + offset + channel * p.in_plane, nullptr, slice.channels.end - slice.channels.begin, p.y, p.x, outputs, tile);
      fill_offsets(p, t.view, slice);
      filled = group;
    }
    const Start start{p.accumulate || !first, p.bias && first ? p.bias + row : nullptr};
    with_constant<kRows>(smaller(kRows, p.rows - first_row), [&](auto rows) {
      conv_tile_panel<rows.value>(p, slice, t, slice.panel(panel), start, tile, p.out + offset + row * p.out_plane);
    });
  }
}

// One block without a tile, at an output place that meets the taps y, x. `weight`, `in` and `out` stand at channel 0 and row 0 of the
// block.
template <int ROWS, int VECTORS>
inline void conv_place_block(
    const ConvProduct& p, const Taps& y, const Taps& x, Start start, const float* weight, const float* const* in, float* const* out) {
  vec sums[ROWS][VECTORS];
  start_block(sums, start, out, p.out_plane);
  for (int c = 0; c < p.channels; ++c)
    for (int i = 0; i < y.count; ++i) {
      const float* from[VECTORS];
      for (int v = 0; v < VECTORS; ++v)
        from[v] = in[v] + c * p.in_plane + (static_cast<std::ptrdiff_t>(y.place + i * p.y.place_step) * p.in_width + x.place) * kLanes;
      accumulate_block(
          sums, weight + c * p.w_channel + (y.first + i * p.y.step) * p.x.kernel + x.first, p.w_row, p.x.step, from,
          static_cast<std::ptrdiff_t>(p.x.place_step) * kLanes, x.count);
    }
  store_block(sums, out, p.out_plane);
}

// One output place without a tile.
inline void conv_place(const ConvProduct& p, int place, int lane_group, Range panels) {
  const Taps y = p.y.at(place / p.out_width), x = p.x.at(place % p.out_width);
  const int panels_of_group = p.panels_of_group();
  for (int panel = panels.begin; panel < panels.end; ++panel) {
    const int group = panel / panels_of_group, first_row = panel % panels_of_group * kRows;
    const std::ptrdiff_t channel = static_cast<std::ptrdiff_t>(group) * p.channels,
                         row = static_cast<std::ptrdiff_t>(group) * p.rows + first_row;
    const Start start{p.accumulate, p.bias ? p.bias + row : nullptr};
    const float* weight = p.w + group * p.w_group + first_row * p.w_row;
    for (int first = 0; first < kVectorsPerGroup; first += kVectors) {
      const float* in[kVectors];
      float* out[kVectors];
      const int count = smaller(kVectors, kVectorsPerGroup - first);
      for (int v = 0; v < count; ++v) {
        const std::ptrdiff_t offset = lane_group * p.groups.stride + (first + v) * kWidth;
        in[v] = p.in + offset + channel * p.in_plane;
        out[v] = p.out + offset + row * p.out_plane + static_cast<std::ptrdiff_t>(place) * kLanes;
      }
      with_constant<kRows>(smaller(kRows, p.rows - first_row), [&](auto rows) {
        with_constant<kVectors>(count, [&](auto n) { conv_place_block<rows.value, n.value>(p, y, x, start, weight, in, out); });
      });
    }
  }
}

// The largest rectangle of at most `size` that begins at a place and holds nothing from `end` on.
inline Rectangle next_rectangle(int place, int end, int width, const Rectangle& size) {
  const int y = place / width, x = place % width;
  if (x == 0 && size.columns == width && end - place >= width) return {y, 0, smaller(size.rows, (end - place) / width), width};
  return {y, x, 1, smaller(smaller(size.columns, width - x), end - place)};
}

inline int slices_of(const ConvProduct& p) {
  return larger(1, smaller(p.channels, divide_up(p.channels * p.y.kernel * p.x.kernel, kConvDepth)));
}

// Outputs are numbered along the places, lane group by lane group.
inline void convolve_tiles(const ConvProduct& p, const Rectangle& size, Range outputs, Range panels) {
  const int places = p.places(), slices = slices_of(p);
  ConvSlice& slice = slice_scratch();
  for (int first = panels.begin; first < panels.end; first += kConvPanels)
    for (int s = 0; s < slices; ++s) {
      fill_slice(p, part_of(p.channels, {s, slices}), {first, smaller(first + kConvPanels, panels.end)}, slice);
      for (int at = outputs.begin; at < outputs.end;) {
        const int lane_group = at / places, place = at % places, end = smaller(places, place + outputs.end - at);
        const Rectangle rectangle = next_rectangle(place, end, p.out_width, size);
        conv_tile(p, rectangle, lane_group, slice);
        at += rectangle.rows * rectangle.columns;
      }
    }
}

// A share takes some places and all panels where there are places enough for packing the weights to pay, otherwise some panels.
inline void convolve(const ConvProduct& p, Share share) {
  const int panels = p.panels_of_group() * p.conv_groups, places = p.places();
  if (panels == 0 || places == 0) return;
  const long all = static_cast<long>(places) * p.groups.count;
  const bool by_places = all >= 32 * share.size || panels < 2 * share.size;
  const Range outputs = by_places ? part_of(all, share) : Range{0, static_cast<int>(all)};
  const Range my_panels = by_places ? Range{0, panels} : part_of(panels, share);
  const int channels = divide_up(p.channels, slices_of(p));
  const Rectangle size = tile_size(p.y, p.x, places / p.out_width, p.out_width, channels);
  if (size.rows && channels * p.y.kernel * p.x.kernel <= kConvTaps)
    convolve_tiles(p, size, outputs, my_panels);
  else
    for (int at = outputs.begin; at < outputs.end; ++at) conv_place(p, at % places, at / places, my_panels);
}

inline void conv(
    const float* w, const float* bias, const float* x, float* out, const ConvShape& s, bool accumulate, Groups groups, Share share) {
  const std::ptrdiff_t taps = s.kernel_h * s.kernel_w, channels = s.channels / s.groups, rows = s.out_channels / s.groups;
  convolve(
      {w, bias, x, out, accumulate, groups, make_axis(s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.height, false),
       make_axis(s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.width, false), static_cast<int>(channels), static_cast<int>(rows),
       s.groups, s.width, s.out_w, static_cast<std::ptrdiff_t>(s.height) * s.width * kLanes,
       static_cast<std::ptrdiff_t>(s.out_h) * s.out_w * kLanes, rows * channels * taps, channels * taps, taps},
      share);
}

inline void conv_t(const float* w, const float* g, float* out, const ConvShape& s, bool accumulate, Groups groups, Share share) {
  const std::ptrdiff_t taps = s.kernel_h * s.kernel_w, channels = s.out_channels / s.groups, rows = s.channels / s.groups;
  convolve(
      {w, nullptr, g, out, accumulate, groups, make_axis(s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.out_h, true),
       make_axis(s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.out_w, true), static_cast<int>(channels), static_cast<int>(rows),
       s.groups, s.out_w, s.width, static_cast<std::ptrdiff_t>(s.out_h) * s.out_w * kLanes,
       static_cast<std::ptrdiff_t>(s.height) * s.width * kLanes, rows * channels * taps, taps, rows * taps},
      share);
}

struct LearnProduct {
  const float* g;
  const float* x;
  const float* dx;
  float* gradient;
  float factor;
  const ConvShape& shape;
  Groups groups;
  Axis y_axis, x_axis;

  int channels() const { return shape.channels / shape.groups; }  // of a convolution group, and so are rows and taps
  int rows() const { return shape.out_channels / shape.groups; }
  int taps() const { return channels() * shape.kernel_h * shape.kernel_w; }
  std::ptrdiff_t in_plane() const { return static_cast<std::ptrdiff_t>(shape.height) * shape.width * kLanes; }
  std::ptrdiff_t out_plane() const { return static_cast<std::ptrdiff_t>(shape.out_h) * shape.out_w * kLanes; }
};

// A tile of x + dx, of a slice of the channels, for a rectangle of outputs.
struct LearnTile {
  Rectangle outputs;
  View view;
  Range channels;
  const float* tile;

  std::ptrdiff_t offset(const ConvShape& s, int tap) const {
    const int kx = tap % s.kernel_w, ky = tap / s.kernel_w % s.kernel_h, c = tap / (s.kernel_w * s.kernel_h);
    return c * view.plane + ky * s.dilation_h * view.row + static_cast<std::ptrdiff_t>(kx) * s.dilation_w * kLanes;
  }
};

// gradient[r][t] += factor * the sum over the outputs of a tile and lanes of g[r] x[t]. `g` is row 0 of the block at the tile's first
// output.
template <int ROWS, int TAPS>
inline void learn_block(const LearnProduct& p, const LearnTile& tile, const float* g, int first_tap, float* gradient) {
  const ConvShape& s = p.shape;
  const std::ptrdiff_t plane = p.out_plane(), step = static_cast<std::ptrdiff_t>(s.stride_w) * kLanes;
  std::ptrdiff_t offsets[TAPS];
#pragma GCC unroll 4
  for (int t = 0; t < TAPS; ++t) offsets[t] = tile.offset(s, first_tap + t);
  vec sums[ROWS][TAPS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TAPS; ++t) sums[r][t] = vec{};
  for (int y = 0; y < tile.outputs.rows; ++y) {
    const float* errors = g + static_cast<std::ptrdiff_t>(y) * s.out_w * kLanes;
    const float* x = tile.tile + y * s.stride_h * tile.view.row;
    // Unrolled for more vectors, GCC would load those of several parts at once and run out of registers.
    for (int i = 0; i < tile.outputs.columns; ++i, errors += kLanes, x += step)
#pragma GCC unroll(kVectorsPerGroup > 2 ? 1 : 2)
      for (int part = 0; part < kLanes; part += kWidth) {
        vec inputs[TAPS];
#pragma GCC unroll 4
        for (int t = 0; t < TAPS; ++t) inputs[t] = load(x + offsets[t] + part);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const vec error = load(errors + r * plane + part);
#pragma GCC unroll 4
          for (int t = 0; t < TAPS; ++t) sums[r][t] = fma(error, inputs[t], sums[r][t]);
        }
      }
  }
  const std::ptrdiff_t taps = p.taps();
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < TAPS; ++t) gradient[r * taps + t] += p.factor * sum(sums[r][t]);
}

// Rows of one convolution group, all taps of a slice.
inline void learn_rows(const LearnProduct& p, const LearnTile& tile, Range rows, const float* g) {
  const ConvShape& s = p.shape;
  const int slice_tap = tile.channels.begin * s.kernel_h * s.kernel_w, taps = tile.channels.end * s.kernel_h * s.kernel_w - slice_tap;
  const int blocks = divide_up(rows.end - rows.begin, kLearnRows);
  for (int b = 0; b < blocks; ++b) {
    const Range block = part_of(rows.end - rows.begin, {b, blocks});
    const std::ptrdiff_t row = rows.begin + block.begin;
    const float* errors = g + row * p.out_plane() + (static_cast<std::ptrdiff_t>(tile.outputs.y) * s.out_w + tile.outputs.x) * kLanes;
    float* gradient = p.gradient + row * p.taps() + slice_tap;
    with_constant<kLearnRows>(block.end - block.begin, [&](auto block_rows) {
      for (int t = 0; t < taps; t += kLearnTaps)
        with_constant<kLearnTaps>(smaller(kLearnTaps, taps - t), [&](auto block_taps) {
          learn_block<block_rows.value, block_taps.value>(p, tile, errors, t, gradient + t);
        });
    });
  }
}

// Rows of one convolution group over one lane group; a slice has `channels` channels.
inline void learn_tiles(const LearnProduct& p, const Rectangle& size, int channels, int group, Range rows, std::ptrdiff_t offset) {
  const ConvShape& s = p.shape;
  float* scratch = tile_scratch();
  for (int place = 0; place < s.out_h * s.out_w;) {
    LearnTile tile{next_rectangle(place, s.out_h * s.out_w, s.out_w, size), {}, {}, scratch};
    for (int c = 0; c < p.channels(); c += channels) {
      tile.channels = {c, smaller(c + channels, p.channels())};
      const std::ptrdiff_t image = offset + (static_cast<std::ptrdiff_t>(group) * p.channels() + c) * p.in_plane();
      tile.view = fill_tile(p.x + image, p.dx ? p.dx + image : nullptr, tile.channels.end - c, p.y_axis, p.x_axis, tile.outputs, scratch);
      learn_rows(p, tile, rows, p.g + offset);
    }
    place += tile.outputs.rows * tile.outputs.columns;
  }
}

// One weight without a tile.
inline float learn_tap(const LearnProduct& p, const float* g, std::ptrdiff_t image, int ky, int kx) {
  const ConvShape& s = p.shape;
  vec total{};
  for (int oy = 0; oy < s.out_h; ++oy)
    for (int ox = 0; ox < s.out_w; ++ox) {
      const int y = p.y_axis.lowest(oy) + ky * s.dilation_h, x = p.x_axis.lowest(ox) + kx * s.dilation_w;
      if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
      const std::ptrdiff_t at = image + (static_cast<std::ptrdiff_t>(y) * s.width + x) * kLanes;
      for (int part = 0; part < kLanes; part += kWidth) {
        const vec input = p.dx ? load(p.x + at + part) + load(p.dx + at + part) : load(p.x + at + part);
        total = fma(load(g + (static_cast<std::ptrdiff_t>(oy) * s.out_w + ox) * kLanes + part), input, total);
      }
    }
  return sum(total);
}

inline void learn_taps(const LearnProduct& p, int group, Range rows, std::ptrdiff_t offset) {
  const ConvShape& s = p.shape;
  for (int row = rows.begin; row < rows.end; ++row)
    for (int t = 0; t < p.taps(); ++t) {
      const int kx = t % s.kernel_w, ky = t / s.kernel_w % s.kernel_h, c = t / (s.kernel_w * s.kernel_h);
      const std::ptrdiff_t image = offset + (static_cast<std::ptrdiff_t>(group) * p.channels() + c) * p.in_plane();
      p.gradient[static_cast<std::ptrdiff_t>(row) * p.taps() + t] +=
          p.factor * learn_tap(p, p.g + offset + row * p.out_plane(), image, ky, kx);
    }
}

inline void conv_learn(
    const float* g, const float* x, const float* dx, float* gradient, float factor, const ConvShape& s, Groups groups, Share share) {
  const LearnProduct p{
      g,
      x,
      dx,
      gradient,
      factor,
      s,
      groups,
      make_axis(s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, s.height, false),
      make_axis(s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, s.width, false)};
  const Range mine = part_of(s.out_channels, share);
  const Rectangle size = tile_size(p.y_axis, p.x_axis, s.out_h, s.out_w, 1);
  const int channels = size.rows ? kTileFloats / (p.y_axis.extent(size.rows) * p.x_axis.extent(size.columns) * kLanes) : 0;
  for (int lane_group = 0; lane_group < groups.count; ++lane_group)
    for (int row = mine.begin; row < mine.end;) {
      const int group = row / p.rows();
      const Range rows{row, smaller(mine.end, (group + 1) * p.rows())};
      if (size.rows)
        learn_tiles(p, size, channels, group, rows, lane_group * groups.stride);
      else
        learn_taps(p, group, rows, lane_group * groups.stride);
      row = rows.end;
    }
}

}  // namespace pckernels::PCK_ISA
