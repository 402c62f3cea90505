// Per-token sections with AVX-512 (F, BW, VL, DQ). Included by avx512.cpp inside its target region
// and namespace.
//
// A block of 64 elements is two vectors of 16-bit elements. bf16 widens by a shift (even elements)
// and a mask (odd elements), fp16 by a conversion (halves); the order of the four vectors of codes
// that results differs, and join_codes() and the functions that store packed codes undo it.

struct Bf16 {
  static constexpr int kOutside = 0x7F00;  // 2^127
  static constexpr bool kEvenOdd = true;

  static KVC_INLINE __m512 widen(__m512i words_low) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(words_low, 16));
  }

  // Four vectors of 16 floats: even and odd elements of `a`, then of `b`.
  static KVC_INLINE void widen_block(__m512i a, __m512i b, __m512 out[4]) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    out[0] = widen(a);
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(a, high));
    out[2] = widen(b);
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(b, high));
  }

  static KVC_INLINE __m512 largest() { return _mm512_castsi512_ps(_mm512_set1_epi32(0x7F7F0000)); }

  // The upper half of each float, ties away from zero; NaNs become 0x7FC0.
  static KVC_INLINE __m512i round(__m512 v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i up = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(0x8000));
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000)), 16);
  }
  static KVC_INLINE __m256i narrow(__m512 v) { return _mm512_cvtepi32_epi16(round(v)); }

  // 32 numbers in a row, none of which is NaN.
  static KVC_INLINE __m512i join(__m512 first, __m512 second) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    alignas(64) static constexpr uint16_t kUpper[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(first), half),
                                     _mm512_load_si512(kUpper),
                                     _mm512_add_epi32(_mm512_castps_si512(second), half));
  }
};

struct Fp16 {
  static constexpr int kOutside = 0x7C00;  // infinity
  static constexpr bool kEvenOdd = false;

  static KVC_INLINE __m512 widen(__m512i words_low) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words_low));
  }

  // Elements 0-15 and 16-31 of `a`, then of `b`.
  static KVC_INLINE void widen_block(__m512i a, __m512i b, __m512 out[4]) {
    out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(a));
    out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1));
    out[2] = _mm512_cvtph_ps(_mm512_castsi512_si256(b));
    out[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(b, 1));
  }

  static KVC_INLINE __m512 largest() { return _mm512_set1_ps(65504.0f); }

  static KVC_INLINE __m256i narrow(__m512 v) {
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    v = _mm512_mask_mov_ps(v, nan, _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000)));
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

KVC_INLINE __mmask32 first_words(uint32_t count) {
  return count >= 32 ? 0xFFFFFFFFu : (1u << count) - 1;
}

// Up to 32 elements from `count` on; absent ones are 0.
KVC_INLINE __m512i load_words(const uint8_t* source, uint32_t count) {
  return _mm512_maskz_loadu_epi16(first_words(count), source);
}

// Words as 32-bit integers, in the order of widening.
template <typename Element>
KVC_INLINE void split_words(__m512i words, __m512i out[2]) {
  if (Element::kEvenOdd) {
    out[0] = _mm512_and_si512(words, _mm512_set1_epi32(0xFFFF));
    out[1] = _mm512_srli_epi32(words, 16);
  } else {
    out[0] = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(words));
    out[1] = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1));
  }
}

// ---- extremes of groups

// Largest magnitude: the maximum of the bits without the sign.
struct Magnitude {
  __m512i value;

  Magnitude() = default;
  explicit KVC_INLINE Magnitude(__m512i first)
      : value(_mm512_and_si512(first, _mm512_set1_epi16(0x7FFF))) {}
  KVC_INLINE void add(__m512i other) {
    value = _mm512_max_epi16(value, _mm512_and_si512(other, _mm512_set1_epi16(0x7FFF)));
  }
  KVC_INLINE __m512i half_reduced() const { return value; }

