// Kind fp8 with AVX-512: 32 elements of 16 bits at a time. Included by avx512.cpp inside its target
// region and namespace, after x86_raw.h.

// What e4m3fn needs of an element type of 16 bits: how many bits its mantissa has, and the exponent
// of 2^-6, the smallest normal number of e4m3fn.
template <typename Element>
struct E4M3 {
  static constexpr int kMantissa = Element::kEvenOdd ? 7 : 10;
  static constexpr int kDropped = kMantissa - 3;
  static constexpr int kSmallestExponent = Element::kEvenOdd ? 121 : 9;
  static constexpr int kInfinity = Element::kEvenOdd ? 0x7F80 : 0x7C00;
  static constexpr int kNaN = Element::kEvenOdd ? 0x7FC0 : 0x7E00;
};

// Rounds 32 elements; `*largest` keeps the largest code before it saturates.
template <typename Element>
KVC_INLINE __m256i e4m3_of_words(__m512i words, __m512i* largest) {
  using E = E4M3<Element>;
  const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF));
  // Normal numbers: another bias, and the mantissa rounded to nearest even.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, E::kDropped), _mm512_set1_epi16(1));
  constexpr int kBias = ((E::kSmallestExponent - 1) << E::kMantissa) - ((1 << (E::kDropped - 1)) - 1);
  const __m512i moved = _mm512_sub_epi16(_mm512_add_epi16(magnitude, odd), _mm512_set1_epi16(kBias));
  const __m512i normal = _mm512_srli_epi16(moved, E::kDropped);
  // Smaller ones: the mantissa with its leading bit, shifted by what the exponent is too small. A
  // shift of kMantissa + 2 leaves nothing.
  const __m512i exponent = _mm512_srli_epi16(magnitude, E::kMantissa);
  const __m512i shift = _mm512_min_epu16(
      _mm512_sub_epi16(_mm512_set1_epi16(E::kDropped + E::kSmallestExponent), exponent),
      _mm512_set1_epi16(E::kMantissa + 2));
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i whole = _mm512_or_si512(
      _mm512_and_si512(magnitude, _mm512_set1_epi16((1 << E::kMantissa) - 1)),
      _mm512_set1_epi16(1 << E::kMantissa));
  const __m512i half = _mm512_sub_epi16(_mm512_sllv_epi16(one, _mm512_sub_epi16(shift, one)), one);
  const __m512i even = _mm512_and_si512(_mm512_srlv_epi16(whole, shift), one);
  const __m512i denormal =
      _mm512_srlv_epi16(_mm512_add_epi16(_mm512_add_epi16(whole, half), even), shift);
  const __mmask32 small = _mm512_cmplt_epi16_mask(
      magnitude, _mm512_set1_epi16(E::kSmallestExponent << E::kMantissa));
  const __m512i code = _mm512_mask_mov_epi16(normal, small, denormal);
  *largest = _mm512_max_epi16(*largest, code);
  const __mmask32 nan = _mm512_cmpgt_epi16_mask(magnitude, _mm512_set1_epi16(E::kInfinity));
  __m512i within = _mm512_min_epi16(code, _mm512_set1_epi16(kE4M3Largest));
  within = _mm512_mask_mov_epi16(within, nan, _mm512_set1_epi16(kE4M3NaN));
  const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(words, 15), 7);
  return _mm512_cvtepi16_epi8(_mm512_or_si512(within, sign));
}

