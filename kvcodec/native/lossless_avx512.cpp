// Lossless sections for processors with AVX-512 F, BW, VL, DQ, VBMI and VBMI2.
#include "lossless.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Before the target region: see avx512.cpp.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kvcodec.h"
#include "lossless_coded.h"
#include "lossless_element.h"
#include "x86_rows.h"

#if defined(__clang__)
#pragma clang attribute push(                                                              \
    __attribute__((target(                                                                 \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt")
#endif

namespace kvc {
namespace {

// Bytes 2i + odd of a pair of vectors.
KVC_INLINE __m512i every_other_byte(__m512i first, __m512i second, int odd) {
  alignas(64) static constexpr uint8_t kEven[64] = {
      0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62,
      64, 66, 68, 70, 72, 74, 76, 78, 80, 82, 84, 86, 88, 90, 92, 94,
      96, 98, 100, 102, 104, 106, 108, 110, 112, 114, 116, 118, 120, 122, 124, 126};
  const __m512i even = _mm512_load_si512(kEven);
  const __m512i index = odd ? _mm512_or_si512(even, _mm512_set1_epi8(1)) : even;
  return _mm512_permutex2var_epi8(first, index, second);
}

// The sum of all bytes in every 64-bit element.
KVC_INLINE __m512i sum_bytes(__m512i bytes) {
  __m512i sum = _mm512_sad_epu8(bytes, _mm512_setzero_si512());
  sum = _mm512_add_epi64(sum, _mm512_shuffle_i64x2(sum, sum, 0x4E));
  sum = _mm512_add_epi64(sum, _mm512_shuffle_i64x2(sum, sum, 0xB1));
  return _mm512_add_epi64(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
}

template <typename Element>
struct BlockWriter {
  static KVC_INLINE uint8_t* encode(const uint8_t* source, uint32_t count, uint8_t* low_bytes,
                                    uint8_t* planes, uint8_t* base_of_block, uint8_t* escapes) {
    constexpr int kUnit = Element::kUnit;
    __m512i first = _mm512_loadu_si512(source);
    __m512i second = _mm512_loadu_si512(source + 64);
    if (Element::kRotated) {
      first = _mm512_shldi_epi16(first, first, 1);
      second = _mm512_shldi_epi16(second, second, 1);
    }
    __m512i high = every_other_byte(first, second, 1);
    _mm512_storeu_si512(low_bytes, every_other_byte(first, second, 0));
    if (!Element::kRotated) {
      store_plane(planes + 24, _mm512_movepi8_mask(high));
      store_plane(planes + 32, _mm512_test_epi8_mask(high, _mm512_set1_epi8(2)));
      store_plane(planes + 40, _mm512_test_epi8_mask(high, _mm512_set1_epi8(1)));
      high = _mm512_and_si512(high, _mm512_set1_epi8(0x7C));
    }
    const __mmask64 present = count == kBlock ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    __m512i base = sum_bytes(high);
    if (count == kBlock) {
      base = _mm512_add_epi64(base, _mm512_set1_epi64(kBaseAbove * kUnit));
      base = _mm512_slli_epi64(_mm512_srli_epi64(base, 6 + Element::kShift), Element::kShift);
    } else {
      const auto sum = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(base)));
      base = _mm512_set1_epi64(first_base(sum / kUnit, count) * kUnit);
    }
    const __m512i unit = _mm512_set1_epi8(kUnit);
    const __m512i limit = _mm512_set1_epi8(6 * kUnit);
    const __m512i first_distance =
        _mm512_sub_epi8(_mm512_broadcastb_epi8(_mm512_castsi512_si128(base)), high);
    const __m512i next_distance = _mm512_add_epi8(first_distance, unit);
    const __mmask64 first_far = _mm512_cmpgt_epu8_mask(first_distance, limit) & present;
    const __mmask64 next_far = _mm512_cmpgt_epu8_mask(next_distance, limit) & present;
    // Nobody foresees which it is: no branch.
    const uint64_t take_next = all_if_fewer(next_far, first_far);
    const __mmask64 escaped = first_far ^ ((first_far ^ next_far) & take_next);
    const auto base_bits = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(base)));
    *base_of_block = static_cast<uint8_t>(base_bits + (kUnit & static_cast<uint32_t>(take_next)));
    __m512i distance = _mm512_mask_add_epi8(first_distance, take_next, first_distance, unit);
    distance = _mm512_mask_mov_epi8(distance, escaped, _mm512_set1_epi8(-1));
    for (int k = 0; k < 3; ++k) {
      const __m512i bit = _mm512_set1_epi8(static_cast<char>(kUnit << k));
      store_plane(planes + 8 * k, _mm512_test_epi8_mask(distance, bit) & present);
    }
    _mm512_storeu_si512(escapes, _mm512_maskz_compress_epi8(escaped, high));
    return escapes + __builtin_popcountll(escaped);
  }
};

// 64 elements from their high and low bytes.
template <typename Element>
KVC_INLINE void join_bytes(__m512i high, __m512i low, __m512i* first, __m512i* second) {
  // Unpacking works in each quarter of a vector: its lower half makes the first 32 elements.
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  high = _mm512_permutexvar_epi64(order, high);
  low = _mm512_permutexvar_epi64(order, low);
  *first = _mm512_unpacklo_epi8(low, high);
  *second = _mm512_unpackhi_epi8(low, high);
  if (!Element::kRotated) return;
  *first = _mm512_shrdi_epi16(*first, *first, 1);
  *second = _mm512_shrdi_epi16(*second, *second, 1);
}

template <typename Element>
struct BlockReader {
  template <bool kStream>
  static KVC_INLINE const uint8_t* decode(uint8_t* target, const uint8_t* low_bytes,
                                          const uint8_t* planes, uint8_t base,
                                          const uint8_t* escapes) {
    constexpr int kUnit = Element::kUnit;
    const __mmask64 bit0 = load_plane(planes, kBlock);
    const __mmask64 bit1 = load_plane(planes + 8, kBlock);
    const __mmask64 bit2 = load_plane(planes + 16, kBlock);
    const __mmask64 escaped = bit0 & bit1 & bit2;
    __m512i high = _mm512_set1_epi8(static_cast<char>(base));
    high = _mm512_mask_sub_epi8(high, bit0, high, _mm512_set1_epi8(kUnit));
    high = _mm512_mask_sub_epi8(high, bit1, high, _mm512_set1_epi8(2 * kUnit));
    high = _mm512_mask_sub_epi8(high, bit2, high, _mm512_set1_epi8(4 * kUnit));
    high = _mm512_mask_expand_epi8(high, escaped, _mm512_loadu_si512(escapes));
    if (!Element::kRotated) {
      const __mmask64 sign = load_plane(planes + 24, kBlock);
      const __mmask64 bit9 = load_plane(planes + 32, kBlock);
      const __mmask64 bit8 = load_plane(planes + 40, kBlock);
      high = _mm512_mask_add_epi8(high, sign, high, _mm512_set1_epi8(static_cast<char>(0x80)));
      high = _mm512_mask_add_epi8(high, bit9, high, _mm512_set1_epi8(2));
      high = _mm512_mask_add_epi8(high, bit8, high, _mm512_set1_epi8(1));
    }
    __m512i first;
    __m512i second;
    join_bytes<Element>(high, _mm512_loadu_si512(low_bytes), &first, &second);
    if (kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target), first);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + 64), second);
    } else {
      _mm512_storeu_si512(target, first);
      _mm512_storeu_si512(target + 64, second);
    }
    return escapes + __builtin_popcountll(escaped);
  }
};

