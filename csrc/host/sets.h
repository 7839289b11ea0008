// Which of the compiled instruction sets this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pckernels {

std::vector<std::string> compiled_sets();
const Kernels& chosen_set();
std::string reason_of_choice();

// Throws std::invalid_argument unless the set is compiled and this machine has it.
void choose_set(const std::string& name);

}  // namespace pckernels
