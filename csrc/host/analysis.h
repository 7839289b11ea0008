// What every call of a program needs to know about it, found once.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace pckernels {

// How products read a weight.
struct WeightUse {
  int outputs = 0, inputs = 0;
  std::int64_t forward = 0, backward = 0;  // products of a lane group with each direction; 0 where its uses disagree about the shape
};

// A gradient that products write after the tiles, and the bias whose gradient comes from the same errors.
struct GradientSum {
  int weight, bias;  // one of them may be ABSENT
  std::vector<int> products;
};

struct Analysis {
  bool spatial;                  // convolutions or pooling
  bool learns;                   // inside the loop
  int sums;                      // LOSS and NORM instructions of a phase, at most
  std::int64_t sum_size;         // numbers that their blocks leave for a lane group, at most
  double work_between_barriers;  // multiplications of a lane group, on average
  std::vector<WeightUse> weights;
  double weight_bytes;           // of all that products read
  std::vector<GradientSum> gradient_sums;
  std::vector<bool> written;           // gradients that products write after the tiles
  std::vector<bool> learned;           // gradients that the loop adds to
  std::vector<std::int64_t> learn_at;  // where each of these begins in an array of them all
  std::int64_t learn_size;
};

Analysis analyse(const Program& program);

}  // namespace pckernels
