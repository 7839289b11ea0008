#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_wgmma_32, 32, WGMMA)
