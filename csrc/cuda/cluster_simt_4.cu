#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_simt_4, 4, SIMT)