#include "lossless_block.h"

#include "coded_avx512.h"
#include "turn_avx512.h"
#include "lossless_avx512.h"
#include "coded_avx512_writer.h"
#include "lossless_avx512_encode.h"

}  // namespace

size_t encode_block_avx512(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  return encode_block_section(codec, rows, out);
}

bool decode_block_avx512(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                         const Rows& rows) {
  const bool stream = rows_aligned(rows, size_t{2} * rows.head_size, 64);
  const bool whole = decode_block_section(codec, in, stored_bytes, rows, stream);
  if (stream) _mm_sfence();
  return whole;
}

size_t encode_lossless_avx512(const SectionCodec& codec, const Rows& rows, uint8_t* scratch,
                              uint8_t* out) {
  LosslessEncoderScratch& work = *reinterpret_cast<LosslessEncoderScratch*>(scratch);
  return codec.dtype == KVC_BF16 ? encode_coded_rows<Bf16Bytes>(codec, rows, work, out)
                                 : encode_coded_rows<Fp16Bytes>(codec, rows, work, out);
}

bool decode_lossless_avx512(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                            const Rows& rows, uint8_t* scratch) {
  LosslessScratch& work = *reinterpret_cast<LosslessScratch*>(scratch);
  return codec.dtype == KVC_BF16
             ? decode_coded_rows<Bf16Bytes>(codec, in, stored_bytes, rows, work)
             : decode_coded_rows<Fp16Bytes>(codec, in, stored_bytes, rows, work);
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
