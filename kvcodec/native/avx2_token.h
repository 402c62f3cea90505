// Per-token sections with AVX2, FMA and F16C: element types, and the parameters of groups. Included
// by avx2.cpp inside its target region and namespace. The methods are those of avx512_token.h with
// half the width.

KVC_INLINE __m256i load_vector(const uint8_t* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

KVC_INLINE void store_aligned(uint8_t* target, __m256i v) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(target), v);
}

// Words 0, 2, 4 ... of `even`; the low words of the elements of `odd` between them.
KVC_INLINE __m256i merge_low_words(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xAA);
}

KVC_INLINE __m256i merge_high_words(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xAA);
}

struct Bf16 {
  static constexpr int kOutside = 0x7F00;  // 2^127
  static constexpr bool kEvenOdd = true;

  static KVC_INLINE __m256 widen(__m256i words_low) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(words_low, 16));
  }

  // Of 16 elements, the even and the odd ones.
  static KVC_INLINE void widen_sixteen(const uint8_t* source, __m256* first, __m256* second) {
    const __m256i words = load_vector(source);
    *first = widen(words);
    *second = _mm256_castsi256_ps(
        _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
  }

  static KVC_INLINE __m256 largest() { return _mm256_castsi256_ps(_mm256_set1_epi32(0x7F7F0000)); }

  // Rounded in the upper half, ties away from zero.
  static KVC_INLINE __m256i round(__m256 v) {
    return _mm256_add_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(0x8000));
  }
};

struct Fp16 {
  static constexpr int kOutside = 0x7C00;  // infinity
  static constexpr bool kEvenOdd = false;

  static KVC_INLINE __m256 widen(__m256i words_low) {
    const __m128i low = _mm256_castsi256_si128(words_low);
    return _mm256_cvtph_ps(_mm_packus_epi32(low, _mm256_extracti128_si256(words_low, 1)));
  }

  // Of 16 elements, the lower and the upper half.
  static KVC_INLINE void widen_sixteen(const uint8_t* source, __m256* first, __m256* second) {
    *first = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    *second = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16)));
  }

  static KVC_INLINE __m256 largest() { return _mm256_set1_ps(65504.0f); }

  static KVC_INLINE __m128i narrow(__m256 v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

// Words as 32-bit integers, in the order of widening.
template <typename Element>
KVC_INLINE void split_words(__m256i words, __m256i out[2]) {
  if (Element::kEvenOdd) {
    out[0] = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
    out[1] = _mm256_srli_epi32(words, 16);
  } else {
    out[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(words));
    out[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1));
  }
}

// ---- extremes of groups

struct Magnitude {
  __m256i value;

  Magnitude() = default;
  explicit KVC_INLINE Magnitude(__m256i first)
      : value(_mm256_and_si256(first, _mm256_set1_epi16(0x7FFF))) {}
  KVC_INLINE void add(__m256i other) {
    value = _mm256_max_epi16(value, _mm256_and_si256(other, _mm256_set1_epi16(0x7FFF)));
  }
  KVC_INLINE __m256i half_reduced() const { return value; }

  KVC_INLINE void start(__m256i) { value = _mm256_setzero_si256(); }
  template <typename Element>
  KVC_INLINE void split(__m256i[2], __m256i high[2]) const {
    split_words<Element>(value, high);
  }
};

// Of sign-and-magnitude bits a signed maximum is the largest element if one is not negative, and an
// unsigned maximum is the smallest if one is negative. Groups of one sign are put right later.
struct SmallestLargest {
  __m256i largest;
  __m256i smallest;

  explicit KVC_INLINE SmallestLargest(__m256i first) : largest(first), smallest(first) {}
  KVC_INLINE void add(__m256i other) {
    largest = _mm256_max_epi16(largest, other);
    smallest = _mm256_max_epu16(smallest, other);
  }
  // The lower half belongs to the largest, the upper half to the smallest, its sign bit flipped.
  KVC_INLINE __m256i half_reduced() const {
    const __m256i flipped =
        _mm256_xor_si256(smallest, _mm256_set1_epi16(static_cast<short>(0x8000)));
    return _mm256_max_epi16(_mm256_permute2x128_si256(largest, flipped, 0x20),
                            _mm256_permute2x128_si256(largest, flipped, 0x31));
  }
};

constexpr uint32_t kExtremesBytes = 32;  // of a group in TokenChunk::extremes

template <typename Extremes, uint32_t kVectors>
void find_extremes_of_whole(const TokenShape& shape, TokenChunk& chunk) {
  uint8_t* target = chunk.extremes;
  const uint32_t rows =
      chunk.rows;  // copies: a store might change the originals for all the compiler knows
  const uint32_t groups = shape.groups;
  for (uint32_t r = 0; r < rows; ++r) {
    const uint8_t* source = chunk.source[r];
    for (uint32_t g = 0; g < groups; ++g, source += kVectors * 32, target += kExtremesBytes) {
      Extremes extremes(load_vector(source));
      for (uint32_t i = 1; i < kVectors; ++i) extremes.add(load_vector(source + i * 32));
      store_aligned(target, extremes.half_reduced());
    }
  }
}

