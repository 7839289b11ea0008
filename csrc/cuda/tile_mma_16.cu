#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_mma_16, 16, MMA)
