#include "run.h"

#include <algorithm>

#include "threads.h"
#include "workspace.h"

namespace pckernels {
namespace {

constexpr double CACHE = 512 << 10;  // bytes of arena that a tile may take for the sake of using a weight more than once
constexpr std::int64_t LEARN_BYTES = std::int64_t{256} << 20;
constexpr std::int64_t LEARN_BLOCKS = 16;
constexpr std::int64_t USES_TO_PACK = 3;  // products with a weight that pay for packing it

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Part `rank` of `size` of count things.
struct Part {
  std::int64_t low, high;
  Part(std::int64_t count, std::int64_t rank, std::int64_t size) : low(count * rank / size), high(count * (rank + 1) / size) {}
};

// How a batch is cut. A block is one or more tiles that are executed in their order; blocks are what threads share.
struct Plan {
  int lanes, threads;
  std::int64_t groups, tile_groups, tiles, blocks, stride;

  Plan(const Program& program, const Analysis& analysis, const Call& call) {
    lanes = call.batch == 1 && !analysis.spatial ? 1 : GROUP;
    threads = std::max(1, call.threads);
    groups = divide_up(call.batch, lanes);
    stride = divide_up(std::int64_t{program.rows} * lanes, GROUP) * GROUP + GROUP;
    tile_groups = std::min(groups, call.tile_groups > 0 ? call.tile_groups : choose_groups(analysis));
    tiles = divide_up(groups, tile_groups);
    // What the loop learns is added up tile by tile, in an order that must not depend on the number of threads.
    const std::int64_t fit = std::max<std::int64_t>(1, LEARN_BYTES / std::max<std::int64_t>(1, analysis.learn_size * 4));
    blocks = analysis.learns ? std::min({tiles, fit, LEARN_BLOCKS}) : tiles;
  }

 private:
  // Every thread has work first; then several groups share a weight while it is in cache. Weights that are not in cache to begin with are
  // worth sharing even where the arena of the groups is larger still: a number of a weight is read for each group, one of the arena once.
  std::int64_t choose_groups(const Analysis& analysis) const {
    if (analysis.learns) return 1;
    const auto fit = static_cast<std::int64_t>(CACHE / (stride * sizeof(float)));
    const std::int64_t least = analysis.weight_bytes > CACHE ? 4 : 1;
    const std::int64_t rounds = divide_up(groups, threads * std::clamp<std::int64_t>(fit, least, 8));
    return divide_up(groups, threads * rounds);
  }
};

// The arrays and the tiles of one call.
class Runner {
 public:
  Runner(const Program& program, const Analysis& analysis, const Kernels& kernels, const Call& call, Workspace& memory)
      : program_(program), analysis_(analysis), kernels_(kernels), call_(call), memory_(memory), plan_(program, analysis, call) {
    set_teams();
    set_pointers();
    set_panels();
    set_terms();
  }

  void run() {
    run_threads(plan_.threads, [](void* self, int rank) { static_cast<Runner*>(self)->work(rank); }, this);
    add_energies();
  }

 private:
  // Blocks that are left when every thread has had the same number are shared by teams of threads, as large as their work is worth.
  void set_teams() {
    rounds_ = plan_.blocks / plan_.threads;
    rest_ = plan_.blocks % plan_.threads;
    const double work = analysis_.work_between_barriers * plan_.lanes * plan_.tile_groups;
    most_in_team_ = static_cast<int>(std::clamp(work / work_of_thread, 1.0, double(plan_.threads)));
    Barrier* barriers = memory_.hold_barriers(plan_.threads + 1);
    meeting_ = &barriers[plan_.threads];
    meeting_->reset(plan_.threads);
    for (int team = 0; team < rest_; ++team) barriers[team].reset(team_size(team));
  }

  void set_pointers() {
    const auto as_floats = [](const std::uintptr_t* addresses, std::size_t count, std::vector<float*>& target) {
      target.resize(count);
      for (std::size_t k = 0; k < count; ++k) target[k] = reinterpret_cast<float*>(addresses[k]);
    };
    as_floats(call_.io, program_.io.size(), memory_.io);
    as_floats(call_.gradients, program_.gradients.size(), memory_.gradients);
    arenas_ = memory_.arenas.hold<float>(plan_.threads * arena_size());
    energies_size_ = std::int64_t{program_.steps + 1} * program_.energies;
    energies_ = memory_.energies.hold<double>(plan_.groups * energies_size_);
    std::fill_n(energies_, plan_.groups * energies_size_, 0.0);
    partial_sums_ = memory_.partial_sums.hold<double>(plan_.threads * 2 * sum_size());
    memory_.pending.resize(plan_.threads * analysis_.sums);
    if (!analysis_.learns) return;
    learned_ = memory_.learned.hold<float>(plan_.blocks * analysis_.learn_size);
    memory_.block_gradients.resize(plan_.blocks * program_.gradients.size());
    for (std::size_t k = 0; k < memory_.block_gradients.size(); ++k) {
      const std::size_t block = k / program_.gradients.size(), gradient = k % program_.gradients.size();
      memory_.block_gradients[k] = learned_ + block * analysis_.learn_size + analysis_.learn_at[gradient];
    }
  }

