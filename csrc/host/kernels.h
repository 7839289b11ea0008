// The part of the host engine that exists once for each instruction set, as a table of functions.
#pragma once

#include <cstddef>

#include "../engine/instruction.h"
#include "tile.h"

namespace pckernels {

// OuterTerm of products.h, outside the namespaces of the instruction sets.
struct OuterSum {
  const float* g;
  const float* x;
  long rows;
  int positions;
  std::ptrdiff_t x_stride;
  float coefficient;
};

struct Kernels {
  const char* name;
  int width;  // floats of a register
  void (*run_tile)(const Code& code, const Tile& tile, int lanes, int rank, int size);
  std::size_t (*packed_floats)(int lanes, int outputs, int inputs);
  void (*pack_forward)(int lanes, const float* w, int outputs, int inputs, float* panels, int rank, int size);
  void (*pack_backward)(int lanes, const float* w, int outputs, int inputs, float* panels, int rank, int size);
  void (*outer_products)(const OuterSum* terms, int count, float* gradient, float* bias, int outputs, int inputs, float factor, int rank,
                         int size);
};

}  // namespace pckernels
