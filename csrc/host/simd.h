// The native vector of floats of the instruction set that is compiled for, and the few operations the host's kernels need of it.
//
// vec is a GCC vector type: + - * / and comparisons work on it as they are, with a float on either side as well, and a comparison gives an
// ivec of 0 and -1. The functions here add what operators do not give. Selections are by the bits of a mask; NaN goes through
// all functions; nothing depends on -ffast-math.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef PCK_ISA
#error "define PCK_ISA, the namespace of the instruction set"
#endif

namespace pckernels::PCK_ISA {

// A test may ask for a width without its instructions: GCC then makes one vector of several registers.
#if defined(PCK_PORTABLE_WIDTH)
constexpr int kWidth = PCK_PORTABLE_WIDTH;
#elif defined(__AVX512F__)
#define PCK_SIMD_AVX512
constexpr int kWidth = 16;
#elif defined(__AVX__)
#define PCK_SIMD_AVX
constexpr int kWidth = 8;
#else
#if defined(__SSE__)
#define PCK_SIMD_SSE
#elif defined(__aarch64__)
#define PCK_SIMD_NEON
#endif
constexpr int kWidth = 4;
#endif

typedef float vec __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t ivec __attribute__((vector_size(4 * kWidth)));   // masks and signed integers
typedef std::uint32_t uvec __attribute__((vector_size(4 * kWidth)));  // bits

inline vec load(const float* source) {
  vec result;
  std::memcpy(&result, source, sizeof result);
  return result;
}

inline void store(float* target, vec value) { std::memcpy(target, &value, sizeof value); }

#if defined(PCK_SIMD_AVX)
// All ones in the first `count` lanes.
inline __m256i first_lanes(int count) {
  static const std::int32_t ones_then_zeros[2 * kWidth] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones_then_zeros + kWidth - count));
}
#endif

// The first `count` <= kWidth floats of source, and zeros; nothing behind them is read.
inline vec load_first(const float* source, int count) {
#if defined(PCK_SIMD_AVX512)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), source);
#elif defined(PCK_SIMD_AVX)
  return _mm256_maskload_ps(source, first_lanes(count));
#else
  float all[kWidth] = {};
  for (int i = 0; i < count; ++i) all[i] = source[i];
  return load(all);
#endif
}

inline void store_first(float* target, vec value, int count) {
#if defined(PCK_SIMD_AVX512)
  _mm512_mask_storeu_ps(target, static_cast<__mmask16>((1u << count) - 1u), value);
#elif defined(PCK_SIMD_AVX)
  _mm256_maskstore_ps(target, first_lanes(count), value);
#else
  float all[kWidth];
  store(all, value);
  for (int i = 0; i < count; ++i) target[i] = all[i];
#endif
}

inline vec splat(float x) {
#if defined(PCK_SIMD_AVX512)
  return _mm512_set1_ps(x);
#elif defined(PCK_SIMD_AVX)
  return _mm256_set1_ps(x);
#elif defined(PCK_SIMD_SSE)
  return _mm_set1_ps(x);
#elif defined(PCK_SIMD_NEON)
  return vdupq_n_f32(x);
#else
  return vec{} + x;
#endif
}

