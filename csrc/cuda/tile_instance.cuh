// What a file of one instance of the tile kernel holds.
#pragma once

#include "kernels.h"
#include "tile_kernel.cuh"

#define PCK_TILE_INSTANCE(NAME, LANES, TENSOR)                         \
  namespace pckernels::cuda {                                          \
  const TileKernel NAME{LANES, TENSOR, &execute_tiles<LANES, TENSOR>}; \
  }
