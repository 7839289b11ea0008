// The threads of a block as fibers. Between two points where threads wait for each other each runs alone. The order is drawn for each
// block: threads at random, or one warp as far ahead of the others as it can get, from the last warp or from the first, so that a missing
// barrier shows as a wrong result.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {

Place place;
char* shared;

namespace {

constexpr std::size_t STACK = 256 << 10;
constexpr int WARP = 32, WARPGROUP = 128;
constexpr std::size_t GUARD = 4096;  // bytes behind shared memory that nobody may write

enum class Order { RANDOM, LAST_WARP_AHEAD, FIRST_WARP_AHEAD };
enum class State { READY, AT_BARRIER, IN_EXCHANGE, DONE };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  State state = State::READY;
  int exchanges[2] = {};  // of its warp; of its warpgroup
  Asynchronous asynchronous;
  std::unique_ptr<char[]> stack{new char[STACK]};
};

// Threads that exchange.
struct Group {
  std::vector<char> data[2];
  int arrived = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Group> groups[2];  // warps; warpgroups
std::vector<int> ready;
std::vector<char> view;
std::size_t shared_size;
const char* complaint;
std::mt19937 generator(1);
const std::function<void()>* body;
jmp_buf scheduler;
int current, waiting, alive;
Order order;

void leave(State state) {
  fibers[current]->state = state;
  if (_setjmp(fibers[current]->resume) == 0) _longjmp(scheduler, 1);
}

void begin() {
  (*body)();
  const Asynchronous& left = fibers[current]->asynchronous;
  if (!left.issued.empty() || !left.committed.empty()) stop("a thread has ended with asynchronous work that it has not waited for.");
  fibers[current]->state = State::DONE;
  --alive;
  _longjmp(scheduler, 1);
}

void resume(int k) {
  Fiber& fiber = *fibers[k];
  current = k;
  place.thread = dim3(k);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, begin, 0);
  setcontext(&fiber.context);
}

void wake(int first, int count) {
  for (int k = 0; k < count; ++k) {
    const int next = order == Order::FIRST_WARP_AHEAD ? first + count - 1 - k : first + k;
    fibers[next]->state = State::READY;
    ready.push_back(next);
  }
}

void run_block(int threads) {
  waiting = 0, alive = threads;
  order = static_cast<Order>(generator() % 3);
  groups[0].assign(threads / WARP, {});
  groups[1].assign((threads + WARPGROUP - 1) / WARPGROUP, {});
  complaint = nullptr;
  ready.clear();
  for (int k = 0; k < threads; ++k) {
    fibers[k]->started = false;
    fibers[k]->exchanges[0] = fibers[k]->exchanges[1] = 0;
    fibers[k]->asynchronous = {};
  }
  wake(0, threads);
  while (!ready.empty()) {
    if (order == Order::RANDOM) std::swap(ready[generator() % ready.size()], ready.back());
    const int next = ready.back();
    ready.pop_back();
    resume(next);
    if (complaint) throw std::runtime_error(complaint);
    if (waiting == threads) waiting = 0, wake(0, threads);
  }
  if (alive > 0) throw std::runtime_error("threads of a block wait for each other in different places.");
}

}  // namespace

void meet() {
  ++waiting;
  leave(State::AT_BARRIER);
}

const char* exchange(const void* mine, std::size_t bytes, int size) {
  const int kind = size == WARP ? 0 : 1;
  Group& group = groups[kind][current / size];
  std::vector<char>& data = group.data[fibers[current]->exchanges[kind]++ % 2];
  data.resize(std::max(data.size(), size * std::max<std::size_t>(bytes, 64)));
  std::memcpy(data.data() + current % size * bytes, mine, bytes);
  if (++group.arrived == size) {
    group.arrived = 0;
    const int own = current, first = own / size * size;
    for (int k = first; k < first + size; ++k) {
      if (k != own) wake(k, 1);
    }
    return data.data();
  }
  leave(State::IN_EXCHANGE);
  return data.data();
}

Asynchronous& asynchronous() { return fibers[current]->asynchronous; }

void fence_proxy() { std::memcpy(view.data(), shared, shared_size); }

const char* proxy_view(std::size_t start, std::size_t bytes) {
  if (start + bytes > shared_size) stop("a descriptor leads out of shared memory.");
  return view.data() + start;
}

void stop(const char* why) {
  complaint = why;
  _longjmp(scheduler, 1);
}

void run_blocks(dim3 grid, int threads, std::size_t shared_bytes, const std::function<void()>& function) {
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  const std::size_t whole = (shared_bytes + GUARD + 15) / 16 * 16;
  const std::unique_ptr<char, decltype(&std::free)> memory(static_cast<char*>(std::aligned_alloc(16, whole)), std::free);
  shared = memory.get();
  shared_size = shared_bytes;
  body = &function;
  place.grid = grid, place.block_size = dim3(threads);
  for (unsigned block = 0; block < grid.x * grid.y; ++block) {
    place.block = dim3(block % grid.x, block / grid.x);
    std::memset(shared, 0xff, whole);  // NaN
    view.assign(shared_bytes, '\xff');
    run_block(threads);
    const bool intact = std::all_of(shared + shared_bytes, shared + whole, [](char byte) { return byte == '\xff'; });
    if (!intact) throw std::runtime_error("a block wrote beyond its shared memory.");
  }
}

}  // namespace emulation
