#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_simt_1, 1, SIMT)
