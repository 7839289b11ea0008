#include <initializer_list>
#include <stdexcept>

#include "program.h"

namespace pckernels {
namespace {

const char* const NAMES[OPS] = {
    "LOAD",       "STORE",     "FILL", "COPY",  "LINEAR",     "LINEAR_T", "CONV",    "CONV_T",         "ACT",
    "ACT_CHANGE", "ACT_GRAD",  "ADD",  "MUL",   "MUL_CHANGE", "MUL_GRAD", "MAXPOOL", "MAXPOOL_CHANGE", "MAXPOOL_GRAD",
    "AVGPOOL",    "AVGPOOL_T", "LOSS", "ERROR", "MOVE",       "RELAX",    "NORM",    "CONV_LEARN",     "SUM_LEARN",
    "MEET",       "GATHER",
};

bool accumulates(Op op) {
  switch (op) {
    case Op::COPY:
    case Op::LINEAR:
    case Op::LINEAR_T:
    case Op::CONV:
    case Op::CONV_T:
    case Op::ACT_GRAD:
    case Op::ADD:
    case Op::MUL_GRAD:
    case Op::MAXPOOL_GRAD:
    case Op::AVGPOOL:
    case Op::AVGPOOL_T: return true;
    default: return false;
  }
}

// The product of counts, or a number larger than any arena.
std::int64_t product(std::initializer_list<std::int64_t> counts) {
  const std::int64_t huge = std::int64_t{1} << 40;
  std::int64_t result = 1;
  for (const std::int64_t count : counts) {
    if (count == 0) return 0;
    if (count > huge / result) return huge;
    result *= count;
  }
  return result;
}

std::string text(std::int64_t number) { return std::to_string(number); }

class InstructionCheck {
 public:
  InstructionCheck(const Program& program, std::size_t index) : program_(program), index_(index), i_(program.instructions[index]) {}

  void run() const {
    const int op = static_cast<int>(i_.op);
    if (op < 0 || op >= OPS) throw std::invalid_argument("instruction " + text(index_) + " has the unknown operation " + text(op) + ".");
    require(i_.n >= 0, "n = " + text(i_.n) + " is negative");
    require(!i_.accumulate || accumulates(i_.op), "this operation writes its result and cannot accumulate");
    operands();
  }

 private:
  void operands() const {
    switch (i_.op) {
      case Op::LOAD: return io_block(), needed("out", i_.out, i_.n);
      case Op::STORE: return io_block(), optional("a", i_.a, i_.n), optional("b", i_.b, i_.n);
      case Op::FILL: return needed("out", i_.out, i_.n);
      case Op::COPY: return copy();
      case Op::LINEAR: return linear(i_.p[1], i_.p[2]), bias(i_.p[2]);
      case Op::LINEAR_T: return linear(i_.p[2], i_.p[1]);
      case Op::CONV: return conv(), needed("a", i_.a, image()), needed("out", i_.out, result()), bias(i_.p[3]);
      case Op::CONV_T: return conv(), needed("a", i_.a, result()), needed("out", i_.out, image());
      case Op::ACT:
      case Op::ACT_CHANGE:
      case Op::ACT_GRAD: return activation(), each({i_.a, i_.b, i_.c, i_.d});
      case Op::ADD:
      case Op::MUL:
      case Op::ERROR: return each({i_.a, i_.b});
      case Op::MUL_CHANGE: return each({i_.a, i_.b, i_.c, i_.d});
      case Op::MUL_GRAD:
      case Op::MOVE: return each({i_.a, i_.b, i_.c});
      case Op::RELAX: return each({i_.a});
      case Op::MAXPOOL: return pool(), needed("a", i_.a, image()), needed("out", i_.out, pooled()), optional("b", i_.b, pooled());
      case Op::MAXPOOL_CHANGE:
        pool(), needed("a", i_.a, image()), optional("b", i_.b, image()), needed("c", i_.c, pooled());
        return needed("out", i_.out, pooled()), optional("d", i_.d, pooled());
      case Op::MAXPOOL_GRAD: return pool(), needed("a", i_.a, pooled()), needed("b", i_.b, pooled()), needed("out", i_.out, image());
      case Op::AVGPOOL: return average(), needed("a", i_.a, image()), needed("out", i_.out, pooled());
      case Op::AVGPOOL_T: return average(), needed("a", i_.a, pooled()), needed("out", i_.out, image());
      case Op::LOSS: return loss();
      case Op::NORM: return energy(), needed("a", i_.a, i_.n), optional("b", i_.b, i_.n);
      case Op::CONV_LEARN:
        conv(), needed("a", i_.a, result()), needed("b", i_.b, image()), optional("c", i_.c, image());
        return gradient(kernel());
      case Op::SUM_LEARN: return counts(3), needed("a", i_.a, product({i_.p[0], i_.p[1], i_.p[2]})), gradient(i_.p[1]);
      case Op::MEET: return;
      case Op::GATHER: return gather();
    }
  }

