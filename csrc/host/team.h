// The host's Team: one or several threads that execute a tile, with SIMD over samples (LANES = 16) or over rows (LANES = 1).
#pragma once

#include "lanes.h"

#include <algorithm>

#include "../engine/engine.h"
#include "products.h"
#include "tile.h"
#include "transpose.h"

namespace pckernels::PCK_ISA {

template <int LANE_COUNT>
class HostTeam {
 public:
  static constexpr int LANES = LANE_COUNT;

  HostTeam(const Tile& tile, int rank, int size) : tile_(tile), rank_(rank), size_(size) {}

  void begin_step(int t) { t_ = t; }

  // Sums of this step are complete when all have met; the next step with sums writes the other half of partial_sums.
  void end_step() {
    if (pending_ == 0) return;
    sync();
    if (rank_ == 0) put_sums();
    pending_ = 0, next_sum_ = 0, parity_ ^= 1;
  }

  void begin_instruction(const Instruction&) {}

  void sync() {
    if (size_ > 1) tile_.barrier->wait();
  }

  float* array(int row) const { return row == ABSENT ? nullptr : tile_.arena + std::ptrdiff_t{row} * LANES; }

  // Block after block, so that what an instruction leaves in the first cache the next ones find there.
  void run_rows(const Instruction* start, const Instruction* end) {
    const int blocks = blocks_of(start->n, LANES);
    const Part mine = part_of(blocks);
    for (int group = 0; group < tile_.groups; ++group) {
      for (int k = mine.low; k < mine.high; ++k) {
        block_ = {group, k, blocks, k == mine.low && group == 0, part(start->n, 16, k, blocks)};
        sums_of_run_ = 0;
        for (const Instruction* i = start; i != end; ++i) {
          if (t_ >= i->first) execute(*this, *i);
        }
      }
    }
    int sums = 0;
    for (const Instruction* i = start; i != end; ++i) sums += t_ >= i->first && (i->op == Op::NORM || i->op == Op::LOSS);
    keep_sums(sums, blocks);
  }

  // Inside a run: over the rows of the block.
  template <class F>
  void for_each(int, F f) {
    for_rows_of(block_.group, block_.rows, [&](auto at, int) { f(at); });
  }

  template <class F>
  void for_blocks(int blocks, int n, F f) {
    const bool split_blocks = blocks >= size_;
    const Part part = split_blocks ? part_of(blocks) : Part{0, blocks};
    const Part rows = split_blocks ? Part{0, n} : part_of_rows(n);
    for (int block = part.low; block < part.high; ++block) for_rows(rows, [&](auto at) { f(at, block); });
  }

  template <class F>
  void for_units(int count, F f) {
    const Part part = part_of(count);
    for (int group = 0; group < tile_.groups; ++group) {
      for (int unit = part.low; unit < part.high; ++unit) for_lanes(group, [&](auto at, int) { f(at, unit); });
    }
  }

  template <class F>
  void sum_each(const Instruction& i, int, float scale, F f) {
    sum_rows(block_.group, block_.rows, sums_of(i, scale), f);
    ++sums_of_run_;
  }

  template <class F>
  void sum_units(const Instruction& i, int count, float scale, F f) {
    const int blocks = std::clamp(count / 4, 1, UNIT_BLOCKS);
    const Part mine = part_of(blocks);
    sums_of_run_ = 0;
    for (int group = 0; group < tile_.groups; ++group) {
      for (int k = mine.low; k < mine.high; ++k) {
        block_ = {group, k, blocks, k == mine.low && group == 0, part(count, 1, k, blocks)};
        Sum total;
        for (int unit = block_.rows.low; unit < block_.rows.high; ++unit) {
          for_lanes(group, [&](auto at, int lane) { total.add(f(at, unit), lane); });
        }
        total.put(sums_of(i, scale));
      }
    }
    keep_sums(1, blocks);
  }

  void load(const Instruction& i) {
    const Part rows = part_of_rows(i.n);
    for (int group = 0; group < tile_.groups; ++group) {
      float* out = array(i.out) + group * tile_.stride;
      const float* source = io_row(i, group);
      if constexpr (LANES == 1) {
        for (int row = rows.low; row < rows.high; ++row) out[row] = source[row];
      } else {
        load_rows(source, i.p[0], out, rows.low, rows.high, samples_of(group), LANES);
      }
    }
  }

