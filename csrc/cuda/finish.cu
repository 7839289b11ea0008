// Adds up what blocks and tiles left, in a fixed order: a thread for each number of the gradients, then a warp for each energy.
#include "geometry.cuh"
#include "kernels.h"

namespace pckernels::cuda {
namespace {

__device__ float sum_of(const float* first, int count, int step) {
  float sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < count; ++k) sum += first[std::ptrdiff_t{k} * step];
  return sum;
}

__device__ void finish_gradient(const FinishArguments& arguments, int index) {
  int found = 0;
  const GradientSource* sources = arguments.tables.sources;
  while (found + 1 < arguments.tables.source_count && index >= sources[found + 1].first) ++found;
  const GradientSource& source = sources[found];
  const int inside = index - source.first;
  float sum = 0.0f;
  if (source.product_at != ABSENT) {
    sum += sum_of(arguments.partial + source.product_at + inside, arguments.splits, arguments.partial_size);
  }
  if (source.learned_at != ABSENT) {
    sum += sum_of(arguments.learned + source.learned_at + inside, arguments.blocks, arguments.learn_size);
  }
  arguments.gradients[found][inside] = arguments.factor * sum;
}

__device__ void finish_energy(const FinishArguments& arguments, int index) {
  double sum = 0.0;
#pragma unroll 4
  for (int tile = threadIdx.x % WARP; tile < arguments.tiles; tile += WARP) {
    sum += arguments.tile_energies[std::ptrdiff_t{tile} * arguments.energy_count + index];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) arguments.energies[index] = sum;
}

}  // namespace

__global__ void __launch_bounds__(THREADS) finish(const FinishArguments arguments) {
  const int index = blockIdx.x * THREADS + threadIdx.x, whole_warps = (arguments.gradient_count + WARP - 1) / WARP * WARP;
  if (index < arguments.gradient_count) finish_gradient(arguments, index);
  const int energy = (index - whole_warps) / WARP;
  if (index >= whole_warps && energy < arguments.energy_count) finish_energy(arguments, energy);
}

void (*const finish_kernel)(FinishArguments) = &finish;

}  // namespace pckernels::cuda
