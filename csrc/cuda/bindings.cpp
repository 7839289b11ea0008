// The Python module pckernels._cuda: device addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "launch.h"

#ifndef PCK_MODULE
#define PCK_MODULE _cuda
#endif
#ifndef PCK_ARCHITECTURES
#define PCK_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace pckernels::cuda {
namespace {

// The rows of a contiguous buffer of 4-byte numbers (a NumPy array, bytes) as structs.
template <class Struct>
std::vector<Struct> structs(const py::buffer& source, const char* what) {
  const py::buffer_info info = source.request();
  const std::size_t bytes = static_cast<std::size_t>(info.size) * static_cast<std::size_t>(info.itemsize);
  if (info.itemsize != 1 && info.itemsize != 4) throw py::type_error(std::string(what) + " must hold 4-byte numbers.");
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error(std::string(what) + " must be contiguous.");
  if (bytes % sizeof(Struct) != 0)
    throw py::value_error(std::string(what) + " must consist of rows of " + std::to_string(sizeof(Struct) / 4) + ".");
  std::vector<Struct> result(bytes / sizeof(Struct));
  if (bytes > 0) std::memcpy(static_cast<void*>(result.data()), info.ptr, bytes);
  return result;
}

void check_addresses(const std::vector<std::uintptr_t>& found, std::size_t count, const char* what) {
  if (found.size() != count) {
    throw py::value_error(std::string(what) + " has " + std::to_string(found.size()) + " addresses; the program has " +
                          std::to_string(count) + ".");
  }
  for (const std::uintptr_t address : found) {
    if (address % sizeof(float) != 0) throw py::value_error(std::string(what) + " must be addresses of float32 numbers.");
  }
}

std::vector<std::int64_t> sizes(const std::vector<std::pair<std::int64_t, std::int64_t>>& matrices) {
  std::vector<std::int64_t> result;
  for (const auto& [outputs, inputs] : matrices) result.push_back(outputs * inputs);
  return result;
}

Precision precision_of(const std::string& name) {
  if (name == "fp32") return Precision::FP32;
  if (name == "tf32") return Precision::TF32;
  if (name == "bf16") return Precision::BF16;
  if (name == "fp16") return Precision::FP16;
  throw py::value_error("precision must be 'fp32', 'tf32', 'bf16' or 'fp16'; got '" + name + "'.");
}

bool is_resident(const std::string& tier, int cluster) {
  const bool known = cluster > 1 ? tier == "cluster" : tier == "stream" || tier == "resident";
  if (!known) {
    throw py::value_error("tier must be 'stream' or 'resident', or 'cluster' for a program that several blocks share; got '" + tier + "'.");
  }
  return tier != "stream";
}

// '': the one that needs no staging buffer.
Product product_of(const std::string& name, Precision precision) {
  if (name.empty()) return precision == Precision::FP32 ? Product::SIMT : Product::MMA;
  if (name == "simt") return Product::SIMT;
  if (name == "mma") return Product::MMA;
  if (name == "wgmma") return Product::WGMMA;
  throw py::value_error("product must be 'simt', 'mma' or 'wgmma'; got '" + name + "'.");
}

class PyProgram {
 public:
  PyProgram(const py::buffer& words, const py::buffer& phases, const py::buffer& products, const py::buffer& coefficients, int rows,
            const std::vector<std::pair<std::int64_t, std::int64_t>>& weights, std::vector<std::int64_t> io,
            std::vector<std::int64_t> gradients, int steps, int energies, int cluster)
      : layout_(Program{structs<Instruction>(words, "words"), structs<Phase>(phases, "phases"), structs<OuterProduct>(products, "products"),
                        structs<float>(coefficients, "coefficients"), rows, sizes(weights), std::move(io), std::move(gradients), steps,
                        energies},
                cluster) {}

  py::bytes tables() const { return py::bytes(layout_.table_bytes().data(), layout_.table_bytes().size()); }

  std::int64_t workspace_bytes(std::int64_t batch, const std::string& tier, int lanes, const std::string& precision, int blocks,
                               const std::string& product, int staged) const {
    return layout_.workspace(cut(batch, tier, lanes, precision, blocks, product, staged)).bytes;
  }

  std::int64_t shared_bytes(const std::string& tier, int lanes, const std::string& precision, const std::string& product,
                            int staged) const {
    return layout_.shared_bytes(cut(1, tier, lanes, precision, 0, product, staged));
  }

