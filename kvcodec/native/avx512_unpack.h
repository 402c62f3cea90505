// Decoding per-token rows with AVX-512. Included by avx512.cpp inside its target region and
// namespace, after avx512_token.h.
//
// Codes of 4 and 2 bits are looked up: a group has at most 16 values, so each is computed and
// rounded once, and a permutation of 16-bit words takes the place of arithmetic per element.

template <bool kStream>
KVC_INLINE void store_vector(uint8_t* target, __m512i v) {
  if (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), v);
  _mm512_storeu_si512(target, v);
}

constexpr size_t kVectorBytes = 64;

template <bool kStream>
KVC_INLINE void copy_vector(uint8_t* target, const uint8_t* source) {
  store_vector<kStream>(target, _mm512_loadu_si512(source));
}

// Less than a vector.
KVC_INLINE void copy_rest(uint8_t* target, const uint8_t* source, size_t bytes) {
  const __mmask64 mask = (uint64_t{1} << bytes) - 1;
  _mm512_mask_storeu_epi8(target, mask, _mm512_maskz_loadu_epi8(mask, source));
}

// Scale and zero of a group, broadcast.
template <typename Element, bool kAsymmetric>
struct GroupValues {
  __m512 scale;
  __m512 zero;
  uint16_t scale_bits;
  uint16_t zero_bits;

  explicit KVC_INLINE GroupValues(const uint8_t* parameter) {
    uint32_t bits = 0;
    std::memcpy(&bits, parameter, kAsymmetric ? 4 : 2);
    if (!kAsymmetric) bits <<= 16;
    scale_bits = static_cast<uint16_t>(bits >> 16);
    zero_bits = static_cast<uint16_t>(bits);
    scale = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(bits & 0xFFFF0000)));
    zero = kAsymmetric ? Element::widen(_mm512_set1_epi32(static_cast<int>(bits & 0xFFFF)))
                       : _mm512_setzero_ps();
  }

  // `codes` as floats, the middle code subtracted if symmetric. The product is exact unless it
  // overflows, which a fused operation would hide.
  KVC_INLINE __m512 value(__m512 codes) const {
    const __m512 product = _mm512_mul_ps(scale, codes);
    return kAsymmetric ? _mm512_add_ps(zero, product) : product;
  }
};

// A NaN stays: the second operand is what min and max return then.
template <typename Element>
KVC_INLINE __m512 clamp(__m512 v) {
  const __m512 largest = Element::largest();
  v = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), largest), v);
  return _mm512_min_ps(largest, v);
}

// ---- 4 and 2 bits

template <typename Element>
KVC_OUTLINE __m512i table_of_any(__m512 values) {
  return _mm512_broadcast_i64x4(Element::narrow(clamp<Element>(values)));
}

