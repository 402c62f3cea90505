// Hadamard rows with AVX-512: a whole row in registers. Included by transformed_avx512.cpp inside
// its target region and namespace.

// Lanes i and i + kStep of a vector become their sum and their difference.
template <uint32_t kStep>
KVC_INLINE __m512 mix_lanes(__m512 v) {
  __m512 other;
  if constexpr (kStep == 1) {
    other = _mm512_permute_ps(v, 0xB1);
  } else if constexpr (kStep == 2) {
    other = _mm512_permute_ps(v, 0x4E);
  } else if constexpr (kStep == 4) {
    other = _mm512_shuffle_f32x4(v, v, 0xB1);
  } else {
    other = _mm512_shuffle_f32x4(v, v, 0x4E);
  }
  // A product with -1 is exact: one operation makes sums and differences.
  constexpr __mmask16 kSecond = kStep == 1   ? 0xAAAA
                                : kStep == 2 ? 0xCCCC
                                : kStep == 4 ? 0xF0F0
                                             : 0xFF00;
  const __m512 sign = _mm512_mask_blend_ps(kSecond, _mm512_set1_ps(1.0f), _mm512_set1_ps(-1.0f));
  return _mm512_fmadd_ps(v, sign, other);
}

template <uint32_t kVectors>
KVC_INLINE void mix_row(__m512* v) {
  for (uint32_t i = 0; i < kVectors; ++i)
    v[i] = mix_lanes<8>(mix_lanes<4>(mix_lanes<2>(mix_lanes<1>(v[i]))));
#pragma GCC unroll 5
  for (uint32_t step = 1; step < kVectors; step *= 2) {
#pragma GCC unroll 32
    for (uint32_t i = 0; i < kVectors; ++i) {
      if (i & step) continue;
      const __m512 a = v[i];
      const __m512 b = v[i + step];
      v[i] = _mm512_add_ps(a, b);
      v[i + step] = _mm512_sub_ps(a, b);
    }
  }
}

struct HadamardShape {
  uint32_t group_vectors;
  uint32_t groups;
  size_t row_parameters;
  size_t row_codes;
  size_t codes;

  HadamardShape(const SectionCodec& codec, const Rows& rows)
      : group_vectors(codec.group_size / 16),
        groups((rows.head_size + codec.group_size - 1) / codec.group_size),
        row_parameters(groups * (codec.asymmetric ? 4 : 2)),
        row_codes(size_t{rows.head_size} * codec.bits / 8),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))) {}

  static bool covers(const SectionCodec& codec, const Rows& rows) {
    return codec.dtype != KVC_FP32 && rows.head_size >= 64 && rows.head_size <= 512 &&
           codec.group_size % 16 == 0;
  }
};

// ---- encoding

// The parameter of a group, and what its numbers are quantized with.
struct GroupCodes {
  __m512 zero;
  __m512 inverse;
  __mmask16 inside;
};

template <uint32_t kVectors>
KVC_INLINE GroupCodes store_group(const SectionCodec& codec, const __m512* v, uint32_t first,
                                  uint32_t end, uint8_t* target, uint64_t* outside) {
  __m512i low = ordered_keys(_mm512_castps_si512(v[first]));
  __m512i high = low;
  for (uint32_t i = first + 1; i < end; ++i) {
    const __m512i key = ordered_keys(_mm512_castps_si512(v[i]));
    low = _mm512_min_epi32(low, key);
    high = _mm512_max_epi32(high, key);
  }
  const WideParameters p =
      wide_parameters(codec, _mm512_set1_epi32(_mm512_reduce_min_epi32(low)),
                      _mm512_set1_epi32(_mm512_reduce_max_epi32(high)));
  *outside += p.inside == 0;
  const uint32_t stored = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(p.stored)));
  if (codec.asymmetric) {
    memcpy(target, &stored, 4);
  } else {
    const uint16_t scale = static_cast<uint16_t>(stored >> 16);
    memcpy(target, &scale, 2);
  }
  return {p.zero, p.inverse, p.inside};
}

// 64 codes in four vectors -> 8 * kBits bytes.
template <uint32_t kBits>
KVC_INLINE void store_block(const __m512i* q, uint8_t* target) {
  const auto store = [target](uint32_t i, __m512i bytes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 16 * i), _mm512_cvtepi32_epi8(bytes));
  };
  if constexpr (kBits == 8) {
    for (uint32_t i = 0; i < 4; ++i) store(i, q[i]);
  } else if constexpr (kBits == 4) {
    for (uint32_t i = 0; i < 2; ++i)
      store(i, _mm512_or_si512(q[i], _mm512_slli_epi32(q[i + 2], 4)));
  } else {
    const __m512i low = _mm512_or_si512(q[0], _mm512_slli_epi32(q[1], 2));
    const __m512i high = _mm512_or_si512(q[2], _mm512_slli_epi32(q[3], 2));
    store(0, _mm512_or_si512(low, _mm512_slli_epi32(high, 4)));
  }
}