// a * b + c, rounded once where the instruction set has that.
inline vec fma(vec a, vec b, vec c) {
#if defined(PCK_SIMD_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(PCK_SIMD_AVX) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(PCK_SIMD_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline uvec bits(vec x) { return reinterpret_cast<uvec>(x); }
inline vec from_bits(uvec x) { return reinterpret_cast<vec>(x); }

inline ivec gt(vec a, vec b) { return a > b; }
inline vec select(ivec mask, vec yes, vec no) { return mask ? yes : no; }

// Whether a mask is set in every lane.
inline bool all(ivec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#else
  bool result = true;
  for (int k = 0; k < kWidth; ++k) result = result && mask[k];
  return result;
#endif
}

// The larger and the smaller; b where either is NaN, so that a bound given as a lets NaN through.
inline vec max(vec a, vec b) {
#if defined(PCK_SIMD_AVX512)
  return _mm512_maskz_max_ps(0xffff, a, b);  // the form without a mask draws a false warning from GCC 12
#elif defined(PCK_SIMD_AVX)
  return _mm256_max_ps(a, b);
#elif defined(PCK_SIMD_SSE)
  return _mm_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

inline vec min(vec a, vec b) {
#if defined(PCK_SIMD_AVX512)
  return _mm512_maskz_min_ps(0xffff, a, b);  // the form without a mask draws a false warning from GCC 12
#elif defined(PCK_SIMD_AVX)
  return _mm256_min_ps(a, b);
#elif defined(PCK_SIMD_SSE)
  return _mm_min_ps(a, b);
#else
  return select(a < b, a, b);
#endif
}

#if defined(PCK_SIMD_AVX512) || defined(PCK_SIMD_AVX)
inline float sum_of_eight(__m256 x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
#endif

// The sum of the lanes, in a fixed order.
inline float sum(vec x) {
#if defined(PCK_SIMD_AVX512)
  const __m512d both = _mm512_castps_pd(x);
  const __m256d low = _mm512_maskz_extractf64x4_pd(0xff, both, 0), high = _mm512_maskz_extractf64x4_pd(0xff, both, 1);
  return sum_of_eight(_mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high)));
#elif defined(PCK_SIMD_AVX)
  return sum_of_eight(x);
#else
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

inline vec absolute(vec x) { return from_bits(bits(x) & 0x7fffffffu); }
inline vec with_sign_of(vec size, vec sign) { return from_bits(bits(size) | (bits(sign) & 0x80000000u)); }

// c0 + c1 x + c2 x^2 + ..
inline vec horner(vec, float c0) { return splat(c0); }
template <class... Rest>
inline vec horner(vec x, float c0, Rest... rest) {
  return fma(x, horner(x, rest...), splat(c0));
}

// e^x. The power of two is applied in two factors, because one alone would overflow below the largest result and above denormal ones.
inline vec exp(vec x) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
  const vec y = min(splat(89.0f), max(splat(-104.0f), x));
  const vec shifted = fma(y, splat(1.44269504f), splat(round));
  const vec n = shifted - round;
  const vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), y));
  const vec p = horner(r, 4.999999335e-01f, 1.666651913e-01f, 4.166840572e-02f, 8.368898680e-03f, 1.381422176e-03f);
  const ivec exponent = reinterpret_cast<ivec>(bits(shifted)) - 0x4b400000;
  const ivec half = exponent >> 1;
  const vec low = reinterpret_cast<vec>((half + 127) << 23);
  const vec high = reinterpret_cast<vec>((exponent - half + 127) << 23);
  return (fma(r * r, p, r) + 1.0f) * low * high;
}

inline vec tanh(vec x) {
  const vec size = absolute(x);
  const vec y = x * x;
  const vec q = horner(y, -3.333333080e-01f, 1.333320601e-01f, -5.394676310e-02f, 2.170070338e-02f, -8.177398570e-03f, 2.142962102e-03f);
  const vec small = fma(x * y, q, x);  // x alone near 0
  const vec large = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return select(size < 0.6f, small, with_sign_of(large, x));
}

inline vec sigmoid(vec x) {
  const vec e = exp(-absolute(x));  // at most 1, so that nothing overflows and the left tail keeps its digits
  return select(x < 0.0f, e, splat(1.0f)) / (e + 1.0f);
}

// The error function.
inline vec erf(vec x) {
  const vec size = absolute(x);
  const vec q = horner(
      x * x, 1.283791657e-01f, -3.761262568e-01f, 1.128358324e-01f, -2.685372179e-02f, 5.188137362e-03f, -8.008355924e-04f,
      7.847250236e-05f);
  const vec log_rest = horner(
      min(splat(4.0f), size), -2.447225062e-04f, -1.127474947e+00f, -6.375170771e-01f, -1.036402626e-01f, 2.208761030e-02f,
      -3.008528971e-03f, 1.924251718e-04f);  // log(1 - erf)
  return select(size < 1.0f, fma(x, q, x), with_sign_of(1.0f - exp(log_rest), x));
}

constexpr int kLanes = 16;  // samples of a lane group
constexpr int kVectorsPerGroup = kLanes / kWidth;

// One row of a lane group.
struct lanes {
  vec part[kVectorsPerGroup];
};

inline lanes load_lanes(const float* source) {
  lanes result;
  for (int i = 0; i < kVectorsPerGroup; ++i) result.part[i] = load(source + i * kWidth);
  return result;
}

inline void store_lanes(float* target, const lanes& value) {
  for (int i = 0; i < kVectorsPerGroup; ++i) store(target + i * kWidth, value.part[i]);
}

inline lanes fma(const lanes& a, const lanes& b, const lanes& c) {
  lanes result;
  for (int i = 0; i < kVectorsPerGroup; ++i) result.part[i] = fma(a.part[i], b.part[i], c.part[i]);
  return result;
}

inline float sum(const lanes& x) {
  vec total = x.part[0];
  for (int i = 1; i < kVectorsPerGroup; ++i) total += x.part[i];
  return sum(total);
}

}  // namespace pckernels::PCK_ISA
