#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_simt_2, 2, SIMT)
