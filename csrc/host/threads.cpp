#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "barrier.h"

namespace pckernels {
namespace {

class Pool {
 public:
  void run(int threads, void (*work)(void*, int), void* context) {
    const std::lock_guard<std::mutex> turn(turn_);
    while (static_cast<int>(workers_.size()) < threads - 1) add_worker();
    left_.store(threads - 1, std::memory_order_relaxed);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_ = work;
      context_ = context;
      threads_ = threads;
      call_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(context, 0);
    spin_until([&] { return left_.load(std::memory_order_acquire) == 0; });
  }

 private:
  // Detached, since a thread that sleeps ends with the process; joining would hang in a forked child, which has no such threads.
  void add_worker() {
    const int rank = static_cast<int>(workers_.size()) + 1;
    workers_.push_back(rank);
    std::thread([this, rank, seen = call_.load()] { serve(rank, seen); }).detach();
  }

  [[noreturn]] void serve(int rank, unsigned seen) {
    for (;;) {
      wait_for_call(seen);
      void (*work)(void*, int);
      void* context;
      int threads;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = call_.load(std::memory_order_relaxed);
        work = work_;
        context = context_;
        threads = threads_;
      }
      if (rank >= threads) continue;
      work(context, rank);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  // A short spin catches calls that follow each other closely; then the thread sleeps.
  void wait_for_call(unsigned seen) {
    for (int tries = 0; tries < 4000; ++tries) {
      if (call_.load(std::memory_order_acquire) != seen) return;
      pause_core();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return call_.load(std::memory_order_relaxed) != seen; });
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::vector<int> workers_;
  std::atomic<unsigned> call_{0};
  std::atomic<int> left_{0};
  void (*work_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
};

// The threads of a forked process's parent do not exist in it: it starts with a pool of its own and leaves the copy alone.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(mutex);
  if (owner != getpid()) {
    current = new Pool;
    owner = getpid();
  }
  return *current;
}

}  // namespace

void run_threads(int threads, void (*work)(void*, int), void* context) {
  if (threads <= 1) return work(context, 0);
  pool().run(threads, work, context);
}

}  // namespace pckernels
