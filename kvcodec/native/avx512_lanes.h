// What per-channel sections need of AVX-512, for x86_channel.h: a column is 32 channels. Included
// by avx512.cpp inside its target region and namespace.

// 32 elements of 16 bits.
using Words = __m512i;
// Half a column in the order of widening: even or odd channels (bf16), or 16 in a row (fp16).
using Dwords = __m512i;
using Floats = __m512;
using Lanes = __mmask16;

constexpr uint32_t kColumn = 32;
constexpr uint32_t kChannelMultiple = 1;  // masks serve any last column

KVC_INLINE Words load_column(const uint8_t* source, uint32_t channels) {
  return channels >= kColumn ? _mm512_loadu_si512(source) : load_words(source, channels);
}

KVC_INLINE void store_column(uint8_t* target, Words words) { _mm512_store_si512(target, words); }

KVC_INLINE uint64_t lane_bits(Lanes lanes) { return lanes; }
KVC_INLINE Dwords keep_lanes(Dwords v, Lanes lanes) { return _mm512_maskz_mov_epi32(lanes, v); }
KVC_INLINE Dwords keep_bits(Dwords v, uint32_t bits) {
  return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(bits)));
}

template <typename Element>
KVC_INLINE void widen_column(Words words, Floats out[2]) {
  Floats both[4];
  Element::widen_block(words, words, both);
  out[0] = both[0];
  out[1] = both[1];
}

// Halves of a column -> channels 0-15 and 16-31.
template <typename Element>
KVC_INLINE void put_channels_in_order(const Dwords v[2], Dwords out[2]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  out[0] = Element::kEvenOdd ? _mm512_permutex2var_epi32(v[0], low, v[1]) : v[0];
  out[1] = Element::kEvenOdd ? _mm512_permutex2var_epi32(v[0], high, v[1]) : v[1];
}

KVC_INLINE __mmask16 first_dwords(uint32_t count) {
  return static_cast<__mmask16>(first_words(count));
}

template <typename Element>
KVC_INLINE void store_column_words(const Dwords v[2], uint32_t channels, uint8_t* target) {
  Dwords ordered[2];
  put_channels_in_order<Element>(v, ordered);
  if (channels >= kColumn) {
    _mm512_storeu_si512(target, ordered[0]);
    return _mm512_storeu_si512(target + 64, ordered[1]);
  }
  _mm512_mask_storeu_epi32(target, first_dwords(channels), ordered[0]);
  if (channels > 16) _mm512_mask_storeu_epi32(target + 64, first_dwords(channels - 16), ordered[1]);
}

template <typename Element>
KVC_INLINE void load_column_words(const uint8_t* source, uint32_t channels, Dwords out[2]) {
  __m512i low, high;
  if (channels >= kColumn) {
    low = _mm512_loadu_si512(source);
    high = _mm512_loadu_si512(source + 64);
  } else {
    low = _mm512_maskz_loadu_epi32(first_dwords(channels), source);
    high = _mm512_maskz_loadu_epi32(channels > 16 ? first_dwords(channels - 16) : 0, source + 64);
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  out[0] = Element::kEvenOdd ? _mm512_permutex2var_epi32(low, even, high) : low;
  out[1] = Element::kEvenOdd ? _mm512_permutex2var_epi32(low, odd, high) : high;
}

// ---- parameters

// Smallest and largest element of each channel. Channels of one sign are common, so that their
// extreme of the smaller magnitude is kept as well (see SmallestLargest).
struct ChannelRange {
  __m512i largest;
  __m512i smallest;
  __m512i nearest;

  KVC_INLINE void start(Words words) { largest = smallest = nearest = words; }
  KVC_INLINE void add(Words words) {
    largest = _mm512_max_epi16(largest, words);
    smallest = _mm512_max_epu16(smallest, words);
    nearest = _mm512_min_epu16(nearest, words);
  }

  template <typename Element>
  KVC_INLINE void split(Dwords low[2], Dwords high[2]) const {
    const __mmask32 all_negative = _mm512_movepi16_mask(largest);
    const __mmask32 some_negative = _mm512_movepi16_mask(smallest);
    split_words<Element>(_mm512_mask_blend_epi16(some_negative, nearest, smallest), low);
    split_words<Element>(_mm512_mask_blend_epi16(all_negative, largest, nearest), high);
  }
};

template <typename Element, bool kAsymmetric>
KVC_INLINE void store_column_parameters(const Dwords stored[2], uint32_t channels,
                                        uint8_t* target) {
  if (kAsymmetric) return store_column_words<Element>(stored, channels, target);
  __m512i words;
  if (Element::kEvenOdd) {
    words = _mm512_mask_mov_epi16(stored[1], 0x55555555, _mm512_srli_epi32(stored[0], 16));
  } else {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(stored[0], 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(stored[1], 16));
    words = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  _mm512_mask_storeu_epi16(target, first_words(channels), words);
}

// `inside`: lanes of the first half of the column, 32 bits later of the second.
template <typename Element>
KVC_INLINE uint64_t count_outside(uint64_t inside, uint32_t channels) {
  const uint64_t first =
      Element::kEvenOdd ? first_dwords((channels + 1) / 2) : first_dwords(channels);
  const uint64_t rest = Element::kEvenOdd ? channels / 2 : channels > 16 ? channels - 16 : 0;
  const uint64_t present = first | static_cast<uint64_t>(first_dwords(static_cast<uint32_t>(rest)))
                                       << 32;
  return static_cast<uint64_t>(__builtin_popcountll(present & ~inside));
}

// Scales and zeros; true if no value can need clamping or be a NaN.
template <typename Element, bool kAsymmetric>
KVC_INLINE bool load_column_parameters(const uint8_t* source, uint32_t channels, Floats scale[2],
                                       Floats zero[2]) {
  Dwords stored[2];
  if (kAsymmetric) {
    load_column_words<Element>(source, channels, stored);
  } else {
    split_words<Element>(load_column(source, channels), stored);
    stored[0] = _mm512_slli_epi32(stored[0], 16);
    stored[1] = _mm512_slli_epi32(stored[1], 16);
  }
  uint32_t tame = 0xFFFF;
  for (int i = 0; i < 2; ++i) {
    const __m512i low = _mm512_and_si512(stored[i], _mm512_set1_epi32(0xFFFF));
    scale[i] = _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), stored[i]));
    zero[i] = kAsymmetric ? Element::widen(low) : _mm512_setzero_ps();
    const __m512i magnitude = _mm512_and_si512(low, _mm512_set1_epi32(0x7FFF));
    tame &= _mm512_cmplt_epu32_mask(
        stored[i], _mm512_set1_epi32(static_cast<int>(scale_end<Element>() << 16)));
    tame &= _mm512_cmplt_epu32_mask(magnitude,
                                    _mm512_set1_epi32(static_cast<int>(zero_end<Element>())));
  }
  return tame == 0xFFFF;
}

