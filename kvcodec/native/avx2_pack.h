// Quantising elements and packing their codes with AVX2. Included by avx2.cpp inside its target
// region and namespace, after avx2_token.h.

// Copies less than 256 bytes without a call.
KVC_INLINE void copy_short(uint8_t* target, const uint8_t* source, uint32_t bytes) {
  for (; bytes >= 32; bytes -= 32, target += 32, source += 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), load_vector(source));
  }
  if (bytes & 16) {
    std::memcpy(target, source, 16);
    target += 16;
    source += 16;
  }
  if (bytes & 8) {
    std::memcpy(target, source, 8);
    target += 8;
    source += 8;
  }
  for (uint32_t i = 0; i < (bytes & 7); ++i) target[i] = source[i];
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct Packer {
  static constexpr uint32_t kBlockBytes = 8 * kBits;

  // A fused multiply-add with 1.5 * 2^23 rounds the exact product to an integer and leaves it in
  // the low bits.
  static KVC_INLINE __m256i quantise(__m256 x, __m256 inverse, __m256 zero) {
    const __m256 magic = _mm256_set1_ps(12582912.0f + (kAsymmetric ? 0 : 1 << (kBits - 1)));
    if (kAsymmetric) x = _mm256_sub_ps(x, zero);
    return _mm256_castps_si256(_mm256_fmadd_ps(x, inverse, magic));
  }

  // Codes of 16 elements as words: in order (bf16), or i and i + 8 alternate (fp16).
  static KVC_INLINE __m256i quantise_sixteen(const uint8_t* source, __m256 inverse, __m256 zero) {
    __m256 first, second;
    Element::widen_sixteen(source, &first, &second);
    const __m256i words =
        merge_low_words(quantise(first, inverse, zero), quantise(second, inverse, zero));
    // The payload of an fp16 NaN reaches down to bit 13, and saturation would spoil the other half
    // of the block.
    return Element::kEvenOdd ? words : _mm256_and_si256(words, _mm256_set1_epi16(0xFF));
  }

  // Bytes of 32 codes out of two vectors of words, before put_in_order().
  static KVC_INLINE __m256i quantise_half(const uint8_t* source, __m256 inverse, __m256 zero) {
    return _mm256_packus_epi16(quantise_sixteen(source, inverse, zero),
                               quantise_sixteen(source + 32, inverse, zero));
  }

  static KVC_INLINE __m256i put_in_order(__m256i bytes) {
    if (Element::kEvenOdd) return _mm256_permute4x64_epi64(bytes, 0xD8);
    const __m256i split = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, split), order);
  }

  static KVC_INLINE __m256 zero_at(const float* zero, int entry) {
    return kAsymmetric ? _mm256_broadcast_ss(zero + entry) : _mm256_setzero_ps();
  }

  // `inverse` and `zero` at the entry of the block; one entry for each half of it if kHalves.
  static KVC_INLINE void encode_block(const uint8_t* source, const float* inverse,
                                      const float* zero, uint8_t* target) {
    const __m256 inverse_a = _mm256_broadcast_ss(inverse);
    const __m256 inverse_b = kHalves ? _mm256_broadcast_ss(inverse + 1) : inverse_a;
    const __m256 zero_a = zero_at(zero, 0);
    const __m256 zero_b = kHalves ? zero_at(zero, 1) : zero_a;
    if (kBits == 2) return encode_quarters(source, inverse_a, inverse_b, zero_a, zero_b, target);
    const __m256i a = quantise_half(source, inverse_a, zero_a);
    const __m256i b = quantise_half(source + 64, inverse_b, zero_b);
    if (kBits == 8) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), put_in_order(a));
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 32), put_in_order(b));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        put_in_order(_mm256_or_si256(a, _mm256_slli_epi16(b, 4))));
  }

  // A block of `count` < 64 elements: through buffers of whole blocks.
  static KVC_OUTLINE void encode_tail(const uint8_t* source, uint32_t count, const float* inverse,
                                      const float* zero, uint8_t* target) {
    alignas(32) uint8_t elements[128] = {};
    alignas(32) uint8_t codes[64 + 32] = {};
    copy_short(elements, source, count * 2);
    for (uint32_t i = 0; i < count; i += 32) {
      const int entry = kHalves ? static_cast<int>(i / 32) : 0;
      store_aligned(codes + i, put_in_order(quantise_half(elements + i * 2,
                                                          _mm256_broadcast_ss(inverse + entry),
                                                          zero_at(zero, entry))));
    }
    for (uint32_t i = count; i < (count + 31) / 32 * 32; ++i) codes[i] = 0;
    const uint32_t bytes = (count + 8 / kBits - 1) / (8 / kBits);
    if (kBits == 8) return copy_short(target, codes, bytes);
    __m256i packed = load_vector(codes);
    for (uint32_t k = 1; k < 8 / kBits; ++k) {
      const __m256i plane = load_vector(codes + k * bytes);
      packed = _mm256_or_si256(
          packed, _mm256_sll_epi16(plane, _mm_cvtsi32_si128(static_cast<int>(k * kBits))));
    }
    store_aligned(elements, packed);
    copy_short(target, elements, bytes);
  }

 private:
  static KVC_INLINE void encode_quarters(const uint8_t* source, __m256 inverse_a, __m256 inverse_b,
                                         __m256 zero_a, __m256 zero_b, uint8_t* target) {
    const __m256i w0 = quantise_sixteen(source, inverse_a, zero_a);
    const __m256i w1 = _mm256_slli_epi16(quantise_sixteen(source + 32, inverse_a, zero_a), 2);
    const __m256i w2 = quantise_sixteen(source + 64, inverse_b, zero_b);
    const __m256i w3 = _mm256_slli_epi16(quantise_sixteen(source + 96, inverse_b, zero_b), 2);
    const __m256i upper = _mm256_slli_epi16(_mm256_or_si256(w2, w3), 4);
    const __m256i words = _mm256_or_si256(_mm256_or_si256(w0, w1), upper);
    __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (!Element::kEvenOdd) {
      bytes = _mm_shuffle_epi8(bytes,
                               _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
  }
};

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
void quantise_rows(const TokenShape& shape, const TokenChunk& chunk, const float* inverse,
                   const float* zero) {
  using P = Packer<Element, kBits, kAsymmetric, kHalves>;
  // Copies: a store might change the originals for all the compiler knows.
  const uint32_t rows = chunk.rows;
  const uint32_t blocks = shape.blocks;
  const uint32_t tail = shape.tail;
  const uint32_t entries = shape.entries;
  const uint32_t shift = shape.entry_shift;
  const int64_t ahead = chunk.ahead;
  const auto entry = [=](uint32_t block) { return kHalves ? 2 * block : block >> shift; };
  for (uint32_t r = 0; r < rows; ++r) {
    const uint8_t* source = chunk.source[r];
    uint8_t* target = chunk.codes + chunk.index[r] * shape.row_codes;
    for (uint32_t block = 0; block < blocks; ++block) {
      prefetch(source, ahead);
      prefetch(source, ahead + 64);
      P::encode_block(source, inverse + entry(block), zero + entry(block), target);
      source += 128;
      target += P::kBlockBytes;
    }
    if (tail != 0) {
      prefetch(source, ahead);
      P::encode_tail(source, tail, inverse + entry(blocks), zero + entry(blocks), target);
    }
    inverse += entries;
    zero += entries;
  }
}
