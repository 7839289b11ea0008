// What device code takes from CUDA, in one place. Under g++ the headers of emulation/ stand in for it: see emulation/cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define PCK_ISA cuda  // the namespace of the engine's code

#ifdef PCK_EMULATED
#include <emulated_instructions.h>
#include <emulated_wgmma.h>
#else
#include "instructions.cuh"
#include "instructions_wgmma.cuh"
#endif

namespace pckernels::cuda {

constexpr int WARP = 32;
constexpr int THREADS = 256;  // of a block that executes tiles
constexpr int WARPS = THREADS / WARP;

}  // namespace pckernels::cuda