  void store(const Instruction& i) {
    const Part rows = part_of_rows(i.n);
    for (int group = 0; group < tile_.groups; ++group) {
      const float* a = i.a == ABSENT ? nullptr : array(i.a) + group * tile_.stride;
      const float* b = i.b == ABSENT ? nullptr : array(i.b) + group * tile_.stride;
      store_rows(a, b, io_row(i, group), i.p[0], rows.low, rows.high, samples_of(group), LANES);
    }
  }

  void linear(const Instruction& i) {
    pckernels::PCK_ISA::linear<LANES>(weight(i), bias(i), array(i.a), array(i.out), i.p[0], i.accumulate, groups(), share());
  }

  void linear_t(const Instruction& i) {
    pckernels::PCK_ISA::linear_t<LANES>(weight(i), array(i.a), array(i.out), i.p[0], i.accumulate, groups(), share());
  }

  void conv(const Instruction& i) {
    const float* w = tile_.weights[i.slot].data;
    pckernels::PCK_ISA::conv(w, bias(i), array(i.a), array(i.out), conv_shape(i), i.accumulate, groups(), share());
  }

  void conv_t(const Instruction& i) {
    const float* w = tile_.weights[i.slot].data;
    pckernels::PCK_ISA::conv_t(w, array(i.a), array(i.out), conv_shape(i), i.accumulate, groups(), share());
  }

  // Lanes without a sample add nothing because their errors are 0.
  void conv_learn(const Instruction& i) {
    float* gradient = tile_.gradients[i.slot];
    pckernels::PCK_ISA::conv_learn(array(i.a), array(i.b), array(i.c), gradient, i.f[0], conv_shape(i), groups(), share());
  }

  void sum_learn(const Instruction& i) {
    const float* a = array(i.a);
    const Part part = part_of(i.p[1]);
    for (int k = part.low; k < part.high; ++k) {
      for (int group = 0; group < tile_.groups; ++group) {
        double sum = 0.0, lanes[LANES];
        for (int before = 0; before < i.p[0]; ++before) {
          const int first = (before * i.p[1] + k) * i.p[2];
          sum_rows(group, Part{first, first + i.p[2]}, lanes, [=](auto at) { return at(a); });
          sum += sum_of_samples(lanes, group);
        }
        tile_.gradients[i.slot][k] += i.f[0] * static_cast<float>(sum);
      }
    }
  }

 private:
  struct Part {
    int low, high;
  };

  // What a thread does at a time: rows (or units) of a lane group, number `number` of `count`; `first` of those that are the thread's.
  struct Block {
    int group, number, count;
    bool first;
    Part rows;
  };

  static constexpr float MASK[2 * GROUP] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

  // A sum for each lane, in double precision.
  struct Sum {
    WideLanes wide[LANES == 1 ? 1 : LANES / kWidth];
    double single = 0.0;

    void add(float x, int) { single += x; }
    void add(vec x, int lane) { wide[lane / kWidth].add(x); }
    void put(double* lanes) const {
      for (int lane = 0; lane < LANES; ++lane) lanes[lane] = LANES == 1 ? single : wide[lane / kWidth][lane % kWidth];
      for (int k = 0; LANES == 1 && k < kWidth; ++k) lanes[0] += wide[0][k];
    }
  };

  Share share() const { return {rank_, size_}; }
  Groups groups() const { return {tile_.groups, tile_.stride}; }
  const float* bias(const Instruction& i) const { return i.slot2 == ABSENT ? nullptr : tile_.weights[i.slot2].data; }

  Weight weight(const Instruction& i) const {
    const WeightArrays& w = tile_.weights[i.slot];
    return {w.data, i.p[2], i.p[1], w.forward, w.backward};
  }

