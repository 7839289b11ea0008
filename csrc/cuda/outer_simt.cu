#include "outer.cuh"

namespace pckernels::cuda {
namespace {

// A thread computes 4 x 4.
struct SimtOuter {
  float sums[4][4] = {};

  __device__ void multiply(const OuterTile& tile) {
#pragma unroll 4
    for (int row = 0; row < DEPTH; ++row) {
      const float4 g = *reinterpret_cast<const float4*>(&tile.g[row][threadIdx.x / 16 * 4]);
      const float4 x = *reinterpret_cast<const float4*>(&tile.x[row][threadIdx.x % 16 * 4]);
      const float left[4] = {g.x, g.y, g.z, g.w}, right[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 16; ++k) sums[k / 4][k % 4] += left[k / 4] * right[k % 4];
    }
  }

  template <class Body>
  __device__ void write(Body body) const {
#pragma unroll
    for (int k = 0; k < 16; ++k) body(threadIdx.x / 16 * 4 + k / 4, threadIdx.x % 16 * 4 + k % 4, sums[k / 4][k % 4]);
  }
};

}  // namespace

__global__ void __launch_bounds__(THREADS) outer_simt(const OuterArguments arguments) {
  __shared__ float4 memory[sizeof(OuterTile) / sizeof(float4)];
  compute_outer(arguments, *reinterpret_cast<OuterTile*>(memory), SimtOuter{});
}

void (*const outer_simt_kernel)(OuterArguments) = &outer_simt;

}  // namespace pckernels::cuda
