// The kernels by name, for the launcher.
#pragma once

#include "tables.h"

namespace pckernels::cuda {

struct TileKernel {
  int lanes;
  Product product;
  bool cluster;
  void (*function)(TileArguments);
};
extern const TileKernel tile_simt_1, tile_simt_2, tile_simt_4, tile_simt_8, tile_simt_16, tile_mma_8, tile_mma_16, tile_wgmma_16,
    tile_wgmma_32;
extern const TileKernel cluster_simt_1, cluster_simt_2, cluster_simt_4, cluster_simt_8, cluster_simt_16, cluster_mma_8, cluster_mma_16;

extern void (*const write_pointers_kernel)(PointerChunk, std::uint64_t*, int);
extern void (*const pack_kernel)(PackArguments);
extern void (*const outer_simt_kernel)(OuterArguments);
extern void (*const outer_mma_kernel)(OuterArguments);
extern void (*const finish_kernel)(FinishArguments);

}  // namespace pckernels::cuda