template <typename Element>
KVC_INLINE __m512i words_of_e4m3(__m256i bytes) {
  using E = E4M3<Element>;
  const __m512i code = _mm512_cvtepu8_epi16(bytes);
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7F));
  // The eight numbers below 2^-6, which are normal here: n * 2^-9.
  alignas(64) static constexpr uint16_t kSmall[2][32] = {
      {0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60},
      {0, 0x1800, 0x1C00, 0x1E00, 0x2000, 0x2100, 0x2200, 0x2300}};
  const __m512i table = _mm512_load_si512(kSmall[Element::kEvenOdd ? 0 : 1]);
  const __m512i bias = _mm512_set1_epi16((E::kSmallestExponent - 1) << E::kMantissa);
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, E::kDropped), bias);
  const __mmask32 small = _mm512_cmplt_epi16_mask(magnitude, _mm512_set1_epi16(8));
  const __m512i value = _mm512_mask_permutexvar_epi16(normal, small, magnitude, table);
  const __m512i sign = _mm512_slli_epi16(_mm512_srli_epi16(code, 7), 15);
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(kE4M3NaN));
  return _mm512_mask_mov_epi16(_mm512_or_si512(value, sign), nan, _mm512_set1_epi16(E::kNaN));
}

template <typename Element>
uint64_t encode_fp8_rows(const SectionCodec& codec, const Rows& rows, const Rows* next,
                         uint8_t* out) {
  const uint32_t size = rows.head_size;
  const uint32_t prefetched = size * 2 < 4096 ? size * 2 : 0;  // the hardware follows long rows
  RowWalk walk(rows);
  RowsAhead ahead(rows, next, kPrefetchBytes / (size * 2) + 1);
  const uint8_t* source[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  const __m512i most = _mm512_set1_epi16(kE4M3Largest);
  uint64_t outside = 0;
  for (;;) {
    const int64_t offset = ahead.offset(walk.address(), kMaxChunkRows);
    const uint32_t count = walk.take(source, index, kMaxChunkRows);
    if (count == 0) break;
    for (uint32_t r = 0; r < count; ++r) {
      uint8_t* target = out + index[r] * size;
      __m512i largest = _mm512_setzero_si512();
      for (uint32_t i = 0; i < prefetched; i += 64) prefetch(source[r], offset + i);
      uint32_t i = 0;
      for (; i + 32 <= size; i += 32) {
        const __m256i bytes =
            e4m3_of_words<Element>(_mm512_loadu_si512(source[r] + i * 2), &largest);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + i), bytes);
      }
      if (i < size) {
        const __m512i words = load_words(source[r] + i * 2, size - i);
        _mm256_mask_storeu_epi8(target + i, first_words(size - i),
                                e4m3_of_words<Element>(words, &largest));
      }
      outside += _mm512_cmpgt_epi16_mask(largest, most) != 0;
    }
  }
  clear_padding(codec, rows, out);
  return outside;
}

template <typename Element, bool kStream>
void decode_fp8_rows(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const uint32_t size = rows.head_size;
  RowWalk walk(rows);
  BytesBehind behind(codec, in, rows);
  const uint8_t* target[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  while (const uint32_t count = walk.take(target, index, kMaxChunkRows)) {
    behind.fetch(count);
    for (uint32_t r = 0; r < count; ++r) {
      uint8_t* row = const_cast<uint8_t*>(target[r]);
      const uint8_t* source = in + index[r] * size;
      uint32_t i = 0;
      for (; i + 32 <= size; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
        store_vector<kStream>(row + i * 2, words_of_e4m3<Element>(bytes));
      }
      if (kStream || i == size) continue;
      const __m256i bytes = _mm256_maskz_loadu_epi8(first_words(size - i), source + i);
      _mm512_mask_storeu_epi16(row + i * 2, first_words(size - i), words_of_e4m3<Element>(bytes));
    }
  }
  if (kStream) _mm_sfence();
}

template <typename Element>
void decode_fp8_elements(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  rows_aligned(rows, static_cast<size_t>(rows.head_size) * 2, 64)
      ? decode_fp8_rows<Element, true>(codec, in, rows)
      : decode_fp8_rows<Element, false>(codec, in, rows);
}

inline bool fp8_covers(const SectionCodec& codec) {
  return codec.kind == KVC_KIND_FP8 && codec.dtype != KVC_FP32;
}
