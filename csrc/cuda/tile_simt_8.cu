#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_simt_8, 8, SIMT)