template <typename Element, uint32_t kBits, uint32_t kVectors>
uint64_t encode_hadamard_rows(const SectionCodec& codec, const Rows& rows, const Rows* next,
                              uint8_t* out) {
  const HadamardShape shape(codec, rows);
  constexpr uint32_t kRowBytes = kVectors * 32;
  const __m512i bias = _mm512_set1_epi32(codec.asymmetric ? 0 : 1 << (kBits - 1));
  RowWalk walk(rows);
  RowsAhead ahead(rows, next, kPrefetchBytes / kRowBytes + 1);
  const uint8_t* source[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  uint64_t outside = 0;
  for (;;) {
    const int64_t offset = ahead.offset(walk.address(), kMaxChunkRows);
    const uint32_t count = walk.take(source, index, kMaxChunkRows);
    if (count == 0) break;
    for (uint32_t r = 0; r < count; ++r) {
      for (uint32_t i = 0; i < kRowBytes; i += 64) prefetch(source[r], offset + i);
      __m512 v[kVectors];
      for (uint32_t i = 0; i < kVectors; ++i) v[i] = load_column<Element>(source[r] + i * 32);
      mix_row<kVectors>(v);
      uint8_t* parameters = out + index[r] * shape.row_parameters;
      __m512i q[kVectors];
      for (uint32_t g = 0; g < shape.groups; ++g, parameters += codec.asymmetric ? 4 : 2) {
        const uint32_t first = g * shape.group_vectors;
        const uint32_t end = smaller(first + shape.group_vectors, kVectors);
        const GroupCodes group = store_group<kVectors>(codec, v, first, end, parameters, &outside);
        for (uint32_t i = first; i < end; ++i) {
          q[i] = _mm512_maskz_mov_epi32(group.inside,
                                        wide_codes<kBits>(v[i], group.zero, group.inverse, bias));
        }
      }
      uint8_t* codes = out + shape.codes + index[r] * shape.row_codes;
      for (uint32_t i = 0; i < kVectors; i += 4, codes += 8 * kBits) store_block<kBits>(q + i, codes);
    }
  }
  clear_padding(codec, rows, out);
  return outside;
}

// ---- decoding

// 8 * kBits bytes -> the codes of 64 elements, each in the low bits of a lane.
template <uint32_t kBits>
KVC_INLINE void load_block(const uint8_t* source, __m512i* q) {
  const auto load = [source](uint32_t i) {
    return _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 16 * i)));
  };
  if constexpr (kBits == 8) {
    for (uint32_t i = 0; i < 4; ++i) q[i] = load(i);
  } else if constexpr (kBits == 4) {
    for (uint32_t i = 0; i < 2; ++i) {
      q[i] = load(i);
      q[i + 2] = _mm512_srli_epi32(q[i], 4);
    }
  } else {
    q[0] = load(0);
    for (int i = 1; i < 4; ++i) q[i] = _mm512_srli_epi32(q[0], static_cast<uint32_t>(2 * i));
  }
}

template <typename Element, uint32_t kBits, uint32_t kVectors>
KVC_INLINE void decode_hadamard_row(const HadamardShape& shape, const SectionCodec& codec,
                                    const CodeRamp<kBits>& ramp, const uint8_t* parameters,
                                    const uint8_t* codes, uint8_t* row, bool stream) {
  __m512 v[kVectors];
  for (uint32_t i = 0; i < kVectors; i += 4, codes += 8 * kBits) {
    __m512i q[4];
    load_block<kBits>(codes, q);
    for (uint32_t k = 0; k < 4; ++k) v[i + k] = ramp.values(q[k]);
  }
  bool tame = true;
  for (uint32_t g = 0; g < shape.groups; ++g, parameters += codec.asymmetric ? 4 : 2) {
    uint32_t stored = 0;
    memcpy(&stored, parameters, codec.asymmetric ? 4 : 2);
    if (!codec.asymmetric) stored = stored << 16 | 0x8000;  // -0, which changes no number
    const uint16_t zero_bits = static_cast<uint16_t>(stored);
    // Sums of 512 such numbers are finite, and below the largest one of the element type when they
    // are divided again.
    tame &= stored >> 16 < (Element::kEvenOdd ? 0x7100u : 0x4280u) &&
            (zero_bits & 0x7FFFu) < (Element::kEvenOdd ? 0x7600u : 0x4680u);
    const __m512 scale = _mm512_set1_ps(float_of_bf16(static_cast<uint16_t>(stored >> 16)));
    const __m512 zero = _mm512_set1_ps(float_of_bf16(zero_bits));
    const uint32_t first = g * shape.group_vectors;
    for (uint32_t i = first; i < smaller(first + shape.group_vectors, kVectors); ++i)
      v[i] = _mm512_add_ps(zero, _mm512_mul_ps(scale, v[i]));
  }
  mix_row<kVectors>(v);
  const __m512 unit = _mm512_set1_ps(1.0f / (16 * kVectors));
  for (uint32_t i = 0; i < kVectors; i += 2) {
    const __m512 a = _mm512_mul_ps(v[i], unit);
    const __m512 b = _mm512_mul_ps(v[i + 1], unit);
    const __m512i words =
        __builtin_expect(tame, true) ? join_numbers<Element, true>(a, b) : join_numbers<Element, false>(a, b);
    stream ? store_vector<true>(row + i * 32, words) : store_vector<false>(row + i * 32, words);
  }
}

template <typename Element, uint32_t kBits, uint32_t kVectors>
void decode_hadamard_rows(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const HadamardShape shape(codec, rows);
  const CodeRamp<kBits> ramp(codec.asymmetric);
  const bool stream = rows_aligned(rows, kVectors * 32, 64);
  RowWalk walk(rows);
  BytesBehind behind(codec, in, rows);
  const uint8_t* target[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  while (const uint32_t count = walk.take(target, index, kMaxChunkRows)) {
    behind.fetch(count);
    for (uint32_t r = 0; r < count; ++r) {
      decode_hadamard_row<Element, kBits, kVectors>(
          shape, codec, ramp, in + index[r] * shape.row_parameters,
          in + shape.codes + index[r] * shape.row_codes, const_cast<uint8_t*>(target[r]), stream);
    }
  }
  if (stream) _mm_sfence();
}
