// The virtual machine, written once over a Team. A Team is the threads that execute one tile together; it owns the arena and provides
//
//   LANES                          numbers in a row of the arena
//   begin_step(t), end_step()      around the instructions of one t
//   begin_instruction(i)           before each
//   sync()                         all threads of the team meet
//   array(row)                     where a row starts; null if ABSENT
//   for_each(n, f)                 f(at) over n rows, in parts that the threads share; at is an At<..>
//   for_blocks(blocks, n, f)       f(at, block) over n rows for each block
//   for_units(count, f)            f(at, unit) for each unit and every lane: f walks over rows itself
//   sum_each(i, n, scale, f)       as for_each; scale times the sum of what f returns goes to energies[t][i.slot], each
//   sum_units(i, count, f)         sample's sum to io[i.slot2]
//   load, store                    between io and the arena
//   linear, linear_t, conv, conv_t, conv_learn, sum_learn    the products
//
// The rows of for_each and sum_each over the same n belong to the same threads: code has no barrier between row-by-row instructions that
// depend on each other row by row.
#pragma once

#include "elementwise.h"
#include "loss.h"
#include "pooling.h"

namespace pckernels::PCK_ISA {

// On the host a single sample in a row has no images; a Team that has them all the same specialises this.
template <class Team>
constexpr bool HAS_IMAGES = Team::LANES > 1;

// Whether a Team is blocks with an arena each, and has meet() and gather(i); otherwise there is nothing to do for MEET and GATHER.
template <class Team>
constexpr bool HAS_BLOCKS = false;

// Whether a Team executes runs of row-by-row instructions by itself: run_rows(start, end), those of them whose `first` is reached.
template <class Team>
constexpr bool TAKES_RUNS = false;

template <class Team>
PCK_DEVICE void execute_spatial(Team& team, const Instruction& i) {
  switch (i.op) {
    case Op::CONV: return team.conv(i);
    case Op::CONV_T: return team.conv_t(i);
    case Op::CONV_LEARN: return team.conv_learn(i);
    case Op::MAXPOOL: return maxpool(team, i);
    case Op::MAXPOOL_CHANGE: return maxpool_change(team, i);
    case Op::MAXPOOL_GRAD: return maxpool_grad(team, i);
    case Op::AVGPOOL: return avgpool(team, i);
    case Op::AVGPOOL_T: return avgpool_t(team, i);
    default: return;
  }
}

template <class Team>
PCK_DEVICE void execute(Team& team, const Instruction& i) {
  switch (i.op) {
    case Op::LOAD: return team.load(i);
    case Op::STORE: return team.store(i);
    case Op::FILL: return fill(team, i);
    case Op::COPY: return copy(team, i);
    case Op::LINEAR: return team.linear(i);
    case Op::LINEAR_T: return team.linear_t(i);
    case Op::ACT: return act(team, i);
    case Op::ACT_CHANGE: return act_change(team, i);
    case Op::ACT_GRAD: return act_grad(team, i);
    case Op::ADD: return add(team, i);
    case Op::MUL: return mul(team, i);
    case Op::MUL_CHANGE: return mul_change(team, i);
    case Op::MUL_GRAD: return mul_grad(team, i);
    case Op::LOSS: return loss(team, i);
    case Op::ERROR: return error(team, i);
    case Op::MOVE: return move(team, i);
    case Op::RELAX: return relax(team, i);
    case Op::NORM: return norm(team, i);
    case Op::SUM_LEARN: return team.sum_learn(i);
    default: break;
  }
  if constexpr (HAS_BLOCKS<Team>) {
    if (i.op == Op::MEET) return team.meet();
    if (i.op == Op::GATHER) return team.gather(i);
  }
  // Programs with images always run with several lanes.
  if constexpr (HAS_IMAGES<Team>) execute_spatial(team, i);
}

// A run: row-by-row instructions over the same n, with no barrier in between.
inline const Instruction* end_of_run(const Instruction* start, const Instruction* end) {
  const Instruction* i = start + 1;
  while (i != end && is_rowwise(*i) && i->n == start->n && !i->barrier) ++i;
  return i;
}

// The barrier of an instruction that is left out stands for what comes after it as well: the next that runs inherits it.
template <class Team>
PCK_DEVICE void run_step(Team& team, const Instruction* start, const Instruction* end, int t) {
  bool meet = false;
  for (const Instruction* i = start; i != end; ++i) {
    meet |= i->barrier != 0;
    if (t < i->first) continue;
    team.begin_instruction(*i);
    if (meet) team.sync();
    meet = false;
    if constexpr (TAKES_RUNS<Team>) {
      if (is_rowwise(*i)) {
        const Instruction* stop = end_of_run(i, end);
        team.run_rows(i, stop);
        i = stop - 1;
        continue;
      }
    }
    execute(team, *i);
  }
}

template <class Team>
PCK_DEVICE void run_phases(Team& team, const Code& code) {
  const Instruction* start = code.instructions;
  for (int phase = 0; phase < code.phase_count; ++phase) {
    const Instruction* end = start + code.phases[phase].count;
    for (int t = code.phases[phase].first; t <= code.phases[phase].last; ++t) {
      team.begin_step(t);
      run_step(team, start, end, t);
      team.end_step();
    }
    start = end;
  }
}

}  // namespace pckernels::PCK_ISA
