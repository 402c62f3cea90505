// Decoding per-token rows with AVX2. Included by avx2.cpp inside its target region and namespace,
// after avx2_pack.h.
//
// Codes of 4 and 2 bits are looked up: the values of a group are computed and rounded once, and
// byte shuffles in a table of their low bytes and one of their high bytes take the place of
// arithmetic per element.

template <bool kStream>
KVC_INLINE void store_vector(uint8_t* target, __m256i v) {
  if (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(target), v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), v);
}

constexpr size_t kVectorBytes = 32;

template <bool kStream>
KVC_INLINE void copy_vector(uint8_t* target, const uint8_t* source) {
  store_vector<kStream>(target, load_vector(source));
}

// Less than a vector.
KVC_INLINE void copy_rest(uint8_t* target, const uint8_t* source, size_t bytes) {
  copy_short(target, source, static_cast<uint32_t>(bytes));
}

// Scale and zero of a group, broadcast.
template <typename Element, bool kAsymmetric>
struct GroupValues {
  __m256 scale;
  __m256 zero;
  uint16_t scale_bits;
  uint16_t zero_bits = 0;

  explicit KVC_INLINE GroupValues(const uint8_t* parameter) {
    if (kAsymmetric) std::memcpy(&zero_bits, parameter, 2);
    std::memcpy(&scale_bits, parameter + (kAsymmetric ? 2 : 0), 2);
    scale = Bf16::widen(_mm256_set1_epi32(scale_bits));
    zero = kAsymmetric ? Element::widen(_mm256_set1_epi32(zero_bits)) : _mm256_setzero_ps();
  }

  // `codes` as floats, the middle code subtracted if symmetric. The product is exact unless it
  // overflows, which a fused operation would hide.
  KVC_INLINE __m256 value(__m256 codes) const {
    const __m256 product = _mm256_mul_ps(scale, codes);
    return kAsymmetric ? _mm256_add_ps(zero, product) : product;
  }
};

// Clamped; a NaN becomes the one that the format stores.
template <typename Element>
inline __m256 tamed(__m256 v) {
  const __m256 largest = Element::largest();
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  v = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), largest), v);
  v = _mm256_min_ps(largest, v);
  return _mm256_blendv_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)), nan);
}

// ---- 4 and 2 bits

// The low and the high bytes of 16 values, twice.
struct Table {
  __m256i low;
  __m256i high;
};

// `words`: values 0-7 in the lower lane, 8-15 in the upper one.
KVC_INLINE Table table_of_words(__m256i words) {
  const __m256i split = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
  const __m256i bytes = _mm256_shuffle_epi8(words, split);
  return {_mm256_permute4x64_epi64(bytes, 0x88), _mm256_permute4x64_epi64(bytes, 0xDD)};
}

KVC_INLINE __m256i table_words(Bf16, __m256 even, __m256 odd) {
  return merge_high_words(Bf16::round(even), Bf16::round(odd));
}

KVC_INLINE __m256i table_words(Fp16, __m256 even, __m256 odd) {
  const __m128i e = Fp16::narrow(even);
  const __m128i o = Fp16::narrow(odd);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(e, o)),
                                 _mm_unpackhi_epi16(e, o), 1);
}

