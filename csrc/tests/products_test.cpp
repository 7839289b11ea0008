// Test of the host's products against plain loops in double precision; with the argument `bench`, their speed next to that of a loop of
// multiplications in registers.
//   g++ -O3 -std=c++17 -fno-math-errno -fno-trapping-math -mavx2 -mfma products_test.cpp -o products_test
#ifndef PCK_ISA
#define PCK_ISA tested
#endif

#include "../host/products_conv.h"
#include "../host/products_linear.h"
#include "../host/products_outer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <time.h>

using namespace pckernels::PCK_ISA;

namespace {

using Floats = std::vector<float>;

std::mt19937 generator(1);
int failures = 0;

Floats random_floats(std::size_t count) {
  std::normal_distribution<float> normal;
  Floats result(count);
  for (float& x : result) x = normal(generator);
  return result;
}

// `size` bounds the sum of the absolute values of what was added up.
void expect(bool condition, const char* what, long a, long b, long c) {
  if (condition) return;
  if (++failures < 20) std::printf("failed: %s at %ld %ld %ld\n", what, a, b, c);
}

bool close(float value, double expected, double size) { return std::fabs(value - expected) <= 2e-6 * size + 1e-30; }

// Runs f once for every share of a team.
template <class F>
void with_team(int size, F f) {
  for (int rank = 0; rank < size; ++rank) f(Share{rank, size});
}

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
}

struct LinearCase {
  int outputs, inputs, positions, groups;
};

// Element (position, row) of lane `lane` of group `group` in an array of rows `rows`.
template <int LANES>
std::size_t place(int rows, int position, int row, int lane, std::ptrdiff_t group_offset) {
  return group_offset + (static_cast<std::size_t>(position) * rows + row) * LANES + lane;
}

// forward: out = x W^T; otherwise out = x W, with the weight (outputs, inputs) either way.
template <int LANES>
void test_product(const LinearCase& c, bool forward, bool packed, bool with_bias, bool accumulate) {
  const int from = forward ? c.inputs : c.outputs, to = forward ? c.outputs : c.inputs;
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(std::max(from, to)) * c.positions * LANES + 32;
  const Floats w = random_floats(static_cast<std::size_t>(c.outputs) * c.inputs), bias = random_floats(c.outputs);
  const Floats x = random_floats(stride * c.groups), before = random_floats(stride * c.groups);
  Floats panels(packed_floats<LANES>(c.outputs, c.inputs), std::numeric_limits<float>::quiet_NaN());
  with_team(3, [&](Share share) {
    if (forward)
      pack_forward<LANES>(w.data(), c.outputs, c.inputs, panels.data(), share);
    else
      pack_backward<LANES>(w.data(), c.outputs, c.inputs, panels.data(), share);
  });
  const float* used = packed ? panels.data() : nullptr;
  const Weight weight{w.data(), c.outputs, c.inputs, forward ? used : nullptr, forward ? nullptr : used};
  const Groups groups{c.groups, stride};
  const float* added = with_bias ? bias.data() : nullptr;
  Floats first;
  for (int size : {1, 2, 3, 7}) {
    Floats out = before;
    with_team(size, [&](Share share) {
      if (forward)
        linear<LANES>(weight, added, x.data(), out.data(), c.positions, accumulate, groups, share);
      else
        linear_t<LANES>(weight, x.data(), out.data(), c.positions, accumulate, groups, share);
    });
    if (size == 1) first = out;
    expect(same_bits(first, out), forward ? "linear, shares" : "linear_t, shares", c.outputs, c.inputs, size);
  }
  Floats expected_untouched = first;
  for (int g = 0; g < c.groups; ++g)
    for (int p = 0; p < c.positions; ++p)
      for (int r = 0; r < to; ++r)
        for (int lane = 0; lane < LANES; ++lane) {
          const std::size_t at = place<LANES>(to, p, r, lane, g * stride);
          double sum = (accumulate ? before[at] : 0.0) + (with_bias && forward ? bias[r] : 0.0), size = std::fabs(sum) + 1;
          for (int k = 0; k < from; ++k) {
            const double term = static_cast<double>(x[place<LANES>(from, p, k, lane, g * stride)]) *
                                w[forward ? static_cast<std::size_t>(r) * c.inputs + k : static_cast<std::size_t>(k) * c.inputs + r];
            sum += term;
            size += std::fabs(term);
          }
          expect(close(first[at], sum, size), forward ? "linear" : "linear_t", c.outputs, c.inputs, c.positions);
          expected_untouched[at] = before[at];
        }
  expect(same_bits(expected_untouched, before), "linear wrote elsewhere", c.outputs, c.inputs, c.positions);
}

