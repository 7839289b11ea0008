// Instructions of the chip that C++ has no words for: conversions of operands, warp-wide products, and dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pckernels::cuda {

// The one array of dynamic shared memory that a block has.
__device__ __forceinline__ char* dynamic_shared_memory() {
  extern __shared__ float4 pckernels_shared[];
  return reinterpret_cast<char*>(pckernels_shared);
}

__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
__device__ __forceinline__ double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// A float32 rounded to tf32, to nearest, ties away from zero; in the place of a float32.
__device__ __forceinline__ std::uint32_t to_tf32(float x) {
  std::uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// Two numbers rounded to 16 bits, to nearest even; `low` in the low half.
__device__ __forceinline__ std::uint32_t to_bf16x2(float low, float high) {
  std::uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
__device__ __forceinline__ std::uint32_t to_fp16x2(float low, float high) {
  std::uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// c (16, 8) += a (16, K) b (K, 8), spread over a warp as PTX says of mma.m16n8k8 (tf32) and m16n8k16 (16 bits). Volatile, so that the
// compiler does not move them to where only a part of the warp goes.
__device__ __forceinline__ void mma_tf32(float (&c)[4], uint4 a, uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint4 a, uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
__device__ __forceinline__ void mma_fp16(float (&c)[4], uint4 a, uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Puts a kernel on a stream. Returns what CUDA says about it.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                   Parameters... parameters) {
  void* addresses[] = {&parameters...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), addresses, shared_bytes, stream);
}

}  // namespace pckernels::cuda
