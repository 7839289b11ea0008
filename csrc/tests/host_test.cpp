// Runs a case file (case_file.h) on the host engine, for builds with sanitizers. PCK_ISA is the one instruction set that is compiled.
//
//   host_test CASE RESULTS [--threads 1] [--tile_groups 0] [--repeat 1]
#include <exception>

#include "../host/run.h"
#include "case_file.h"

namespace pckernels::PCK_ISA {
extern const Kernels kernels;
}

using namespace pckernels;

namespace {

std::vector<std::uintptr_t> addresses(std::vector<std::vector<float>>& tensors) {
  std::vector<std::uintptr_t> result;
  for (auto& tensor : tensors) result.push_back(reinterpret_cast<std::uintptr_t>(tensor.data()));
  return result;
}

int run(int argc, char** argv) {
  CaseData data = read_case(argv[1]);
  const Analysis analysis = analyse(data.program);
  const auto weights = addresses(data.weights), io = addresses(data.io), gradients = addresses(data.gradients);
  work_of_thread = 1.0;
  Call call{weights.data(), io.data(), gradients.data(), data.energies.data(), data.batch, 1, 1.0f, 0};
  call.threads = option(argc, argv, "--threads", 1);
  call.tile_groups = option(argc, argv, "--tile_groups", 0);
  for (int k = option(argc, argv, "--repeat", 1); k > 0; --k) run(data.program, analysis, PCK_ISA::kernels, call);
  write_results(argv[2], data);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "host_test CASE RESULTS [--threads N] [--tile_groups N] [--repeat N]\n"), 2;
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 2;
  }
}