template <typename Element>
KVC_OUTLINE __m256i table_words_of_any(__m256 even, __m256 odd) {
  return table_words(Element{}, tamed<Element>(even), tamed<Element>(odd));
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
KVC_INLINE Table table_of(const uint8_t* parameter) {
  const GroupValues<Element, kAsymmetric> group(parameter);
  const __m256 middle = _mm256_set1_ps(kAsymmetric ? 0 : 1 << (kBits - 1));
  __m256 even = kBits == 4 ? _mm256_setr_ps(0, 2, 4, 6, 8, 10, 12, 14)
                           : _mm256_setr_ps(0, 2, 0, 2, 0, 2, 0, 2);
  __m256 odd = kBits == 4 ? _mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15)
                          : _mm256_setr_ps(1, 3, 1, 3, 1, 3, 1, 3);
  even = group.value(_mm256_sub_ps(even, middle));
  odd = group.value(_mm256_sub_ps(odd, middle));
  if (__builtin_expect(is_tame<Element>(group.scale_bits, group.zero_bits), true)) {
    return table_of_words(table_words(Element{}, even, odd));
  }
  return table_of_words(table_words_of_any<Element>(even, odd));
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct TableReader {
  static constexpr uint32_t kBlockBytes = 8 * kBits;
  static constexpr size_t kParameterBytes = kAsymmetric ? 4 : 2;
  const uint8_t* parameters;
  Table first;
  Table second;

  // Of the group (or the pair of groups) that a block starts in.
  KVC_INLINE void load(uint32_t group, uint32_t last) {
    first = table_of<Element, kBits, kAsymmetric>(parameters + group * kParameterBytes);
    if (!kHalves) return;
    second = first;
    if (group != last)
      second = table_of<Element, kBits, kAsymmetric>(parameters + (group + 1) * kParameterBytes);
  }

  template <bool kStream>
  KVC_INLINE void decode_block(const uint8_t* codes, uint8_t* target) const {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i packed;  // lanes: codes 0-7 and 16-23 of a half block, codes 8-15 and 24-31
    if (kBits == 4) {
      packed = _mm256_permute4x64_epi64(load_vector(codes), 0xD8);
    } else {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
      const __m256i twice = _mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50);
      packed = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 2, 0, 2));
    }
    look_up<kStream>(first, _mm256_and_si256(packed, mask), target);
    look_up<kStream>(kHalves ? second : first, _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask),
                     target + 64);
  }

  // 32 codes as bytes, in order.
  KVC_INLINE void decode_bytes(const uint8_t* codes, bool upper, uint8_t* target) const {
    const __m256i order = _mm256_permute4x64_epi64(load_vector(codes), 0xD8);
    look_up<false>(kHalves && upper ? second : first, order, target);
  }

 private:
  template <bool kStream>
  static KVC_INLINE void look_up(const Table& table, __m256i codes, uint8_t* target) {
    const __m256i low = _mm256_shuffle_epi8(table.low, codes);
    const __m256i high = _mm256_shuffle_epi8(table.high, codes);
    store_vector<kStream>(target, _mm256_unpacklo_epi8(low, high));
    store_vector<kStream>(target + 32, _mm256_unpackhi_epi8(low, high));
  }
};

// ---- 8 bits

template <typename Element, bool kAsymmetric, bool kHalves>
struct ByteReader {
  static constexpr uint32_t kBlockBytes = 64;
  static constexpr size_t kParameterBytes = kAsymmetric ? 4 : 2;

  const uint8_t* parameters;
  __m256 scale[2];
  // With -128 * scale if symmetric: a fused multiply-add of the code itself is then the value.
  __m256 zero[2];
  bool plain[2];

  KVC_INLINE void load(uint32_t group, uint32_t last) {
    load_half(0, group);
    if (kHalves) load_half(1, group != last ? group + 1 : group);
  }

  template <bool kStream>
  KVC_INLINE void decode_block(const uint8_t* codes, uint8_t* target) const {
    for (int i = 0; i < 4; ++i)
      decode_sixteen<kStream>(codes + 16 * i, kHalves && i >= 2, target + 32 * i);
  }

  KVC_INLINE void decode_bytes(const uint8_t* codes, bool upper, uint8_t* target) const {
    for (int i = 0; i < 2; ++i)
      decode_sixteen<false>(codes + 16 * i, kHalves && upper, target + 32 * i);
  }

