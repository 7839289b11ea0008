#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_mma_8, 8, MMA)