  KVC_INLINE void start(__m512i) { value = _mm512_setzero_si512(); }
  template <typename Element>
  KVC_INLINE void split(__m512i[2], __m512i high[2]) const {
    split_words<Element>(value, high);
  }
};

// Smallest and largest. Of sign-and-magnitude bits a signed maximum is the largest element if one
// is not negative, and an unsigned maximum is the smallest if one is negative: two operations,
// where keys in numeric order would take two more. Groups of one sign are put right later.
struct SmallestLargest {
  __m512i largest;
  __m512i smallest;

  explicit KVC_INLINE SmallestLargest(__m512i first) : largest(first), smallest(first) {}
  KVC_INLINE void add(__m512i other) {
    largest = _mm512_max_epi16(largest, other);
    smallest = _mm512_max_epu16(smallest, other);
  }
  // The lower half belongs to the largest, the upper half to the smallest (its sign bit flipped, so
  // that a signed maximum serves both from here on).
  KVC_INLINE __m512i half_reduced() const {
    const __m512i flipped =
        _mm512_xor_si512(smallest, _mm512_set1_epi16(static_cast<short>(0x8000)));
    return _mm512_max_epi16(_mm512_shuffle_i64x2(largest, flipped, 0x44),
                            _mm512_shuffle_i64x2(largest, flipped, 0xEE));
  }
};

template <typename Extremes>
inline void find_group_extremes(const uint8_t* source, uint32_t count, uint8_t* target) {
  // Absent elements repeat the first one.
  uint16_t head;
  std::memcpy(&head, source, sizeof head);
  const __m512i filler = _mm512_set1_epi16(static_cast<short>(head));
  Extremes extremes(_mm512_mask_loadu_epi16(filler, first_words(count), source));
  for (uint32_t i = 32; i < count; i += 32) {
    extremes.add(_mm512_mask_loadu_epi16(filler, first_words(count - i), source + i * 2));
  }
  _mm512_store_si512(target, extremes.half_reduced());
}

template <typename Extremes, uint32_t kVectors>
void find_extremes_of_whole(const TokenShape& shape, TokenChunk& chunk) {
  uint8_t* target = chunk.extremes;
  const uint32_t rows =
      chunk.rows;  // copies: a store might change the originals for all the compiler knows
  const uint32_t groups = shape.groups;
  for (uint32_t r = 0; r < rows; ++r) {
    const uint8_t* source = chunk.source[r];
    for (uint32_t g = 0; g < groups; ++g, source += kVectors * 64, target += 64) {
      Extremes extremes(_mm512_loadu_si512(source));
      for (uint32_t i = 1; i < kVectors; ++i) extremes.add(_mm512_loadu_si512(source + i * 64));
      _mm512_store_si512(target, extremes.half_reduced());
    }
  }
}

template <typename Extremes>
void find_extremes(const TokenShape& shape, TokenChunk& chunk) {
  if (shape.head_size % shape.group == 0) {
    if (shape.group == 64) return find_extremes_of_whole<Extremes, 2>(shape, chunk);
    if (shape.group == 128) return find_extremes_of_whole<Extremes, 4>(shape, chunk);
    if (shape.group == 32) return find_extremes_of_whole<Extremes, 1>(shape, chunk);
  }
  uint8_t* target = chunk.extremes;
  for (uint32_t r = 0; r < chunk.rows; ++r) {
    for (uint32_t g = 0; g < shape.groups; ++g, target += 64) {
      find_group_extremes<Extremes>(chunk.source[r] + g * shape.group * 2, shape.group_elements(g),
                                    target);
    }
  }
}

// ---- parameters of 16 groups

KVC_INLINE __m512i max_of_lane_pairs(__m512i a, __m512i b) {
  return _mm512_max_epi16(_mm512_shuffle_i64x2(a, b, 0x88), _mm512_shuffle_i64x2(a, b, 0xDD));
}

