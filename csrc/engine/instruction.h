// The encoding of what a kernel executes. pckernels/instructions.py says what every operation means; this file mirrors its numbers.
#pragma once

#include <cstdint>

namespace pckernels {

constexpr int ABSENT = -1;
constexpr int WORDS = 32;

enum class Op : std::int32_t {
  LOAD,
  STORE,
  FILL,
  COPY,
  LINEAR,
  LINEAR_T,
  CONV,
  CONV_T,
  ACT,
  ACT_CHANGE,
  ACT_GRAD,
  ADD,
  MUL,
  MUL_CHANGE,
  MUL_GRAD,
  MAXPOOL,
  MAXPOOL_CHANGE,
  MAXPOOL_GRAD,
  AVGPOOL,
  AVGPOOL_T,
  LOSS,
  ERROR,
  MOVE,
  RELAX,
  NORM,
  CONV_LEARN,
  SUM_LEARN,
  MEET,
  GATHER,
};
constexpr int OPS = 29;

enum class Activation : std::int32_t { AFFINE, RELU, LEAKY_RELU, TANH, SIGMOID, GELU, GELU_TANH, HARDTANH, SILU };
constexpr int ACTIVATIONS = 9;

enum class Loss : std::int32_t { SQUARED_ERROR, CROSS_ENTROPY };

struct Instruction {
  Op op;
  std::int32_t first, barrier, accumulate, n, out, a, b, c, d, slot, slot2, unused;
  std::int32_t p[16];
  float f[3];
};
static_assert(sizeof(Instruction) == WORDS * sizeof(std::int32_t), "an instruction is WORDS words");

// Whether what happens to a row of n depends on the same row of every operand: ROWWISE of instructions.py, and LOSS of squared errors.
constexpr bool is_rowwise(const Instruction& i) {
  switch (i.op) {
    case Op::FILL:
    case Op::ACT:
    case Op::ACT_CHANGE:
    case Op::ACT_GRAD:
    case Op::ADD:
    case Op::MUL:
    case Op::MUL_CHANGE:
    case Op::MUL_GRAD:
    case Op::ERROR:
    case Op::MOVE:
    case Op::RELAX:
    case Op::NORM: return true;
    case Op::LOSS: return static_cast<Loss>(i.p[0]) == Loss::SQUARED_ERROR;
    default: return false;
  }
}

struct Phase {
  std::int32_t count, first, last;
};

struct OuterProduct {
  std::int32_t weight, bias, g_slot, x_slot, positions, inputs, outputs, x_stride, x_offset;
};
static_assert(sizeof(OuterProduct) == 9 * sizeof(std::int32_t), "a row of the table of products");

// What the engine walks through: instructions of all phases in a row.
struct Code {
  const Phase* phases;
  int phase_count;
  const Instruction* instructions;
};

}  // namespace pckernels
