// Plain data that the host lays out and the kernels read. Addresses inside them are of device memory.
#pragma once

#include <cstdint>

#include "../engine/instruction.h"

namespace pckernels::cuda {

// How a product multiplies: fp32 arithmetic, or tensor cores over operands rounded to tf32, bf16 or fp16 and added up in fp32.
enum class Precision : std::int32_t { FP32, TF32, BF16, FP16 };
// wgmma's staging buffer holds a multiple of so many rows of v: those of the tiles whose products run at once.
constexpr int STAGED_ROWS = 64;

// What multiplies: fp32 arithmetic, a warp's tensor core product (mma), or a warpgroup's (wgmma), which reads v from a staging buffer.
enum class Product : std::int32_t { SIMT, MMA, WGMMA };
// How a weight is packed for it. A 16-bit format is packed alike whichever it is.
enum class Packing : std::int32_t { ROWS, TILES_8, TILES_16 };
constexpr int PACKINGS = 3;

inline Packing packing_of(Precision precision) {
  if (precision == Precision::FP32) return Packing::ROWS;
  return precision == Precision::TF32 ? Packing::TILES_8 : Packing::TILES_16;
}

// A weight (outputs, inputs) as one direction of its products reads it: a matrix M (depth, width), so that out (width) = v (depth) M.
// LINEAR: M = W^T, depth = inputs. LINEAR_T: M = W, depth = outputs.
//   ROWS: float32 (depth, width), width rounded up to 4.
//   TILES_n: 512 bytes for each (16 columns of M, n rows of M), the rows of a column block in a row: a warp's A operand of mma, or its
//   quarter of wgmma's, 16 bytes a thread.
struct Panel {
  std::int32_t slot, depth, width, transposed;  // transposed: M = W^T
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
};

// What a block needs to execute tiles.
struct TileArguments {
  Tables tables;
  const float* const* weights;
  float* const* io;
  const char* packed;
  double* energies;  // (tiles, steps + 1, slots)
  float* learned;    // (blocks, learn_size)
  int batch, tiles, steps, slots, learn_size;
  int arena_bytes;
  int resident;  // units of 16 bytes at the start of `packed` that are copied into shared memory
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
  const double* tile_energies;  // (tiles, energy_count)
  double* energies;
  int gradient_count, splits, partial_size, blocks, learn_size, tiles, energy_count;
  float factor;
};

}  // namespace pckernels::cuda
