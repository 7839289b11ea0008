// Sums over a block, in double and in a fixed order. The sums of a step wait in shared memory, so that a barrier serves several of them.
#pragma once

#include "geometry.cuh"

namespace pckernels::cuda {

constexpr int WAITING = 8;  // sums that one barrier serves

// In shared memory. Sums go to one half while the other is being added up.
struct SumMemory {
  double parts[2][WAITING][WARPS];
  double scales[2][WAITING];
  int slots[2][WAITING];
  double lanes[WARPS][WARP];
};

constexpr int SUM_BYTES = (sizeof(SumMemory) + 15) / 16 * 16;

class BlockSums {
 public:
  __device__ explicit BlockSums(SumMemory* memory) : memory_(memory) {}

  // energies[slot] of this step will be scale times the sum over the block.
  __device__ void add(double value, double scale, int slot, double* energies) {
    value = warp_sum(value);
    if (threadIdx.x % WARP == 0) memory_->parts[half_][count_][threadIdx.x / WARP] = value;
    if (threadIdx.x == 0) {
      memory_->scales[half_][count_] = scale;
      memory_->slots[half_][count_] = slot;
    }
    if (++count_ == WAITING) flush(energies);
  }

  // Writes what waits. Of two sums with the same slot the later one stands.
  __device__ void flush(double* energies) {
    if (count_ == 0) return;
    __syncthreads();
    const int mine = threadIdx.x;
    if (mine < count_ && !overwritten(mine)) {
      double sum = 0.0;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) sum += memory_->parts[half_][mine][warp];
      energies[memory_->slots[half_][mine]] = memory_->scales[half_][mine] * sum;
    }
    half_ ^= 1, count_ = 0;
  }

  // target[lane * 1] = the sum over all threads of this lane; thread k has lane k % LANES.
  template <int LANES>
  __device__ void add_lanes(double value, float* target, int samples) {
    for (int mask = WARP / 2; mask >= LANES; mask /= 2) value += shuffle_xor(value, mask);
    const int lane = threadIdx.x % WARP;
    if (lane < LANES) memory_->lanes[threadIdx.x / WARP][lane] = value;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < samples) {
      double sum = 0.0;
      for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) sum += memory_->lanes[warp][threadIdx.x];
      target[threadIdx.x] = static_cast<float>(sum);
    }
    __syncthreads();
  }

 private:
  __device__ bool overwritten(int mine) const {
    for (int later = mine + 1; later < count_; ++later) {
      if (memory_->slots[half_][later] == memory_->slots[half_][mine]) return true;
    }
    return false;
  }

  SumMemory* memory_;
  int half_ = 0, count_ = 0;
};

}  // namespace pckernels::cuda
