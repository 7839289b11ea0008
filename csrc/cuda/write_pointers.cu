// Addresses travel as parameters of a kernel: a copy from the host's memory could not be captured in a CUDA graph.
#include "device.h"
#include "kernels.h"

namespace pckernels::cuda {

__global__ void write_pointers(const PointerChunk chunk, std::uint64_t* target, int count) {
  for (int k = threadIdx.x; k < count; k += blockDim.x) target[k] = chunk.values[k];
}

void (*const write_pointers_kernel)(PointerChunk, std::uint64_t*, int) = &write_pointers;

}  // namespace pckernels::cuda
