#include "analysis.h"

#include <algorithm>

#include "tile.h"

namespace pckernels {
namespace {

bool spatial(Op op) {
  switch (op) {
    case Op::CONV:
    case Op::CONV_T:
    case Op::CONV_LEARN:
    case Op::MAXPOOL:
    case Op::MAXPOOL_CHANGE:
    case Op::MAXPOOL_GRAD:
    case Op::AVGPOOL:
    case Op::AVGPOOL_T: return true;
    default: return false;
  }
}

bool learns(Op op) { return op == Op::CONV_LEARN || op == Op::SUM_LEARN; }
bool sums(Op op) { return op == Op::LOSS || op == Op::NORM; }
std::int64_t sum_size(const Instruction& i) { return std::int64_t{GROUP} * std::max(UNIT_BLOCKS, blocks_of(i.n, GROUP)); }

// Multiplications of one sample.
double work(const Instruction& i) {
  const std::int32_t* p = i.p;
  switch (i.op) {
    case Op::LINEAR:
    case Op::LINEAR_T: return double(p[0]) * p[1] * p[2];
    case Op::CONV:
    case Op::CONV_T:
    case Op::CONV_LEARN: return double(p[3]) * p[13] * p[14] * (p[0] / p[12]) * p[4] * p[5];
    default: return i.n;
  }
}

void use_weight(WeightUse& use, const Instruction& i, std::int64_t times) {
  if (use.outputs == 0) use.outputs = i.p[2], use.inputs = i.p[1];
  if (use.outputs != i.p[2] || use.inputs != i.p[1]) use.inputs = -1;
  (i.op == Op::LINEAR ? use.forward : use.backward) += times * i.p[0];
}

// Products of one weight make one sum. It brings its bias along if all of them and no others name that bias.
std::vector<GradientSum> gradient_sums(const Program& program) {
  const std::size_t gradients = program.gradients.size();
  std::vector<std::vector<int>> of_weight(gradients), of_bias(gradients);
  for (int k = 0; k < static_cast<int>(program.products.size()); ++k) {
    const OuterProduct& product = program.products[k];
    if (product.weight != ABSENT) of_weight[product.weight].push_back(k);
    if (product.bias != ABSENT) of_bias[product.bias].push_back(k);
  }
  std::vector<GradientSum> result;
  for (int weight = 0; weight < static_cast<int>(gradients); ++weight) {
    if (of_weight[weight].empty()) continue;
    const int bias = program.products[of_weight[weight][0]].bias;
    const bool together = bias != ABSENT && of_bias[bias] == of_weight[weight];
    result.push_back({weight, together ? bias : ABSENT, of_weight[weight]});
    if (together) of_bias[bias].clear();
  }
  for (int bias = 0; bias < static_cast<int>(gradients); ++bias) {
    if (!of_bias[bias].empty()) result.push_back({ABSENT, bias, of_bias[bias]});
  }
  return result;
}

}  // namespace

Analysis analyse(const Program& program) {
  Analysis result{};
  result.weights.resize(program.weights.size());
  result.learned.resize(program.gradients.size());
  double total = 0.0, barriers = 1.0;
  auto i = program.instructions.begin();
  for (const Phase& phase : program.phases) {
    int sums_of_phase = 0;
    std::int64_t sum_size_of_phase = 0;
    for (const auto end = i + phase.count; i != end; ++i) {
      const std::int64_t times = std::max(0, phase.last - std::max(phase.first, i->first) + 1);
      total += times * work(*i);
      barriers += i->barrier ? times : 0;
      sums_of_phase += sums(i->op);
      sum_size_of_phase += sums(i->op) ? sum_size(*i) : 0;
      result.spatial |= spatial(i->op);
      result.learns |= learns(i->op);
      if (learns(i->op)) result.learned[i->slot] = true;
      if (i->op == Op::LINEAR || i->op == Op::LINEAR_T) use_weight(result.weights[i->slot], *i, times);
    }
    result.sums = std::max(result.sums, sums_of_phase);
    result.sum_size = std::max(result.sum_size, sum_size_of_phase);
  }
  result.work_between_barriers = total / barriers;
  result.gradient_sums = gradient_sums(program);
  result.written.resize(program.gradients.size());
  for (const GradientSum& sum : result.gradient_sums) {
    if (sum.weight != ABSENT) result.written[sum.weight] = true;
    if (sum.bias != ABSENT) result.written[sum.bias] = true;
  }
  result.learn_at.resize(program.gradients.size());
  for (std::size_t k = 0; k < program.gradients.size(); ++k) {
    result.learn_at[k] = result.learn_size;
    if (result.learned[k]) result.learn_size += (program.gradients[k] + 15) / 16 * 16;
  }
  for (WeightUse& use : result.weights) {
    result.weight_bytes += 4.0 * use.outputs * std::max(0, use.inputs);
    if (use.inputs < 0) use.forward = use.backward = 0;
  }
  return result;
}

}  // namespace pckernels