  // Panels for the weights that are used often enough; packed by all threads before the first tile.
  void set_panels() {
    std::size_t size = 0;
    for (const WeightUse& use : analysis_.weights) size += panel_size(use, use.forward) + panel_size(use, use.backward);
    float* panels = size > 0 ? memory_.panels.hold<float>(size) : nullptr;
    packs_ = size > 0;
    memory_.weights.resize(program_.weights.size());
    for (std::size_t k = 0; k < memory_.weights.size(); ++k) {
      const WeightUse& use = analysis_.weights[k];
      const std::size_t forward = panel_size(use, use.forward), backward = panel_size(use, use.backward);
      memory_.weights[k] = {reinterpret_cast<const float*>(call_.weights[k]), forward ? panels : nullptr,
                            backward ? panels + forward : nullptr};
      panels += forward + backward;
    }
  }

  std::size_t panel_size(const WeightUse& use, std::int64_t uses) const {
    if (uses == 0 || uses * divide_up(plan_.groups, plan_.tile_groups) < USES_TO_PACK) return 0;
    return (kernels_.packed_floats(plan_.lanes, use.outputs, use.inputs) + 15) / 16 * 16;
  }

  void set_terms() {
    memory_.terms.clear();
    for (const GradientSum& sum : analysis_.gradient_sums) {
      for (const int k : sum.products) {
        const OuterProduct& p = program_.products[k];
        memory_.terms.push_back({memory_.io[p.g_slot], memory_.io[p.x_slot] + p.x_offset, static_cast<long>(call_.batch * p.positions),
                                 p.positions, p.x_stride, program_.coefficients[k]});
      }
    }
  }

  std::int64_t arena_size() const { return plan_.tile_groups * plan_.stride; }
  std::int64_t sum_size() const { return plan_.tile_groups * analysis_.sum_size; }

  // What thread `rank` does.
  void work(int rank) {
    pack(rank);
    if (packs_) meet();
    for (std::int64_t block = rank * rounds_; block < (rank + 1) * rounds_; ++block) run_block(block, rank, nullptr, 0, 1);
    if (rest_ > 0) work_in_team(rank);
    meet();
    write_gradients(rank);
    if (!analysis_.learns) return;
    meet();
    add_learned(rank);
  }

  void meet() {
    if (plan_.threads > 1) meeting_->wait();
  }

  std::int64_t first_of_team(std::int64_t team) const { return divide_up(team * plan_.threads, rest_); }
  int team_size(std::int64_t team) const {
    return std::min(most_in_team_, static_cast<int>(first_of_team(team + 1) - first_of_team(team)));
  }

  void work_in_team(int rank) {
    const std::int64_t team = rank * rest_ / plan_.threads;
    const int leader = static_cast<int>(first_of_team(team)), size = team_size(team);
    if (rank - leader < size) run_block(plan_.threads * rounds_ + team, leader, &memory_.barriers[team], rank - leader, size);
  }

  // By a team of `size` threads, in the memory of the thread that leads it.
  void run_block(std::int64_t block, int leader, Barrier* barrier, int rank, int size) {
    float* const* gradients = nullptr;
    if (analysis_.learns) {
      gradients = memory_.block_gradients.data() + block * program_.gradients.size();
      const Part part(analysis_.learn_size, rank, size);
      std::fill(learned_ + block * analysis_.learn_size + part.low, learned_ + block * analysis_.learn_size + part.high, 0.0f);
      if (size > 1) barrier->wait();
    }
    const Part tiles(plan_.tiles, block, plan_.blocks);
    for (std::int64_t k = tiles.low; k < tiles.high; ++k) {
      const Tile tile = make_tile(k, leader, gradients, barrier);
      kernels_.run_tile(code(), tile, plan_.lanes, rank, size);
      if (size > 1) barrier->wait();
    }
  }

  Code code() const { return {program_.phases.data(), static_cast<int>(program_.phases.size()), program_.instructions.data()}; }

