// What a file of one instance of the tile kernel holds.
#pragma once

#include "kernels.h"
#include "tile_kernel.cuh"

#define PCK_TILE_INSTANCE(NAME, LANES, TENSOR)                                \
  namespace pckernels::cuda {                                                 \
  const TileKernel NAME{LANES, TENSOR, false, &execute_tiles<LANES, TENSOR>}; \
  }

#define PCK_CLUSTER_INSTANCE(NAME, LANES, TENSOR)                                     \
  namespace pckernels::cuda {                                                         \
  const TileKernel NAME{LANES, TENSOR, true, &execute_tiles_together<LANES, TENSOR>}; \
  }