template <int LANES>
void test_linear() {
  std::vector<LinearCase> cases;
  for (int outputs : {0, 1, 5, 7, 10, 12, 33, 129})
    for (int inputs : {0, 1, 2, 7, 17, 64, 131})
      cases.push_back({outputs, inputs, 1 + (outputs + inputs) % 3, 1 + (outputs + 2 * inputs) % 5});
  cases.insert(
      cases.end(), {{10, 300, 1, 4}, {300, 784, 1, 1}, {33, 900, 7, 3}, {7, 1000, 13, 1}, {1000, 7, 2, 8}, {5, 5, 0, 2}, {260, 390, 1, 2}});
  int number = 0;
  for (const LinearCase& c : cases)
    for (bool forward : {true, false})
      for (bool packed : {true, false}) {
        test_product<LANES>(c, forward, packed, number % 2, number / 2 % 2);
        number += 1 + (number / 4) % 2;
      }
}

struct OuterCase {
  int outputs, inputs;
  std::vector<std::pair<long, int>> terms;  // rows and positions
};

void test_outer(const OuterCase& c, bool with_bias) {
  std::vector<OuterTerm> terms;
  std::vector<Floats> arrays;
  arrays.reserve(2 * c.terms.size());
  for (auto [rows, positions] : c.terms) {
    const std::ptrdiff_t x_stride = static_cast<std::ptrdiff_t>(positions) * c.inputs + 3;
    arrays.push_back(random_floats(rows * c.outputs));
    arrays.push_back(random_floats((rows / positions + 1) * x_stride));
    terms.push_back({arrays[arrays.size() - 2].data(), arrays.back().data(), rows, positions, x_stride, 0.5f + terms.size()});
  }
  const float factor = -0.25f;
  Floats first, first_bias;
  for (int size : {1, 2, 3, 9}) {
    Floats gradient(static_cast<std::size_t>(c.outputs) * c.inputs, std::numeric_limits<float>::quiet_NaN()),
        bias(c.outputs, gradient.empty() ? 0 : gradient[0]);
    with_team(size, [&](Share share) {
      outer_products(terms.data(), terms.size(), gradient.data(), with_bias ? bias.data() : nullptr, c.outputs, c.inputs, factor, share);
    });
    if (size == 1) first = gradient, first_bias = bias;
    expect(same_bits(first, gradient) && same_bits(first_bias, bias), "outer_products, shares", c.outputs, c.inputs, size);
  }
  for (int n = 0; n < c.outputs; ++n)
    for (int k = with_bias ? -1 : 0; k < c.inputs; ++k) {  // -1 is the bias
      double sum = 0, size = 0;
      for (const OuterTerm& t : terms)
        for (long r = 0; r < t.rows; ++r) {
          const double x = k < 0 ? 1.0 : t.x[r / t.positions * t.x_stride + r % t.positions * c.inputs + k];
          const double term = static_cast<double>(factor) * t.coefficient * t.g[r * c.outputs + n] * x;
          sum += term;
          size += std::fabs(term);
        }
      const float value = k < 0 ? first_bias[n] : first[static_cast<std::size_t>(n) * c.inputs + k];
      expect(close(value, sum, size), "outer_products", n, k, c.inputs);
    }
}

