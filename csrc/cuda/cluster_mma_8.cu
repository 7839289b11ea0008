#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_mma_8, 8, MMA)
