// wgmma, the asynchronous product of a warpgroup: instructions that only sm_90a has. PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pckernels::cuda {

// Code for other architectures, and PTX that a driver would translate for a newer one, cannot hold these instructions.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool HAS_WGMMA = true;
#else
constexpr bool HAS_WGMMA = false;
#endif

// An address in shared memory as a descriptor names it.
__device__ __forceinline__ std::uint32_t shared_address(const void* generic) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(generic));
}

// What this thread has written to shared memory by ordinary stores becomes visible to the tensor cores' own reads of it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Between other accesses to the registers of a product and the product.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// The compiler leaves the sums alone until here: it does not know that products write them after they were issued.
template <int GROUPS>
__device__ __forceinline__ void hold(float (&sums)[GROUPS][4]) {
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    asm volatile("" : "+f"(sums[group][0]), "+f"(sums[group][1]), "+f"(sums[group][2]), "+f"(sums[group][3])::"memory");
  }
}

#define PCK_SUMS(GROUP) "+f"(d[GROUP][0]), "+f"(d[GROUP][1]), "+f"(d[GROUP][2]), "+f"(d[GROUP][3])
#define PCK_OPERANDS "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)

// d (64, 8 GROUPS) += a (64, K) b (K, 8 GROUPS), d and a spread over a warpgroup as PTX says of m64nNk16 (16 bits) and m64nNk8 (tf32), b in
// shared memory as its descriptor says, K-major.
#define PCK_WGMMA(NAME, SHAPE, END) \
  __device__ __forceinline__ void NAME(float(&d)[2][4], const uint4& a, std::uint64_t b) { \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n16" SHAPE \
                 " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1" END ";\n}" \
                 : PCK_SUMS(0), PCK_SUMS(1) \
                 : PCK_OPERANDS); \
  } \
  __device__ __forceinline__ void NAME(float(&d)[4][4], const uint4& a, std::uint64_t b) { \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\nwgmma.mma_async.sync.aligned.m64n32" SHAPE \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1" END ";\n}" \
                 : PCK_SUMS(0), PCK_SUMS(1), PCK_SUMS(2), PCK_SUMS(3) \
                 : PCK_OPERANDS); \
  }
PCK_WGMMA(wgmma_tf32, "k8.f32.tf32.tf32", "")
PCK_WGMMA(wgmma_bf16, "k16.f32.bf16.bf16", ", 0")
PCK_WGMMA(wgmma_fp16, "k16.f32.f16.f16", ", 0")
#undef PCK_WGMMA
#undef PCK_OPERANDS
#undef PCK_SUMS

}  // namespace pckernels::cuda
