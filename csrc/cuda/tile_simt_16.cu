#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_simt_16, 16, SIMT)
