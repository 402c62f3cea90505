// Kind fp8: bytes of e4m3fn without scales. proto/FORMAT.md 3.11.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "numerics.h"

namespace kvc {

// The portable way; these do not touch the padding of a section.
uint64_t encode_fp8(const SectionCodec&, const Rows&, uint8_t* out);
void decode_fp8(const SectionCodec&, const uint8_t* in, const Rows&);

namespace {

constexpr uint32_t kE4M3Largest = 0x7E;  // 448
constexpr uint32_t kE4M3NaN = 0x7F;

// The byte of a number before it saturates: above kE4M3Largest it is beyond the range, or NaN.
inline uint32_t e4m3_magnitude(uint32_t magnitude) {
  const uint32_t normal = (magnitude - 0x3C000000 + 0x7FFFF + (magnitude >> 20 & 1)) >> 20;
  // One unit in the last place of 2^14 is the smallest denormal of e4m3fn: the addition rounds.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  return magnitude < 0x3C800000 ? denormal : normal;
}

inline float float_of_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7Fu;
  // A product with 2^120 moves the bias, denormals included, as for fp16.
  const uint32_t moved = bits_of(float_of(magnitude << 20) * 0x1p120f);
  return float_of(magnitude == kE4M3NaN ? 0x7FC00000 : moved | (code & 0x80u) << 24);
}

}  // namespace
}  // namespace kvc
