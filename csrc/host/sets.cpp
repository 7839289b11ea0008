#include "sets.h"

#include <stdexcept>

namespace pckernels {

namespace baseline {
extern const Kernels kernels;
}
#ifdef PCK_HAVE_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef PCK_HAVE_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Set {
  const Kernels* kernels;
  bool present;
};

// The best first.
const std::vector<Set>& sets() {
  static const std::vector<Set> result = {
#ifdef PCK_HAVE_AVX512
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma")},
#endif
#ifdef PCK_HAVE_AVX2
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&baseline::kernels, true},
  };
  return result;
}

const Set*& chosen() {
  static const Set* result = nullptr;
  if (result == nullptr) {
    for (const Set& set : sets()) {
      if (set.present && result == nullptr) result = &set;
    }
  }
  return result;
}

bool by_request = false;

}  // namespace

std::vector<std::string> compiled_sets() {
  std::vector<std::string> result;
  for (const Set& set : sets()) result.push_back(set.kernels->name);
  return result;
}

const Kernels& chosen_set() { return *chosen()->kernels; }

std::string reason_of_choice() {
  if (by_request) return "asked for";
  std::string missing;
  for (const Set& set : sets()) {
    if (!set.present) missing += std::string(missing.empty() ? "" : ", ") + set.kernels->name;
  }
  return "the best of those compiled that this processor has" + (missing.empty() ? "" : "; it lacks " + missing);
}

void choose_set(const std::string& name) {
  for (const Set& set : sets()) {
    if (name != set.kernels->name) continue;
    if (!set.present) throw std::invalid_argument("This processor does not have the instruction set " + name + ".");
    chosen() = &set;
    by_request = true;
    return;
  }
  throw std::invalid_argument("The instruction set " + name + " is not compiled.");
}

}  // namespace pckernels
