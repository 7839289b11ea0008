// A Team for finding races without a GPU: real threads execute one tile with scalar lanes and plain products.
//
// The part of the work that a thread takes, its logical rank, changes at every stage. With a fixed rank most arrays would be written and
// read by the same thread, and a missing barrier would go unseen. A thread keeps its rows where code relies on that: in row-by-row
// instructions over the same n between two barriers of the code, whether or not the threads meet there. Nothing but sync() orders the
// threads: sums stay with the thread that computed them until all have finished.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <thread>
#include <vector>

#include "../engine/engine.h"
#include "../host/products_naive.h"

namespace pckernels::PCK_ISA {

// A barrier that orders no more than it must: every round has a counter of its own. With one mutex for all rounds, a thread that is late to
// wake up would be ordered after what others did in later rounds, and races with that would be hidden.
class Meeting {
 public:
  Meeting(int threads, long rounds) : threads_(threads), arrived_(static_cast<std::size_t>(rounds)) {}

  void wait(long round) {
    std::atomic<int>& arrived = arrived_[static_cast<std::size_t>(round)];
    arrived.fetch_add(1, std::memory_order_acq_rel);
    while (arrived.load(std::memory_order_acquire) < threads_) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::vector<std::atomic<int>> arrived_;
};

// A stage is an instruction (or several, see above), or what lies between two barriers: then a thread may depend on what it wrote itself in the same stage.
enum class Stage { INSTRUCTION, BARRIER };

// A tile of `samples` samples; everything but the arena begins at its first sample.
struct ThreadTile {
  float* arena;
  const float* const* weights;
  float* const* io;
  float* const* gradients;
  int samples, steps, slots, ios;
  Stage stage;
  const Instruction* instructions;
  const int* intervals;  // of each instruction: how many barriers the code has up to it
};

template <int LANE_COUNT>
class ThreadTeam {
 public:
  static constexpr int LANES = LANE_COUNT;

  ThreadTeam(const ThreadTile& tile, Meeting& meeting, int thread, int size)
      : energies(static_cast<std::size_t>(tile.steps + 1) * tile.slots),
        losses(static_cast<std::size_t>(tile.ios) * LANES),
        tile_(tile),
        meeting_(meeting),
        thread_(thread),
        size_(size) {
    for (int lane = 0; lane < LANES; ++lane) valid_[lane] = lane < tile.samples ? 1.0f : 0.0f;
  }

  void begin_step(int t) {
    t_ = t;
    interval_ = -1;
  }
  void end_step() {}
  void begin_instruction(const Instruction& i) {
    if (tile_.stage != Stage::INSTRUCTION) return;
    if (interval_ != tile_.intervals[&i - tile_.instructions]) stages_.clear();
    interval_ = tile_.intervals[&i - tile_.instructions];
    stage_ = is_rowwise(i) ? stages_.try_emplace(i.n, begun_ + 1).first->second : begun_ + 1;
    begun_ = std::max(begun_, stage_);
  }
  void sync() {
    meeting_.wait(round_++);
    if (tile_.stage == Stage::BARRIER) ++stage_;
  }

  float* array(int row) const { return row == ABSENT ? nullptr : tile_.arena + std::ptrdiff_t{row} * LANES; }

  template <class F>
  void for_each(int n, F f) const {
    for_blocks(1, n, [&](auto at, int) { f(at); });
  }

  template <class F>
  void for_blocks(int blocks, int n, F f) const {
    for_share(blocks * n, share(),
              [&](int row) { for_lanes([&](auto at) { f(At<float>{at.offset + std::ptrdiff_t{row % n} * LANES, at.valid}, row / n); }); });
  }

  template <class F>
  void for_units(int count, F f) const {
    for_share(count, share(), [&](int unit) { for_lanes([&](auto at) { f(at, unit); }); });
  }

  template <class F>
  void sum_each(const Instruction& i, int n, float scale, F f) {
    sum_units(i, n, scale, [&](auto at, int row) { return f(At<float>{at.offset + std::ptrdiff_t{row} * LANES, at.valid}); });
  }

