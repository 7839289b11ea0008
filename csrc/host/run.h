// A program executed on a batch by the host's threads.
#pragma once

#include <cstdint>

#include "analysis.h"
#include "kernels.h"
#include "program.h"

namespace pckernels {

struct Call {
  const std::uintptr_t* weights;  // addresses of float32 arrays, one for each slot of the program
  const std::uintptr_t* io;
  const std::uintptr_t* gradients;
  double* energies;  // (steps + 1, slots)
  std::int64_t batch;
  int threads;
  float factor;
  int tile_groups;  // lane groups of a tile; 0: chosen here
};

// How many multiplications between two barriers pay for one more thread in a team that shares a tile. Tests lower it.
extern double work_of_thread;

// Gradients and energies are written, whatever they held. Results do not depend on the number of threads, bit for bit.
void run(const Program& program, const Analysis& analysis, const Kernels& kernels, const Call& call);

}  // namespace pckernels
