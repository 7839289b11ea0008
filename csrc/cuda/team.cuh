// The Team of a CUDA block: see engine/engine.h for what a Team is. Its threads execute one tile of LANES samples, or the Share of it that
// is theirs. The arena lies in shared memory, [rows][LANES].
#pragma once

#include "device.h"

#include "../engine/engine.h"
#include "learn.cuh"
#include "product_mma.cuh"
#include "product_simt.cuh"
#include "product_wgmma.cuh"
#include "share.cuh"
#include "sums.cuh"

namespace pckernels::cuda {

// Where a body of the engine stands: one lane of one row.
struct ThreadAt {
  using Lane = float;
  int offset;
  bool valid;

  __device__ float operator()(const float* array) const { return array ? array[offset] : 0.0f; }
  __device__ void put(float* array, float value) const { array[offset] = value; }
  __device__ void put(float* array, float value, bool accumulate) const { array[offset] = accumulate ? array[offset] + value : value; }
  __device__ float if_valid(float value) const { return valid ? value : 0.0f; }
};

// Shared memory of a block: what sums need, the arena, and the packed weights that are resident.
struct BlockMemory {
  SumMemory* sums;
  float* arena;
  const char* packed;
};

// How weights are packed for a kernel, of which the compiler knows a part.
template <Product PRODUCT>
__device__ Packing packing_in(Precision precision) {
  if (PRODUCT == Product::SIMT) return Packing::ROWS;
  return precision == Precision::TF32 ? Packing::TILES_8 : Packing::TILES_16;
}

template <int LANE_COUNT, Product PRODUCT, class Share>
class CudaTeam {
 public:
  static constexpr int LANES = LANE_COUNT;
  static_assert(WARP % LANES == 0, "a thread keeps its lane");

  __device__ CudaTeam(const TileArguments& arguments, const BlockMemory& memory, const Share& share, int tile)
      : arguments_(arguments), memory_(memory), share_(share), sums_(memory.sums), tile_(tile), first_sample_(tile * LANES) {
    const int left = arguments.batch - first_sample_;
    samples_ = left < LANES ? left : LANES;
    valid_ = static_cast<int>(threadIdx.x) % LANES < samples_;
  }

  __device__ void begin_step(int t) {
    const std::ptrdiff_t row = std::ptrdiff_t{tile_} * share_.blocks() + share_.rank();
    energies_ = arguments_.energies + (row * (arguments_.steps + 1) + t) * arguments_.slots;
  }
  __device__ void end_step() { sums_.flush(energies_); }
  __device__ void begin_instruction(const Instruction&) {}
  __device__ void sync() { __syncthreads(); }
  __device__ void meet() const { share_.meet(); }
  __device__ void gather(const Instruction& i) const { share_.template gather<LANES>(memory_.arena, i); }
  __device__ float* array(int row) const { return row == ABSENT ? nullptr : memory_.arena + row * LANES; }

  template <class F>
  __device__ void for_each(int n, F f) const {
    for_rows(share_.rows(n), f);
  }

  template <class F>
  __device__ void for_blocks(int blocks, int n, F f) const {
#pragma unroll 1
    for (int item = threadIdx.x; item < blocks * n * LANES; item += blockDim.x) {
      const int block = item / (n * LANES);
      f(ThreadAt{item - block * n * LANES, valid_}, block);
    }
  }

  template <class F>
  __device__ void for_units(int count, F f) const {
#pragma unroll 1
    for (int item = threadIdx.x; item < count * LANES; item += blockDim.x) f(ThreadAt{item % LANES, valid_}, item / LANES);
  }

  template <class F>
  __device__ void sum_each(const Instruction& i, int n, float scale, F f) {
    double sum = 0.0;
    for_rows(share_.runs_whole(i) ? Range{0, n} : share_.rows(n), [&](ThreadAt at) {
      const float value = f(at);
      if (valid_) sum += value;
    });
    add_sum(i, scale, sum);
  }

  template <class F>
  __device__ void sum_units(const Instruction& i, int count, float scale, F f) {
    double sum = 0.0;
    const bool here = share_.runs_whole(i) || share_.rank() == 0;
    for_units(here ? count : 0, [&](ThreadAt at, int unit) {
      const float value = f(at, unit);
      if (valid_) sum += value;
    });
    add_sum(i, scale, sum);
  }

  // Neighbouring threads take neighbouring numbers of a sample.
  __device__ void load(const Instruction& i) const {
    float* out = array(i.out);
    const float* source = arguments_.io[i.slot] + std::ptrdiff_t{first_sample_} * i.p[0] + i.p[1];
    const int n = i.n, width = i.p[0];
#pragma unroll 1
    for (int item = threadIdx.x; item < n * LANES; item += blockDim.x) {
      const int lane = item / n, row = item - lane * n;
      out[row * LANES + lane] = lane < samples_ ? source[std::ptrdiff_t{lane} * width + row] : 0.0f;
    }
  }