// The values of all codes of a group as 16-bit words, twice (2 bits: eight times), so that only the
// low bits of an index count.
template <typename Element, uint32_t kBits, bool kAsymmetric>
KVC_INLINE __m512i table_of(const uint8_t* parameter) {
  const GroupValues<Element, kAsymmetric> group(parameter);
  constexpr float kMiddle = kAsymmetric ? 0 : 1 << (kBits - 1);
  const __m512 codes = kBits == 4
                           ? _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
                           : _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
  const __m512 values = group.value(_mm512_sub_ps(codes, _mm512_set1_ps(kMiddle)));
  if (__builtin_expect(!is_tame<Element>(group.scale_bits, group.zero_bits), false)) {
    return table_of_any<Element>(values);
  }
  if (!Element::kEvenOdd) {
    return _mm512_broadcast_i64x4(
        _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // One permutation takes the upper halves and repeats them.
  const __m512i uppers =
      _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1, 31, 29, 27, 25,
                       23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i up = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
  return _mm512_permutexvar_epi16(uppers, up);
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct TableReader {
  static constexpr uint32_t kBlockBytes = 8 * kBits;
  static constexpr size_t kParameterBytes = kAsymmetric ? 4 : 2;
  const uint8_t* parameters;
  __m512i first;
  __m512i second;

  // Of the group (or the pair of groups) that a block starts in.
  KVC_INLINE void load(uint32_t group, uint32_t last) {
    first = table_of<Element, kBits, kAsymmetric>(parameters + group * kParameterBytes);
    second = first;
    if (kHalves && group != last) {
      second = table_of<Element, kBits, kAsymmetric>(parameters + (group + 1) * kParameterBytes);
    }
  }

  template <bool kStream>
  KVC_INLINE void decode_block(const uint8_t* codes, uint8_t* target) const {
    __m512i low, high;
    if (kBits == 4) {
      low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
      high = _mm512_srli_epi16(low, 4);
    } else {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m256i words = _mm256_cvtepu8_epi16(bytes);
      low = _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 2), 1);
      high = _mm512_srli_epi16(low, 4);
    }
    store_vector<kStream>(target, _mm512_permutexvar_epi16(low, first));
    store_vector<kStream>(target + 64, _mm512_permutexvar_epi16(high, second));
  }

  // Words of codes, in the order of the elements.
  KVC_INLINE __m512i decode_words(__m512i codes, bool upper) const {
    return _mm512_permutexvar_epi16(codes, upper ? second : first);
  }
};

// ---- 8 bits

template <typename Element, bool kAsymmetric, bool kHalves>
struct ByteReader {
  static constexpr uint32_t kBlockBytes = 64;
  static constexpr size_t kParameterBytes = kAsymmetric ? 4 : 2;
  using Group = GroupValues<Element, kAsymmetric>;

  const uint8_t* parameters;
  __m512 scale[2];
  // With -128 * scale if symmetric: a fused multiply-add of the code itself is then the value.
  __m512 zero[2];
  bool plain[2];

  KVC_INLINE void load(uint32_t group, uint32_t last) {
    load_half(0, group);
    if (kHalves && group != last) return load_half(1, group + 1);
    scale[1] = scale[0];
    zero[1] = zero[0];
    plain[1] = plain[0];
  }

  template <bool kStream>
  KVC_INLINE void decode_block(const uint8_t* codes, uint8_t* target) const {
    for (int i = 0; i < 2; ++i) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32 * i));
      store_vector<kStream>(target + 64 * i, decode_words(_mm512_cvtepu8_epi16(bytes), i != 0));
    }
  }

  KVC_INLINE __m512i decode_words(__m512i codes, bool upper) const {
    if (__builtin_expect(!plain[upper], false)) return decode_exactly(codes, upper);
    if (!Element::kEvenOdd) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(codes));
      const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(codes, 1));
      return concatenate(
          _mm512_cvtps_ph(value(low, upper), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm512_cvtps_ph(value(high, upper), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i even = _mm512_and_si512(codes, _mm512_set1_epi32(0xFFFF));
    const __m512i odd = _mm512_srli_epi32(codes, 16);
    const __m512i low = _mm512_add_epi32(_mm512_castps_si512(value(even, upper)), half);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(value(odd, upper)), half);
    return _mm512_mask_mov_epi16(high, 0x55555555, _mm512_srli_epi32(low, 16));
  }

 private:
  static KVC_INLINE __m512i concatenate(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  KVC_INLINE __m512 value(__m512i codes, bool upper) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale[upper], zero[upper]);
  }

  KVC_INLINE void load_half(int half, uint32_t index) {
    const uint8_t* parameter = parameters + index * kParameterBytes;
    const Group group(parameter);
    // A scale of 0 has to give -0 for codes below the middle, which the sum would not.
    plain[half] = is_tame<Element>(group.scale_bits, group.zero_bits) && group.scale_bits != 0;
    scale[half] = group.scale;
    // -128 * scale is exact: the sum scale * code - 128 * scale is then the exact product.
    const bool fold = !kAsymmetric && plain[half];
    zero[half] = fold ? _mm512_mul_ps(group.scale, _mm512_set1_ps(-128.0f)) : group.zero;
  }

  KVC_OUTLINE __m512i decode_exactly(__m512i codes, bool upper) const {
    __m256i out[2];
    for (int i = 0; i < 2; ++i) {
      const __m256i words =
          i == 0 ? _mm512_castsi512_si256(codes) : _mm512_extracti64x4_epi64(codes, 1);
      const __m512i integers =
          _mm512_sub_epi32(_mm512_cvtepu16_epi32(words), _mm512_set1_epi32(kAsymmetric ? 0 : 128));
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(integers), scale[upper]);
      const __m512 sum = kAsymmetric ? _mm512_add_ps(product, zero[upper]) : product;
      out[i] = Element::narrow(clamp<Element>(sum));
    }
    return concatenate(out[0], out[1]);
  }
};

// ---- rows

// How the codes of a short block become words in the order of the elements.
template <uint32_t kBits>
struct TailOrder {
  uint32_t count;
  uint32_t bytes;
  __m512i from[2];
  __m512i shift[2];

