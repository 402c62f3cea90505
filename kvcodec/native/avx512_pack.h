// Codes of a block with AVX-512: quantising 64 elements and packing them, unpacking them and
// looking their values up. Included by avx512.cpp inside its target region and namespace, after
// avx512_token.h.

// Byte k of each 32-bit element of join(v) is the low byte of that element of v[k].
struct ByteJoiner {
  // In mask registers for good: left to itself, the compiler loads the constants in every
  // iteration.
  __mmask64 second;
  __mmask64 third;
  __mmask64 fourth;

  KVC_INLINE ByteJoiner()
      : second(0x2222222222222222), third(0x4444444444444444), fourth(0x8888888888888888) {
    asm("" : "+k"(second), "+k"(third), "+k"(fourth));
  }

  KVC_INLINE __m512i join(__m512i v0, __m512i v1, __m512i v2, __m512i v3) const {
    const __m512i low =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
    v0 = _mm512_mask_shuffle_epi8(v0, second, v1, low);
    v0 = _mm512_mask_shuffle_epi8(v0, third, v2, low);
    return _mm512_mask_shuffle_epi8(v0, fourth, v3, low);
  }
};

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct Packer {
  static constexpr uint32_t kBlockBytes = 8 * kBits;

  // A fused multiply-add with 1.5 * 2^23 rounds the exact product to an integer and leaves it in
  // the low bits.
  static KVC_INLINE __m512i quantise(__m512 x, __m512 inverse, __m512 zero) {
    const __m512 magic = _mm512_set1_ps(12582912.0f + (kAsymmetric ? 0 : 1 << (kBits - 1)));
    if (kAsymmetric) x = _mm512_sub_ps(x, zero);
    return _mm512_castps_si512(_mm512_fmadd_ps(x, inverse, magic));
  }

  // `inverse` and `zero` at the entry of the block; one entry for each half of it if kHalves.
  static KVC_INLINE void quantise_block(__m512i a, __m512i b, const float* inverse,
                                        const float* zero, __m512i q[4]) {
    __m512 x[4];
    Element::widen_block(a, b, x);
    for (int i = 0; i < 4; ++i) {
      const int entry = kHalves ? i / 2 : 0;
      q[i] = quantise(x[i], _mm512_set1_ps(inverse[entry]),
                      _mm512_set1_ps(kAsymmetric ? zero[entry] : 0));
    }
  }

  // 8 bits: the 64 codes. Else 32 words of which each holds the codes of elements i and i + 32 at
  // bits 0 and 4; their order is that of the elements (bf16), or i and i + 16 alternate (fp16).
  static KVC_INLINE __m512i join(const ByteJoiner& bytes, const __m512i q[4]) {
    if (kBits == 8) {
      const __m512i joined = bytes.join(q[0], q[1], q[2], q[3]);
      if (Element::kEvenOdd) {
        const __m512i order =
            _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26,
                             24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        return _mm512_permutexvar_epi16(order, joined);
      }
      const __m512i transposed = _mm512_broadcast_i32x4(
          _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
      return _mm512_permutexvar_epi32(
          _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
          _mm512_shuffle_epi8(joined, transposed));
    }
    return _mm512_maddubs_epi16(bytes.join(q[0], q[2], q[1], q[3]), _mm512_set1_epi16(0x1001));
  }

  static KVC_INLINE void store_one(__m512i joined, uint8_t* target) {
    if (kBits == 8) return _mm512_storeu_si512(target, joined);
    if (kBits == 4) {
      const __m256i bytes = _mm512_cvtepi16_epi8(Element::kEvenOdd ? joined : deinterleave(joined));
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bytes);
    }
    __m128i bytes;
    if (Element::kEvenOdd) {
      const __m256i upper = _mm512_extracti64x4_epi64(joined, 1);
      bytes = _mm256_cvtepi16_epi8(
          _mm256_or_si256(_mm512_castsi512_si256(joined), _mm256_slli_epi16(upper, 2)));
    } else {
      bytes = _mm512_cvtepi32_epi8(_mm512_madd_epi16(joined, _mm512_set1_epi32(0x00040001)));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), bytes);
  }

  // Two blocks share the shuffles.
  static KVC_INLINE void store_two(__m512i first, __m512i second, uint8_t* target) {
    if (kBits == 8) {
      _mm512_storeu_si512(target, first);
      return _mm512_storeu_si512(target + 64, second);
    }
    if (kBits == 2 && !Element::kEvenOdd) {
      store_one(first, target);
      return store_one(second, target + kBlockBytes);
    }
    const __m512i packed =
        _mm512_packus_epi16(first, second);  // lanes: 8 bytes of the first, 8 of the second
    if (kBits == 2) {
      const __m256i upper = _mm512_extracti64x4_epi64(packed, 1);
      const __m256i both =
          _mm256_or_si256(_mm512_castsi512_si256(packed), _mm256_slli_epi16(upper, 2));
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                                 _mm256_permute4x64_epi64(both, 0xD8));
    }
    if (Element::kEvenOdd) {
      const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
      return _mm512_storeu_si512(target, _mm512_permutexvar_epi64(order, packed));
    }
    const __m512i split =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(target,
                        _mm512_permutexvar_epi32(order, _mm512_shuffle_epi8(packed, split)));
  }

  // A block of `count` < 64 elements.
  static KVC_OUTLINE void store_tail(const uint8_t* source, uint32_t count, const float* inverse,
                                     const float* zero, uint8_t* target) {
    __m512i words[2];
    quantise_tail(source, count, inverse, zero, words);
    const uint32_t bytes = (count + 8 / kBits - 1) / (8 / kBits);
    if (kBits == 8) {
      store_words(words[1], bytes > 32 ? bytes - 32 : 0, target + 32);
      return store_words(words[0], bytes, target);
    }
    const __m512i step = _mm512_set1_epi16(static_cast<short>(bytes));
    __m512i from = counting_words();
    __m512i packed = words[0];
    for (uint32_t k = 1; k < 8 / kBits; ++k) {
      from = _mm512_add_epi16(from, step);
      const __m512i plane = _mm512_permutex2var_epi16(words[0], from, words[1]);
      packed = _mm512_or_si512(
          packed, _mm512_sll_epi16(plane, _mm_cvtsi32_si128(static_cast<int>(k * kBits))));
    }
    store_words(packed, bytes, target);
  }

 private:
  static KVC_INLINE __m512i counting_words() {
    return _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                            13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  }

  // Words i and i + 16 alternate -> words in order.
  static KVC_INLINE __m512i deinterleave(__m512i v) {
    const __m512i order =
        _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 30, 28, 26, 24,
                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, v);
  }

  // The low bytes of `count` words.
  static KVC_INLINE void store_words(__m512i words, uint32_t count, uint8_t* target) {
    _mm256_mask_storeu_epi8(target, first_words(count), _mm512_cvtepi16_epi8(words));
  }

  // Codes as words in the order of the elements; 0 behind the last.
  static KVC_INLINE void quantise_tail(const uint8_t* source, uint32_t count, const float* inverse,
                                       const float* zero, __m512i words[2]) {
    const uint32_t rest = count > 32 ? count - 32 : 0;
    const uint32_t counts[2] = {count, rest};
    __m512i q[4];
    quantise_block(load_words(source, count), load_words(source + 64, rest), inverse, zero, q);
    const __m512i low = _mm512_set1_epi32(0xFF);
    for (uint32_t i = 0; i < 2; ++i) {
      const __m512i a = _mm512_and_si512(q[2 * i], low);
      const __m512i b = _mm512_and_si512(q[2 * i + 1], low);
      __m512i all = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
      if (!Element::kEvenOdd) all = deinterleave(all);
      words[i] = _mm512_maskz_mov_epi16(first_words(counts[i]), all);
    }
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
  const ByteJoiner bytes;
  const auto entry = [=](uint32_t block) { return kHalves ? 2 * block : block >> shift; };
  const auto joined = [&](const uint8_t* source, uint32_t block) __attribute__((always_inline)) {
    prefetch(source, ahead);
    prefetch(source, ahead + 64);
    __m512i q[4];
    P::quantise_block(_mm512_loadu_si512(source), _mm512_loadu_si512(source + 64),
                      inverse + entry(block), zero + entry(block), q);
    return P::join(bytes, q);
  };
  for (uint32_t r = 0; r < rows; ++r) {
    const uint8_t* source = chunk.source[r];
    uint8_t* target = chunk.codes + chunk.index[r] * shape.row_codes;
    uint32_t block = 0;
    for (; block + 1 < blocks; block += 2) {
      const __m512i first = joined(source, block);
      P::store_two(first, joined(source + 128, block + 1), target);
      source += 256;
      target += 2 * P::kBlockBytes;
    }
    if (block < blocks) {
      P::store_one(joined(source, block), target);
      source += 128;
      target += P::kBlockBytes;
      ++block;
    }
    if (tail != 0) {
      prefetch(source, ahead);
      P::store_tail(source, tail, inverse + entry(block), zero + entry(block), target);
    }
    inverse += entries;
    zero += entries;
  }
}
