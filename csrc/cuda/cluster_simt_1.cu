#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_simt_1, 1, SIMT)
