// A barrier for threads that meet every few microseconds: it spins, then yields, since there may be fewer cores than threads.
#pragma once

#include <atomic>
#include <thread>

namespace pckernels {

inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Waits until ready() is true.
template <class Ready>
void spin_until(Ready ready) {
  for (int tries = 0; !ready(); ++tries) {
    if (tries < 2000) {
      pause_core();
    } else {
      std::this_thread::yield();
    }
  }
}

// Sense-reversing: the last to arrive turns the sense over, for which the others wait.
class Barrier {
 public:
  void reset(int threads) {
    threads_ = threads;
    arrived_.store(0, std::memory_order_relaxed);
  }

  void wait() {
    const bool before = sense_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      sense_.store(!before, std::memory_order_release);
    } else {
      spin_until([&] { return sense_.load(std::memory_order_acquire) != before; });
    }
  }

 private:
  int threads_ = 1;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<bool> sense_{false};
};

}  // namespace pckernels
