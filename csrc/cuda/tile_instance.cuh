// What a file of one instance of the tile kernel holds.
#pragma once

#include "kernels.h"
#include "tile_kernel.cuh"

#define PCK_TILE_INSTANCE(NAME, LANES, PRODUCT)                                                   \
  namespace pckernels::cuda {                                                                     \
  const TileKernel NAME{LANES, Product::PRODUCT, false, &execute_tiles<LANES, Product::PRODUCT>}; \
  }

#define PCK_CLUSTER_INSTANCE(NAME, LANES, PRODUCT)                                                        \
  namespace pckernels::cuda {                                                                             \
  const TileKernel NAME{LANES, Product::PRODUCT, true, &execute_tiles_together<LANES, Product::PRODUCT>}; \
  }
