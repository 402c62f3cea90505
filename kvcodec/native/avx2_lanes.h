// What per-channel sections need of AVX2, for x86_channel.h: a column is 16 channels. Included by
// avx2.cpp inside its target region and namespace.

// 16 elements of 16 bits.
using Words = __m256i;
// Half a column in the order of widening: even or odd channels (bf16), or 8 in a row (fp16).
using Dwords = __m256i;
using Floats = __m256;
using Lanes = __m256i;  // all bits or none

constexpr uint32_t kColumn = 16;
constexpr uint32_t kChannelMultiple = 16;  // every column is whole

KVC_INLINE Words load_column(const uint8_t* source, uint32_t) { return load_vector(source); }

KVC_INLINE void store_column(uint8_t* target, Words words) { store_aligned(target, words); }

KVC_INLINE uint64_t lane_bits(Lanes lanes) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
}
KVC_INLINE Dwords keep_lanes(Dwords v, Lanes lanes) { return _mm256_and_si256(v, lanes); }
KVC_INLINE Dwords keep_bits(Dwords v, uint32_t bits) {
  return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(bits)));
}

template <typename Element>
KVC_INLINE void widen_column(Words words, Floats out[2]) {
  if (Element::kEvenOdd) {
    out[0] = Element::widen(words);
    out[1] = _mm256_castsi256_ps(
        _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  } else {
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  }
}

template <typename Element>
KVC_INLINE void store_column_words(const Dwords v[2], uint32_t, uint8_t* target) {
  __m256i low = v[0];
  __m256i high = v[1];
  if (Element::kEvenOdd) {
    const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]);
    const __m256i b = _mm256_unpackhi_epi32(v[0], v[1]);
    low = _mm256_permute2x128_si256(a, b, 0x20);
    high = _mm256_permute2x128_si256(a, b, 0x31);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 32), high);
}

template <typename Element>
KVC_INLINE void load_column_words(const uint8_t* source, uint32_t, Dwords out[2]) {
  const __m256i low = load_vector(source);
  const __m256i high = load_vector(source + 32);
  out[0] = low;
  out[1] = high;
  if (!Element::kEvenOdd) return;
  const __m256 a = _mm256_castsi256_ps(low);
  const __m256 b = _mm256_castsi256_ps(high);
  out[0] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xD8);
  out[1] = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD)), 0xD8);
}

// ---- parameters

// Smallest and largest element of each channel. Channels of one sign are common, so that their
// extreme of the smaller magnitude is kept as well (see SmallestLargest).
struct ChannelRange {
  __m256i largest;
  __m256i smallest;
  __m256i nearest;

  KVC_INLINE void start(Words words) { largest = smallest = nearest = words; }
  KVC_INLINE void add(Words words) {
    largest = _mm256_max_epi16(largest, words);
    smallest = _mm256_max_epu16(smallest, words);
    nearest = _mm256_min_epu16(nearest, words);
  }

  template <typename Element>
  KVC_INLINE void split(Dwords low[2], Dwords high[2]) const {
    const __m256i all_negative = _mm256_srai_epi16(largest, 15);
    const __m256i some_negative = _mm256_srai_epi16(smallest, 15);
    split_words<Element>(_mm256_blendv_epi8(nearest, smallest, some_negative), low);
    split_words<Element>(_mm256_blendv_epi8(largest, nearest, all_negative), high);
  }
};

template <typename Element, bool kAsymmetric>
KVC_INLINE void store_column_parameters(const Dwords stored[2], uint32_t channels,
                                        uint8_t* target) {
  if (kAsymmetric) return store_column_words<Element>(stored, channels, target);
  __m256i words;
  if (Element::kEvenOdd) {
    words = merge_high_words(stored[0], stored[1]);
  } else {
    words = _mm256_packus_epi32(_mm256_srli_epi32(stored[0], 16), _mm256_srli_epi32(stored[1], 16));
    words = _mm256_permute4x64_epi64(words, 0xD8);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), words);
}

// `inside`: lanes of the first half of the column, 32 bits later of the second.
template <typename Element>
KVC_INLINE uint64_t count_outside(uint64_t inside, uint32_t) {
  return static_cast<uint64_t>(__builtin_popcountll(~inside & 0x000000FF000000FF));
}

