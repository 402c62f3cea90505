// Lossless sections for processors with AVX2.
#include "lossless.h"

#if defined(__x86_64__)

// Before the target region: see avx2.cpp.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kvcodec.h"
#include "lossless_coded.h"
#include "lossless_element.h"
#include "x86_rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,popcnt")
#endif

namespace kvc {
namespace {

#include "coded_avx2.h"

// The low bytes of 32 words.
KVC_INLINE __m256i join_bytes(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xD8);
}

template <int kBit>
KVC_INLINE uint64_t plane_of(const __m256i bytes[2]) {
  const int low = _mm256_movemask_epi8(_mm256_slli_epi16(bytes[0], 7 - kBit));
  const int high = _mm256_movemask_epi8(_mm256_slli_epi16(bytes[1], 7 - kBit));
  return static_cast<uint32_t>(low) | static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32;
}

KVC_INLINE __m256i subtract_where(__m256i v, __m256i where, int amount) {
  return _mm256_sub_epi8(v, _mm256_and_si256(where, _mm256_set1_epi8(static_cast<char>(amount))));
}

template <typename Element>
struct BlockWriter {
  static KVC_INLINE uint8_t* encode(const uint8_t* source, uint32_t count, uint8_t* low_bytes,
                                    uint8_t* planes, uint8_t* base_of_block, uint8_t* escapes) {
    constexpr int kUnit = Element::kUnit;
    const __m256i zero = _mm256_setzero_si256();
    __m256i high[2];
    __m256i sums = zero;
    for (int i = 0; i < 2; ++i) {
      __m256i first = load_vector(source + 64 * i);
      __m256i second = load_vector(source + 64 * i + 32);
      if (Element::kRotated) {
        first = _mm256_or_si256(_mm256_add_epi16(first, first), _mm256_srli_epi16(first, 15));
        second = _mm256_or_si256(_mm256_add_epi16(second, second), _mm256_srli_epi16(second, 15));
      }
      const __m256i low_half = _mm256_set1_epi16(0xFF);
      store_vector(low_bytes + 32 * i, join_bytes(_mm256_and_si256(first, low_half),
                                                  _mm256_and_si256(second, low_half)));
      high[i] = join_bytes(_mm256_srli_epi16(first, 8), _mm256_srli_epi16(second, 8));
    }
    if (!Element::kRotated) {
      store_plane(planes + 24, plane_of<7>(high));
      store_plane(planes + 32, plane_of<1>(high));
      store_plane(planes + 40, plane_of<0>(high));
      high[0] = _mm256_and_si256(high[0], _mm256_set1_epi8(0x7C));
      high[1] = _mm256_and_si256(high[1], _mm256_set1_epi8(0x7C));
    }
    for (int i = 0; i < 2; ++i) sums = _mm256_add_epi64(sums, _mm256_sad_epu8(high[i], zero));
    __m128i halves =
        _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    halves = _mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves));
    const uint32_t sum = static_cast<uint32_t>(_mm_cvtsi128_si32(halves));
    const uint64_t present = count == kBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    const uint32_t base = first_base(sum / kUnit, count) * kUnit;
    const uint32_t next = base + kUnit;
    __m256i distance0[2], distance1[2];
    const uint64_t far0 = distances<kUnit>(high, base, distance0) & present;
    const uint64_t far1 = distances<kUnit>(high, next, distance1) & present;
    // Nobody foresees which it is: no branch.
    const uint64_t take_next = all_if_fewer(far1, far0);
    const uint64_t escaped = far0 ^ ((far0 ^ far1) & take_next);
    *base_of_block = static_cast<uint8_t>(base + (kUnit & static_cast<uint32_t>(take_next)));
    const __m256i choice = _mm256_set1_epi64x(static_cast<int64_t>(take_next));
    const __m256i distance[2] = {_mm256_blendv_epi8(distance0[0], distance1[0], choice),
                                 _mm256_blendv_epi8(distance0[1], distance1[1], choice)};
    constexpr int kFirstBit = kUnit == 1 ? 0 : 2;
    store_plane(planes, (plane_of<kFirstBit>(distance) & present) | escaped);
    store_plane(planes + 8, (plane_of<kFirstBit + 1>(distance) & present) | escaped);
    store_plane(planes + 16, (plane_of<kFirstBit + 2>(distance) & present) | escaped);
    alignas(32) uint8_t bytes[kBlock];
    store_vector(bytes, high[0]);
    store_vector(bytes + 32, high[1]);
    return store_escapes(bytes, escaped, escapes);
  }

 private:
  template <int kUnit>
  static KVC_INLINE uint64_t distances(const __m256i high[2], uint32_t base, __m256i out[2]) {
    const __m256i beyond = _mm256_set1_epi8(6 * kUnit + 1);
    uint64_t far = 0;
    for (int i = 0; i < 2; ++i) {
      out[i] = _mm256_sub_epi8(_mm256_set1_epi8(static_cast<char>(base)), high[i]);
      const __m256i is_far = _mm256_cmpeq_epi8(_mm256_max_epu8(out[i], beyond), out[i]);
      far |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(is_far))) << 32 * i;
    }
    return far;
  }

  // The first few without a look at their number, which no processor foresees: what is not there
  // is overwritten by what follows.
  static KVC_INLINE uint8_t* store_escapes(const uint8_t* bytes, uint64_t escaped,
                                           uint8_t* escapes) {
    const auto count = static_cast<uint32_t>(__builtin_popcountll(escaped));
    for (uint32_t i = 0; i < kFree; ++i) {
      escapes[i] = bytes[_tzcnt_u64(escaped) & 63];
      escaped = _blsr_u64(escaped);
    }
    for (uint32_t i = kFree; escaped != 0; ++i) {
      escapes[i] = bytes[_tzcnt_u64(escaped)];
      escaped = _blsr_u64(escaped);
    }
    return escapes + count;
  }
  static constexpr uint32_t kFree = 4;
};

