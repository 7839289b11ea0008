// Products on tensor cores by warpgroups (wgmma, sm_90a alone): as product_mma.cuh otherwise.
//
// A warpgroup computes 64 columns of M for all lanes. In product_mma.cuh every warp reads v in fp32 from shared memory and rounds it for
// itself: at 16 lanes 4 KiB for 64 columns and 16 rows, whose weights are 2 KiB. Here v is rounded once into a staging buffer, and the
// tensor cores themselves read 1/2 KiB of that; so what a product takes is the reading of its weights, which with 32 lanes serves twice the
// samples. The weight is the A operand, in registers and packed as for mma: of wgmma's fragment each warp has one of mma.
//
// The buffer holds v as the B operand, K-major without swizzling: cells of 16 bytes, numbers of one lane from 8 (16 bits) or 4 (tf32)
// consecutive places of a tile's depth. The cells of 8 lanes make up a core matrix of 128 bytes, those of all lanes follow each other, and
// then comes the next cell of the depth. It may be less deep than v: then the parts of a product are added up in the arena.
//
// There is no kernel for 64 lanes: their arena fits no MLP of 784 inputs in use; 784-128-64-10 takes 228 KiB by the exact rule, 312 KiB by
// strict dynamics.
#pragma once

#include "product_mma.cuh"
#include "tables.h"

namespace pckernels::cuda {

constexpr int WARPGROUP = 4 * WARP;
constexpr int CELL = 16;  // bytes

// What a descriptor says of B: where it starts, and the bytes from one cell of the depth to the next (`leading`) and from 8 lanes to the
// next 8 (`stride`).
__device__ __forceinline__ std::uint64_t matrix_descriptor(std::uint32_t start, std::uint32_t leading, std::uint32_t stride) {
  const auto encoded = [](std::uint32_t bytes) { return std::uint64_t{(bytes & 0x3ffffu) >> 4}; };
  return encoded(start) | encoded(leading) << 16 | encoded(stride) << 32;
}

// FORMATs for wgmma: a word of a cell from the parts of one member of a tile, and the product.
struct WgmmaTf32 {
  static constexpr int ROWS = Tf32::ROWS, PARTS = 1;  // of a tile; of a word
  static __device__ __forceinline__ std::uint32_t word(const float (&x)[PARTS]) { return to_tf32(x[0]); }
  template <class Sums>
  static __device__ __forceinline__ void multiply(Sums& sums, const uint4& a, std::uint64_t b) {
    wgmma_tf32(sums, a, b);
  }
};
struct WgmmaBf16 {
  static constexpr int ROWS = Bf16::ROWS, PARTS = 2;
  static __device__ __forceinline__ std::uint32_t word(const float (&x)[PARTS]) { return to_bf16x2(x[0], x[1]); }
  template <class Sums>
  static __device__ __forceinline__ void multiply(Sums& sums, const uint4& a, std::uint64_t b) {
    wgmma_bf16(sums, a, b);
  }
};
struct WgmmaFp16 {
  static constexpr int ROWS = Fp16::ROWS, PARTS = 2;
  static __device__ __forceinline__ std::uint32_t word(const float (&x)[PARTS]) { return to_fp16x2(x[0], x[1]); }
  template <class Sums>
  static __device__ __forceinline__ void multiply(Sums& sums, const uint4& a, std::uint64_t b) {
    wgmma_fp16(sums, a, b);
  }
};

// Shared memory for v in the tensor cores' format: `rows` of it, a multiple of STAGED_ROWS.
struct Staging {
  char* memory;
  int rows;
};

template <int LANES, class Format>
struct WgmmaProduct {
  static constexpr int GROUPS = LANES / 8, CELLS = 2;  // of lanes; of a tile's depth
  static constexpr int TILE_BYTES = CELLS * LANES * CELL;
  static constexpr int BATCH = 4;  // tiles whose products run at once
  static_assert(STAGED_ROWS % (BATCH * Format::ROWS) == 0, "a piece of the depth ends with a batch");

  static __device__ void run(const char* panel, const float* bias, const float* v, float* out, int positions, int depth, int width,
                             int step, bool accumulate, const Staging& staging) {
    for (int position = 0; position < positions; ++position) {
      for (int row = 0; row < depth; row += staging.rows) {
        const int rows = depth - row < staging.rows ? depth - row : staging.rows;
        __syncthreads();  // nobody reads what was staged before
        stage(v + (position * depth + row) * LANES, rows, staging.memory);
        fence_proxy_async();
        __syncthreads();
        multiply_columns(panel, row / Format::ROWS, rows, row == 0 ? bias : nullptr, staging.memory, out + position * step * LANES, depth,
                         width, accumulate || row > 0);
      }
    }
  }

