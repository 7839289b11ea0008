// What a thread is given to execute a tile: plain data, the same for every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../engine/instruction.h"
#include "barrier.h"

namespace pckernels {

constexpr int GROUP = 16;  // samples of a lane group

// Rows are cut into blocks, whatever the number of threads: a thread takes whole ones, and sums are added block by block in their order.
constexpr int BLOCK = 1024;     // numbers of a block of rows, about: the blocks of several arrays fit into the first cache
constexpr int UNIT_BLOCKS = 8;  // of a sum over other units, at most

constexpr int blocks_of(int rows, int lanes) {
  const std::int64_t blocks = std::int64_t{rows} * lanes / BLOCK;
  return blocks > 1 ? static_cast<int>(blocks) : 1;
}

// A weight as products read it: packed panels where the call has packed them.
struct WeightArrays {
  const float* data;
  const float* forward;
  const float* backward;
};

// A sum whose blocks lie in partial_sums, from `start` on, until all threads have computed theirs.
struct PendingSum {
  const Instruction* instruction;
  int blocks;
  float scale;
  std::ptrdiff_t start;
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
  double* partial_sums;  // (2, sum_size): of the LOSS and NORM instructions of a step, (groups, blocks, lanes) each
  std::ptrdiff_t sum_size;
  PendingSum* pending;
  Barrier* barrier;  // of a team of several threads
};

}  // namespace pckernels