  template <class F>
  void sum_units(const Instruction& i, int count, float scale, F f) {
    double lanes[LANES] = {};
    for_units(count, [&](auto at, int unit) { lanes[at.offset] += f(at, unit); });
    for (int lane = 0; lane < tile_.samples; ++lane) {
      energies[static_cast<std::size_t>(t_) * tile_.slots + i.slot] += scale * lanes[lane];
      if (i.slot2 != ABSENT) losses[static_cast<std::size_t>(i.slot2) * LANES + lane] = lanes[lane];
    }
  }

  void load(const Instruction& i) const {
    float* out = array(i.out);
    for_share(i.n, share(), [&](int row) {
      for (int lane = 0; lane < LANES; ++lane) {
        out[std::ptrdiff_t{row} * LANES + lane] =
            lane < tile_.samples ? tile_.io[i.slot][std::ptrdiff_t{lane} * i.p[0] + i.p[1] + row] : 0.0f;
      }
    });
  }

  void store(const Instruction& i) const {
    const float *a = array(i.a), *b = array(i.b);
    for_share(i.n, share(), [&](int row) {
      for (int lane = 0; lane < tile_.samples; ++lane) {
        const std::ptrdiff_t place = std::ptrdiff_t{row} * LANES + lane;
        tile_.io[i.slot][std::ptrdiff_t{lane} * i.p[0] + i.p[1] + row] = (a ? a[place] : 0.0f) + (b ? b[place] : 0.0f);
      }
    });
  }

  void linear(const Instruction& i) const {
    pckernels::PCK_ISA::linear<LANES>(weight(i), bias(i), array(i.a), array(i.out), i.p[0], i.accumulate, {1, 0}, share());
  }
  void linear_t(const Instruction& i) const {
    pckernels::PCK_ISA::linear_t<LANES>(weight(i), array(i.a), array(i.out), i.p[0], i.accumulate, {1, 0}, share());
  }
  void conv(const Instruction& i) const {
    pckernels::PCK_ISA::conv(tile_.weights[i.slot], bias(i), array(i.a), array(i.out), shape(i), i.accumulate, {1, 0}, share());
  }
  void conv_t(const Instruction& i) const {
    pckernels::PCK_ISA::conv_t(tile_.weights[i.slot], array(i.a), array(i.out), shape(i), i.accumulate, {1, 0}, share());
  }
  void conv_learn(const Instruction& i) const {
    pckernels::PCK_ISA::conv_learn(array(i.a), array(i.b), array(i.c), tile_.gradients[i.slot], i.f[0], shape(i), {1, 0}, share());
  }

  void sum_learn(const Instruction& i) const {
    const float* a = array(i.a);
    for_share(i.p[1], share(), [&](int k) {
      float sum = 0.0f;
      for (int unit = 0; unit < i.p[0] * i.p[2]; ++unit) {
        const std::ptrdiff_t row = (std::ptrdiff_t{unit / i.p[2]} * i.p[1] + k) * i.p[2] + unit % i.p[2];
        for (int lane = 0; lane < tile_.samples; ++lane) sum += a[row * LANES + lane];
      }
      tile_.gradients[i.slot][k] += i.f[0] * sum;
    });
  }

  // This thread's part of the sums; (steps + 1, slots), and for each io the losses of the samples that a LOSS writes there.
  std::vector<double> energies, losses;

 private:
  Share share() const { return {static_cast<int>((thread_ + stage_) % size_), size_}; }
  Weight weight(const Instruction& i) const { return {tile_.weights[i.slot], i.p[2], i.p[1], nullptr, nullptr}; }
  const float* bias(const Instruction& i) const { return i.slot2 == ABSENT ? nullptr : tile_.weights[i.slot2]; }
  static ConvShape shape(const Instruction& i) {
    const std::int32_t* p = i.p;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14]};
  }

  template <class F>
  void for_lanes(F f) const {
    for (int lane = 0; lane < LANES; ++lane) f(At<float>{lane, valid_ + lane});
  }

  const ThreadTile& tile_;
  Meeting& meeting_;
  const int thread_, size_;
  long stage_ = 0, begun_ = 0, round_ = 0;
  int t_ = 0, interval_ = -1;
  std::map<int, long> stages_;  // of the rows of n, since the last barrier of the code
  float valid_[LANES];
};

}  // namespace pckernels::PCK_ISA
