// What a thread is given to execute a tile: plain data, the same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../engine/instruction.h"
#include "barrier.h"

namespace pckernels {

constexpr int GROUP = 16;  // samples of a lane group
constexpr int CHUNKS = 8;  // parts of a sum over rows, added in their order whatever thread computed them

// A weight as products read it: packed panels where the call has packed them.
struct WeightArrays {
  const float* data;
  const float* forward;
  const float* backward;
};

// A sum over rows whose chunks lie in partial_sums until all threads have computed theirs.
struct PendingSum {
  const Instruction* instruction;
  int chunks;
  float scale;
};

// A tile: consecutive samples and all that their inference reads and writes.
struct Tile {
  float* arena;
  std::ptrdiff_t stride;  // floats from a lane group's arena to the next
  int groups;
  std::int64_t first_sample;
  int samples;
  const WeightArrays* weights;
  float* const* io;
  float* const* gradients;  // what the tile's samples add to each gradient, summed with those of other tiles later
  double* energies;         // (groups, steps + 1, slots)
  int steps, slots;
  // Of a team of several threads; (2, sums, groups, CHUNKS, lanes) and (sums,), `sums` the most LOSS and NORM instructions of a phase.
  double* partial_sums;
  PendingSum* pending;
  int sums;
  Barrier* barrier;
};

}  // namespace pckernels