KVC_INLINE __m512i max_of_quads(__m512i a, __m512i b) {
  return _mm512_max_epi16(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

KVC_INLINE __m512i max_of_doubles(__m512i a, __m512i b) {
  const __m512 fa = _mm512_castsi512_ps(a);
  const __m512 fb = _mm512_castsi512_ps(b);
  return _mm512_max_epi16(_mm512_castps_si512(_mm512_shuffle_ps(fa, fb, 0x88)),
                          _mm512_castps_si512(_mm512_shuffle_ps(fa, fb, 0xDD)));
}

KVC_INLINE __m512i max_of_words(__m512i v) { return _mm512_max_epi16(v, _mm512_srli_epi32(v, 16)); }

// Bits of the largest magnitude of 16 groups, one per 32-bit element. One tree for 16 groups takes
// six instructions a group; reducing each on its own would take a dozen.
KVC_INLINE __m512i reduce_magnitudes(const uint8_t* extremes) {
  __m512i quarter[4];
  for (int i = 0; i < 4; ++i) {
    __m512i half[2];
    for (int k = 0; k < 2; ++k) {
      const __m512i a = _mm512_load_si512(extremes + (4 * i + 2 * k) * 64);
      const __m512i b = _mm512_load_si512(extremes + (4 * i + 2 * k + 1) * 64);
      half[k] =
          _mm512_max_epi16(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xEE));
    }
    quarter[i] = max_of_lane_pairs(half[0], half[1]);
  }
  const __m512i all = max_of_words(
      max_of_doubles(max_of_quads(quarter[0], quarter[1]), max_of_quads(quarter[2], quarter[3])));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_and_si512(_mm512_permutexvar_epi32(order, all), _mm512_set1_epi32(0xFFFF));
}

// Bits of the largest and the smallest element of 16 groups that hold both signs.
KVC_INLINE void reduce_smallest_largest(const uint8_t* extremes, __m512i* smallest,
                                        __m512i* largest) {
  __m512i part[2];
  for (int j = 0; j < 2; ++j) {
    __m512i quad[2];
    for (int i = 0; i < 2; ++i) {
      const uint8_t* at = extremes + (8 * j + 4 * i) * 64;
      quad[i] =
          max_of_quads(max_of_lane_pairs(_mm512_load_si512(at), _mm512_load_si512(at + 64)),
                       max_of_lane_pairs(_mm512_load_si512(at + 128), _mm512_load_si512(at + 192)));
    }
    part[j] = max_of_words(max_of_doubles(quad[0], quad[1]));
  }
  // Lanes: largest and smallest of even groups, then of odd ones.
  const __m512i order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
  const __m512i next = _mm512_add_epi32(order, _mm512_set1_epi32(4));
  const __m512i low = _mm512_set1_epi32(0xFFFF);
  *largest = _mm512_and_si512(_mm512_permutex2var_epi32(part[0], order, part[1]), low);
  *smallest = _mm512_and_si512(_mm512_permutex2var_epi32(part[0], next, part[1]), low);
  *smallest = _mm512_xor_si512(*smallest, _mm512_set1_epi32(0x8000));
}

// All elements of one sign: what the reduction took for one extreme is the other one again. The
// smallest bits are right for both signs.
inline void correct_single_sign(const TokenShape& shape, const TokenChunk& chunk, uint32_t first,
                                __mmask16 which, __m512i* smallest, __m512i* largest) {
  alignas(64) uint32_t low[16];
  alignas(64) uint32_t high[16];
  _mm512_store_si512(low, *smallest);
  _mm512_store_si512(high, *largest);
  for (uint32_t left = which; left != 0; left &= left - 1) {
    const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(left));
    if (first + lane >= chunk.rows * shape.groups) break;
    const uint32_t bits = smallest_bits(shape, chunk, first + lane);
    (bits < 0x8000 ? low : high)[lane] = bits;
  }
  *smallest = _mm512_load_si512(low);
  *largest = _mm512_load_si512(high);
}