  explicit TailOrder(uint32_t tail) : count(tail), bytes((tail + 8 / kBits - 1) / (8 / kBits)) {
    alignas(64) uint16_t byte_of[64] = {};
    alignas(64) uint16_t shift_of[64] = {};
    for (uint32_t i = 0; i < tail; ++i) {
      byte_of[i] = static_cast<uint16_t>(i % bytes);
      shift_of[i] = static_cast<uint16_t>(i / bytes * kBits);
    }
    for (int i = 0; i < 2; ++i) {
      from[i] = _mm512_load_si512(byte_of + 32 * i);
      shift[i] = _mm512_load_si512(shift_of + 32 * i);
    }
  }

  // With kStream a whole row is a multiple of 64 bytes, and `count` is 32.
  template <bool kStream, typename Reader>
  KVC_OUTLINE void decode(const Reader& reader, const uint8_t* codes, uint8_t* target) const {
    const __m256i low = _mm256_maskz_loadu_epi8(first_words(bytes), codes);
    const __m512i words = _mm512_cvtepu8_epi16(low);
    const __m512i code_mask = _mm512_set1_epi16((1 << kBits) - 1);
    __m512i first = _mm512_and_si512(
        _mm512_srlv_epi16(_mm512_permutexvar_epi16(from[0], words), shift[0]), code_mask);
    if (kStream) return store_vector<true>(target, reader.decode_words(first, false));
    _mm512_mask_storeu_epi16(target, first_words(count), reader.decode_words(first, false));
    if (count <= 32) return;
    __m512i second;
    if (kBits == 8) {
      second = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(first_words(bytes - 32), codes + 32));
    } else {
      second = _mm512_and_si512(
          _mm512_srlv_epi16(_mm512_permutexvar_epi16(from[1], words), shift[1]), code_mask);
    }
    _mm512_mask_storeu_epi16(target + 64, first_words(count - 32),
                             reader.decode_words(second, true));
  }
};

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct ReaderOf {
  using Type = TableReader<Element, kBits, kAsymmetric, kHalves>;
};
template <typename Element, bool kAsymmetric, bool kHalves>
struct ReaderOf<Element, 8, kAsymmetric, kHalves> {
  using Type = ByteReader<Element, kAsymmetric, kHalves>;
};

// Whole groups of `kPerGroup` blocks and nothing else: what most models have.
template <typename Reader, uint32_t kPerGroup, bool kStream>
KVC_INLINE void decode_whole_groups(Reader reader, uint32_t groups, const uint8_t* codes,
                                    uint8_t* target) {
  for (uint32_t group = 0; group < groups; ++group) {
    reader.load(group, groups);
    for (uint32_t block = 0; block < kPerGroup; ++block) {
      reader.template decode_block<kStream>(codes, target);
      codes += Reader::kBlockBytes;
      target += 128;
    }
  }
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves, bool kStream>
void decode_rows(const TokenShape& shape, const TokenTargets& rows) {
  using Reader = typename ReaderOf<Element, kBits, kAsymmetric, kHalves>::Type;
  const uint32_t per_group = kHalves ? 1 : (shape.group + kBlock - 1) / kBlock;  // blocks
  const uint32_t whole = kHalves ? 0 : shape.whole_groups();
  const TailOrder<kBits> tail(shape.tail);
  // Copies: a store might change the originals for all the compiler knows.
  const uint32_t row_count = rows.rows;
  const uint32_t groups = shape.groups;
  const uint32_t blocks = shape.blocks;
  const size_t row_codes = shape.row_codes;
  const size_t row_parameters = shape.row_parameters;
  for (uint32_t r = 0; r < row_count; ++r) {
    const uint8_t* codes = rows.codes + rows.index[r] * row_codes;
    uint8_t* target = const_cast<uint8_t*>(rows.target[r]);
    Reader reader;
    reader.parameters = rows.parameters + rows.index[r] * row_parameters;
    if (whole == 1) {
      decode_whole_groups<Reader, 1, kStream>(reader, groups, codes, target);
      continue;
    }
    if (whole == 2) {
      decode_whole_groups<Reader, 2, kStream>(reader, groups, codes, target);
      continue;
    }
    uint32_t block = 0;
    for (uint32_t group = 0; group < groups; group += 1 + kHalves) {
      reader.load(group, groups - 1);
      const uint32_t end = block + per_group < blocks ? block + per_group : blocks;
      for (; block < end; ++block) {
        reader.template decode_block<kStream>(codes, target);
        codes += Reader::kBlockBytes;
        target += 128;
      }
    }
    if (shape.tail != 0) tail.template decode<kStream>(reader, codes, target);
  }
}
