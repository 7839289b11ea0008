#include "launch.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "device.h"
#include "kernels.h"
#include "sums.cuh"

#ifndef PCK_ARCHITECTURES
#define PCK_ARCHITECTURES "nothing that it knows of"
#endif

namespace pckernels::cuda {
namespace {

constexpr int WITHOUT_ASKING = 48 << 10;  // bytes of dynamic shared memory
constexpr int PORTABLE_CLUSTER = 8;       // blocks

// Functions, not an array: other files' constants may not be initialised yet when this file's are.
std::vector<TileKernel> tile_kernels() {
  return {tile_simt_1,   tile_simt_2,    tile_simt_4,    tile_simt_8,    tile_simt_16,   tile_mma_8,      tile_mma_16,   tile_wgmma_16,
          tile_wgmma_32, cluster_simt_1, cluster_simt_2, cluster_simt_4, cluster_simt_8, cluster_simt_16, cluster_mma_8, cluster_mma_16};
}

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it does not come up again in the next call
  std::string text = std::string("CUDA could not ") + what + ": " + cudaGetErrorString(error) + ".";
  if (error == cudaErrorNoKernelImageForDevice) text += " The extension was not built for this GPU; info() lists its architectures.";
  if (error == cudaErrorInvalidValue) text += " The plan may ask for more shared memory than a block of this GPU has.";
  throw std::runtime_error(text);
}

TileKernel kernel_for(const Cut& cut, int cluster) {
  for (const TileKernel& kernel : tile_kernels()) {
    if (kernel.lanes == cut.lanes && kernel.product == cut.product && kernel.cluster == (cluster > 1)) return kernel;
  }
  std::string known;
  for (const int lanes : lanes_of(cut.product)) known += (known.empty() ? "" : ", ") + std::to_string(lanes);
  throw std::invalid_argument("There is no kernel with " + std::to_string(cut.lanes) +
                              " samples in a tile at this precision; there are those with " + known + ".");
}

// wgmma is an instruction of compute capability 9.0 alone, and of code that was compiled for sm_90a; its kernels are for a block alone.
void check_product(const Cut& cut, int cluster, int device) {
  if ((cut.precision == Precision::FP32) != (cut.product == Product::SIMT)) {
    throw std::invalid_argument("Products of operands in fp32 are simt, those of other operands mma or wgmma.");
  }
  const bool staged = cut.product == Product::WGMMA;
  if (staged ? cut.staged <= 0 || cut.staged % STAGED_ROWS != 0 : cut.staged != 0) {
    throw std::invalid_argument("wgmma stages a multiple of " + std::to_string(STAGED_ROWS) + " rows, and no other product any; got " +
                                std::to_string(cut.staged) + ".");
  }
  if (!staged) return;
  if (cluster > 1) throw std::invalid_argument("Blocks of a cluster multiply by simt or mma, not by wgmma.");
  int major = 0, minor = 0;
  must(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "read the compute capability");
  must(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "read the compute capability");
  if (major != 9 || minor != 0 || std::string(PCK_ARCHITECTURES).find("sm_90a") == std::string::npos) {
    throw std::invalid_argument("wgmma needs compute capability 9.0 and an extension compiled for sm_90a; this GPU has " +
                                std::to_string(major) + "." + std::to_string(minor) + " and the extension is for " PCK_ARCHITECTURES
                                ". The product mma runs here.");
  }
}

int blocks_for(std::int64_t threads) { return static_cast<int>((threads + THREADS - 1) / THREADS); }

class Launcher {
 public:
  Launcher(const Layout& layout, const Cut& cut, const Call& call)
      : layout_(layout),
        cut_(cut),
        call_(call),
        at_(layout.workspace(cut)),
        tables_(layout.tables(call.tables)),
        stream_(reinterpret_cast<cudaStream_t>(call.stream)) {
    if (call.workspace_bytes < at_.bytes) {
      throw std::invalid_argument("The workspace has " + std::to_string(call.workspace_bytes) + " bytes; this call needs " +
                                  std::to_string(at_.bytes) + ".");
    }
    weights_ = reinterpret_cast<std::uint64_t*>(call.workspace + at_.pointers);
    io_ = weights_ + layout.program().weights.size();
    gradients_ = io_ + layout.program().io.size();
  }

  void run() {
    write_pointers();
    pack();
    execute();
    multiply();
    finish();
  }

 private:
  template <class T>
  static T as(std::uint64_t* pointers) {
    return reinterpret_cast<T>(pointers);
  }
  float* floats(std::int64_t offset) const { return reinterpret_cast<float*>(call_.workspace + offset); }
  double* tile_energies() const { return reinterpret_cast<double*>(call_.workspace + at_.energies); }

  void write_pointers() {
    const Program& program = layout_.program();
    std::vector<std::uint64_t> all(call_.weights, call_.weights + program.weights.size());
    all.insert(all.end(), call_.io, call_.io + program.io.size());
    all.insert(all.end(), call_.gradients, call_.gradients + program.gradients.size());
    for (std::size_t start = 0; start < all.size(); start += CHUNK) {
      PointerChunk chunk{};
      const int count = static_cast<int>(std::min<std::size_t>(CHUNK, all.size() - start));
      std::copy_n(all.data() + start, count, chunk.values);
      must(launch(write_pointers_kernel, dim3(1), THREADS, 0, stream_, chunk, weights_ + start, count), "launch write_pointers");
    }
  }

