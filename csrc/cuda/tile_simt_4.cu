#include "tile_instance.cuh"

PCK_TILE_INSTANCE(tile_simt_4, 4, SIMT)
