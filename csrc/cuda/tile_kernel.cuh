// The kernel that executes tiles: a block takes every gridDim-th one. It is compiled once for each number of lanes and kind of product.
#pragma once

#include "team.cuh"

namespace pckernels::cuda {

template <class T>
__device__ void fill_zero(T* target, std::ptrdiff_t count) {
  for (std::ptrdiff_t k = threadIdx.x; k < count; k += blockDim.x) target[k] = T{};
}

__device__ inline BlockMemory block_memory(const TileArguments& arguments) {
  char* memory = dynamic_shared_memory();
  char* packed = memory + SUM_BYTES + arguments.arena_bytes;
  const uint4* source = reinterpret_cast<const uint4*>(arguments.packed);
  for (int k = threadIdx.x; k < arguments.resident; k += blockDim.x) reinterpret_cast<uint4*>(packed)[k] = source[k];
  return {reinterpret_cast<SumMemory*>(memory), reinterpret_cast<float*>(memory + SUM_BYTES), packed};
}

// Whether this compilation has the instructions of a product.
template <Product PRODUCT>
constexpr bool HAS_PRODUCT = PRODUCT != Product::WGMMA || HAS_WGMMA;

template <int LANES, Product PRODUCT>
__global__ void __launch_bounds__(THREADS, 2) execute_tiles(const TileArguments arguments) {
  if constexpr (!HAS_PRODUCT<PRODUCT>) {
    stop();
  } else {
    const BlockMemory memory = block_memory(arguments);
    const Code code{arguments.tables.phases, arguments.tables.phase_count, arguments.tables.instructions};
    fill_zero(arguments.learned + std::ptrdiff_t{static_cast<int>(blockIdx.x)} * arguments.learn_size, arguments.learn_size);
    const int size = (arguments.steps + 1) * arguments.slots;
    for (int tile = blockIdx.x; tile < arguments.tiles; tile += gridDim.x) {
      fill_zero(arguments.energies + std::ptrdiff_t{tile} * size, size);  // slots of steps that the light cone leaves out
      __syncthreads();                                                    // also for the sums that the tile before has left
      CudaTeam<LANES, PRODUCT> team(arguments, memory, tile);
      run_phases(team, code);
    }
  }
}

}  // namespace pckernels::cuda