  void pack() {
    const int units = layout_.packed_units(cut_.precision);
    if (units == 0) return;
    const PackArguments arguments{
        tables_,        as<const float* const*>(weights_), reinterpret_cast<std::uint32_t*>(call_.workspace + at_.packed), units,
        cut_.precision, packing_of(cut_.precision)};
    must(launch(pack_kernel, dim3(blocks_for(units)), THREADS, 0, stream_, arguments), "launch pack_weights");
  }

  void execute() {
    const bool nothing = layout_.program().instructions.empty() && layout_.energy_count() == 0 && layout_.analysis().learn_size == 0;
    if (nothing) return;  // a program of outer products alone
    const int cluster = layout_.cluster();
    const TileKernel kernel = kernel_for(cut_, cluster);
    const void* function = reinterpret_cast<const void*>(kernel.function);
    const std::int64_t shared = layout_.shared_bytes(cut_);
    if (shared > INT32_MAX) throw std::invalid_argument("A tile's arena is larger than any shared memory.");
    if (shared > WITHOUT_ASKING) {
      must(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), "reserve shared memory");
    }
    if (cluster > PORTABLE_CLUSTER) {
      must(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "allow clusters of this size");
    }
    const Program& program = layout_.program();
    const TileArguments arguments{tables_,
                                  as<const float* const*>(weights_),
                                  as<float* const*>(io_),
                                  call_.workspace + at_.packed,
                                  tile_energies(),
                                  floats(at_.learned),
                                  static_cast<int>(cut_.batch),
                                  at_.tiles,
                                  program.steps,
                                  program.energies,
                                  static_cast<int>(layout_.analysis().learn_size),
                                  static_cast<int>(layout_.arena_bytes(cut_.lanes)),
                                  cluster,
                                  cut_.resident ? layout_.loop_units(cut_.precision) : 0,
                                  cut_.precision,
                                  cut_.staged};
    const std::size_t bytes = static_cast<std::size_t>(shared);
    if (cluster == 1) {
      must(launch(kernel.function, dim3(at_.blocks), THREADS, bytes, stream_, arguments), "launch execute_tiles");
    } else {
      const auto found = launch_clusters(cluster, kernel.function, dim3(at_.blocks), THREADS, bytes, stream_, arguments);
      must(found, "launch clusters of execute_tiles");
    }
  }

  void multiply() {
    if (layout_.outer_tiles() == 0) return;
    const OuterArguments arguments{tables_,    as<const float* const*>(io_), floats(at_.partial), static_cast<int>(cut_.batch),
                                   at_.splits, layout_.product_size(),       cut_.precision};
    const auto kernel = cut_.precision == Precision::FP32 ? outer_simt_kernel : outer_mma_kernel;
    must(launch(kernel, dim3(layout_.outer_tiles(), at_.splits), THREADS, 0, stream_, arguments), "launch the outer products");
  }

  void finish() {
    const std::int64_t threads =
        (std::int64_t{layout_.gradient_count()} + WARP - 1) / WARP * WARP + std::int64_t{layout_.energy_count()} * WARP;
    if (threads == 0) return;
    const FinishArguments arguments{tables_,
                                    as<float* const*>(gradients_),
                                    floats(at_.partial),
                                    floats(at_.learned),
                                    tile_energies(),
                                    call_.energies,
                                    layout_.gradient_count(),
                                    at_.splits,
                                    layout_.product_size(),
                                    at_.blocks,
                                    static_cast<int>(layout_.analysis().learn_size),
                                    at_.tiles * layout_.cluster(),
                                    layout_.energy_count(),
                                    call_.factor};
    must(launch(finish_kernel, dim3(blocks_for(threads)), THREADS, 0, stream_, arguments), "launch finish");
  }

  const Layout& layout_;
  const Cut& cut_;
  const Call& call_;
  const WorkspaceLayout at_;
  const Tables tables_;
  const cudaStream_t stream_;
  std::uint64_t *weights_, *io_, *gradients_;
};

}  // namespace

std::int64_t Layout::shared_bytes(const Cut& cut) const {
  return SUM_BYTES + arena_bytes(cut.lanes) + (cut.resident ? std::int64_t{loop_units(cut.precision)} * 16 : 0) + staging_bytes(cut);
}

void run(const Layout& layout, const Cut& cut, const Call& call) {
  if (cut.batch <= 0 || cut.batch > INT32_MAX / 2) throw std::invalid_argument("A call has 1 to 2^30 samples.");
  check_product(cut, layout.cluster(), call.device);
  kernel_for(cut, layout.cluster());
  must(cudaSetDevice(call.device), "take the device");
  Launcher(layout, cut, call).run();
}

std::vector<int> lanes_of(Product product) {
  std::vector<int> result;
  for (const TileKernel& kernel : tile_kernels()) {
    if (kernel.product == product && !kernel.cluster) result.push_back(kernel.lanes);
  }
  return result;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

std::string why_unusable() {
  int driver = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    cudaGetLastError();
#ifndef PCK_EMULATED
    return "there is no NVIDIA driver";
#endif
  }
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    cudaGetLastError();
    return error == cudaSuccess ? "there is no CUDA device" : std::string("CUDA finds no device: ") + cudaGetErrorString(error);
  }
  return "";
}

}  // namespace pckernels::cuda
