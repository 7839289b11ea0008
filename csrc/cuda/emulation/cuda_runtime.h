// Stands in for CUDA's header when g++ compiles the kernels to run them on the CPU, where no GPU is at hand: the threads of a block, or of
// all blocks of a cluster, are fibers that take turns between barriers, in an order drawn at random. It proves indices, barriers and the
// order of sums; not speed, and not what only hardware has (address spaces, memory order between blocks).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <tuple>
#include <vector>

#define PCK_EMULATED_RUNTIME
#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {
struct Place {
  dim3 thread, block, block_size, grid;
};
extern Place place;  // of the fiber that runs
extern char* shared;
void meet();                                      // __syncthreads
void meet_cluster();                              // all threads of all blocks of a cluster
const char* of_peer(const void* mine, int rank);  // where block `rank` of the cluster has what this one has at `mine`

// What the `size` threads of a warp (32) or a warpgroup (128) give, in a row.
const char* exchange(const void* mine, std::size_t bytes, int size = 32);

// Asynchronous work of the thread that runs: what it has issued runs when it waits, if it was committed before, as late as it may.
struct Asynchronous {
  bool fenced = false;  // since it waited, registers are its own again
  std::vector<std::function<void()>> issued, committed;
};
Asynchronous& asynchronous();

// Shared memory of the block as asynchronous work sees it: as it was when a thread of it last fenced. NaN before.
void fence_proxy();
const char* proxy_view(std::size_t start, std::size_t bytes);  // stops where this is outside

[[noreturn]] void stop(const char* why);  // run_blocks throws
void run_blocks(dim3 grid, int cluster, int threads, std::size_t shared_bytes, const std::function<void()>& body);
}  // namespace emulation

#define threadIdx (emulation::place.thread)
#define blockIdx (emulation::place.block)
#define blockDim (emulation::place.block_size)
#define gridDim (emulation::place.grid)

inline void __syncthreads() { emulation::meet(); }
inline void __syncwarp() { emulation::exchange("", 1); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorNoDevice,
  cudaErrorInsufficientDriver,
  cudaErrorNoKernelImageForDevice,
  cudaErrorInvalidDeviceFunction,
  cudaErrorMemoryAllocation
};
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* capability = std::getenv("PCKERNELS_EMULATED_CAPABILITY");  // as 100 for 10.0
  const int found = capability ? std::atoi(capability) : 90;
  return *value = attribute == cudaDevAttrComputeCapabilityMajor ? found / 10 : found % 10, cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