 private:
  template <bool kStream>
  KVC_INLINE void decode_sixteen(const uint8_t* codes, bool upper, uint8_t* target) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    if (__builtin_expect(!plain[upper], false)) {
      return store_vector<kStream>(target, decode_exactly(bytes, upper));
    }
    if (Element::kEvenOdd) {
      const __m256i words = _mm256_cvtepu8_epi16(bytes);
      const __m256i even = _mm256_and_si256(words, _mm256_set1_epi32(0xFFFF));
      const __m256i odd = _mm256_srli_epi32(words, 16);
      store_vector<kStream>(target, merge_high_words(Bf16::round(value(even, upper)),
                                                     Bf16::round(value(odd, upper))));
    } else {
      const __m256i low = _mm256_cvtepu8_epi32(bytes);
      const __m256i high = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
      const __m256i both = _mm256_castsi128_si256(Fp16::narrow(value(low, upper)));
      store_vector<kStream>(target,
                            _mm256_inserti128_si256(both, Fp16::narrow(value(high, upper)), 1));
    }
  }

  KVC_INLINE __m256 value(__m256i codes, bool upper) const {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scale[upper], zero[upper]);
  }

  KVC_INLINE void load_half(int half, uint32_t index) {
    const GroupValues<Element, kAsymmetric> group(parameters + index * kParameterBytes);
    // A scale of 0 has to give -0 for codes below the middle, which the sum would not.
    plain[half] = is_tame<Element>(group.scale_bits, group.zero_bits) && group.scale_bits != 0;
    scale[half] = group.scale;
    // -128 * scale is exact: the sum scale * code - 128 * scale is then the exact product.
    const bool fold = !kAsymmetric && plain[half];
    zero[half] = fold ? _mm256_mul_ps(group.scale, _mm256_set1_ps(-128.0f)) : group.zero;
  }

  KVC_OUTLINE __m256i decode_exactly(__m128i bytes, bool upper) const {
    const __m256i middle = _mm256_set1_epi32(kAsymmetric ? 0 : 128);
    const __m256i words = _mm256_cvtepu8_epi16(bytes);
    const __m256i codes[2] = {_mm256_and_si256(words, _mm256_set1_epi32(0xFFFF)),
                              _mm256_srli_epi32(words, 16)};
    __m256 values[2];
    for (int i = 0; i < 2; ++i) {
      const __m256 product =
          _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(codes[i], middle)), scale[upper]);
      values[i] = tamed<Element>(kAsymmetric ? _mm256_add_ps(product, zero[upper]) : product);
    }
    return table_words(Element{}, values[0], values[1]);
  }
};

// ---- rows

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kHalves>
struct ReaderOf {
  using Type = TableReader<Element, kBits, kAsymmetric, kHalves>;
};
template <typename Element, bool kAsymmetric, bool kHalves>
struct ReaderOf<Element, 8, kAsymmetric, kHalves> {
  using Type = ByteReader<Element, kAsymmetric, kHalves>;
};

// A block of `count` < 64 elements: through buffers of whole blocks.
// With kStream it is a multiple of 32 bytes. (A normal store to a line that is being streamed costs
// a thousand cycles.)
template <uint32_t kBits, bool kStream, typename Reader>
KVC_OUTLINE void decode_tail(const Reader& reader, const uint8_t* source, uint32_t count,
                             uint8_t* target) {
  const uint32_t bytes = (count + 8 / kBits - 1) / (8 / kBits);
  alignas(32) uint8_t packed[64] = {};
  alignas(32) uint8_t codes[64 + 32] = {};
  alignas(32) uint8_t elements[128];
  copy_short(packed, source, bytes);
  for (uint32_t k = 0; k < 8 / kBits; ++k) {
    for (uint32_t i = 0; i < bytes; i += 32) {
      const __m256i shifted =
          _mm256_srl_epi16(load_vector(packed + i), _mm_cvtsi32_si128(static_cast<int>(k * kBits)));
      const __m256i plane =
          _mm256_and_si256(shifted, _mm256_set1_epi8(static_cast<char>((1 << kBits) - 1)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k * bytes + i), plane);
    }
  }
  reader.decode_bytes(codes, false, elements);
  if (count > 32) reader.decode_bytes(codes + 32, true, elements + 64);
  if (!kStream) return copy_short(target, elements, count * 2);
  for (uint32_t i = 0; i < count * 2; i += kVectorBytes)
    copy_vector<true>(target + i, elements + i);
}

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
    if (shape.tail != 0) decode_tail<kBits, kStream>(reader, codes, shape.tail, target);
  }
}
