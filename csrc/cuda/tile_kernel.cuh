// The kernels that execute tiles: of n blocks, or n clusters of them, each takes every n-th tile. They are compiled once for each number of
// lanes and kind of product.
#pragma once

#include "team.cuh"

namespace pckernels::cuda {

template <class T>
__device__ void fill_zero(T* target, std::ptrdiff_t count) {
  for (std::ptrdiff_t k = threadIdx.x; k < count; k += blockDim.x) target[k] = T{};
}

__device__ inline BlockMemory block_memory(const TileArguments& arguments, Range resident) {
  char* memory = dynamic_shared_memory();
  char* packed = memory + SUM_BYTES + arguments.arena_bytes;
  const uint4* source = reinterpret_cast<const uint4*>(arguments.packed) + resident.first;
  for (int k = threadIdx.x; k < resident.last - resident.first; k += blockDim.x) reinterpret_cast<uint4*>(packed)[k] = source[k];
  return {reinterpret_cast<SumMemory*>(memory), reinterpret_cast<float*>(memory + SUM_BYTES), packed};
}

template <int LANES, Product PRODUCT, class Share>
__device__ __forceinline__ void run_tiles(const TileArguments& arguments) {
  const Share share(arguments, packing_in<PRODUCT>(arguments.precision));
  const BlockMemory memory = block_memory(arguments, share.resident(arguments));
  const Code code{arguments.tables.phases, arguments.tables.phase_count, arguments.tables.instructions};
  fill_zero(arguments.learned + std::ptrdiff_t{static_cast<int>(blockIdx.x)} * arguments.learn_size, arguments.learn_size);
  const int size = (arguments.steps + 1) * arguments.slots;
  for (int tile = blockIdx.x / share.blocks(); tile < arguments.tiles; tile += gridDim.x / share.blocks()) {
    // Slots of steps that the light cone leaves out.
    fill_zero(arguments.energies + (std::ptrdiff_t{tile} * share.blocks() + share.rank()) * size, size);
    share.meet();  // also for the sums that the tile before has left, and for blocks that still read its arena
    CudaTeam<LANES, PRODUCT, Share> team(arguments, memory, share, tile);
    run_phases(team, code);
  }
}

// Kernels stop where the code is for an architecture that does not have what they need; the launcher does not launch them there.
template <int LANES, Product PRODUCT>
__global__ void __launch_bounds__(THREADS, 2) execute_tiles(const TileArguments arguments) {
  if constexpr (PRODUCT != Product::WGMMA || HAS_WGMMA) {
    run_tiles<LANES, PRODUCT, Alone>(arguments);
  } else {
    stop();
  }
}

// By the blocks of a cluster.
template <int LANES, Product PRODUCT>
__global__ void __launch_bounds__(THREADS, 1) execute_tiles_together(const TileArguments arguments) {
  if constexpr (HAS_CLUSTERS) {
    run_tiles<LANES, PRODUCT, Member>(arguments);
    meet_cluster();  // a block's memory must be there as long as others may read it
  } else {
    stop();
  }
}

}  // namespace pckernels::cuda