void test_outer() {
  for (int outputs : {0, 1, 7, 10, 33, 129})
    for (int inputs : {0, 1, 5, 16, 33, 131})
      for (bool with_bias : {false, true}) {
        test_outer({outputs, inputs, {}}, with_bias);
        test_outer({outputs, inputs, {{0, 1}}}, with_bias);
        test_outer({outputs, inputs, {{1, 1}}}, with_bias);
        test_outer({outputs, inputs, {{64, 1}, {7, 3}}}, with_bias);
        test_outer({outputs, inputs, {{200, 5}, {0, 2}, {100, 1}, {300, 50}}}, with_bias);
      }
  test_outer({1100, 20, {{64, 1}}}, true);
  test_outer({20, 1100, {{64, 1}, {240, 4}}}, true);
}

int out_size(int in, int kernel, int stride, int pad, int dilation) { return (in + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1; }

ConvShape conv_shape(
    int channels, int height, int width, int out_channels, int kh, int kw, int sh, int sw, int ph, int pw, int dh, int dw, int groups) {
  return {
      channels,
      height,
      width,
      out_channels,
      kh,
      kw,
      sh,
      sw,
      ph,
      pw,
      dh,
      dw,
      groups,
      out_size(height, kh, sh, ph, dh),
      out_size(width, kw, sw, pw, dw)};
}

// Calls f(weight, input, output) with the indices of every term of the convolution of one lane.
template <class F>
void for_conv_terms(const ConvShape& s, F f) {
  const int channels = s.channels / s.groups, rows = s.out_channels / s.groups;
  for (int o = 0; o < s.out_channels; ++o)
    for (int c = 0; c < channels; ++c)
      for (int ky = 0; ky < s.kernel_h; ++ky)
        for (int kx = 0; kx < s.kernel_w; ++kx)
          for (int oy = 0; oy < s.out_h; ++oy)
            for (int ox = 0; ox < s.out_w; ++ox) {
              const int y = oy * s.stride_h - s.pad_h + ky * s.dilation_h, x = ox * s.stride_w - s.pad_w + kx * s.dilation_w;
              if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
              f(((o * channels + c) * s.kernel_h + ky) * s.kernel_w + kx, ((o / rows * channels + c) * s.height + y) * s.width + x,
                (o * s.out_h + oy) * s.out_w + ox);
            }
}

// Values and the sums of absolute values of their terms.
struct Sums {
  std::vector<double> value, size;
  explicit Sums(std::size_t count) : value(count), size(count) {}
  void add(std::size_t at, double term) {
    value[at] += term;
    size[at] += std::fabs(term);
  }
  void check(const Floats& got, const char* what, const ConvShape& s) const {
    for (std::size_t i = 0; i < value.size(); ++i) expect(close(got[i], value[i], size[i]), what, i, s.channels, s.kernel_w);
  }
};

template <class F>
Floats same_for_all_shares(const Floats& before, const char* what, F f) {
  Floats first;
  for (int size : {1, 2, 5}) {
    Floats result = before;
    with_team(size, [&](Share share) { f(result.data(), share); });
    if (size == 1) first = result;
    expect(same_bits(first, result), what, size, 0, 0);
  }
  return first;
}

void test_conv(const ConvShape& s, int group_count, bool accumulate, bool with_bias, bool with_dx) {
  const std::size_t inputs = static_cast<std::size_t>(s.channels) * s.height * s.width,
                    outputs = static_cast<std::size_t>(s.out_channels) * s.out_h * s.out_w;
  const std::size_t weights = static_cast<std::size_t>(s.out_channels) * (s.channels / s.groups) * s.kernel_h * s.kernel_w;
  const std::ptrdiff_t stride = std::max(inputs, outputs) * kLanes + 48;
  const Groups groups{group_count, stride};
  const std::size_t all = stride * group_count;
  const Floats w = random_floats(weights), bias = random_floats(s.out_channels), x = random_floats(all), dx = random_floats(all),
               g = random_floats(all), before = random_floats(all), gradient_before = random_floats(weights);
  const float factor = 0.75f;
  const Floats out = same_for_all_shares(before, "conv, shares", [&](float* to, Share share) {
    conv(w.data(), with_bias ? bias.data() : nullptr, x.data(), to, s, accumulate, groups, share);
  });
  const Floats back = same_for_all_shares(
      before, "conv_t, shares", [&](float* to, Share share) { conv_t(w.data(), g.data(), to, s, accumulate, groups, share); });
  const Floats gradient = same_for_all_shares(gradient_before, "conv_learn, shares", [&](float* to, Share share) {
    conv_learn(g.data(), x.data(), with_dx ? dx.data() : nullptr, to, factor, s, groups, share);
  });
  Sums expected_out(all), expected_back(all), expected_gradient(weights);
  for (std::size_t i = 0; i < all; ++i) {
    const std::size_t within = i % stride / kLanes;
    if (accumulate || within >= outputs) expected_out.add(i, before[i]);
    if (accumulate || within >= inputs) expected_back.add(i, before[i]);
    if (with_bias && within < outputs) expected_out.add(i, bias[within / (s.out_h * s.out_w)]);
  }
  for (std::size_t i = 0; i < weights; ++i) expected_gradient.add(i, gradient_before[i]);
  for_conv_terms(s, [&](std::size_t weight, std::size_t input, std::size_t output) {
    for (int group = 0; group < group_count; ++group)
      for (int lane = 0; lane < kLanes; ++lane) {
        const std::size_t i = group * stride + input * kLanes + lane, o = group * stride + output * kLanes + lane;
        expected_out.add(o, static_cast<double>(w[weight]) * x[i]);
        expected_back.add(i, static_cast<double>(w[weight]) * g[o]);
        expected_gradient.add(weight, static_cast<double>(factor) * g[o] * (with_dx ? x[i] + dx[i] : x[i]));
      }
  });
  expected_out.check(out, "conv", s);
  expected_back.check(back, "conv_t", s);
  expected_gradient.check(gradient, "conv_learn", s);
}

void test_conv() {
  const ConvShape shapes[] = {
      conv_shape(3, 9, 8, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1),   conv_shape(6, 7, 7, 16, 5, 5, 1, 1, 0, 0, 1, 1, 1),
      conv_shape(5, 6, 7, 7, 3, 3, 1, 1, 1, 1, 1, 1, 1),   conv_shape(4, 5, 4, 10, 5, 5, 1, 1, 2, 2, 1, 1, 1),
      conv_shape(4, 9, 10, 6, 3, 3, 2, 2, 1, 1, 1, 1, 1),  conv_shape(4, 8, 9, 6, 3, 2, 2, 3, 0, 2, 1, 1, 2),
      conv_shape(6, 9, 9, 9, 3, 3, 1, 1, 2, 2, 2, 2, 3),   conv_shape(3, 11, 12, 5, 4, 3, 3, 2, 4, 5, 2, 4, 1),
      conv_shape(7, 4, 4, 7, 3, 3, 1, 1, 1, 1, 1, 1, 7),   conv_shape(33, 3, 5, 13, 1, 1, 1, 1, 0, 0, 1, 1, 1),
      conv_shape(8, 6, 6, 8, 1, 1, 2, 2, 0, 0, 1, 1, 2),   conv_shape(70, 4, 4, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1),
      conv_shape(2, 3, 3, 2, 3, 3, 1, 1, 4, 4, 1, 1, 1),   conv_shape(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1),
      conv_shape(2, 5, 1, 129, 5, 1, 1, 1, 0, 0, 1, 1, 1), conv_shape(2, 2, 2, 3, 2, 2, 6, 4, 1, 1, 1, 3, 1),
      conv_shape(3, 10, 10, 4, 2, 2, 2, 2, 0, 0, 4, 6, 1), conv_shape(2, 6, 6, 3, 2, 2, 4, 4, 3, 3, 6, 6, 1),
      conv_shape(0, 4, 4, 3, 3, 3, 1, 1, 1, 1, 1, 1, 1),   conv_shape(3, 4, 4, 0, 3, 3, 1, 1, 1, 1, 1, 1, 1),
  };
  int number = 0;
  for (const ConvShape& shape : shapes)
    for (int groups : {1, 2, 3}) {
      test_conv(shape, groups, number % 2, number / 2 % 2, number / 3 % 2);
      ++number;
    }
}

// Of this thread alone, because the machine is shared.
double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec + 1e-9 * now.tv_nsec;
}

