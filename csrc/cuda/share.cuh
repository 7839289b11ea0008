// What a block does of the tile that it works on: all of it, or its share as one of the blocks of a cluster, which have an arena each. Who
// owns which rows, and what is executed as a whole, is said in pckernels/sharding.py.
#pragma once

#include "device.h"
#include "tables.h"

namespace pckernels::cuda {

// first .. last - 1.
struct Range {
  int first, last;
};

// A block that has its tile to itself.
class Alone {
 public:
  __device__ Alone(const TileArguments&, Packing) {}
  __device__ int rank() const { return 0; }
  __device__ int blocks() const { return 1; }
  __device__ Range rows(int n) const { return {0, n}; }
  // Units of the packed weights that the block has in shared memory.
  __device__ Range resident(const TileArguments& arguments) const { return {0, arguments.resident}; }
  __device__ bool runs_whole(const Instruction&) const { return true; }
  __device__ bool counts(const Instruction&) const { return true; }
  __device__ void meet() const { __syncthreads(); }
};

class Member {
 public:
  __device__ Member(const TileArguments& arguments, Packing packing)
      : blocks_(arguments.cluster), rank_(static_cast<int>(blockIdx.x) % arguments.cluster) {
    const Panel* panels = arguments.tables.panels + rank_ * arguments.tables.panels_of_block;
    resident_.first = panels->start[static_cast<int>(packing)];
    resident_.last = arguments.resident ? panels[arguments.tables.panels_of_loop].start[static_cast<int>(packing)] : resident_.first;
  }
  __device__ int rank() const { return rank_; }
  __device__ int blocks() const { return blocks_; }

  // Those of n that this block owns.
  __device__ Range rows(int n) const {
    const int step = share_of(n, blocks_), first = rank_ * step < n ? rank_ * step : n;
    return {first, n - first < step ? n : first + step};
  }

  __device__ Range resident(const TileArguments&) const { return resident_; }

  // Of instructions that sum: whether every block goes through all rows.
  __device__ bool runs_whole(const Instruction& i) const { return i.op == Op::LOSS && i.n > ROW_GROUP && !adds_shares(i); }

  // Whether this block's sum is a part of the tile's.
  __device__ bool counts(const Instruction& i) const { return rank_ == 0 || adds_shares(i); }

  // All threads of all blocks, which see what the others have written.
  __device__ void meet() const { meet_cluster(); }

  // Copies the rows of others from their arenas into this block's.
  template <int LANES>
  __device__ void gather(float* arena, const Instruction& i) const {
    constexpr int COUNT = LANES < 4 ? LANES : 4, PARTS = LANES / COUNT;  // numbers at once; those of a row
    const int count = i.n * PARTS, offset = i.out - i.a, width = i.p[0], step = share_of(width, blocks_);
    float* first = arena + i.out * LANES;
#pragma unroll 4
    for (int item = threadIdx.x; item < count; item += blockDim.x) {
      const int owner = (offset + item / PARTS) % width / step;
      if (owner != rank_) copy_of_peer<COUNT>(first + item * COUNT, owner);
    }
  }

 private:
  // A loss of each sample is one block's, and so is one over the classes of a position.
  static __device__ bool adds_shares(const Instruction& i) {
    return i.op != Op::LOSS || (static_cast<Loss>(i.p[0]) == Loss::SQUARED_ERROR && i.slot2 == ABSENT);
  }

  const int blocks_, rank_;
  Range resident_;
};

}  // namespace pckernels::cuda
