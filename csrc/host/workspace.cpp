#include "workspace.h"

#include <mutex>

namespace pckernels {
namespace {

struct Shelf {
  std::mutex mutex;
  std::vector<std::unique_ptr<Workspace>> free;
};

// Never destroyed: a thread may still be in a call when the process ends.
Shelf& shelf() {
  static Shelf* result = new Shelf;
  return *result;
}

}  // namespace

std::unique_ptr<Workspace> take_workspace() {
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  if (shelf().free.empty()) return std::make_unique<Workspace>();
  std::unique_ptr<Workspace> result = std::move(shelf().free.back());
  shelf().free.pop_back();
  return result;
}

void put_back(std::unique_ptr<Workspace> workspace) {
  const std::lock_guard<std::mutex> lock(shelf().mutex);
  shelf().free.push_back(std::move(workspace));
}

}  // namespace pckernels