template <typename Element>
struct BlockReader {
  template <bool kStream>
  static KVC_INLINE const uint8_t* decode(uint8_t* target, const uint8_t* low_bytes,
                                          const uint8_t* planes, uint8_t base,
                                          const uint8_t* escapes) {
    constexpr int kUnit = Element::kUnit;
    const uint64_t bit0 = load_plane(planes, kBlock);
    const uint64_t bit1 = load_plane(planes + 8, kBlock);
    const uint64_t bit2 = load_plane(planes + 16, kBlock);
    // One place more for escapes that are not there.
    alignas(32) uint8_t bytes[kBlock + 32];
    for (int i = 0; i < 2; ++i) {
      __m256i high = _mm256_set1_epi8(static_cast<char>(base));
      high = subtract_where(high, bytes_of_plane(bit0, i), kUnit);
      high = subtract_where(high, bytes_of_plane(bit1, i), 2 * kUnit);
      high = subtract_where(high, bytes_of_plane(bit2, i), 4 * kUnit);
      store_vector(bytes + 32 * i, high);
    }
    uint64_t escaped = bit0 & bit1 & bit2;
    const auto count = static_cast<uint32_t>(__builtin_popcountll(escaped));
    for (uint32_t i = 0; i < kFree; ++i) {
      bytes[_tzcnt_u64(escaped)] = escapes[i];
      escaped = _blsr_u64(escaped);
    }
    for (uint32_t i = kFree; escaped != 0; ++i) {
      bytes[_tzcnt_u64(escaped)] = escapes[i];
      escaped = _blsr_u64(escaped);
    }
    for (int i = 0; i < 2; ++i) {
      __m256i high = load_vector(bytes + 32 * i);
      if (!Element::kRotated) {
        high = subtract_where(high, bytes_of_plane(load_plane(planes + 24, kBlock), i), 0x80);
        high = subtract_where(high, bytes_of_plane(load_plane(planes + 32, kBlock), i), -2);
        high = subtract_where(high, bytes_of_plane(load_plane(planes + 40, kBlock), i), -1);
      }
      high = _mm256_permute4x64_epi64(high, 0xD8);
      const __m256i low = _mm256_permute4x64_epi64(load_vector(low_bytes + 32 * i), 0xD8);
      store<kStream>(target + 64 * i, _mm256_unpacklo_epi8(low, high));
      store<kStream>(target + 64 * i + 32, _mm256_unpackhi_epi8(low, high));
    }
    return escapes + count;
  }

 private:
  static constexpr uint32_t kFree = 4;

  template <bool kStream>
  static KVC_INLINE void store(uint8_t* target, __m256i words) {
    if (Element::kRotated)
      words = _mm256_or_si256(_mm256_srli_epi16(words, 1), _mm256_slli_epi16(words, 15));
    if (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), words);
    store_vector(target, words);
  }
};

#include "lossless_block.h"

#include "lossless_avx2.h"
#include "lossless_rows.h"

}  // namespace

size_t encode_block_avx2(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  return encode_block_section(codec, rows, out);
}

bool decode_block_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                       const Rows& rows) {
  const bool stream = rows_aligned(rows, size_t{2} * rows.head_size, 32);
  const bool whole = decode_block_section(codec, in, stored_bytes, rows, stream);
  if (stream) _mm_sfence();
  return whole;
}

bool decode_lossless_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                          const Rows& rows, uint8_t* scratch) {
  return decode_coded_section(codec, in, stored_bytes, rows, scratch);
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