// The last vector of a group overlaps the one before it, or repeats the only elements there are.
template <typename Extremes>
inline void find_group_extremes(const uint8_t* source, uint32_t count, uint8_t* target) {
  if (count < 16) {
    alignas(32) uint8_t repeated[32];
    for (uint32_t i = 0; i < 16; ++i) std::memcpy(repeated + i * 2, source + i % count * 2, 2);
    return store_aligned(target, Extremes(load_vector(repeated)).half_reduced());
  }
  Extremes extremes(load_vector(source));
  for (uint32_t i = 16; i + 16 <= count; i += 16) extremes.add(load_vector(source + i * 2));
  if (count % 16 != 0) extremes.add(load_vector(source + (count - 16) * 2));
  store_aligned(target, extremes.half_reduced());
}

template <typename Extremes>
void find_extremes(const TokenShape& shape, TokenChunk& chunk) {
  if (shape.head_size % shape.group == 0) {
    if (shape.group == 64) return find_extremes_of_whole<Extremes, 4>(shape, chunk);
    if (shape.group == 128) return find_extremes_of_whole<Extremes, 8>(shape, chunk);
    if (shape.group == 32) return find_extremes_of_whole<Extremes, 2>(shape, chunk);
  }
  uint8_t* target = chunk.extremes;
  for (uint32_t r = 0; r < chunk.rows; ++r) {
    for (uint32_t g = 0; g < shape.groups; ++g, target += kExtremesBytes) {
      find_group_extremes<Extremes>(chunk.source[r] + g * shape.group * 2, shape.group_elements(g),
                                    target);
    }
  }
}

// ---- parameters of 8 groups

KVC_INLINE __m256i max_of_quads(__m256i a, __m256i b) {
  return _mm256_max_epi16(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
}

KVC_INLINE __m256i max_of_doubles(__m256i a, __m256i b) {
  const __m256 fa = _mm256_castsi256_ps(a);
  const __m256 fb = _mm256_castsi256_ps(b);
  return _mm256_max_epi16(_mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0x88)),
                          _mm256_castps_si256(_mm256_shuffle_ps(fa, fb, 0xDD)));
}

// Dword i: the maximum of the words that `a`, `b`, `c` and `d` hold in the same 128-bit lane.
KVC_INLINE __m256i max_of_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i pairs = max_of_doubles(max_of_quads(a, b), max_of_quads(c, d));
  return _mm256_and_si256(_mm256_max_epi16(pairs, _mm256_srli_epi32(pairs, 16)),
                          _mm256_set1_epi32(0xFFFF));
}

KVC_INLINE __m256i load_extremes(const uint8_t* extremes, int group) {
  return _mm256_load_si256(
      reinterpret_cast<const __m256i*>(extremes + group * static_cast<int>(kExtremesBytes)));
}

// Bits of the largest magnitudes. One tree for 8 groups takes three instructions a group, a third
// of what reducing each on its own would take.
KVC_INLINE __m256i reduce_magnitudes(const uint8_t* extremes) {
  __m256i pair[4];
  for (int i = 0; i < 4; ++i) {
    const __m256i a = load_extremes(extremes, i);
    const __m256i b = load_extremes(extremes, i + 4);
    pair[i] = _mm256_max_epi16(_mm256_permute2x128_si256(a, b, 0x20),
                               _mm256_permute2x128_si256(a, b, 0x31));
  }
  return max_of_lanes(pair[0], pair[1], pair[2], pair[3]);
}

KVC_INLINE void reduce_smallest_largest(const uint8_t* extremes, __m256i* smallest,
                                        __m256i* largest) {
  __m256i part[2];
  for (int i = 0; i < 2; ++i) {
    part[i] = max_of_lanes(load_extremes(extremes, 4 * i), load_extremes(extremes, 4 * i + 1),
                           load_extremes(extremes, 4 * i + 2), load_extremes(extremes, 4 * i + 3));
  }
  *largest = _mm256_permute2x128_si256(part[0], part[1], 0x20);
  *smallest = _mm256_xor_si256(_mm256_permute2x128_si256(part[0], part[1], 0x31),
                               _mm256_set1_epi32(0x8000));
}

