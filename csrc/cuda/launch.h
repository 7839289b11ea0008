// A program's kernels on a stream: nothing is allocated, nothing waits, so that a call can be captured in a CUDA graph.
#pragma once

#include <cstdint>
#include <string>

#include "layout.h"

namespace pckernels::cuda {

struct Call {
  const std::uintptr_t* weights;  // device addresses of float32 arrays, one for each slot of the program
  const std::uintptr_t* io;
  const std::uintptr_t* gradients;
  double* energies;    // (steps + 1, slots)
  const char* tables;  // the program's tables in memory of the same device
  char* workspace;     // of at least workspace(cut).bytes
  std::int64_t workspace_bytes;
  float factor;
  int device;
  std::uintptr_t stream;
};

// Throws std::invalid_argument for a cut that there is no kernel for or a workspace that is too small, std::runtime_error for what CUDA
// refuses.
void run(const Layout& layout, const Cut& cut, const Call& call);

// Numbers of lanes that tiles can have.
std::vector<int> lanes_of(Product product);

// Why no kernel can run here; empty if one can.
std::string why_unusable();
int runtime_version();

}  // namespace pckernels::cuda
