#include "layout.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <tuple>

namespace pckernels::cuda {
namespace {

constexpr std::int64_t ALIGNMENT = 256;
constexpr std::int64_t LEARN_BYTES = std::int64_t{64} << 20;    // that blocks may take for what they learn
constexpr std::int64_t PARTIAL_BYTES = std::int64_t{64} << 20;  // that the parts of outer products may take
constexpr std::int64_t MOST_BLOCKS = 528;                       // of a program that learns in the loop
constexpr std::int64_t ROWS_OF_PART = 1024;
constexpr std::int64_t MOST_PARTS = 16;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t aligned(std::int64_t bytes) { return divide_up(bytes, ALIGNMENT) * ALIGNMENT; }

int narrow(std::int64_t value, const char* what) {
  if (value > INT32_MAX) throw std::invalid_argument(std::string(what) + " are too many for the CUDA engine.");
  return static_cast<int>(value);
}

// Units of 16 bytes of a panel: see Panel.
std::int64_t units_of(const Panel& panel, Packing packing) {
  if (packing == Packing::ROWS) return std::int64_t{panel.depth} * divide_up(panel.width, 4);
  return divide_up(panel.width, 16) * divide_up(panel.depth, packing == Packing::TILES_8 ? 8 : 16) * 32;
}

// The columns of a whole panel that block `rank` owns, behind so many units, to which its own are added.
Panel placed(Panel panel, int rank, int cluster, std::int64_t (&units)[PACKINGS]) {
  const int step = share_of(panel.width, cluster);
  panel.first_column = std::min(rank * step, panel.width);
  panel.width = std::min(step, panel.width - panel.first_column);
  for (int packing = 0; packing < PACKINGS; ++packing) {
    panel.start[packing] = narrow(units[packing], "Weights");
    units[packing] += units_of(panel, static_cast<Packing>(packing));
  }
  return panel;
}

template <class T>
std::size_t append(std::vector<char>& bytes, const std::vector<T>& table) {
  const std::size_t start = static_cast<std::size_t>(aligned(static_cast<std::int64_t>(bytes.size())));
  bytes.resize(start + table.size() * sizeof(T));
  if (!table.empty()) std::memcpy(bytes.data() + start, table.data(), table.size() * sizeof(T));
  return start;
}

}  // namespace

Layout::Layout(Program program, int cluster) : program_(std::move(program)), cluster_(cluster) {
  check(program_);
  analysis_ = analyse(program_);
  check_cluster();
  instructions_ = program_.instructions;
  find_panels();
  place_panels();
  find_sums();
  find_sources();
  write_tables();
}

void Layout::check_cluster() const {
  if (cluster_ != 1 && cluster_ != 2 && cluster_ != 4 && cluster_ != 8 && cluster_ != 16) {
    throw std::invalid_argument("A cluster has 1, 2, 4, 8 or 16 blocks, not " + std::to_string(cluster_) + ".");
  }
  if (cluster_ > 1 && (analysis_.spatial || analysis_.learns)) {
    throw std::invalid_argument("Blocks of a cluster share neither convolutions and pooling nor what learns inside the loop.");
  }
}

// One panel for each weight, direction and shape in which it is read. (Clusters' loops are cut into phases, some of them of a single step.)
// Instructions name it in `unused`; those that learn, their gradient's place.
void Layout::find_panels() {
  std::map<std::tuple<int, bool, int, int>, int> known;
  auto i = instructions_.begin();
  for (const Phase& phase : program_.phases) {
    for (const auto end = i + phase.count; i != end; ++i) {
      if (i->op == Op::CONV_LEARN || i->op == Op::SUM_LEARN) i->unused = narrow(analysis_.learn_at[i->slot], "Gradients");
      if (i->op != Op::LINEAR && i->op != Op::LINEAR_T) continue;
      const bool forward = i->op == Op::LINEAR;
      const auto [found, is_new] = known.try_emplace({i->slot, forward, i->p[1], i->p[2]}, static_cast<int>(panels_.size()));
      if (is_new) {
        const int inputs = i->p[1], outputs = i->p[2], width = forward ? outputs : inputs;
        panels_.push_back({i->slot, forward ? inputs : outputs, width, forward, 0, width, {}});
        in_loop_.push_back(false);
      }
      if (phase.last > (cluster_ > 1 ? 0 : phase.first)) in_loop_[found->second] = true;
      i->unused = found->second;
    }
  }
}

// Those of one block after those of the other; of each block's, those of the loop first, so that it copies one piece of memory. One more
// panel says where the last one ends.
void Layout::place_panels() {
  std::vector<int> order, place(panels_.size());
  for (const bool loop : {true, false}) {
    for (int k = 0; k < static_cast<int>(panels_.size()); ++k) {
      if (in_loop_[k] != loop) continue;
      place[k] = static_cast<int>(order.size());
      order.push_back(k);
    }
    if (loop) panels_of_loop_ = static_cast<int>(order.size());
  }
  panels_of_block_ = static_cast<int>(order.size());
  std::vector<Panel> sorted;
  std::int64_t units[PACKINGS] = {};
  for (int rank = 0; rank < cluster_; ++rank) {
    for (const int k : order) sorted.push_back(placed(panels_[k], rank, cluster_, units));
  }
  sorted.push_back(placed({}, 0, cluster_, units));
  panels_ = std::move(sorted);
  for (int packing = 0; packing < PACKINGS; ++packing) {
    units_[packing] = narrow(units[packing], "Weights");
    for (int rank = 0; rank < cluster_; ++rank) {
      const Panel* first = panels_.data() + rank * panels_of_block_;
      loop_units_[packing] = std::max(loop_units_[packing], first[panels_of_loop_].start[packing] - first->start[packing]);
    }
  }
  for (Instruction& i : instructions_) {
    if (i.op == Op::LINEAR || i.op == Op::LINEAR_T) i.unused = place[i.unused];
  }
}

void Layout::find_sums() {
  std::int64_t size = 0, tiles = 0;
  for (const pckernels::GradientSum& sum : analysis_.gradient_sums) {
    const OuterProduct& first = program_.products[sum.products[0]];
    GradientSum result{first.outputs, sum.weight == ABSENT ? 0 : first.inputs, ABSENT, ABSENT, static_cast<int>(terms_.size()), 0, 0, 0};
    result.terms = static_cast<int>(sum.products.size());
    result.first_tile = narrow(tiles, "Gradients");
    result.tiles_across = static_cast<int>(std::max<std::int64_t>(1, divide_up(result.inputs, SIDE)));
    tiles += divide_up(result.outputs, SIDE) * result.tiles_across;
    if (sum.weight != ABSENT) {
      result.weight_at = narrow(size, "Gradients");
      size += std::int64_t{result.outputs} * result.inputs;
    }
    if (sum.bias != ABSENT) {
      result.bias_at = narrow(size, "Gradients");
      size += result.outputs;
    }
    for (const int k : sum.products) {
      const OuterProduct& p = program_.products[k];
      terms_.push_back({p.g_slot, p.x_slot, p.positions, p.x_stride, p.x_offset, program_.coefficients[k]});
    }
    sums_.push_back(result);
  }
  outer_tiles_ = narrow(tiles, "Gradients");
  product_size_ = narrow(size, "Gradients");
}

void Layout::find_sources() {
  std::int64_t first = 0;
  for (std::size_t k = 0; k < program_.gradients.size(); ++k) {
    const int learned = analysis_.learned[k] ? narrow(analysis_.learn_at[k], "Gradients") : ABSENT;
    sources_.push_back({narrow(first, "Gradients"), narrow(program_.gradients[k], "Gradients"), ABSENT, learned});
    first += program_.gradients[k];
  }
  for (std::size_t k = 0; k < sums_.size(); ++k) {
    const pckernels::GradientSum& sum = analysis_.gradient_sums[k];
    if (sum.weight != ABSENT) sources_[sum.weight].product_at = sums_[k].weight_at;
    if (sum.bias != ABSENT) sources_[sum.bias].product_at = sums_[k].bias_at;
  }
  gradient_count_ = narrow(first, "Gradients");
}

void Layout::write_tables() {
  starts_[0] = append(bytes_, instructions_);
  starts_[1] = append(bytes_, program_.phases);
  starts_[2] = append(bytes_, panels_);
  starts_[3] = append(bytes_, sums_);
  starts_[4] = append(bytes_, terms_);
  starts_[5] = append(bytes_, sources_);
}

Tables Layout::tables(const char* address) const {
  return {reinterpret_cast<const Instruction*>(address + starts_[0]),
          reinterpret_cast<const Phase*>(address + starts_[1]),
          reinterpret_cast<const Panel*>(address + starts_[2]),
          reinterpret_cast<const GradientSum*>(address + starts_[3]),
          reinterpret_cast<const Term*>(address + starts_[4]),
          reinterpret_cast<const GradientSource*>(address + starts_[5]),
          static_cast<int>(program_.phases.size()),
          static_cast<int>(panels_.size()) - 1,
          static_cast<int>(sums_.size()),
          static_cast<int>(sources_.size()),
          panels_of_block_,
          panels_of_loop_};
}

WorkspaceLayout Layout::workspace(const Cut& cut) const {
  WorkspaceLayout result{};
  result.tiles = narrow(divide_up(cut.batch, cut.lanes), "Samples");
  std::int64_t most = cut.blocks > 0 ? cut.blocks : std::int64_t{result.tiles} * cluster_;
  if (analysis_.learns) {
    const std::int64_t fit = LEARN_BYTES / std::max<std::int64_t>(1, analysis_.learn_size * 4);
    most = std::min(most, std::clamp<std::int64_t>(fit, 1, MOST_BLOCKS));
  }
  const std::int64_t clusters = std::min<std::int64_t>(result.tiles, most / cluster_);
  result.blocks = narrow(std::max<std::int64_t>(1, clusters) * cluster_, "Blocks");
  std::int64_t rows = 1;
  for (const Term& term : terms_) rows = std::max(rows, cut.batch * term.positions);
  const std::int64_t fit = PARTIAL_BYTES / std::max<std::int64_t>(1, std::int64_t{product_size_} * 4);
  result.splits = static_cast<int>(std::clamp<std::int64_t>(std::min(divide_up(rows, ROWS_OF_PART), fit), 1, MOST_PARTS));

  const std::int64_t pointers = static_cast<std::int64_t>(program_.weights.size() + program_.io.size() + program_.gradients.size()) * 8;
  result.packed = aligned(pointers);
  result.energies = result.packed + aligned(std::int64_t{packed_units(cut.precision)} * 16);
  result.learned = result.energies + aligned(std::int64_t{result.tiles} * cluster_ * energy_count() * 8);
  result.partial = result.learned + aligned(result.blocks * analysis_.learn_size * 4);
  result.bytes = std::max(ALIGNMENT, result.partial + aligned(std::int64_t{result.splits} * product_size_ * 4));
  return result;
}

}  // namespace pckernels::cuda
