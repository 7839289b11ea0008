#include "tile_instance.cuh"

PCK_CLUSTER_INSTANCE(cluster_mma_16, 16, MMA)