  __device__ void store(const Instruction& i) const {
    const float *a = array(i.a), *b = array(i.b);
    float* target = arguments_.io[i.slot] + std::ptrdiff_t{first_sample_} * i.p[0] + i.p[1];
    const Range mine = share_.rows(i.n);
    const int n = mine.last - mine.first, width = i.p[0];
#pragma unroll 1
    for (int item = threadIdx.x; item < n * samples_; item += blockDim.x) {
      const int lane = item / n, row = mine.first + item - lane * n, place = row * LANES + lane;
      target[std::ptrdiff_t{lane} * width + row] = (a ? a[place] : 0.0f) + (b ? b[place] : 0.0f);
    }
  }

  __device__ void linear(const Instruction& i) const { product(i, bias(i), i.p[1], i.p[2]); }
  __device__ void linear_t(const Instruction& i) const { product(i, nullptr, i.p[2], i.p[1]); }

  __device__ void conv(const Instruction& i) const {
    cuda::conv<LANES>(arguments_.weights[i.slot], bias(i), array(i.a), array(i.out), ConvShape(i.p), i.accumulate);
  }
  __device__ void conv_t(const Instruction& i) const {
    cuda::conv_t<LANES>(arguments_.weights[i.slot], array(i.a), array(i.out), ConvShape(i.p), i.accumulate);
  }

  // Barriers in front: two instructions may add to one gradient, of which the memory plan knows nothing.
  __device__ void conv_learn(const Instruction& i) const {
    __syncthreads();
    cuda::conv_learn<LANES>(array(i.a), array(i.b), array(i.c), gradient(i), i.f[0], ConvShape(i.p), samples_);
  }
  __device__ void sum_learn(const Instruction& i) const {
    __syncthreads();
    cuda::sum_learn<LANES>(array(i.a), gradient(i), i.f[0], i.p[0], i.p[1], i.p[2], samples_);
  }

 private:
  template <class F>
  __device__ void for_rows(Range rows, F f) const {
    for (int at = rows.first * LANES + threadIdx.x; at < rows.last * LANES; at += blockDim.x) f(ThreadAt{at, valid_});
  }

  __device__ void add_sum(const Instruction& i, float scale, double sum) {
    if (!share_.counts(i)) return;
    if (i.op == Op::LOSS && i.slot2 != ABSENT) sums_.template add_lanes<LANES>(sum, arguments_.io[i.slot2] + first_sample_, samples_);
    sums_.add(sum, scale, i.slot, energies_);
  }

  __device__ const float* bias(const Instruction& i) const { return i.slot2 == ABSENT ? nullptr : arguments_.weights[i.slot2]; }

  // Of the block, of all tiles that it executes. `unused` is where it begins.
  __device__ float* gradient(const Instruction& i) const {
    return arguments_.learned + std::ptrdiff_t{static_cast<int>(blockIdx.x)} * arguments_.learn_size + i.unused;
  }

  // The block's panel that `unused` names, in shared memory if it is among the resident ones; and its columns of the result.
  __device__ void product(const Instruction& i, const float* bias, int depth, int width) const {
    const Range mine = share_.rows(width);
    const Panel& panel = arguments_.tables.panels[share_.rank() * arguments_.tables.panels_of_block + i.unused];
    const int start = panel.start[static_cast<int>(packing_in<PRODUCT>(arguments_.precision))];
    const Range here = share_.resident(arguments_);
    const bool resident = start >= here.first && start < here.last;
    const char* packed = resident ? memory_.packed + std::ptrdiff_t{start - here.first} * 16  //
                                  : arguments_.packed + std::ptrdiff_t{start} * 16;
    const float* from = bias ? bias + mine.first : nullptr;
    float* out = array(i.out) + mine.first * LANES;
    const int columns = mine.last - mine.first;
    if constexpr (PRODUCT == Product::WGMMA) {
      WarpgroupProduct<LANES>::run(arguments_.precision, packed, from, array(i.a), out, i.p[0], depth, columns, width, i.accumulate,
                                   staging());
    } else if constexpr (PRODUCT == Product::MMA) {
      TensorProduct<LANES>::run(arguments_.precision, packed, from, array(i.a), out, i.p[0], depth, columns, width, i.accumulate);
    } else {
      SimtProduct<LANES>::run(packed, from, array(i.a), out, i.p[0], depth, columns, width, i.accumulate);
    }
  }

  // Behind the resident weights.
  __device__ Staging staging() const {
    return {dynamic_shared_memory() + SUM_BYTES + arguments_.arena_bytes + arguments_.resident * 16, arguments_.staged};
  }

  const TileArguments& arguments_;
  const BlockMemory memory_;
  const Share share_;
  BlockSums sums_;
  const int tile_, first_sample_;
  int samples_;
  bool valid_;
  double* energies_ = nullptr;
};

template <Product PRODUCT>
constexpr bool HAS_IMAGES<CudaTeam<1, PRODUCT, Alone>> = true;
template <int LANES, Product PRODUCT>
constexpr bool HAS_IMAGES<CudaTeam<LANES, PRODUCT, Member>> = false;
template <int LANES, Product PRODUCT>
constexpr bool HAS_BLOCKS<CudaTeam<LANES, PRODUCT, Member>> = true;

}  // namespace pckernels::cuda
