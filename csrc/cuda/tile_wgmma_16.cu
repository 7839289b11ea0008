#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_wgmma_16, 16, WGMMA)