  Tile make_tile(std::int64_t k, int leader, float* const* gradients, Barrier* barrier) const {
    const std::int64_t first_group = k * plan_.tile_groups, first = first_group * plan_.lanes;
    Tile tile{};
    tile.arena = arenas_ + leader * arena_size();
    tile.stride = plan_.stride;
    tile.groups = static_cast<int>(std::min(plan_.tile_groups, plan_.groups - first_group));
    tile.first_sample = first;
    tile.samples = static_cast<int>(std::min(plan_.tile_groups * plan_.lanes, call_.batch - first));
    tile.weights = memory_.weights.data();
    tile.io = memory_.io.data();
    tile.gradients = gradients;
    tile.energies = energies_ + first_group * energies_size_;
    tile.steps = program_.steps;
    tile.slots = program_.energies;
    tile.partial_sums = partial_sums_ + leader * 2 * sum_size();
    tile.sum_size = sum_size();
    tile.pending = memory_.pending.data() + leader * analysis_.sums;
    tile.barrier = barrier;
    return tile;
  }

  void pack(int rank) {
    for (std::size_t k = 0; k < memory_.weights.size(); ++k) {
      const WeightArrays& w = memory_.weights[k];
      const WeightUse& use = analysis_.weights[k];
      if (w.forward) {
        kernels_.pack_forward(plan_.lanes, w.data, use.outputs, use.inputs, const_cast<float*>(w.forward), rank, plan_.threads);
      }
      if (w.backward) {
        kernels_.pack_backward(plan_.lanes, w.data, use.outputs, use.inputs, const_cast<float*>(w.backward), rank, plan_.threads);
      }
    }
  }

  void write_gradients(int rank) {
    const OuterSum* terms = memory_.terms.data();
    for (const GradientSum& sum : analysis_.gradient_sums) {
      const OuterProduct& p = program_.products[sum.products[0]];
      const int count = static_cast<int>(sum.products.size());
      float* bias = sum.bias == ABSENT ? nullptr : memory_.gradients[sum.bias];
      if (sum.weight == ABSENT) {
        sum_errors(terms, count, bias, p.outputs, rank);
      } else {
        kernels_.outer_products(terms, count, memory_.gradients[sum.weight], bias, p.outputs, p.inputs, call_.factor, rank, plan_.threads);
      }
      terms += count;
    }
    for (std::size_t k = 0; k < program_.gradients.size(); ++k) {
      const Part part(program_.gradients[k], rank, plan_.threads);
      if (!analysis_.written[k]) std::fill(memory_.gradients[k] + part.low, memory_.gradients[k] + part.high, 0.0f);
    }
  }

  // A bias whose errors belong to several weights.
  void sum_errors(const OuterSum* terms, int count, float* bias, int outputs, int rank) const {
    const Part part(outputs, rank, plan_.threads);
    for (std::int64_t n = part.low; n < part.high; ++n) {
      double total = 0.0;
      for (const OuterSum* term = terms; term != terms + count; ++term) {
        double sum = 0.0;
        for (long row = 0; row < term->rows; ++row) sum += term->g[row * outputs + n];
        total += term->coefficient * sum;
      }
      bias[n] = static_cast<float>(call_.factor * total);
    }
  }

  void add_learned(int rank) {
    for (std::size_t k = 0; k < program_.gradients.size(); ++k) {
      if (!analysis_.learned[k]) continue;
      const Part part(program_.gradients[k], rank, plan_.threads);
      for (std::int64_t block = 0; block < plan_.blocks; ++block) {
        const float* source = learned_ + block * analysis_.learn_size + analysis_.learn_at[k];
        for (std::int64_t j = part.low; j < part.high; ++j) memory_.gradients[k][j] += call_.factor * source[j];
      }
    }
  }

  void add_energies() {
    for (std::int64_t k = 0; k < energies_size_; ++k) {
      double sum = 0.0;
      for (std::int64_t group = 0; group < plan_.groups; ++group) sum += energies_[group * energies_size_ + k];
      call_.energies[k] = sum;
    }
  }

  const Program& program_;
  const Analysis& analysis_;
  const Kernels& kernels_;
  const Call& call_;
  Workspace& memory_;
  const Plan plan_;
  std::int64_t rounds_ = 0, rest_ = 0, energies_size_ = 0;
  int most_in_team_ = 1;
  bool packs_ = false;
  Barrier* meeting_ = nullptr;
  float* arenas_ = nullptr;
  float* learned_ = nullptr;
  double *energies_ = nullptr, *partial_sums_ = nullptr;
};

void write_zeros(const Program& program, const Call& call) {
  for (std::size_t k = 0; k < program.gradients.size(); ++k)
    std::fill_n(reinterpret_cast<float*>(call.gradients[k]), program.gradients[k], 0.0f);
  std::fill_n(call.energies, std::int64_t{program.steps + 1} * program.energies, 0.0);
}

}  // namespace

double work_of_thread = 200e3;

void run(const Program& program, const Analysis& analysis, const Kernels& kernels, const Call& call) {
  if (call.batch == 0) return write_zeros(program, call);
  std::unique_ptr<Workspace> memory = take_workspace();
  Runner(program, analysis, kernels, call, *memory).run();
  put_back(std::move(memory));
}

}  // namespace pckernels
