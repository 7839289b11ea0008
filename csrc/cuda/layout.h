// What the host works out about a program before it runs on a GPU: tables for the kernels, and where everything lies in the workspace.
#pragma once

#include <cstdint>
#include <vector>

#include "../host/analysis.h"
#include "../host/program.h"
#include "tables.h"

namespace pckernels::cuda {

// How a call is cut: what the planner decides.
struct Cut {
  std::int64_t batch;
  int lanes;      // samples of a tile
  int blocks;     // at most; 0: chosen here
  bool resident;  // weights that the loop reads are copied into shared memory
  Precision precision;
  Product product;
  int staged;  // rows of v that wgmma's staging buffer holds; otherwise 0
};

// Byte offsets into the workspace, and how many of everything there are.
struct WorkspaceLayout {
  std::int64_t pointers, packed, energies, learned, partial, bytes;
  int tiles, blocks, splits;
};

class Layout {
 public:
  // For blocks that execute a tile alone, or in clusters of so many. Throws std::invalid_argument as check() does, and for what clusters
  // cannot execute.
  explicit Layout(Program program, int cluster = 1);

  const Program& program() const { return program_; }
  const Analysis& analysis() const { return analysis_; }
  int cluster() const { return cluster_; }

  // The tables as bytes for device memory, and what they are when they lie there.
  const std::vector<char>& table_bytes() const { return bytes_; }
  Tables tables(const char* address) const;

  WorkspaceLayout workspace(const Cut& cut) const;
  int packed_units(Precision precision) const { return units_[static_cast<int>(packing_of(precision))]; }
  // Units of 16 bytes that a block's loop reads, at most.
  int loop_units(Precision precision) const { return loop_units_[static_cast<int>(packing_of(precision))]; }
  std::int64_t arena_bytes(int lanes) const { return (std::int64_t{program_.rows} * lanes * 4 + 15) / 16 * 16; }
  static std::int64_t staging_bytes(const Cut& cut) {
    return std::int64_t{cut.staged} * cut.lanes * (cut.precision == Precision::TF32 ? 4 : 2);
  }
  std::int64_t shared_bytes(const Cut& cut) const;
  int outer_tiles() const { return outer_tiles_; }
  int product_size() const { return product_size_; }
  int gradient_count() const { return gradient_count_; }
  int energy_count() const { return (program_.steps + 1) * program_.energies; }

 private:
  void check_cluster() const;
  void find_panels();
  void place_panels();
  void find_sums();
  void find_sources();
  void write_tables();

  Program program_;
  const int cluster_;
  Analysis analysis_;
  std::vector<Instruction> instructions_;
  std::vector<Panel> panels_;
  std::vector<bool> in_loop_;  // of each panel of a block
  std::vector<GradientSum> sums_;
  std::vector<Term> terms_;
  std::vector<GradientSource> sources_;
  std::vector<char> bytes_;
  std::size_t starts_[6] = {};
  int units_[PACKINGS] = {}, loop_units_[PACKINGS] = {};
  int panels_of_block_ = 0, panels_of_loop_ = 0;
  int outer_tiles_ = 0, product_size_ = 0, gradient_count_ = 0;
};

}  // namespace pckernels::cuda