// The best of many runs.
template <class F>
double gflops(double flops, F f) {
  f();
  double best = 1e30;
  const double begin = cpu_seconds();
  for (long repeats = 1; cpu_seconds() - begin < 0.3;) {
    const double start = cpu_seconds();
    for (long i = 0; i < repeats; ++i) f();
    const double passed = cpu_seconds() - start;
    best = std::min(best, passed / repeats);
    if (passed < 2e-3) repeats *= 2;
  }
  return flops / best * 1e-9;
}

// Multiplications and additions in registers alone.
double peak() {
  constexpr int count = kRegisters == 32 ? 24 : 12;
  constexpr int rounds = 1000;
  static volatile float target;
  return gflops(2.0 * count * kWidth * rounds, [] {
    vec sums[count];
    for (vec& x : sums) x = splat(target);
    const vec a = splat(target), b = splat(target);
    for (int i = 0; i < rounds; ++i) {
#pragma GCC unroll 24
      for (int j = 0; j < count; ++j) {
        sums[j] = fma(a, sums[j], b);
        asm volatile("" :::);
      }
    }
    vec total = vec{};
    for (const vec& x : sums) total += x;
    target = sum(total);
  });
}

void report(const char* name, double speed, double best) {
  std::printf("%-44s %7.1f GFLOP/s  %5.1f %% of peak\n", name, speed, 100 * speed / best);
}

