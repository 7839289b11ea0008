#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_simt_16, 16, SIMT)
