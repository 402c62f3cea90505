// Lossless sections in portable code: what every other instruction set must equal byte for byte.
#include "lossless.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <array>

#include "kvcodec.h"
#include "lossless_element.h"
#include "x86_rows.h"

namespace kvc {
namespace {

// One step per loop, on short arrays: compilers turn that into vector code of any instruction set.

// Bit i of the index in byte i.
constexpr std::array<uint64_t, 256> make_spread() {
  std::array<uint64_t, 256> spread{};
  for (uint64_t byte = 0; byte < 256; ++byte) {
    for (uint64_t i = 0; i < 8; ++i) spread[byte] |= (byte >> i & 1) << 8 * i;
  }
  return spread;
}
constexpr std::array<uint64_t, 256> kSpread = make_spread();

// Bits 0 of eight bytes.
KVC_INLINE uint8_t gather_bits(uint64_t bytes) {
  return static_cast<uint8_t>((bytes & 0x0101010101010101) * 0x0102040810204080 >> 56);
}

template <typename Element>
struct BlockWriter {
  static inline uint8_t* encode(const uint8_t* source, uint32_t count, uint8_t* low_bytes,
                                uint8_t* planes, uint8_t* base_of_block, uint8_t* escapes) {
    constexpr uint32_t kUnit = Element::kUnit;
    uint16_t words[kBlock];
    uint8_t high[kBlock], low[kBlock], bit9[kBlock], sign[kBlock];
    memcpy(words, source, sizeof words);
    for (uint32_t i = 0; i < kBlock; ++i) {
      const uint32_t word = words[i];
      words[i] = static_cast<uint16_t>(Element::kRotated ? word << 1 | word >> 15 : word);
    }
    for (uint32_t i = 0; i < kBlock; ++i) low[i] = static_cast<uint8_t>(words[i]);
    for (uint32_t i = 0; i < kBlock; ++i) high[i] = static_cast<uint8_t>(words[i] >> 8);
    memcpy(low_bytes, low, sizeof low);
    if (!Element::kRotated) {
      for (uint32_t i = 0; i < kBlock; ++i) sign[i] = high[i] >> 7;
      for (uint32_t i = 0; i < kBlock; ++i) bit9[i] = high[i] >> 1 & 1;
      store_plane(sign, planes + 24);
      store_plane(bit9, planes + 32);
      store_plane(high, planes + 40);
      for (uint32_t i = 0; i < kBlock; ++i) high[i] &= 0x7C;
    }
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kBlock; ++i) sum += high[i];
    uint8_t base = static_cast<uint8_t>(first_base(sum / kUnit, count) * kUnit);
    const uint8_t next = static_cast<uint8_t>(base + kUnit);
    if (count_far(high, next, count) < count_far(high, base, count)) base = next;
    *base_of_block = base;
    uint8_t code[kBlock];
    for (uint32_t i = 0; i < kBlock; ++i) {
      const uint8_t distance = static_cast<uint8_t>(base - high[i]);
      code[i] = distance > 6 * kUnit ? 7 : distance / kUnit;
    }
    for (uint32_t i = count; i < kBlock; ++i) code[i] = 0;
    for (uint32_t k = 0; k < 3; ++k) {
      uint8_t bit[kBlock];
      for (uint32_t i = 0; i < kBlock; ++i) bit[i] = code[i] >> k;
      store_plane(bit, planes + 8 * k);
    }
    for (uint32_t i = 0; i < kBlock; ++i) {
      *escapes = high[i];
      escapes += code[i] == 7;
    }
    return escapes;
  }

 private:
  static uint32_t count_far(const uint8_t* high, uint8_t base, uint32_t count) {
    uint8_t far = 0;
    for (uint32_t i = 0; i < kBlock; ++i)
      far += static_cast<uint8_t>(base - high[i]) > 6 * Element::kUnit && i < count;
    return far;
  }

  static void store_plane(const uint8_t* bits, uint8_t* target) {
    for (uint32_t i = 0; i < kBlock / 8; ++i) {
      uint64_t bytes;
      memcpy(&bytes, bits + 8 * i, 8);
      target[i] = gather_bits(bytes);
    }
  }
};

template <typename Element>
struct BlockReader {
  template <bool>
  static inline const uint8_t* decode(uint8_t* target, const uint8_t* low_bytes,
                                      const uint8_t* planes, uint8_t base,
                                      const uint8_t* escapes) {
    uint8_t high[kBlock], low[kBlock];
    uint16_t words[kBlock];
    for (uint32_t i = 0; i < kBlock / 8; ++i) {
      const uint64_t codes = kSpread[planes[i]] | kSpread[planes[8 + i]] << 1 |
                             kSpread[planes[16 + i]] << 2;
      memcpy(high + 8 * i, &codes, 8);
    }
    for (uint32_t i = 0; i < kBlock; ++i)
      high[i] = static_cast<uint8_t>(base - Element::kUnit * high[i]);
    uint64_t escaped = load_plane(planes, kBlock) & load_plane(planes + 8, kBlock) &
                       load_plane(planes + 16, kBlock);
    for (; escaped != 0; escaped &= escaped - 1) high[__builtin_ctzll(escaped)] = *escapes++;
    if (!Element::kRotated) {
      uint8_t rest[kBlock];
      for (uint32_t i = 0; i < kBlock / 8; ++i) {
        const uint64_t bits = kSpread[planes[24 + i]] << 7 | kSpread[planes[32 + i]] << 1 |
                              kSpread[planes[40 + i]];
        memcpy(rest + 8 * i, &bits, 8);
      }
      for (uint32_t i = 0; i < kBlock; ++i) high[i] = static_cast<uint8_t>(high[i] + rest[i]);
    }
    memcpy(low, low_bytes, sizeof low);
    for (uint32_t i = 0; i < kBlock; ++i) {
      const uint32_t word = static_cast<uint32_t>(high[i] << 8 | low[i]);
      words[i] = static_cast<uint16_t>(Element::kRotated ? word >> 1 | word << 15 : word);
    }
    memcpy(target, words, sizeof words);
    return escapes;
  }
};

#include "lossless_block.h"

}  // namespace

size_t encode_block_scalar(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  return encode_block_section(codec, rows, out);
}

bool decode_block_scalar(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                         const Rows& rows) {
  return decode_block_section(codec, in, stored_bytes, rows, false);
}

}  // namespace kvc