// Scales and zeros; true if no value can need clamping or be a NaN.
template <typename Element, bool kAsymmetric>
KVC_INLINE bool load_column_parameters(const uint8_t* source, uint32_t channels, Floats scale[2],
                                       Floats zero[2]) {
  Dwords stored[2];
  if (kAsymmetric) {
    load_column_words<Element>(source, channels, stored);
  } else {
    split_words<Element>(load_vector(source), stored);
    stored[0] = _mm256_slli_epi32(stored[0], 16);
    stored[1] = _mm256_slli_epi32(stored[1], 16);
  }
  __m256i wild = _mm256_setzero_si256();
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_and_si256(stored[i], _mm256_set1_epi32(0xFFFF));
    const __m256i high = _mm256_srli_epi32(stored[i], 16);
    scale[i] = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    zero[i] = kAsymmetric ? Element::widen(low) : _mm256_setzero_ps();
    const __m256i magnitude = _mm256_and_si256(low, _mm256_set1_epi32(0x7FFF));
    const __m256i scale_last = _mm256_set1_epi32(static_cast<int>(scale_end<Element>()) - 1);
    const __m256i zero_last = _mm256_set1_epi32(static_cast<int>(zero_end<Element>()) - 1);
    wild = _mm256_or_si256(wild, _mm256_cmpgt_epi32(high, scale_last));
    wild = _mm256_or_si256(wild, _mm256_cmpgt_epi32(magnitude, zero_last));
  }
  return _mm256_testz_si256(wild, wild) != 0;
}

// ---- codes

struct WordJoiner {};

// Eight, four or sixteen codes of a channel -> its word. The low 16 bits of each vector hold
// nothing but the code.
template <uint32_t kBits>
KVC_INLINE Dwords join_word(const WordJoiner&, const Dwords* q) {
  constexpr uint32_t kHalf = 16 / kBits;  // codes of half a word
  Dwords half[2];
  for (uint32_t h = 0; h < 2; ++h) {
    half[h] = q[h * kHalf];
    for (uint32_t k = 1; k < kHalf; ++k) {
      half[h] = _mm256_or_si256(half[h],
                                _mm256_slli_epi32(q[h * kHalf + k], static_cast<int>(k * kBits)));
    }
  }
  return merge_low_words(half[0], half[1]);
}

// Codes as floats, the middle one subtracted if symmetric.
template <uint32_t kBits, bool kAsymmetric>
KVC_INLINE Floats code_values(Dwords word, uint32_t shift) {
  constexpr int kMask = (1 << kBits) - 1;
  constexpr int kMiddle = kAsymmetric ? 0 : 1 << (kBits - 1);
  __m256i code = shift == 0 ? word : _mm256_srli_epi32(word, static_cast<int>(shift));
  if (shift != 32 - kBits) code = _mm256_and_si256(code, _mm256_set1_epi32(kMask));
  if (kMiddle != 0) code = _mm256_sub_epi32(code, _mm256_set1_epi32(kMiddle));
  return _mm256_cvtepi32_ps(code);
}

template <bool kAsymmetric>
KVC_INLINE Floats tame_value(Floats code, Floats scale, Floats zero) {
  return kAsymmetric ? _mm256_fmadd_ps(scale, code, zero) : _mm256_mul_ps(scale, code);
}

template <typename Element, bool kAsymmetric>
KVC_INLINE Floats exact_value(Floats code, Floats scale, Floats zero) {
  const Floats product = _mm256_mul_ps(scale, code);
  return tamed<Element>(kAsymmetric ? _mm256_add_ps(zero, product) : product);
}

template <typename Element, bool kStream>
KVC_INLINE void store_column_values(uint8_t* target, uint32_t, Floats first, Floats second) {
  if (Element::kEvenOdd) {
    return store_vector<kStream>(target, merge_high_words(Bf16::round(first), Bf16::round(second)));
  }
  const __m256i low = _mm256_castsi128_si256(Fp16::narrow(first));
  store_vector<kStream>(target, _mm256_inserti128_si256(low, Fp16::narrow(second), 1));
}