// Scales of 16 groups from their extents (largest magnitude or range), rounded up to bf16 and no
// smaller than 2^-126.
KVC_INLINE __m512i scales_of(__m512 extent, __m512 factor, __mmask16 inside, __m512* inverse) {
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(_mm512_mul_ps(extent, factor)),
                                      _mm512_set1_epi32(0xFFFF));
  const __mmask16 positive = _mm512_cmp_ps_mask(extent, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i cut = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  __m512i scale = _mm512_maskz_max_epi32(positive, cut, _mm512_set1_epi32(0x00800000));
  *inverse =
      _mm512_maskz_div_ps(positive & inside, _mm512_set1_ps(1.0f), _mm512_castsi512_ps(scale));
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7FC00000), inside, scale);
}

// Parameters of 16 groups.
struct GroupParameters {
  __m512 inverse;
  __m512 zero;
  __m512i stored;  // scale in the upper half, zero in the lower
  __mmask16 inside;
};

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters magnitude_parameters(__m512i bits) {
  GroupParameters p;
  p.inside = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(Element::kOutside));
  p.zero = _mm512_setzero_ps();
  p.stored = scales_of(Element::widen(bits), _mm512_set1_ps(symmetric_factor(kBits)), p.inside,
                       &p.inverse);
  return p;
}

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters range_parameters(__m512i smallest, __m512i largest) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFF);
  const __m512i edge = _mm512_set1_epi32(Element::kOutside);
  GroupParameters p;
  p.inside = _mm512_cmplt_epi32_mask(_mm512_and_si512(smallest, magnitude), edge) &
             _mm512_cmplt_epi32_mask(_mm512_and_si512(largest, magnitude), edge);
  const __m512i zero_bits = _mm512_maskz_mov_epi32(p.inside, smallest);
  p.zero = Element::widen(zero_bits);
  const __m512 extent = _mm512_sub_ps(Element::widen(largest), p.zero);
  const __m512i scale =
      scales_of(extent, _mm512_set1_ps(asymmetric_factor(kBits)), p.inside, &p.inverse);
  p.stored = _mm512_or_si512(scale, zero_bits);
  return p;
}

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters token_range_parameters(const TokenShape& shape, const TokenChunk& chunk,
                                                  uint32_t first) {
  __m512i smallest, largest;
  reduce_smallest_largest(chunk.extremes + first * 64, &smallest, &largest);
  const __m512i sign = _mm512_set1_epi32(0x8000);
  const __mmask16 single =
      _mm512_test_epi32_mask(largest, sign) | _mm512_testn_epi32_mask(smallest, sign);
  if (__builtin_expect(single != 0, false)) {
    correct_single_sign(shape, chunk, first, single, &smallest, &largest);
  }
  return range_parameters<Element, kBits>(smallest, largest);
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
bool find_parameters(const TokenShape& shape, TokenChunk& chunk) {
  const uint32_t groups = chunk.rows * shape.groups;
  bool any_outside = false;
  for (uint32_t first = 0; first < groups; first += 16) {
    GroupParameters p;
    if (kAsymmetric) {
      p = token_range_parameters<Element, kBits>(shape, chunk, first);
      _mm512_store_si512(chunk.parameters + first * 4, p.stored);
      _mm512_store_ps(chunk.zero + first, p.zero);
    } else {
      p = magnitude_parameters<Element, kBits>(reduce_magnitudes(chunk.extremes + first * 64));
      _mm256_store_si256(reinterpret_cast<__m256i*>(chunk.parameters + first * 2),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(p.stored, 16)));
    }
    _mm512_store_ps(chunk.inverse + first, p.inverse);
    const uint32_t present = groups - first < 16 ? (1u << (groups - first)) - 1 : 0xFFFF;
    note_outside(chunk, first, 16, ~static_cast<uint32_t>(p.inside) & present, &any_outside);
  }
  return any_outside;
}