  void run(const std::vector<std::uintptr_t>& weights, const std::vector<std::uintptr_t>& io, const std::vector<std::uintptr_t>& gradients,
           std::uintptr_t energies, std::int64_t batch, float factor, std::uintptr_t tables, std::uintptr_t workspace,
           std::int64_t workspace_bytes, const std::string& tier, int lanes, const std::string& precision, int blocks,
           const std::string& product, int staged, int device, std::uintptr_t stream) const {
    const Program& program = layout_.program();
    check_addresses(weights, program.weights.size(), "weights");
    check_addresses(io, program.io.size(), "io");
    check_addresses(gradients, program.gradients.size(), "gradients");
    const Call call{weights.data(),
                    io.data(),
                    gradients.data(),
                    reinterpret_cast<double*>(energies),
                    reinterpret_cast<const char*>(tables),
                    reinterpret_cast<char*>(workspace),
                    workspace_bytes,
                    factor,
                    device,
                    stream};
    const Cut found = cut(batch, tier, lanes, precision, blocks, product, staged);
    const py::gil_scoped_release release;
    cuda::run(layout_, found, call);
  }

 private:
  Cut cut(std::int64_t batch, const std::string& tier, int lanes, const std::string& precision, int blocks, const std::string& product,
          int staged) const {
    if (lanes < 1) throw py::value_error("lanes must be positive.");
    const Precision operands = precision_of(precision);
    return {batch, lanes, blocks, is_resident(tier, layout_.cluster()), operands, product_of(product, operands), staged};
  }

  const Layout layout_;
};

py::dict info() {
  py::dict result;
  result["architectures"] = PCK_ARCHITECTURES;
  result["cudart"] = runtime_version();
  result["lanes"] = py::dict(py::arg("simt") = lanes_of(Product::SIMT), py::arg("mma") = lanes_of(Product::MMA),
                             py::arg("wgmma") = lanes_of(Product::WGMMA));
  result["unusable"] = why_unusable();
  return result;
}

}  // namespace
}  // namespace pckernels::cuda

PYBIND11_MODULE(PCK_MODULE, module) {
  using pckernels::cuda::PyProgram;
  module.doc() = "The native engine for NVIDIA GPUs. See pckernels/instructions.py for what it executes.";
  py::class_<PyProgram>(module, "Program")
      .def(py::init<const py::buffer&, const py::buffer&, const py::buffer&, const py::buffer&, int,
                    const std::vector<std::pair<std::int64_t, std::int64_t>>&, std::vector<std::int64_t>, std::vector<std::int64_t>, int,
                    int, int>(),
           py::arg("words"), py::arg("phases"), py::arg("products"), py::arg("coefficients"), py::arg("rows"), py::arg("weights"),
           py::arg("io"), py::arg("gradients"), py::arg("steps"), py::arg("energies"), py::arg("cluster") = 1,
           "As pckernels._native.Program. cluster: blocks that execute a tile together; more than one for code that is sharded over them.")
      .def("tables", &PyProgram::tables, "What has to lie in the device's memory, 256-byte aligned, for run().")
      .def("workspace_bytes", &PyProgram::workspace_bytes, py::arg("batch"), py::arg("tier"), py::arg("lanes"),
           py::arg("precision") = "fp32", py::arg("blocks") = 0, py::arg("product") = "", py::arg("staged") = 0,
           "Bytes of device memory, 256-byte aligned, that run() needs with the same arguments.")
      .def("shared_bytes", &PyProgram::shared_bytes, py::arg("tier"), py::arg("lanes"), py::arg("precision") = "fp32",
           py::arg("product") = "", py::arg("staged") = 0, "Dynamic shared memory of a block.")
      .def("run", &PyProgram::run, py::arg("weights"), py::arg("io"), py::arg("gradients"), py::arg("energies"), py::arg("batch"),
           py::arg("factor"), py::arg("tables"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("tier"), py::arg("lanes"),
           py::arg("precision") = "fp32", py::arg("blocks") = 0, py::arg("product") = "", py::arg("staged") = 0,
           py::arg("device") = 0, py::arg("stream") = 0,
           "Puts its kernels on the stream: device addresses of contiguous float32 arrays, of the float64 energies, of tables and "
           "workspace.");
  module.def("info", &pckernels::cuda::info,
             "Architectures compiled, CUDA's runtime, lanes of the kernels by product, and why none can run here (or '').");
}
