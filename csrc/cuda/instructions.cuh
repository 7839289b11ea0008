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

__device__ __forceinline__ void stop() { __trap(); }

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

// Whether this code is for an architecture whose blocks come in clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool HAS_CLUSTERS = true;
#else
constexpr bool HAS_CLUSTERS = false;
#endif

// All threads of a cluster meet; what any has written before, all see behind.
__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// COUNT (1, 2 or 4) numbers of this block's shared memory become what block `rank` of the cluster has there. Volatile, so that no read
// moves across a meeting.
template <int COUNT>
__device__ __forceinline__ void copy_of_peer(float* target, int rank) {
  const std::uint32_t here = static_cast<std::uint32_t>(__cvta_generic_to_shared(target));
  std::uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  float x[COUNT];
  if constexpr (COUNT == 4) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(there));
    *reinterpret_cast<float4*>(target) = make_float4(x[0], x[1], x[2], x[3]);
  } else if constexpr (COUNT == 2) {
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(there));
    *reinterpret_cast<float2*>(target) = make_float2(x[0], x[1]);
  } else {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x[0]) : "r"(there));
    *target = x[0];
  }
}

// Puts a kernel on a stream, its blocks in clusters of so many. Returns what CUDA says about it.
template <class... Parameters>
cudaError_t launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes,
                            cudaStream_t stream, Parameters... parameters) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = static_cast<unsigned>(cluster);
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = grid, configuration.blockDim = dim3(threads);
  configuration.dynamicSmemBytes = shared_bytes, configuration.stream = stream;
  configuration.attrs = &size, configuration.numAttrs = 1;
  void* addresses[] = {&parameters...};
  return cudaLaunchKernelExC(&configuration, reinterpret_cast<const void*>(kernel), addresses);
}

// Puts a kernel on a stream. Returns what CUDA says about it.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::size_t shared_bytes, cudaStream_t stream,
                   Parameters... parameters) {
  void* addresses[] = {&parameters...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), addresses, shared_bytes, stream);
}

}  // namespace pckernels::cuda