template <int LANES>
void bench_linear(int outputs, int inputs, int positions, int group_count) {
  const std::ptrdiff_t stride = static_cast<std::ptrdiff_t>(outputs + inputs) * positions * LANES;
  const Floats w = random_floats(static_cast<std::size_t>(outputs) * inputs), bias = random_floats(outputs);
  Floats x = random_floats(stride * group_count), forward(packed_floats<LANES>(outputs, inputs)), backward = forward;
  pack_forward<LANES>(w.data(), outputs, inputs, forward.data(), {0, 1});
  pack_backward<LANES>(w.data(), outputs, inputs, backward.data(), {0, 1});
  const Weight packed{w.data(), outputs, inputs, forward.data(), backward.data()}, plain{w.data(), outputs, inputs, nullptr, nullptr};
  const Groups groups{group_count, stride};
  float* out = x.data() + static_cast<std::ptrdiff_t>(inputs) * positions * LANES;
  const double flops = 2.0 * outputs * inputs * positions * group_count * LANES;
  const double best = peak();
  for (bool use_panels : {true, false}) {
    if (LANES == 1 && use_panels) continue;
    const Weight& weight = use_panels ? packed : plain;
    char name[100];
    std::snprintf(
        name, sizeof name, "linear<%d>   N=%d K=%d P=%d G=%d%s", LANES, outputs, inputs, positions, group_count,
        use_panels ? " packed" : "");
    report(name, gflops(flops, [&] { linear<LANES>(weight, bias.data(), x.data(), out, positions, false, groups, {0, 1}); }), best);
    std::snprintf(
        name, sizeof name, "linear_t<%d> N=%d K=%d P=%d G=%d%s", LANES, outputs, inputs, positions, group_count,
        use_panels ? " packed" : "");
    report(name, gflops(flops, [&] { linear_t<LANES>(weight, out, x.data(), positions, false, groups, {0, 1}); }), best);
  }
  if (LANES == 1) return;
  const double bytes = 4.0 * outputs * inputs;
  std::printf(
      "  pack_forward %.2f GB/s, pack_backward %.2f GB/s\n",
      gflops(bytes, [&] { pack_forward<LANES>(w.data(), outputs, inputs, forward.data(), {0, 1}); }),
      gflops(bytes, [&] { pack_backward<LANES>(w.data(), outputs, inputs, backward.data(), {0, 1}); }));
}

