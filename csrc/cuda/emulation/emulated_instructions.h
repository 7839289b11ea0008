// What instructions.cuh gives, on the CPU. The spread of mma's operands over a warp is that of the PTX manual.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace pckernels::cuda {

inline char* dynamic_shared_memory() { return emulation::shared; }

[[noreturn]] inline void stop() { emulation::stop("a kernel without code for this architecture was launched."); }

constexpr bool HAS_CLUSTERS = true;
inline void meet_cluster() { emulation::meet_cluster(); }

template <int COUNT>
void copy_of_peer(float* target, int rank) {
  std::memcpy(target, emulation::of_peer(target, rank), COUNT * sizeof(float));
}

template <class T>
T shuffle_xor(T value, int mask) {
  const char* all = emulation::exchange(&value, sizeof value);
  T result;
  std::memcpy(&result, all + (threadIdx.x % 32 ^ mask) * sizeof value, sizeof value);
  return result;
}

inline std::uint32_t bits_of(float x) {
  std::uint32_t result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}
inline float float_of(std::uint32_t x) {
  float result;
  std::memcpy(&result, &x, sizeof x);
  return result;
}

inline std::uint32_t to_tf32(float x) { return (bits_of(x) + 0x1000u) & 0xffffe000u; }  // finite numbers alone
inline std::uint32_t to_bf16(float x) { return (bits_of(x) + 0x7fffu + (bits_of(x) >> 16 & 1u)) >> 16; }
inline std::uint32_t to_fp16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  std::uint16_t result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}
inline std::uint32_t to_bf16x2(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline std::uint32_t to_fp16x2(float low, float high) { return to_fp16(low) | to_fp16(high) << 16; }
inline float from_bf16(std::uint32_t x) { return float_of(x << 16); }
inline float from_fp16(std::uint32_t x) {
  const std::uint16_t low = static_cast<std::uint16_t>(x);
  _Float16 half;
  std::memcpy(&half, &low, sizeof half);
  return static_cast<float>(half);
}

struct Operands {
  std::uint32_t a[4], b[2];
};

// a(row, k) and b(k, column) find an element among the operands of the warp's threads.
template <class A, class B>
void multiply(float (&c)[4], int depth, A a, B b) {
  const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
  for (int part = 0; part < 4; ++part) {
    const int row = group + part / 2 * 8, column = member * 2 + part % 2;
    for (int k = 0; k < depth; ++k) c[part] += a(row, k) * b(k, column);
  }
}

inline const Operands* gather(uint4 a, uint2 b) {
  const Operands mine{{a.x, a.y, a.z, a.w}, {b.x, b.y}};
  return reinterpret_cast<const Operands*>(emulation::exchange(&mine, sizeof mine));
}

inline void mma_tf32(float (&c)[4], uint4 a, uint2 b) {
  const Operands* all = gather(a, b);
  multiply(
      c, 8, [=](int row, int k) { return float_of(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]); },
      [=](int k, int column) { return float_of(all[column * 4 + k % 4].b[k / 4]); });
}

template <class Convert>
void mma_16(float (&c)[4], uint4 a, uint2 b, Convert convert) {
  const Operands* all = gather(a, b);
  const auto half = [=](std::uint32_t pair, int k) { return convert(pair >> k % 2 * 16 & 0xffffu); };
  multiply(
      c, 16, [=](int row, int k) { return half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k); },
      [=](int k, int column) { return half(all[column * 4 + k % 8 / 2].b[k / 8], k); });
}
inline void mma_bf16(float (&c)[4], uint4 a, uint2 b) { mma_16(c, a, b, from_bf16); }
inline void mma_fp16(float (&c)[4], uint4 a, uint2 b) { mma_16(c, a, b, from_fp16); }

template <class... Parameters>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t,
                            Parameters... parameters) {
  emulation::run_blocks(grid, cluster, threads, shared_bytes, [&] { kernel(parameters...); });
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                   Parameters... parameters) {
  return launch_clusters(1, kernel, grid, threads, shared_bytes, stream, parameters...);
}

}  // namespace pckernels::cuda