  static ConvShape conv_shape(const Instruction& i) {
    const std::int32_t* p = i.p;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14]};
  }

  int samples_of(int group) const {
    const int left = tile_.samples - group * LANES;
    return left < LANES ? left : LANES;
  }

  float* io_row(const Instruction& i, int group) const {
    return tile_.io[i.slot] + (tile_.first_sample + std::int64_t{group} * LANES) * i.p[0] + i.p[1];
  }

  // Part `rank` of `size` of a number of rows, cut at multiples of `block`.
  static Part part(int count, int block, int rank, int size) {
    const std::int64_t blocks = (count + block - 1) / block;
    const int low = static_cast<int>(blocks * rank / size) * block, high = static_cast<int>(blocks * (rank + 1) / size) * block;
    return {low, high < count ? high : count};
  }
  Part part_of(int count) const { return part(count, 1, rank_, size_); }

  // Where a row is a single number, vectors must fall on the same rows for any number of threads.
  Part part_of_rows(int n) const { return part(n, LANES == 1 ? 16 : 1, rank_, size_); }

  const float* valid(int group, int lane) const { return LANES == 1 ? MASK : MASK + GROUP - samples_of(group) + lane; }

  template <class F>
  void for_lanes(int group, F f) {
    if constexpr (LANES == 1) {
      f(At<float>{0, valid(group, 0)}, 0);
    } else {
      for (int lane = 0; lane < LANES; lane += kWidth) f(At<vec>{group * tile_.stride + lane, valid(group, lane)}, lane);
    }
  }

  template <class F>
  void for_rows(Part rows, F f) {
    for (int group = 0; group < tile_.groups; ++group) for_rows_of(group, rows, [&](auto at, int) { f(at); });
  }

  template <class F>
  void for_rows_of(int group, Part rows, F f) {
    if constexpr (LANES == 1) {
      int row = rows.low;
      for (; row + kWidth <= rows.high; row += kWidth) f(At<vec>{row, MASK}, 0);
      for (; row < rows.high; ++row) f(At<float>{row, MASK}, 0);
    } else {
      std::ptrdiff_t place = group * tile_.stride + std::ptrdiff_t{rows.low} * LANES;
      for (int row = rows.low; row < rows.high; ++row, place += LANES) {
        for (int lane = 0; lane < LANES; lane += kWidth) f(At<vec>{place + lane, valid(group, lane)}, lane);
      }
    }
  }

  template <class F>
  void sum_rows(int group, Part rows, double* lanes, F f) {
    Sum total;
    for_rows_of(group, rows, [&](auto at, int lane) { total.add(f(at), lane); });
    total.put(lanes);
  }

  double sum_of_samples(const double* lanes, int group) const {
    double sum = 0.0;
    for (int lane = 0; lane < samples_of(group); ++lane) sum += lanes[lane];
    return sum;
  }

  // Where the sums of the block go, one for each lane. The last thread of a team has at least one block: it says what the sums are.
  double* sums_of(const Instruction& i, float scale) {
    const std::ptrdiff_t start = next_sum_ + sums_of_run_ * sum_size(block_.count);
    if (block_.first && rank_ == size_ - 1) tile_.pending[pending_ + sums_of_run_] = {&i, block_.count, scale, start};
    return partial_sums() + start + (std::ptrdiff_t{block_.group} * block_.count + block_.number) * LANES;
  }

  double* partial_sums() const { return tile_.partial_sums + parity_ * tile_.sum_size; }
  std::ptrdiff_t sum_size(int blocks) const { return std::ptrdiff_t{tile_.groups} * blocks * LANES; }

  // A thread on its own need not wait for the end of the step.
  void keep_sums(int count, int blocks) {
    pending_ += count, next_sum_ += count * sum_size(blocks);
    if (size_ > 1) return;
    put_sums();
    pending_ = 0, next_sum_ = 0;
  }

  void put_sums() {
    for (int index = 0; index < pending_; ++index) {
      for (int group = 0; group < tile_.groups; ++group) put_sum(tile_.pending[index], group);
    }
  }

  void put_sum(const PendingSum& sum, int group) {
    const Instruction& i = *sum.instruction;
    const double* parts = partial_sums() + sum.start + std::ptrdiff_t{group} * sum.blocks * LANES;
    double lanes[LANES] = {};
    for (std::ptrdiff_t k = 0; k < std::ptrdiff_t{sum.blocks} * LANES; ++k) lanes[k % LANES] += parts[k];
    tile_.energies[(std::ptrdiff_t{group} * (tile_.steps + 1) + t_) * tile_.slots + i.slot] = sum.scale * sum_of_samples(lanes, group);
    if (i.slot2 == ABSENT) return;
    float* losses = tile_.io[i.slot2] + tile_.first_sample + std::int64_t{group} * LANES;
    for (int lane = 0; lane < samples_of(group); ++lane) losses[lane] = static_cast<float>(lanes[lane]);
  }

  const Tile& tile_;
  const int rank_, size_;
  int t_ = 0;
  Block block_{};
  int parity_ = 0, pending_ = 0, sums_of_run_ = 0;
  std::ptrdiff_t next_sum_ = 0;  // in partial_sums
};

template <int LANE_COUNT>
constexpr bool TAKES_RUNS<HostTeam<LANE_COUNT>> = true;

}  // namespace pckernels::PCK_ISA
