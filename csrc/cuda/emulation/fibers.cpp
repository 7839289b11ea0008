// The threads of a cluster's blocks, or of one block, as fibers. Between two points where threads wait for each other each runs alone. The
// order is drawn for each cluster: threads at random, or one warp as far ahead of the others as it can get, and with it its block as far
// ahead of the other blocks, from any of them on, so that a missing barrier shows as a wrong result.
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

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  int exchanges[2] = {};  // of its warp; of its warpgroup
  Asynchronous asynchronous;
  std::unique_ptr<char[]> stack{new char[STACK]};
};

// Threads that exchange.
struct Group {
  std::vector<char> data[2];
  int arrived = 0;
};

struct Block {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, std::free};
  std::vector<char> view;        // of its memory, for asynchronous work
  std::vector<Group> groups[2];  // warps; warpgroups
  int waiting = 0, alive = 0;
};

std::vector<std::unique_ptr<Fiber>> fibers;  // of all blocks in a row
std::vector<Block> blocks;
std::vector<int> ready;
std::mt19937 generator(1);
const std::function<void()>* body;
jmp_buf scheduler;
int current, threads, waiting, first_block;  // the fiber that runs; of a block; for the whole cluster; where the order begins
dim3 start;                                  // index of the cluster's first block
std::size_t shared_size;
Order order;
const char* complaint;

Block& own_block() { return blocks[current / threads]; }

void leave() {
  if (_setjmp(fibers[current]->resume) == 0) _longjmp(scheduler, 1);
}

void begin() {
  (*body)();
  const Asynchronous& left = fibers[current]->asynchronous;
  if (!left.issued.empty() || !left.committed.empty()) stop("a thread has ended with asynchronous work that it has not waited for.");
  --own_block().alive;
  _longjmp(scheduler, 1);
}

void resume(int k) {
  Fiber& fiber = *fibers[k];
  current = k;
  place.thread = dim3(k % threads);
  place.block = dim3(start.x + k / threads, start.y);
  shared = blocks[k / threads].memory.get();
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

// Those that are woken last run first.
void wake(int first, int count) {
  for (int k = 0; k < count; ++k) {
    ready.push_back(order == Order::FIRST_WARP_AHEAD ? first + count - 1 - k : first + k);
  }
}

void wake_all() {
  const int count = static_cast<int>(blocks.size());
  for (int k = 0; k < count; ++k) wake((first_block + k) % count * threads, threads);
}

void release_who_has_met() {
  Block& block = own_block();
  if (block.waiting == threads) block.waiting = 0, wake(current / threads * threads, threads);
  if (waiting == threads * static_cast<int>(blocks.size())) waiting = 0, wake_all();
}

void prepare_blocks(int count) {
  const std::size_t whole = (shared_size + GUARD + 15) / 16 * 16;
  while (blocks.size() > static_cast<std::size_t>(count)) blocks.pop_back();
  while (blocks.size() < static_cast<std::size_t>(count)) blocks.emplace_back();
  for (Block& block : blocks) {
    block.memory.reset(static_cast<char*>(std::aligned_alloc(16, whole)));
    std::memset(block.memory.get(), 0xff, whole);  // NaN
    block.view.assign(shared_size, '\xff');
    block.groups[0].assign(threads / WARP, {});
    block.groups[1].assign((threads + WARPGROUP - 1) / WARPGROUP, {});
    block.waiting = 0, block.alive = threads;
  }
}

void prepare_threads(int count) {
  while (static_cast<int>(fibers.size()) < count) fibers.push_back(std::make_unique<Fiber>());
  ready.clear();
  for (int k = 0; k < count; ++k) {
    fibers[k]->started = false;
    fibers[k]->exchanges[0] = fibers[k]->exchanges[1] = 0;
    fibers[k]->asynchronous = {};
  }
}

void run_cluster(int count) {
  waiting = 0;
  order = static_cast<Order>(generator() % 3);
  first_block = count > 1 ? static_cast<int>(generator() % count) : 0;
  prepare_blocks(count);
  prepare_threads(count * threads);
  wake_all();
  while (!ready.empty()) {
    if (order == Order::RANDOM) std::swap(ready[generator() % ready.size()], ready.back());
    const int next = ready.back();
    ready.pop_back();
    resume(next);
    if (complaint) throw std::runtime_error(complaint);
    release_who_has_met();
  }
}

void check_cluster() {
  for (const Block& block : blocks) {
    if (block.alive > 0) throw std::runtime_error("threads of a block wait for each other in different places.");
    const char *end = block.memory.get() + shared_size, *last = end + GUARD;
    const bool intact = std::all_of(end, last, [](char byte) { return byte == '\xff'; });
    if (!intact) throw std::runtime_error("a block wrote beyond its shared memory.");
  }
}

}  // namespace

void meet() {
  ++own_block().waiting;
  leave();
}

void meet_cluster() {
  ++waiting;
  leave();
}

const char* of_peer(const void* mine, int rank) {
  if (blocks[rank].alive < threads) stop("a block reads the shared memory of one that may have ended.");
  return blocks[rank].memory.get() + (static_cast<const char*>(mine) - shared);
}

const char* exchange(const void* mine, std::size_t bytes, int size) {
  const int kind = size == WARP ? 0 : 1;
  const int place_in_group = current % threads % size;
  Group& group = own_block().groups[kind][current % threads / size];
  std::vector<char>& data = group.data[fibers[current]->exchanges[kind]++ % 2];
  data.resize(std::max(data.size(), size * std::max<std::size_t>(bytes, 64)));
  std::memcpy(data.data() + place_in_group * bytes, mine, bytes);
  if (++group.arrived == size) {
    group.arrived = 0;
    for (int k = 0; k < size; ++k) {
      if (k != place_in_group) wake(current - place_in_group + k, 1);
    }
    return data.data();
  }
  leave();
  return data.data();
}

Asynchronous& asynchronous() { return fibers[current]->asynchronous; }

void fence_proxy() { std::memcpy(own_block().view.data(), shared, shared_size); }

const char* proxy_view(std::size_t start, std::size_t bytes) {
  if (start + bytes > shared_size) stop("a descriptor leads out of shared memory.");
  return own_block().view.data() + start;
}

void stop(const char* why) {
  complaint = why;
  _longjmp(scheduler, 1);
}

void run_blocks(dim3 grid, int cluster, int block_threads, std::size_t shared_bytes, const std::function<void()>& function) {
  body = &function, threads = block_threads, shared_size = shared_bytes, complaint = nullptr;
  place.grid = grid, place.block_size = dim3(block_threads);
  if (grid.x % cluster != 0) throw std::runtime_error("a grid must be whole clusters.");
  for (unsigned block = 0; block < grid.x * grid.y; block += cluster) {
    start = dim3(block % grid.x, block / grid.x);
    run_cluster(cluster);
    check_cluster();
  }
}

}  // namespace emulation
