// Compiled once for each instruction set, with PCK_ISA its name: the engine, its Team and its products.
#include "kernels.h"
#include "products_conv.h"
#include "products_linear.h"
#include "products_outer.h"
#include "team.h"

namespace pckernels::PCK_ISA {

static void run_tile(const Code& code, const Tile& tile, int lanes, int rank, int size) {
  if (lanes == 1) {
    HostTeam<1> team(tile, rank, size);
    run_phases(team, code);
  } else {
    HostTeam<GROUP> team(tile, rank, size);
    run_phases(team, code);
  }
}

static std::size_t packed(int lanes, int outputs, int inputs) {
  return lanes == 1 ? packed_floats<1>(outputs, inputs) : packed_floats<GROUP>(outputs, inputs);
}

static void forward(int lanes, const float* w, int outputs, int inputs, float* panels, int rank, int size) {
  lanes == 1 ? pack_forward<1>(w, outputs, inputs, panels, {rank, size}) : pack_forward<GROUP>(w, outputs, inputs, panels, {rank, size});
}

static void backward(int lanes, const float* w, int outputs, int inputs, float* panels, int rank, int size) {
  lanes == 1 ? pack_backward<1>(w, outputs, inputs, panels, {rank, size}) : pack_backward<GROUP>(w, outputs, inputs, panels, {rank, size});
}

static void outer(const OuterSum* terms, int count, float* gradient, float* bias, int outputs, int inputs, float factor, int rank,
                  int size) {
  static_assert(sizeof(OuterSum) == sizeof(OuterTerm) && offsetof(OuterSum, coefficient) == offsetof(OuterTerm, coefficient));
  outer_products(reinterpret_cast<const OuterTerm*>(terms), count, gradient, bias, outputs, inputs, factor, {rank, size});
}

#define PCK_TEXT(name) #name
#define PCK_NAME(name) PCK_TEXT(name)
extern const Kernels kernels;
const Kernels kernels = {PCK_NAME(PCK_ISA), kWidth, run_tile, packed, forward, backward, outer};

}  // namespace pckernels::PCK_ISA
