// The memory of a call. Calls take a workspace from a shelf and put it back, so that it is allocated once for as many calls as run at a
// time.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "barrier.h"
#include "kernels.h"

namespace pckernels {

// Aligned memory that grows when more is needed, and shrinks when far less is.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  template <class T>
  T* hold(std::size_t count) {
    constexpr std::size_t spare = std::size_t{16} << 20;
    const std::size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_ || bytes_ > 4 * bytes + spare) allocate(bytes);
    return static_cast<T*>(data_);
  }

 private:
  void allocate(std::size_t bytes) {
    std::free(data_);
    bytes_ = 0;
    data_ = std::aligned_alloc(64, bytes);
    if (data_ == nullptr && bytes > 0) throw std::bad_alloc();
    bytes_ = bytes;
  }

  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

struct Workspace {
  Buffer arenas, panels, energies, partial_sums, learned, sums;
  std::vector<WeightArrays> weights;
  std::vector<float*> io, gradients;
  std::vector<float*> block_gradients;  // (blocks, gradients): where a block's samples add to
  std::vector<OuterSum> terms;
  std::vector<PendingSum> pending;
  std::unique_ptr<Barrier[]> barriers;
  int barrier_count = 0;

  Barrier* hold_barriers(int count) {
    if (count > barrier_count) {
      barriers.reset(new Barrier[count]);
      barrier_count = count;
    }
    return barriers.get();
  }
};

std::unique_ptr<Workspace> take_workspace();
void put_back(std::unique_ptr<Workspace> workspace);

}  // namespace pckernels
