#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_simt_8, 8, SIMT)