// All elements of one sign: what the reduction took for one extreme is the other one again.
inline void correct_single_sign(const TokenShape& shape, const TokenChunk& chunk, uint32_t first,
                                uint32_t which, __m256i* smallest, __m256i* largest) {
  alignas(32) uint32_t low[8];
  alignas(32) uint32_t high[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(low), *smallest);
  _mm256_store_si256(reinterpret_cast<__m256i*>(high), *largest);
  for (uint32_t left = which; left != 0; left &= left - 1) {
    const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(left));
    if (first + lane >= chunk.rows * shape.groups) break;
    const uint32_t bits = smallest_bits(shape, chunk, first + lane);
    (bits < 0x8000 ? low : high)[lane] = bits;
  }
  *smallest = _mm256_load_si256(reinterpret_cast<const __m256i*>(low));
  *largest = _mm256_load_si256(reinterpret_cast<const __m256i*>(high));
}

// Scales from extents (largest magnitude or range), rounded up to bf16 and no smaller than 2^-126.
KVC_INLINE __m256i scales_of(__m256 extent, __m256 factor, __m256i inside, __m256* inverse) {
  const __m256i up = _mm256_add_epi32(_mm256_castps_si256(_mm256_mul_ps(extent, factor)),
                                      _mm256_set1_epi32(0xFFFF));
  const __m256i positive =
      _mm256_castps_si256(_mm256_cmp_ps(extent, _mm256_setzero_ps(), _CMP_NEQ_UQ));
  const __m256i cut = _mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  const __m256i scale =
      _mm256_and_si256(_mm256_max_epi32(cut, _mm256_set1_epi32(0x00800000)), positive);
  const __m256 quotient = _mm256_div_ps(_mm256_set1_ps(1.0f), _mm256_castsi256_ps(scale));
  *inverse = _mm256_and_ps(quotient, _mm256_castsi256_ps(_mm256_and_si256(positive, inside)));
  return _mm256_blendv_epi8(_mm256_set1_epi32(0x7FC00000), scale, inside);
}

KVC_INLINE __m256i is_inside(__m256i bits, int edge) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(edge),
                            _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFF)));
}

// Parameters of 8 groups.
struct GroupParameters {
  __m256 inverse;
  __m256 zero;
  __m256i stored;  // scale in the upper half, zero in the lower
  __m256i inside;
};

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters magnitude_parameters(__m256i bits) {
  GroupParameters p;
  p.inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(Element::kOutside), bits);
  p.zero = _mm256_setzero_ps();
  p.stored = scales_of(Element::widen(bits), _mm256_set1_ps(symmetric_factor(kBits)), p.inside,
                       &p.inverse);
  return p;
}

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters range_parameters(__m256i smallest, __m256i largest) {
  GroupParameters p;
  p.inside = _mm256_and_si256(is_inside(smallest, Element::kOutside),
                              is_inside(largest, Element::kOutside));
  const __m256i zero_bits = _mm256_and_si256(smallest, p.inside);
  p.zero = Element::widen(zero_bits);
  const __m256 extent = _mm256_sub_ps(Element::widen(largest), p.zero);
  const __m256i scale =
      scales_of(extent, _mm256_set1_ps(asymmetric_factor(kBits)), p.inside, &p.inverse);
  p.stored = _mm256_or_si256(scale, zero_bits);
  return p;
}

template <typename Element, uint32_t kBits>
KVC_INLINE GroupParameters token_range_parameters(const TokenShape& shape, const TokenChunk& chunk,
                                                  uint32_t first) {
  __m256i smallest, largest;
  reduce_smallest_largest(chunk.extremes + first * kExtremesBytes, &smallest, &largest);
  const __m256i wrong =
      _mm256_or_si256(largest, _mm256_xor_si256(smallest, _mm256_set1_epi32(0x8000)));
  const int single = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_slli_epi32(wrong, 16)));
  if (__builtin_expect(single != 0, false)) {
    correct_single_sign(shape, chunk, first, static_cast<uint32_t>(single), &smallest, &largest);
  }
  return range_parameters<Element, kBits>(smallest, largest);
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
bool find_parameters(const TokenShape& shape, TokenChunk& chunk) {
  const uint32_t groups = chunk.rows * shape.groups;
  bool any_outside = false;
  for (uint32_t first = 0; first < groups; first += 8) {
    GroupParameters p;
    if (kAsymmetric) {
      p = token_range_parameters<Element, kBits>(shape, chunk, first);
      store_aligned(chunk.parameters + first * 4, p.stored);
      _mm256_store_ps(chunk.zero + first, p.zero);
    } else {
      p = magnitude_parameters<Element, kBits>(
          reduce_magnitudes(chunk.extremes + first * kExtremesBytes));
      const __m256i high = _mm256_srli_epi32(p.stored, 16);
      _mm_store_si128(
          reinterpret_cast<__m128i*>(chunk.parameters + first * 2),
          _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
    }
    _mm256_store_ps(chunk.inverse + first, p.inverse);
    const uint32_t present = groups - first < 8 ? (1u << (groups - first)) - 1 : 0xFF;
    const uint32_t inside =
        static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(p.inside)));
    note_outside(chunk, first, 8, ~inside & present, &any_outside);
  }
  return any_outside;
}