void bench_outer(int outputs, int inputs, long rows, int count) {
  std::vector<OuterTerm> terms;
  std::vector<Floats> arrays;
  arrays.reserve(2 * count);
  for (int i = 0; i < count; ++i) {
    arrays.push_back(random_floats(rows / count * outputs));
    arrays.push_back(random_floats(rows / count * inputs));
    terms.push_back({arrays[2 * i].data(), arrays[2 * i + 1].data(), rows / count, 1, inputs, 1.0f});
  }
  Floats gradient(static_cast<std::size_t>(outputs) * inputs), bias(outputs);
  const double best = peak();
  char name[100];
  std::snprintf(name, sizeof name, "outer N=%d K=%d rows=%ld", outputs, inputs, rows);
  report(
      name,
      gflops(
          2.0 * outputs * inputs * rows,
          [&] { outer_products(terms.data(), count, gradient.data(), bias.data(), outputs, inputs, 1.0f, {0, 1}); }),
      best);
}

void bench_conv(const ConvShape& s, int group_count) {
  const std::size_t inputs = static_cast<std::size_t>(s.channels) * s.height * s.width,
                    outputs = static_cast<std::size_t>(s.out_channels) * s.out_h * s.out_w;
  const std::size_t weights = static_cast<std::size_t>(s.out_channels) * (s.channels / s.groups) * s.kernel_h * s.kernel_w;
  const std::ptrdiff_t stride = (2 * inputs + outputs) * kLanes;
  const Groups groups{group_count, stride};
  Floats arena = random_floats(stride * group_count), w = random_floats(weights), bias = random_floats(s.out_channels), gradient = w;
  float *x = arena.data(), *dx = x + inputs * kLanes, *out = dx + inputs * kLanes;
  double flops = 0;
  for_conv_terms(s, [&](std::size_t, std::size_t, std::size_t) { flops += 2.0 * kLanes * group_count; });
  const double best = peak();
  const auto print = [&](const char* what, double speed) {
    char name[100];
    std::snprintf(
        name, sizeof name, "%s %dx%dx%d -> %d k%d G=%d", what, s.channels, s.height, s.width, s.out_channels, s.kernel_w, group_count);
    report(name, speed, best);
  };
  print("conv", gflops(flops, [&] { conv(w.data(), bias.data(), x, out, s, false, groups, {0, 1}); }));
  print("conv_t", gflops(flops, [&] { conv_t(w.data(), out, dx, s, false, groups, {0, 1}); }));
  print("learn", gflops(flops, [&] { conv_learn(out, x, nullptr, gradient.data(), 1e-9f, s, groups, {0, 1}); }));
  print("learn+dx", gflops(flops, [&] { conv_learn(out, x, dx, gradient.data(), 1e-9f, s, groups, {0, 1}); }));
}

void bench() {
  std::printf("register loop: %.1f GFLOP/s\n", peak());
  bench_linear<16>(300, 300, 1, 4);
  bench_linear<16>(300, 784, 1, 4);
  bench_linear<16>(1056, 1056, 1, 4);
  bench_linear<16>(10, 300, 1, 4);
  bench_linear<16>(300, 300, 1, 1);
  bench_linear<1>(300, 784, 1, 1);
  bench_linear<1>(300, 300, 1, 1);
  bench_linear<1>(1056, 1056, 1, 1);
  bench_linear<1>(300, 784, 64, 1);
  bench_outer(300, 784, 64, 1);
  bench_outer(300, 300, 64, 1);
  bench_outer(10, 300, 64, 1);
  bench_outer(1056, 1056, 3200, 50);
  bench_outer(1056, 1056, 64, 1);
  bench_conv(conv_shape(3, 32, 32, 6, 5, 5, 1, 1, 0, 0, 1, 1, 1), 4);
  bench_conv(conv_shape(6, 14, 14, 16, 5, 5, 1, 1, 0, 0, 1, 1, 1), 4);
  bench_conv(conv_shape(128, 16, 16, 256, 3, 3, 1, 1, 1, 1, 1, 1, 1), 1);
  bench_conv(conv_shape(3, 32, 32, 128, 3, 3, 1, 1, 1, 1, 1, 1, 1), 4);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "bench") {
    bench();
    return 0;
  }
  test_linear<16>();
  test_linear<1>();
  test_outer();
  test_conv();
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