  void require(bool condition, const std::string& what) const {
    if (!condition) throw std::invalid_argument("instruction " + text(index_) + " (" + name(i_.op) + "): " + what + ".");
  }

  void needed(const char* operand, int row, std::int64_t n) const {
    const std::string range = std::string(operand) + " = rows " + text(row) + " to " + text(row + n - 1);
    require(row >= 0 && n <= program_.rows && row <= program_.rows - n,
            range + " lie outside the arena of " + text(program_.rows) + " rows");
  }

  void optional(const char* operand, int row, std::int64_t n) const {
    if (row != ABSENT) needed(operand, row, n);
  }

  void each(std::initializer_list<int> operands) const {
    needed("out", i_.out, i_.n);
    const char* const names[] = {"a", "b", "c", "d"};
    int k = 0;
    for (const int row : operands) optional(names[k++], row, i_.n);
  }

  void slot(const char* what, int slot, const std::vector<std::int64_t>& sizes, std::int64_t size) const {
    const std::string which = std::string(what) + " " + text(slot);
    require(slot >= 0 && slot < static_cast<std::int64_t>(sizes.size()), which + " does not exist; there are " + text(sizes.size()));
    require(sizes[slot] == size, which + " has " + text(sizes[slot]) + " elements where " + text(size) + " are read");
  }

  void io_block() const {
    slot("io", i_.slot, program_.io, i_.p[0]);
    require(i_.p[1] >= 0 && std::int64_t{i_.p[1]} + i_.n <= i_.p[0],
            "elements " + text(i_.p[1]) + " to " + text(std::int64_t{i_.p[1]} + i_.n - 1) + " lie outside a row of " + text(i_.p[0]));
  }

  void bias(std::int64_t size) const {
    if (i_.slot2 != ABSENT) slot("weight", i_.slot2, program_.weights, size);
  }

  void gradient(std::int64_t size) const { slot("gradient", i_.slot, program_.gradients, size); }

  void energy() const {
    require(i_.slot >= 0 && i_.slot < program_.energies,
            "energy " + text(i_.slot) + " does not exist; there are " + text(program_.energies));
  }

  void counts(int number) const {
    for (int k = 0; k < number; ++k) require(i_.p[k] >= 0, "p" + text(k) + " = " + text(i_.p[k]) + " is negative");
  }

  void copy() const {
    counts(4);
    if (i_.p[0] == 0 || i_.p[1] == 0) return;
    needed("out", i_.out, product({i_.p[0] - 1, i_.p[2]}) + i_.p[1]);
    needed("a", i_.a, product({i_.p[0] - 1, i_.p[3]}) + i_.p[1]);
    require(i_.p[0] == 1 || i_.p[2] >= i_.p[1], "blocks of " + text(i_.p[1]) + " rows every " + text(i_.p[2]) + " rows overlap in out");
  }

  void linear(std::int64_t inputs, std::int64_t outputs) const {
    counts(3);
    require(i_.p[1] > 0 && i_.p[2] > 0, "a product needs inputs and outputs");
    slot("weight", i_.slot, program_.weights, product({inputs, outputs}));
    needed("a", i_.a, product({i_.p[0], inputs}));
    needed("out", i_.out, product({i_.p[0], outputs}));
  }

  void gather() const {
    needed("out", i_.out, i_.n);
    require(i_.p[0] > 0, "p0 = " + text(i_.p[0]) + " must be positive");
    require(i_.a >= 0 && i_.a <= i_.out, "a = row " + text(i_.a) + " does not come before out = row " + text(i_.out));
  }

  void activation() const {
    require(i_.p[0] >= 0 && i_.p[0] < ACTIVATIONS, "there is no activation " + text(i_.p[0]));
    require(i_.op != Op::ACT || i_.a != ABSENT, "a is missing");
  }

  std::int64_t image() const { return product({i_.p[0], i_.p[1], i_.p[2]}); }
  std::int64_t result() const { return product({i_.p[3], i_.p[13], i_.p[14]}); }
  std::int64_t pooled() const { return product({i_.p[0], i_.p[13], i_.p[14]}); }
  std::int64_t kernel() const { return product({i_.p[3], i_.p[0] / i_.p[12], i_.p[4], i_.p[5]}); }

  void windows() const {
    counts(15);
    for (const int k : {4, 5, 6, 7, 10, 11}) require(i_.p[k] > 0, "p" + text(k) + " must be positive");
    for (const int k : {1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14}) require(i_.p[k] < 1 << 24, "p" + text(k) + " is too large");
  }