 private:
  static __device__ __forceinline__ int tiles_of(int rows) { return (rows + Format::ROWS - 1) / Format::ROWS; }

  // Zero up to a whole number of batches: beyond its end an array holds anything, NaN too.
  static __device__ __forceinline__ void stage(const float* v, int rows, char* memory) {
    const int batches = (tiles_of(rows) + BATCH - 1) / BATCH;
    for (int item = threadIdx.x; item < batches * BATCH * CELLS * LANES; item += blockDim.x) {
      const int lane = item % LANES, half = item / LANES % CELLS, first = item / LANES / CELLS * Format::ROWS;
      std::uint32_t words[4];
#pragma unroll
      for (int member = 0; member < 4; ++member) {
        float x[Format::PARTS];
#pragma unroll
        for (int part = 0; part < Format::PARTS; ++part) {
          const int row = first + row_in_tile(member, half * Format::PARTS + part);
          x[part] = row < rows ? v[row * LANES + lane] : 0.0f;
        }
        words[member] = Format::word(x);
      }
      reinterpret_cast<uint4*>(memory)[item] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // The part of the product that is staged: `rows` rows from tile `first` of each column block on.
  static __device__ __forceinline__ void multiply_columns(const char* panel, int first, int rows, const float* bias, const char* staged,
                                                          float* out, int depth, int width, bool accumulate) {
    const int blocks = (width + 15) / 16, warpgroups = blockDim.x / WARPGROUP, tiles = tiles_of(rows);
    const std::uint64_t b = matrix_descriptor(shared_address(staged), LANES * CELL, 8 * CELL);
    for (int unit = threadIdx.x / WARPGROUP; unit * 4 < blocks; unit += warpgroups) {
      const int block = unit * 4 + threadIdx.x % WARPGROUP / WARP;
      const uint4* weights = reinterpret_cast<const uint4*>(panel) + (block * tiles_of(depth) + first) * WARP + threadIdx.x % WARP;
      float sums[GROUPS][4] = {};
      multiply(weights, block < blocks ? tiles : 0, tiles, b, sums);
      write_columns<LANES>(sums, bias, out, block * 16, width, accumulate);
    }
  }

  // All warps of the warpgroup take part in all products; one beyond the last column block has no tiles.
  static __device__ __forceinline__ void multiply(const uint4* weights, int own_tiles, int tiles, std::uint64_t b,
                                                  float (&sums)[GROUPS][4]) {
    uint4 next[BATCH];
    load(weights, 0, own_tiles, next);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += BATCH) {
      uint4 a[BATCH];
#pragma unroll
      for (int k = 0; k < BATCH; ++k) a[k] = next[k];
      load(weights, tile + BATCH, own_tiles, next);  // arrives while the tensor cores work
      hold(sums);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BATCH; ++k) Format::multiply(sums, a[k], b + (tile + k) * (TILE_BYTES / CELL));
      wgmma_commit();
      wgmma_wait();
      hold(sums);
    }
  }

  static __device__ __forceinline__ void load(const uint4* weights, int first, int tiles, uint4 (&a)[BATCH]) {
#pragma unroll
    for (int k = 0; k < BATCH; ++k) a[k] = first + k < tiles ? weights[(first + k) * WARP] : make_uint4(0, 0, 0, 0);
  }
};

// The product of the precision that was asked for.
template <int LANES>
struct WarpgroupProduct {
  static __device__ void run(Precision precision, const char* panel, const float* bias, const float* v, float* out, int positions,
                             int depth, int width, int step, bool accumulate, const Staging& staging) {
    switch (precision) {
      case Precision::TF32:
        return WgmmaProduct<LANES, WgmmaTf32>::run(panel, bias, v, out, positions, depth, width, step, accumulate, staging);
      case Precision::BF16:
        return WgmmaProduct<LANES, WgmmaBf16>::run(panel, bias, v, out, positions, depth, width, step, accumulate, staging);
      default:
        return WgmmaProduct<LANES, WgmmaFp16>::run(panel, bias, v, out, positions, depth, width, step, accumulate, staging);
    }
  }
};

}  // namespace pckernels::cuda
