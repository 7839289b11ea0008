#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_simt_2, 2, SIMT)
