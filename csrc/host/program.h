// Code as the host keeps it between calls: see pckernels/instructions.py for what the fields mean.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../engine/instruction.h"

namespace pckernels {

struct Program {
  std::vector<Instruction> instructions;
  std::vector<Phase> phases;
  std::vector<OuterProduct> products;
  std::vector<float> coefficients;  // of the products
  int rows;
  std::vector<std::int64_t> weights, io, gradients;  // elements of a weight, of a sample's row of io, of a gradient
  int steps, energies;
};

const char* name(Op op);

// Throws std::invalid_argument, naming the instruction, unless every operand lies inside what it refers to.
void check(const Program& program);

}  // namespace pckernels
