#include "outer.cuh"
#include "product_mma.cuh"

namespace pckernels::cuda {
namespace {

// A warp computes 16 rows times 32 columns: 4 products of 8 columns. mma's depth is the rows of g and x.
template <class Format>
struct MmaOuter {
  float sums[4][4] = {};

  static __device__ int first_row() { return threadIdx.x / WARP % 4 * 16; }
  static __device__ int first_column() { return threadIdx.x / WARP / 4 * 32; }

  __device__ void multiply(const OuterTile& tile) {
    const int member = threadIdx.x % 4, group = threadIdx.x % WARP / 4;
#pragma unroll
    for (int start = 0; start < DEPTH; start += Format::ROWS) {
      const uint2 upper = operand(tile.g, start, member, first_row() + group);
      const uint2 lower = operand(tile.g, start, member, first_row() + group + 8);
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        const uint2 b = operand(tile.x, start, member, first_column() + part * 8 + group);
        Format::multiply(sums[part], make_uint4(upper.x, lower.x, upper.y, lower.y), b);
      }
    }
  }

  template <class Body>
  __device__ void write(Body body) const {
    const int row = first_row() + threadIdx.x % WARP / 4, column = first_column() + threadIdx.x % 4 * 2;
#pragma unroll
    for (int k = 0; k < 16; ++k) body(row + k % 4 / 2 * 8, column + k / 4 * 8 + k % 2, sums[k / 4][k % 4]);
  }

 private:
  static __device__ __forceinline__ uint2 operand(const float (&rows)[DEPTH][STRIDE], int start, int member, int column) {
    float values[Format::PARTS];
#pragma unroll
    for (int part = 0; part < Format::PARTS; ++part) values[part] = rows[start + row_in_tile(member, part)][column];
    return Format::pack(values);
  }
};

}  // namespace

__global__ void __launch_bounds__(THREADS) outer_mma(const OuterArguments arguments) {
  __shared__ float4 memory[sizeof(OuterTile) / sizeof(float4)];
  OuterTile& tile = *reinterpret_cast<OuterTile*>(memory);
  switch (arguments.precision) {
    case Precision::TF32:
      return compute_outer(arguments, tile, MmaOuter<Tf32>{});
    case Precision::BF16:
      return compute_outer(arguments, tile, MmaOuter<Bf16>{});
    default:
      return compute_outer(arguments, tile, MmaOuter<Fp16>{});
  }
}

void (*const outer_mma_kernel)(OuterArguments) = &outer_mma;

}  // namespace pckernels::cuda
