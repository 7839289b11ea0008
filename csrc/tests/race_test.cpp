// Runs a case file (case_file.h) on the thread team; built with -fsanitize=thread it reports races.
//
//   race_test CASE RESULTS [--threads 3] [--ignore K] [--stage 0]
//
// --ignore K drops the K-th barrier flag of the code (from 0). --stage 1 changes the logical ranks at barriers, rather than at every
// instruction that has no rows from the one before. Products after the tiles are left out. Prints how many barrier flags the code has.
#define PCK_ISA thread_team

#include "../thread_team/team.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <thread>

#include "../host/analysis.h"
#include "case_file.h"

using namespace pckernels;
using namespace pckernels::thread_team;

namespace {

std::vector<Instruction*> barriers(Program& program) {
  std::vector<Instruction*> result;
  for (Instruction& i : program.instructions) {
    if (i.barrier) result.push_back(&i);
  }
  return result;
}

// Of each instruction, how many barrier flags there are up to it.
std::vector<int> intervals(const Program& program) {
  std::vector<int> result;
  int count = 0;
  for (const Instruction& i : program.instructions) result.push_back(count += i.barrier != 0);
  return result;
}

// How often the threads meet, at most.
long rounds(const Program& program) {
  long result = 0;
  for (const Phase& phase : program.phases) result += static_cast<long>(phase.count) * std::max(0, phase.last - phase.first + 1);
  return result;
}

template <int LANES>
void run_tile(CaseData& data, const std::vector<int>& intervals, int first, int threads, Stage stage) {
  const Program& program = data.program;
  std::vector<float> arena(static_cast<std::size_t>(program.rows) * LANES);
  std::vector<const float*> weights;
  std::vector<float*> io, gradients;
  for (const auto& weight : data.weights) weights.push_back(weight.data());
  for (std::size_t k = 0; k < data.io.size(); ++k) io.push_back(data.io[k].data() + first * program.io[k]);
  for (auto& gradient : data.gradients) gradients.push_back(gradient.data());
  const ThreadTile tile{arena.data(),     weights.data(), io.data(), gradients.data(), std::min(LANES, data.batch - first), program.steps,
                        program.energies, int(io.size()), stage, program.instructions.data(), intervals.data()};
  const Code code{program.phases.data(), int(program.phases.size()), program.instructions.data()};
  Meeting meeting(threads, rounds(program));
  std::vector<std::unique_ptr<ThreadTeam<LANES>>> teams;
  std::vector<std::thread> running;
  for (int thread = 0; thread < threads; ++thread) teams.push_back(std::make_unique<ThreadTeam<LANES>>(tile, meeting, thread, threads));
  for (auto& team : teams) running.emplace_back([&team, &code] { run_phases(*team, code); });
  for (std::thread& thread : running) thread.join();
  for (const auto& team : teams) {
    for (std::size_t k = 0; k < data.energies.size(); ++k) data.energies[k] += team->energies[k];
  }
  for (const Instruction& i : program.instructions) {
    if (i.op != Op::LOSS || i.slot2 == ABSENT) continue;
    for (int lane = 0; lane < tile.samples; ++lane) {
      double sum = 0.0;
      for (const auto& team : teams) sum += team->losses[static_cast<std::size_t>(i.slot2) * LANES + lane];
      io[i.slot2][lane] = static_cast<float>(sum);
    }
  }
}

int run(int argc, char** argv) {
  CaseData data = read_case(argv[1]);
  const std::vector<Instruction*> flags = barriers(data.program);
  const int ignored = option(argc, argv, "--ignore", -1), threads = option(argc, argv, "--threads", 3);
  if (ignored >= static_cast<int>(flags.size())) throw std::runtime_error("there is no such barrier flag");
  const std::vector<int> parts = intervals(data.program);  // those that are meant to be there, with the one that is ignored
  if (ignored >= 0) flags[ignored]->barrier = 0;
  const Stage stage = option(argc, argv, "--stage", 0) == 0 ? Stage::INSTRUCTION : Stage::BARRIER;
  const bool single = data.batch == 1 && !analyse(data.program).spatial;
  for (int first = 0; first < data.batch; first += 16)
    single ? run_tile<1>(data, parts, first, threads, stage) : run_tile<16>(data, parts, first, threads, stage);
  write_results(argv[2], data);
  std::printf("%zu barriers\n", flags.size());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "race_test CASE RESULTS [--threads N] [--ignore K] [--stage 0|1]\n"), 2;
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 2;
  }
}
