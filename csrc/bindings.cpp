// The Python module pckernels._native: addresses and numbers in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "host/run.h"
#include "host/sets.h"

namespace py = pybind11;

namespace pckernels {
namespace {

// The int32 or float32 values of a bytes object, a buffer (a NumPy array), or what has .numpy() (a tensor).
template <class T>
std::vector<T> values(const py::object& source, std::size_t row, const char* what) {
  if (py::hasattr(source, "numpy")) return values<T>(source.attr("numpy")(), row, what);
  const py::buffer_info info = py::reinterpret_borrow<py::buffer>(source).request();
  const bool is_bytes = info.itemsize == 1;
  if (!is_bytes && info.itemsize != static_cast<py::ssize_t>(sizeof(T)))
    throw py::type_error(std::string(what) + " must hold 4-byte numbers.");
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error(std::string(what) + " must be contiguous.");
  const std::size_t bytes = static_cast<std::size_t>(info.size) * static_cast<std::size_t>(info.itemsize);
  if (bytes % (row * sizeof(T)) != 0) throw py::value_error(std::string(what) + " must consist of rows of " + std::to_string(row) + ".");
  std::vector<T> result(bytes / sizeof(T));
  std::memcpy(result.data(), info.ptr, bytes);
  return result;
}

template <class Struct>
std::vector<Struct> structs(const py::object& source, const char* what) {
  const std::vector<std::int32_t> words = values<std::int32_t>(source, sizeof(Struct) / sizeof(std::int32_t), what);
  std::vector<Struct> result(words.size() * sizeof(std::int32_t) / sizeof(Struct));
  std::memcpy(static_cast<void*>(result.data()), words.data(), words.size() * sizeof(std::int32_t));
  return result;
}

// The addresses of arrays of `rows` times so many elements; an empty array may be anywhere.
std::vector<std::uintptr_t> addresses(const py::list& list, const std::vector<std::int64_t>& elements, std::int64_t rows,
                                      const char* what) {
  if (list.size() != elements.size()) {
    const std::string counts = std::to_string(list.size()) + " addresses; the program has " + std::to_string(elements.size());
    throw py::value_error(std::string(what) + " has " + counts + ".");
  }
  std::vector<std::uintptr_t> result(elements.size());
  for (std::size_t k = 0; k < result.size(); ++k) {
    result[k] = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(list[k].ptr()));
    if (PyErr_Occurred()) throw py::error_already_set();
    const bool missing = result[k] == 0 && elements[k] * rows > 0;
    if (missing || result[k] % sizeof(float) != 0) throw py::value_error(std::string(what) + " must be addresses of float32 numbers.");
  }
  return result;
}

std::vector<std::int64_t> sizes(const std::vector<std::pair<std::int64_t, std::int64_t>>& matrices) {
  std::vector<std::int64_t> result;
  for (const auto& [outputs, inputs] : matrices) result.push_back(outputs * inputs);
  return result;
}

class PyProgram {
 public:
  PyProgram(const py::object& words, const py::object& phases, const py::object& products, const py::object& coefficients, int rows,
            const std::vector<std::pair<std::int64_t, std::int64_t>>& weights, std::vector<std::int64_t> io,
            std::vector<std::int64_t> gradients, int steps, int energies)
      : program_{structs<Instruction>(words, "words"),
                 structs<Phase>(phases, "phases"),
                 structs<OuterProduct>(products, "products"),
                 values<float>(coefficients, 1, "coefficients"),
                 rows,
                 sizes(weights),
                 std::move(io),
                 std::move(gradients),
                 steps,
                 energies} {
    check(program_);
    analysis_ = analyse(program_);
  }

  void run(const py::list& weights, const py::list& io, const py::list& gradients, std::uintptr_t energies, std::int64_t batch, int threads,
           float factor, int tile_groups) const {
    const bool missing = energies == 0 && program_.energies > 0;
    if (missing || energies % sizeof(double) != 0) throw py::value_error("energies must be the address of float64 numbers.");
    if (batch < 0) throw py::value_error("batch must not be negative.");
    if (threads < 1 || threads > 1024) throw py::value_error("threads must be 1 to 1024.");
    if (tile_groups < 0) throw py::value_error("tile_groups must not be negative.");
    const auto weight_addresses = addresses(weights, program_.weights, 1, "weights");
    const auto io_addresses = addresses(io, program_.io, batch, "io");
    const auto gradient_addresses = addresses(gradients, program_.gradients, 1, "gradients");
    const Call call{weight_addresses.data(),
                    io_addresses.data(),
                    gradient_addresses.data(),
                    reinterpret_cast<double*>(energies),
                    batch,
                    threads,
                    factor,
                    tile_groups};
    const Kernels& kernels = chosen_set();
    const py::gil_scoped_release release;
    pckernels::run(program_, analysis_, kernels, call);
  }

 private:
  Program program_;
  Analysis analysis_;
};

py::dict info() {
  py::dict result;
  result["instruction_sets"] = compiled_sets();
  result["chosen"] = chosen_set().name;
  result["why"] = reason_of_choice();
#ifdef __VERSION__
  result["compiler"] = __VERSION__;
#endif
  result["version"] = PCK_VERSION;
  return result;
}

}  // namespace
}  // namespace pckernels

PYBIND11_MODULE(_native, module) {
  using pckernels::PyProgram;
  module.doc() = "The native engine. See pckernels/instructions.py for what it executes.";
  py::class_<PyProgram>(module, "Program")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, int,
                    const std::vector<std::pair<std::int64_t, std::int64_t>>&, std::vector<std::int64_t>, std::vector<std::int64_t>, int,
                    int>(),
           py::arg("words"), py::arg("phases"), py::arg("products"), py::arg("coefficients"), py::arg("rows"), py::arg("weights"),
           py::arg("io"), py::arg("gradients"), py::arg("steps"), py::arg("energies"),
           "Encoded code; for each weight (outputs, inputs), for each io the elements of a sample's row, for each gradient its elements.")
      .def("run", &PyProgram::run, py::arg("weights"), py::arg("io"), py::arg("gradients"), py::arg("energies"), py::arg("batch"),
           py::arg("threads"), py::arg("factor") = 1.0f, py::arg("tile_groups") = 0,
           "Executes it: addresses of contiguous float32 arrays, of the float64 energies (steps + 1, energies), and the batch.");
  module.def("info", &pckernels::info, "The instruction sets that are compiled, the one in use and why, the compiler, the version.");
  module.def("choose_instruction_set", &pckernels::choose_set, py::arg("name"));
  module.def(
      "set_work_of_thread", [](double work) { pckernels::work_of_thread = work; }, py::arg("multiplications"),
      "How many multiplications between two barriers pay for one more thread in a team that shares a tile.");
}
