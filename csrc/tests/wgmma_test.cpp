// Test of the emulated wgmma against a plain product: `wgmma_test FLAW`. The kernel spreads its operands as the PTX manual's figures of
// m64nNk16 and m64nNk8 do; FLAW, if it is not `none`, is something that it does wrong. Prints the numbers of D that are not the plain
// product's, which are 0 only without a flaw, or throws.
//   g++ -std=c++17 -DPCK_EMULATED -I../cuda/emulation -I../cuda wgmma_test.cpp ../cuda/emulation/fibers.cpp -o wgmma_test
#include "device.h"

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

using namespace pckernels::cuda;

namespace {

constexpr int ROWS = 64, GROUP = 128, GROUPS = 2, BLOCKS = 2;  // of A; threads of a warpgroup; warpgroups of a block; blocks of a cluster
using Matrix = std::vector<float>;

std::string flaw;

// In all these formats small whole numbers are exact.
struct Tf32 {
  static constexpr int DEPTH = 8, BYTES = 4;
  static std::uint32_t bits(float x) { return to_tf32(x); }
  template <class Sums>
  static void multiply(Sums& d, const uint4& a, std::uint64_t b) {
    wgmma_tf32(d, a, b);
  }
};
struct Bf16 {
  static constexpr int DEPTH = 16, BYTES = 2;
  static std::uint32_t bits(float x) { return to_bf16(x); }
  template <class Sums>
  static void multiply(Sums& d, const uint4& a, std::uint64_t b) {
    wgmma_bf16(d, a, b);
  }
};
struct Fp16 {
  static constexpr int DEPTH = 16, BYTES = 2;
  static std::uint32_t bits(float x) { return to_fp16(x); }
  template <class Sums>
  static void multiply(Sums& d, const uint4& a, std::uint64_t b) {
    wgmma_fp16(d, a, b);
  }
};

// Bytes from one 8 x 16 bytes of B to the next along its depth, and along its columns.
struct Strides {
  int leading, stride;
};

// Elements a0, a1, .. of a thread, 32 / BYTES / 8 in a register: rows g and g + 8 in turns, and then the second half of the depth.
template <class Format>
uint4 operand_a(const float* a) {
  constexpr int PER_REGISTER = 4 / Format::BYTES;
  const int thread = threadIdx.x % GROUP, warp = thread / 32, g = thread % 32 / 4, member = thread % 4;
  std::uint32_t registers[4] = {};
  for (int element = 0; element < 4 * PER_REGISTER; ++element) {
    const int pair = element / PER_REGISTER, row = warp * 16 + g + (pair % 2 == 1 ? 8 : 0);
    const int column = member * PER_REGISTER + element % PER_REGISTER + (pair / 2 == 1 ? Format::DEPTH / 2 : 0);
    registers[pair] |= Format::bits(a[row * Format::DEPTH + column]) << element % PER_REGISTER * 16;
  }
  return make_uint4(registers[0], registers[1], registers[2], registers[3]);
}

template <class Format>
void stage(const float* b, int columns, Strides strides, char* memory) {
  for (int item = threadIdx.x; item < Format::DEPTH * columns; item += blockDim.x) {
    const int k = item / columns, n = item % columns, along = k * Format::BYTES;
    const std::uint32_t bits = Format::bits(b[item]);
    std::memcpy(memory + along / 16 * strides.leading + n / 8 * strides.stride + n % 8 * 16 + along % 16, &bits, Format::BYTES);
  }
}

std::uint64_t descriptor(const char* memory, Strides strides) {
  std::uint64_t result = shared_address(memory) >> 4;
  result |= std::uint64_t(strides.leading * (flaw == "leading" ? 2 : 1) >> 4) << 16;
  result |= std::uint64_t(strides.stride * (flaw == "stride" ? 2 : 1) >> 4) << 32;
  if (flaw == "start") result += 1;
  if (flaw == "swizzle") result |= std::uint64_t{1} << 62;
  if (flaw == "descriptors" && threadIdx.x % GROUP >= 96) result += 1;
  return result;
}

// Each warpgroup adds its own B times A to D of its own.
template <class Format, int LANES>
void kernel(const float* a, const float* b, float* d, Strides strides) {
  const int group = threadIdx.x / GROUP, first = blockIdx.x * GROUPS, size = Format::DEPTH * LANES;
  char* memory = dynamic_shared_memory() + 64;
  const int bytes = size * Format::BYTES * 2;  // with gaps
  for (int each = 0; each < GROUPS; ++each) stage<Format>(b + (first + each) * size, LANES, strides, memory + each * bytes);
  if (flaw != "proxy fence") fence_proxy_async();
  __syncthreads();
  float sums[LANES / 8][4] = {};
  uint4 mine = operand_a<Format>(a);
  if (flaw != "fence") wgmma_fence();
  Format::multiply(sums, mine, descriptor(memory + group * bytes, strides));
  if (flaw != "commit") wgmma_commit();
  if (flaw == "operand") mine.y = mine.x;
  if (flaw == "memory" && threadIdx.x == 0) std::memset(memory, 0, bytes), fence_proxy_async();
  if (flaw != "wait") wgmma_wait();
  const int thread = threadIdx.x % GROUP;
  for (int i = 0; i < LANES / 2; ++i) {  // d0, d1, ..
    const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    d[((first + group) * ROWS + row) * LANES + column] = sums[i / 4][i % 4];
  }
}

template <class Format, int LANES>
int wrong(Strides strides) {
  Matrix a(ROWS * Format::DEPTH), b(BLOCKS * GROUPS * Format::DEPTH * LANES), d(BLOCKS * GROUPS * ROWS * LANES);
  for (std::size_t k = 0; k < a.size(); ++k) a[k] = static_cast<float>(static_cast<int>(k * 37 % 23) - 11);
  for (std::size_t k = 0; k < b.size(); ++k) b[k] = static_cast<float>(static_cast<int>(k * 53 % 19) - 9);
  emulation::run_blocks(dim3(BLOCKS), BLOCKS, GROUPS * GROUP, 16384, [&] { kernel<Format, LANES>(a.data(), b.data(), d.data(), strides); });
  int result = 0;
  for (int k = 0; k < BLOCKS * GROUPS * ROWS * LANES; ++k) {
    const int column = k % LANES, row = k / LANES % ROWS, group = k / LANES / ROWS;
    float expected = 0.0f;
    for (int depth = 0; depth < Format::DEPTH; ++depth) {
      expected += a[row * Format::DEPTH + depth] * b[(group * Format::DEPTH + depth) * LANES + column];
    }
    result += d[k] == expected ? 0 : 1;
  }
  return result;
}

template <class Format>
int wrong() {
  return wrong<Format, 16>({16 * 16, 128}) + wrong<Format, 16>({128, 256}) + wrong<Format, 32>({32 * 16, 128}) +
         wrong<Format, 32>({128, 256}) + wrong<Format, 32>({16 * 32 + 16, 128});
}

}  // namespace

int main(int count, char** arguments) {
  flaw = count > 1 ? arguments[1] : "none";
  std::printf("%d\n", wrong<Tf32>() + wrong<Bf16>() + wrong<Fp16>());
}
