// What the lossless kernels of all instruction sets share, proto/FORMAT.md 3.8 and 3.9. Plain code
// with internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "coded.h"
#include "x86_rows.h"

namespace kvc {
namespace {

constexpr uint32_t kBlock = 64;  // elements
// Of the read side in an encoder: how far ahead rows are fetched.
constexpr size_t kAheadBytes = 8192;
constexpr uint32_t kMaxNeighbours = 64;  // heads that are encoded side by side

// An element is its high byte and its low byte, after a rotation by one bit for bf16: there the
// high byte is the exponent, and the low byte the mantissa and the sign.
struct Bf16Bytes {
  static constexpr bool kRotated = true;
  static constexpr uint32_t kShift = 0;  // of the exponent in the high byte
  static constexpr uint32_t kUnit = 1 << kShift;
  static constexpr uint32_t kPlanes = 3;
  static constexpr uint32_t kRawBits = 0;  // of the high byte, besides the exponent
};

// The high byte of fp16 holds the exponent between the sign and two bits of the mantissa, which
// have planes of their own.
struct Fp16Bytes {
  static constexpr bool kRotated = false;
  static constexpr uint32_t kShift = 2;
  static constexpr uint32_t kUnit = 1 << kShift;
  static constexpr uint32_t kPlanes = 6;
  static constexpr uint32_t kRawBits = 3;
};

// What a writer tries first as a base, and then one more: the mean exponent and 2.375, modulo 256.
constexpr uint32_t kBaseAbove = 152;  // 64ths

KVC_INLINE uint32_t first_base(uint32_t sum, uint32_t count) {
  return (kBlock * sum / count + kBaseAbove) / kBlock;
}

// All bits set if `a` has fewer bits set than `b`.
KVC_INLINE uint64_t all_if_fewer(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(
      static_cast<int64_t>(__builtin_popcountll(a) - __builtin_popcountll(b)) >> 63);
}

KVC_INLINE void store_plane(uint8_t* target, uint64_t plane) { memcpy(target, &plane, 8); }

KVC_INLINE uint64_t load_plane(const uint8_t* source, uint32_t count) {
  uint64_t plane = 0;
  if (count == kBlock) {
    memcpy(&plane, source, 8);
    return plane;
  }
  memcpy(&plane, source, (count + 7) / 8);
  return plane & ((uint64_t{1} << count) - 1);
}

}  // namespace
}  // namespace kvc
