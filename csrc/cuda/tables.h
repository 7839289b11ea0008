// Plain data that the host lays out and the kernels read. Addresses inside them are of device memory.
#pragma once

#include <cstdint>

#include "../engine/instruction.h"

namespace pckernels::cuda {

// How a product multiplies: fp32 arithmetic, or tensor cores over operands rounded to tf32, bf16 or fp16 and added up in fp32.
enum class Precision : std::int32_t { FP32, TF32, BF16, FP16 };

// What multiplies: fp32 arithmetic, a warp's tensor core product (mma), or a warpgroup's (wgmma), which reads v from a staging buffer.
enum class Product : std::int32_t { SIMT, MMA, WGMMA };
// wgmma's staging buffer holds a multiple of so many rows of v: those of the tiles whose products run at once.
constexpr int STAGED_ROWS = 64;

// How a weight is packed for it. A 16-bit format is packed alike whichever it is.
enum class Packing : std::int32_t { ROWS, TILES_8, TILES_16 };
constexpr int PACKINGS = 3;

#ifdef __CUDACC__
#define PCK_ANYWHERE __host__ __device__
#else
#define PCK_ANYWHERE
#endif

constexpr int ROW_GROUP = 16;  // rows: arrays start at multiples of it

// Rows, or columns, of each block of a cluster, of `width`: share() of pckernels/sharding.py.
PCK_ANYWHERE constexpr int share_of(int width, int blocks) {
  return (width + ROW_GROUP * blocks - 1) / (ROW_GROUP * blocks) * ROW_GROUP;
}

inline Packing packing_of(Precision precision) {
  if (precision == Precision::FP32) return Packing::ROWS;
  return precision == Precision::TF32 ? Packing::TILES_8 : Packing::TILES_16;
}

// A weight (outputs, inputs) as one direction of its products reads it: a matrix M (depth, width), so that out (width) = v (depth) M.
// LINEAR: M = W^T, depth = inputs. LINEAR_T: M = W, depth = outputs. Each block of a cluster has a panel of the columns that it owns.
//   ROWS: float32 (depth, width), width rounded up to 4.
//   TILES_n: 512 bytes for each (16 columns of M, n rows of M), the rows of a column block in a row: a warp's A operand of mma, or its
//   quarter of wgmma's, 16 bytes a thread.
struct Panel {
  std::int32_t slot, depth, width, transposed;  // transposed: M = W^T
  std::int32_t first_column, all_columns;       // where its columns begin among all of M's
  std::int32_t start[PACKINGS];                 // where it begins, in units of 16 bytes, for each packing
};

// One summand of a gradient: rows r of g (rows, outputs), and of x at (r / positions) * x_stride + x_offset + (r % positions) * inputs.
struct Term {
  std::int32_t g_slot, x_slot, positions, x_stride, x_offset;
  float coefficient;
};

// A weight's gradient (outputs, inputs), or only a bias's (inputs = 0), as a sum of terms. Tiles of SIDE x SIDE are what blocks compute.
struct GradientSum {
  std::int32_t outputs, inputs, weight_at, bias_at;  // where the results begin in the array of them all, or ABSENT
  std::int32_t first_term, terms, first_tile, tiles_across;
};
constexpr int SIDE = 64;

// What is added up for one gradient: what products wrote, and what tiles learned.
struct GradientSource {
  std::int32_t first, count;            // elements before it in all gradients; of its own
  std::int32_t product_at, learned_at;  // or ABSENT
};

// The program's tables in device memory.
struct Tables {
  const Instruction* instructions;
  const Phase* phases;
  const Panel* panels;
  const GradientSum* sums;
  const Term* terms;
  const GradientSource* sources;
  int phase_count, panel_count, sum_count, source_count;
  int panels_of_block, panels_of_loop;  // each block's follow each other, those that the loop reads first
};

// What a block needs to execute tiles.
struct TileArguments {
  Tables tables;
  const float* const* weights;
  float* const* io;
  const char* packed;
  double* energies;  // (tiles, blocks of a cluster, steps + 1, slots)
  float* learned;    // (blocks, learn_size)
  int batch, tiles, steps, slots, learn_size;
  int arena_bytes;
  int cluster;   // blocks that execute a tile together
  int resident;  // units of 16 bytes of `packed` that a block copies into shared memory, at most: its first panels
  Precision precision;
  int staged;  // rows of v that wgmma's staging buffer holds, the last part of shared memory; 0 without one
};

constexpr int CHUNK = 448;
struct PointerChunk {
  std::uint64_t values[CHUNK];
};

struct PackArguments {
  Tables tables;
  const float* const* weights;
  std::uint32_t* packed;
  int units;  // of 16 bytes
  Precision precision;
  Packing packing;
};

struct OuterArguments {
  Tables tables;
  const float* const* io;
  float* partial;  // (splits, size)
  int batch, splits, size;
  Precision precision;
};

struct FinishArguments {
  Tables tables;
  float* const* gradients;
  const float* partial;         // (splits, partial_size)
  const float* learned;         // (blocks, learn_size)
  const double* tile_energies;  // (tiles, energy_count): a row for each block of a cluster
  double* energies;
  int gradient_count, splits, partial_size, blocks, learn_size, tiles, energy_count;
  float factor;
};

}  // namespace pckernels::cuda
