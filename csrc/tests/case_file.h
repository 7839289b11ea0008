// A program and its data in a file, for test programs. Little-endian, without padding:
//
//   "PCKCASE1"
//   int32    rows, weights, io, gradients, steps, energies, instructions, phases, products, batch
//   int32    the instructions (32 words each), the phases (3), the products (9)
//   float32  the coefficients of the products
//   int64    the elements of each weight, of a sample's row of each io, of each gradient
//   float32  the weights, then io (batch rows each)
//
// Results are written as float32 io and gradients, then float64 energies (steps + 1, energies).
#pragma once

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../host/program.h"

namespace pckernels {

struct CaseData {
  Program program;
  int batch = 0;
  std::vector<std::vector<float>> weights, io, gradients;
  std::vector<double> energies;
};

class CaseReader {
 public:
  explicit CaseReader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~CaseReader() { std::fclose(file_); }
  CaseReader(const CaseReader&) = delete;
  CaseReader& operator=(const CaseReader&) = delete;

  template <class T>
  std::vector<T> read(std::size_t count) {
    std::vector<T> result(count);
    if (count > 0 && std::fread(static_cast<void*>(result.data()), sizeof(T), count, file_) != count)
      throw std::runtime_error("the file is short");
    return result;
  }

 private:
  std::FILE* file_;
};

inline std::vector<std::vector<float>> read_tensors(CaseReader& file, const std::vector<std::int64_t>& sizes, std::int64_t rows) {
  std::vector<std::vector<float>> result;
  for (const std::int64_t size : sizes) result.push_back(file.read<float>(static_cast<std::size_t>(size * rows)));
  return result;
}

inline CaseData read_case(const char* path) {
  CaseReader file(path);
  const std::vector<char> magic = file.read<char>(8);
  if (std::memcmp(magic.data(), "PCKCASE1", 8) != 0) throw std::runtime_error("this is not a case file");
  const std::vector<std::int32_t> head = file.read<std::int32_t>(10);
  CaseData result;
  Program& program = result.program;
  program.rows = head[0];
  program.steps = head[4];
  program.energies = head[5];
  result.batch = head[9];
  program.instructions = file.read<Instruction>(head[6]);
  program.phases = file.read<Phase>(head[7]);
  program.products = file.read<OuterProduct>(head[8]);
  program.coefficients = file.read<float>(head[8]);
  program.weights = file.read<std::int64_t>(head[1]);
  program.io = file.read<std::int64_t>(head[2]);
  program.gradients = file.read<std::int64_t>(head[3]);
  check(program);
  result.weights = read_tensors(file, program.weights, 1);
  result.io = read_tensors(file, program.io, result.batch);
  for (const std::int64_t size : program.gradients) result.gradients.emplace_back(static_cast<std::size_t>(size));
  result.energies.resize(static_cast<std::size_t>(program.steps + 1) * program.energies);
  return result;
}

inline void write_results(const char* path, const CaseData& data) {
  std::FILE* file = std::fopen(path, "wb");
  if (file == nullptr) throw std::runtime_error(std::string("cannot write ") + path);
  for (const auto* tensors : {&data.io, &data.gradients}) {
    for (const std::vector<float>& tensor : *tensors) std::fwrite(tensor.data(), sizeof(float), tensor.size(), file);
  }
  std::fwrite(data.energies.data(), sizeof(double), data.energies.size(), file);
  std::fclose(file);
}

// The int after `option` among the arguments, or otherwise.
inline int option(int argc, char** argv, const char* name, int otherwise) {
  for (int k = 1; k + 1 < argc; ++k) {
    if (std::strcmp(argv[k], name) == 0) return std::stoi(argv[k + 1]);
  }
  return otherwise;
}

}  // namespace pckernels