  void conv() const {
    windows();
    const int channels = i_.p[0], out_channels = i_.p[3], groups = i_.p[12];
    require(groups > 0 && channels % groups == 0 && out_channels % groups == 0, "groups must divide the channels");
    for (const int axis : {0, 1}) {
      const std::int64_t reach = std::int64_t{i_.p[10 + axis]} * (i_.p[4 + axis] - 1) + 1, padded = i_.p[1 + axis] + 2 * i_.p[8 + axis];
      const std::int64_t size = padded < reach ? 0 : (padded - reach) / i_.p[6 + axis] + 1;
      require(i_.p[13 + axis] == size, "p" + text(13 + axis) + " = " + text(i_.p[13 + axis]) + " should be " + text(size));
    }
    if (i_.op == Op::CONV_LEARN) return;
    slot("weight", i_.slot, program_.weights, kernel());
  }

  void pool() const {
    windows();
    require(image() < 1 << 24, "an image has at most 2^24 elements");
  }

  void average() const {
    pool();
    require(i_.p[10] == 1 && i_.p[11] == 1, "an average has no dilation");
    for (const int axis : {0, 1}) {
      const std::int64_t last = std::int64_t{i_.p[13 + axis] - 1} * i_.p[6 + axis] - i_.p[8 + axis];
      require(last < i_.p[1 + axis] && i_.p[8 + axis] < i_.p[4 + axis], "every window must hold an element of the image");
    }
  }

  void loss() const {
    energy();
    require(i_.p[0] == 0 || i_.p[0] == 1, "there is no loss " + text(i_.p[0]));
    require(i_.p[0] == 0 || (i_.p[1] > 0 && i_.n % i_.p[1] == 0), "n = " + text(i_.n) + " is not a number of rows of p1 classes");
    needed("out", i_.out, i_.n);
    needed("a", i_.a, i_.n);
    optional("b", i_.b, i_.n);
    needed("c", i_.c, i_.p[0] == 0 ? i_.n : i_.n / i_.p[1]);
    if (i_.slot2 != ABSENT) slot("io", i_.slot2, program_.io, 1);
  }

  const Program& program_;
  const std::size_t index_;
  const Instruction& i_;
};

void check_phases(const Program& program) {
  std::int64_t count = 0;
  for (const Phase& phase : program.phases) {
    if (phase.count < 0 || phase.first < 0 || phase.last > program.steps) {
      throw std::invalid_argument("a phase runs from t = " + text(phase.first) + " to " + text(phase.last) + "; there are steps 0 to " +
                                  text(program.steps) + ".");
    }
    count += phase.count;
  }
  if (count != static_cast<std::int64_t>(program.instructions.size())) {
    throw std::invalid_argument("the phases hold " + text(count) + " instructions; there are " + text(program.instructions.size()) + ".");
  }
}

bool in(int slot, const std::vector<std::int64_t>& sizes) { return slot >= 0 && slot < static_cast<std::int64_t>(sizes.size()); }

const char* wrong(const Program& program, const OuterProduct& p) {
  if (p.positions < 1 || p.inputs < 1 || p.outputs < 1) return "positions, inputs and outputs must be positive";
  if (!in(p.g_slot, program.io) || !in(p.x_slot, program.io)) return "an io slot does not exist";
  if (program.io[p.g_slot] != product({p.positions, p.outputs})) return "a row of g is not positions * outputs";
  if (program.io[p.x_slot] != p.x_stride) return "x_stride is not the length of a row of x";
  if (p.x_offset < 0 || p.x_offset + product({p.positions, p.inputs}) > p.x_stride) return "the part of x ends beyond its row";
  if (p.weight != ABSENT && !in(p.weight, program.gradients)) return "the weight's gradient does not exist";
  if (p.weight != ABSENT && program.gradients[p.weight] != product({p.outputs, p.inputs})) return "the weight's gradient has another size";
  if (p.bias != ABSENT && !in(p.bias, program.gradients)) return "the bias's gradient does not exist";
  if (p.bias != ABSENT && program.gradients[p.bias] != p.outputs) return "the bias's gradient has another size";
  return nullptr;
}

}  // namespace

const char* name(Op op) { return NAMES[static_cast<int>(op)]; }

void check(const Program& program) {
  if (program.rows < 0 || program.steps < 0 || program.energies < 0)
    throw std::invalid_argument("rows, steps and energies count something.");
  check_phases(program);
  for (std::size_t index = 0; index < program.instructions.size(); ++index) InstructionCheck(program, index).run();
  for (std::size_t index = 0; index < program.products.size(); ++index) {
    if (const char* what = wrong(program, program.products[index])) {
      throw std::invalid_argument("product " + text(index) + ": " + what + ".");
    }
  }
  if (program.coefficients.size() != program.products.size()) throw std::invalid_argument("every product needs a coefficient.");
}

}  // namespace pckernels