// ---- codes

using WordJoiner = ByteJoiner;

// Eight, four or sixteen codes of a channel -> its word.
template <uint32_t kBits>
KVC_INLINE Dwords join_word(const WordJoiner& bytes, const Dwords* q) {
  if constexpr (kBits == 8) {
    return bytes.join(q[0], q[1], q[2], q[3]);
  } else {
    Dwords joined[4];  // four codes each, in the low bits
    for (int i = 0; i < (kBits == 4 ? 2 : 4); ++i) {
      const Dwords four = bytes.join(q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]);
      const Dwords pairs = _mm512_maddubs_epi16(four, _mm512_set1_epi16(1 + (256 << kBits)));
      joined[i] = _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 + (65536 << 2 * kBits)));
    }
    if (kBits == 4)
      return _mm512_mask_mov_epi16(joined[0], 0xAAAAAAAA, _mm512_slli_epi32(joined[1], 16));
    return bytes.join(joined[0], joined[1], joined[2], joined[3]);
  }
}

// Codes as floats, the middle one subtracted if symmetric. A permutation of a ramp converts, masks
// and subtracts.
template <uint32_t kBits, bool kAsymmetric>
KVC_INLINE Floats code_values(Dwords word, uint32_t shift) {
  const __m512i code = shift == 0 ? word : _mm512_srli_epi32(word, shift);
  constexpr int kMiddle = kAsymmetric ? 0 : 1 << (kBits - 1);
  if (kBits == 8) {
    const __m512i masked = shift == 24 ? code : _mm512_and_si512(code, _mm512_set1_epi32(0xFF));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(masked, _mm512_set1_epi32(kMiddle)));
  }
  const __m512 ramp = kBits == 4
                          ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                          : _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  return _mm512_permutexvar_ps(code, _mm512_sub_ps(ramp, _mm512_set1_ps(kMiddle)));
}

template <bool kAsymmetric>
KVC_INLINE Floats tame_value(Floats code, Floats scale, Floats zero) {
  return kAsymmetric ? _mm512_fmadd_ps(scale, code, zero) : _mm512_mul_ps(scale, code);
}

template <typename Element, bool kAsymmetric>
KVC_INLINE Floats exact_value(Floats code, Floats scale, Floats zero) {
  const Floats product = _mm512_mul_ps(scale, code);
  const Floats v = clamp<Element>(kAsymmetric ? _mm512_add_ps(zero, product) : product);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(v, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
}

template <typename Element, bool kStream>
KVC_INLINE void store_column_values(uint8_t* target, uint32_t channels, Floats first,
                                    Floats second) {
  __m512i words;
  if (Element::kEvenOdd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(first), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(second), half);
    words = _mm512_mask_mov_epi16(high, 0x55555555, low);
  } else {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(first, kNearest));
    words = _mm512_inserti64x4(low, _mm512_cvtps_ph(second, kNearest), 1);
  }
  if (kStream || channels >= kColumn) return store_vector<kStream>(target, words);
  _mm512_mask_storeu_epi16(target, first_words(channels), words);
}
