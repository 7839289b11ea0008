// What instructions_wgmma.cuh gives, on the CPU, decoded from registers and bits as the PTX manual says. A product reads its operands, and
// writes its sums, when its thread waits for it: what changes an operand before, or reads a sum, meets the wrong numbers. So does, through
// proxy_view, what was written to shared memory and not fenced.
//
// Not seen: a proxy fence that stands behind the barrier in place of before it, one that only some of the writing threads execute, and a
// wgmma.fence before the last write to a register in place of after it.
#pragma once

#include <emulated_instructions.h>

namespace pckernels::cuda {

constexpr bool HAS_WGMMA = true;

inline std::uint32_t shared_address(const void* generic) {
  return static_cast<std::uint32_t>(static_cast<const char*>(generic) - emulation::shared);
}
inline void fence_proxy_async() { emulation::fence_proxy(); }
inline void wgmma_fence() { emulation::asynchronous().fenced = true; }

inline void wgmma_commit() {
  emulation::Asynchronous& mine = emulation::asynchronous();
  mine.committed.insert(mine.committed.end(), mine.issued.begin(), mine.issued.end());
  mine.issued.clear();
}
inline void wgmma_wait() {
  emulation::Asynchronous& mine = emulation::asynchronous();
  for (const auto& work : mine.committed) work();
  mine.committed.clear();
  mine.fenced = false;
}

template <int GROUPS>
void hold(float (&)[GROUPS][4]) {}

// A descriptor's fields. Of the modes of swizzling only none is emulated.
struct MatrixDescriptor {
  std::uint32_t start, leading, stride;

  explicit MatrixDescriptor(std::uint64_t bits) : start(field(bits, 0)), leading(field(bits, 16)), stride(field(bits, 32)) {
    if (bits >> 62 != 0) emulation::stop("a descriptor asks for swizzling.");
    if (bits >> 49 & 7) emulation::stop("a descriptor has a base offset, which only swizzling has.");
  }
  static std::uint32_t field(std::uint64_t bits, int first) { return static_cast<std::uint32_t>(bits >> first & 0x3fffu) << 4; }

  // Where the 16 bytes begin that hold row `row` of the K-major matrix, column `column` of its 16-byte columns.
  std::uint32_t at(int row, int column) const { return start + row / 8 * stride + row % 8 * 16 + column * leading; }
};

struct WgmmaShare {
  std::uint32_t a[4];
  std::uint64_t b;
};

// a(row, k) of the warp's own 16 rows, from the shares of its threads.
template <class Format>
float wgmma_a(const WgmmaShare* warp, int row, int k) {
  const int within = k % (Format::DEPTH / 2);
  const std::uint32_t word = warp[row % 8 * 4 + within / Format::PER_WORD].a[row / 8 + k / (Format::DEPTH / 2) * 2];
  return Format::number(word >> k % Format::PER_WORD * 16);
}

// b(k, column), column `column` of B and row `column` of what lies in memory.
template <class Format>
float wgmma_b(const MatrixDescriptor& b, int k, int column) {
  constexpr int BYTES = 4 / Format::PER_WORD;
  std::uint32_t bits = 0;
  std::memcpy(&bits, emulation::proxy_view(b.at(column, k * BYTES / 16) + k * BYTES % 16, BYTES), BYTES);
  return Format::number(bits);
}

template <class Format, int GROUPS>
void wgmma_finish(float (&d)[GROUPS][4], const uint4& a, std::uint64_t b) {
  constexpr int WARPGROUP = 128;
  const WgmmaShare mine{{a.x, a.y, a.z, a.w}, b};
  const auto* all = reinterpret_cast<const WgmmaShare*>(emulation::exchange(&mine, sizeof mine, WARPGROUP));
  for (int k = 0; k < WARPGROUP; ++k) {
    if (all[k].b != b) emulation::stop("the threads of a warpgroup give different descriptors.");
  }
  const MatrixDescriptor descriptor(b);
  const int thread = threadIdx.x % 32, warp = threadIdx.x % WARPGROUP / 32;
  for (int group = 0; group < GROUPS; ++group) {
    for (int part = 0; part < 4; ++part) {
      const int row = thread / 4 + part / 2 * 8, column = group * 8 + thread % 4 * 2 + part % 2;
      for (int k = 0; k < Format::DEPTH; ++k) {
        d[group][part] += wgmma_a<Format>(all + warp * 32, row, k) * wgmma_b<Format>(descriptor, k, column);
      }
    }
  }
}

template <class Format, int GROUPS>
void wgmma(float (&d)[GROUPS][4], const uint4& a, std::uint64_t b) {
  emulation::Asynchronous& mine = emulation::asynchronous();
  if (!mine.fenced) emulation::stop("no wgmma.fence stands between registers that were free and a product.");
  mine.issued.push_back([&d, &a, b] { wgmma_finish<Format>(d, a, b); });
}

struct EmulatedTf32 {
  static constexpr int DEPTH = 8, PER_WORD = 1;
  static float number(std::uint32_t bits) { return float_of(bits & 0xffffe000u); }
};
struct EmulatedBf16 {
  static constexpr int DEPTH = 16, PER_WORD = 2;
  static float number(std::uint32_t bits) { return from_bf16(bits & 0xffffu); }
};
struct EmulatedFp16 {
  static constexpr int DEPTH = 16, PER_WORD = 2;
  static float number(std::uint32_t bits) { return from_fp16(bits & 0xffffu); }
};
template <int GROUPS>
void wgmma_tf32(float (&d)[GROUPS][4], const uint4& a, std::uint64_t b) {
  wgmma<EmulatedTf32>(d, a, b);
}
template <int GROUPS>
void wgmma_bf16(float (&d)[GROUPS][4], const uint4& a, std::uint64_t b) {
  wgmma<EmulatedBf16>(d, a, b);
}
template <int GROUPS>
void wgmma_fp16(float (&d)[GROUPS][4], const uint4& a, std::uint64_t b) {
  wgmma<EmulatedFp16>(d, a, b);
}

}  // namespace pckernels::cuda
