// Derotated sections with AVX-512: 16 channels are a column. Included by transformed_avx512.cpp
// inside its target region and namespace.
//
// Head by head and group by group. An encoder turns the rows of a group into a scratch of floats,
// finds the extremes of the columns there and then their words. A decoder needs no scratch: it has
// both columns of 16 pairs in registers.

constexpr uint32_t kColumn = 16;
constexpr uint32_t kScratchTokens = 64;
constexpr uint32_t kMaxColumns = kMaxDerotatedSize / kColumn;

// How a column, or two of them, are turned.
enum class Turn { kNone, kSplit, kInterleaved };

// A part of a row: one column, or (kSplit) that of the first channels of 16 pairs and another one
// `apart` channels behind it.
struct Part {
  Turn turn;
  uint32_t channel;
};

// Where the parts of a head lie, and what all heads have in common.
struct DerotatedShape {
  const kvc_rotary& rotary;
  uint32_t apart;  // channels from the first to the second of a pair
  uint32_t table_floats;  // of a token
  uint32_t group;
  uint32_t groups;
  uint32_t per_word;
  uint32_t parameter;  // bytes of a channel
  size_t group_parameters;
  size_t word_bytes;
  size_t head_codes;
  size_t codes;
  uint32_t parts;
  Part part[kMaxColumns];

  DerotatedShape(const SectionCodec& codec, const Rows& rows)
      : rotary(*codec.derotation),
        apart(rotary.size / 2),
        table_floats(rotary.size),
        group(codec.group_size),
        groups((rows.token_count + group - 1) / group),
        per_word(32u / codec.bits),
        parameter(codec.asymmetric ? 4 : 2),
        group_parameters(size_t{rows.head_size} * parameter),
        word_bytes(size_t{rows.head_size} * 4),
        head_codes((rows.token_count + per_word - 1) / per_word * word_bytes),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))),
        parts(0) {
    const bool interleaved = rotary.interleaved != 0;
    for (uint32_t i = 0; i < (interleaved ? rotary.size : apart); i += kColumn)
      part[parts++] = {interleaved ? Turn::kInterleaved : Turn::kSplit, i};
    for (uint32_t i = rotary.size; i < rows.head_size; i += kColumn)
      part[parts++] = {Turn::kNone, i};
  }

  // No word holds codes of two groups, and no column other pairs or channels.
  static bool covers(const SectionCodec& codec, const Rows& rows) {
    const kvc_rotary& rotary = *codec.derotation;
    const uint32_t whole = rotary.interleaved != 0 ? kColumn : 2 * kColumn;
    return codec.dtype != KVC_FP32 && rows.head_size % kColumn == 0 && rotary.size % whole == 0 &&
           (codec.group_size == rows.token_count || codec.group_size * codec.bits % 32 == 0);
  }
};

template <typename Element>
KVC_INLINE __m512 load_column(const uint8_t* source) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  if (!Element::kEvenOdd) return _mm512_cvtph_ps(words);
  return Element::widen(_mm512_cvtepu16_epi32(words));
}

struct Angles {
  __m512 cosine;
  __m512 sine;
};

// Of 16 pairs. `table` lies at (cosine, sine) of the first one.
KVC_INLINE Angles split_angles(const float* table) {
  const __m512 low = _mm512_loadu_ps(table);
  const __m512 high = _mm512_loadu_ps(table + 16);
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_ps(low, even, high), _mm512_permutex2var_ps(low, odd, high)};
}

// Eight pairs of neighbours. A difference is the sum with the negated product, the same bits.
template <bool kBack>
KVC_INLINE __m512 turn_neighbours(__m512 v, const float* table) {
  const __m512 angles = _mm512_loadu_ps(table);
  const __m512 sign = _mm512_castsi512_ps(_mm512_maskz_set1_epi32(
      static_cast<__mmask16>(kBack ? 0xAAAA : 0x5555), static_cast<int>(0x80000000)));
  const __m512 sine = _mm512_xor_ps(_mm512_movehdup_ps(angles), sign);
  const __m512 other = _mm512_permute_ps(v, 0xB1);
  return _mm512_add_ps(_mm512_mul_ps(v, _mm512_moveldup_ps(angles)), _mm512_mul_ps(other, sine));
}

// ---- encoding

struct DerotatedScratch {
  alignas(64) float row[kScratchTokens][kMaxDerotatedSize];
  alignas(64) __m512i low[kMaxColumns];  // keys in the order of numbers
  alignas(64) __m512i high[kMaxColumns];
  alignas(64) __m512 zero[kMaxColumns];
  alignas(64) __m512 inverse[kMaxColumns];
  __mmask16 inside[kMaxColumns];
};

template <typename Element>
void turn_rows_back(const DerotatedShape& shape, const Rows& rows, const Rows* next, uint32_t head,
                    uint32_t first, uint32_t tokens, DerotatedScratch& work) {
  const uint32_t row_bytes = rows.head_size * 2;
  const float* angles = shape.rotary.table + size_t{first} * shape.table_floats;
  for (uint32_t t = 0; t < tokens; ++t, angles += shape.table_floats) {
    const uint8_t* row = rows.row(head, first + t);
    if (head + 1 < rows.head_count) {
      for (uint32_t i = 0; i < row_bytes; i += 64) prefetch(rows.row(head + 1, first + t), i);
    } else if (next != nullptr && first + t < next->token_count) {
      for (uint32_t i = 0; i < row_bytes; i += 64) prefetch(next->row(0, first + t), i);
    }
    float* out = work.row[t];
    for (uint32_t p = 0; p < shape.parts; ++p) {
      const uint32_t c = shape.part[p].channel;
      const __m512 a = load_column<Element>(row + c * 2);
      if (shape.part[p].turn == Turn::kSplit) {
        const __m512 b = load_column<Element>(row + (c + shape.apart) * 2);
        const Angles angle = split_angles(angles + 2 * c);
        _mm512_store_ps(out + c, _mm512_add_ps(_mm512_mul_ps(a, angle.cosine),
                                               _mm512_mul_ps(b, angle.sine)));
        _mm512_store_ps(out + c + shape.apart, _mm512_sub_ps(_mm512_mul_ps(b, angle.cosine),
                                                             _mm512_mul_ps(a, angle.sine)));
      } else if (shape.part[p].turn == Turn::kInterleaved) {
        _mm512_store_ps(out + c, turn_neighbours<true>(a, angles + c));
      } else {
        _mm512_store_ps(out + c, a);
      }
    }
  }
}

inline void start_ranges(uint32_t columns, DerotatedScratch& work) {
  for (uint32_t c = 0; c < columns; ++c) {
    work.low[c] = _mm512_set1_epi32(INT32_MAX);
    work.high[c] = _mm512_set1_epi32(INT32_MIN);
  }
}

inline void widen_ranges(uint32_t columns, uint32_t tokens, DerotatedScratch& work) {
  for (uint32_t c = 0; c < columns; ++c) {
    __m512i low = work.low[c];
    __m512i high = work.high[c];
    for (uint32_t t = 0; t < tokens; ++t) {
      const __m512i key = ordered_keys(_mm512_load_si512(work.row[t] + c * kColumn));
      low = _mm512_min_epi32(low, key);
      high = _mm512_max_epi32(high, key);
    }
    work.low[c] = low;
    work.high[c] = high;
  }
}

// Parameters of all columns of a group; how many channels are outside the domain.
inline uint64_t store_parameters(const SectionCodec& codec, uint32_t columns, uint8_t* target,
                                 DerotatedScratch& work) {
  uint64_t outside = 0;
  for (uint32_t c = 0; c < columns; ++c, target += kColumn * (codec.asymmetric ? 4 : 2)) {
    const WideParameters p = wide_parameters(codec, work.low[c], work.high[c]);
    work.zero[c] = p.zero;
    work.inverse[c] = p.inverse;
    work.inside[c] = p.inside;
    outside += static_cast<uint64_t>(__builtin_popcount(static_cast<uint16_t>(~p.inside)));
    if (codec.asymmetric) {
      _mm512_storeu_si512(target, p.stored);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(p.stored, 16)));
    }
  }
  return outside;
}

template <uint32_t kBits>
void store_words(const SectionCodec& codec, uint32_t columns, uint32_t tokens, uint8_t* target,
                 size_t word_bytes, const DerotatedScratch& work) {
  constexpr uint32_t kPerWord = 32 / kBits;
  const __m512i bias = _mm512_set1_epi32(codec.asymmetric ? 0 : 1 << (kBits - 1));
  for (uint32_t t = 0; t < tokens; t += kPerWord, target += word_bytes) {
    const uint32_t present = tokens - t < kPerWord ? tokens - t : kPerWord;
    for (uint32_t c = 0; c < columns; ++c) {
      __m512i word = _mm512_setzero_si512();
      for (uint32_t k = 0; k < present; ++k) {
        const __m512 v = _mm512_load_ps(work.row[t + k] + c * kColumn);
        const __m512i code = wide_codes<kBits>(v, work.zero[c], work.inverse[c], bias);
        word = _mm512_or_si512(word, _mm512_sllv_epi32(code, _mm512_set1_epi32(
                                                                 static_cast<int>(k * kBits))));
      }
      _mm512_storeu_si512(target + c * kColumn * 4, _mm512_maskz_mov_epi32(work.inside[c], word));
    }
  }
}

template <typename Element, uint32_t kBits>
uint64_t encode_derotated(const SectionCodec& codec, const Rows& rows, const Rows* next,
                          uint8_t* out) {
  const DerotatedShape shape(codec, rows);
  const uint32_t columns = rows.head_size / kColumn;
  DerotatedScratch work;
  uint64_t outside = 0;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    uint8_t* codes = out + shape.codes + head * shape.head_codes;
    for (uint32_t group = 0; group < shape.groups; ++group) {
      const uint32_t first = group * shape.group;
      const uint32_t tokens = smaller(rows.token_count - first, shape.group);
      start_ranges(columns, work);
      for (uint32_t t = 0; t < tokens; t += kScratchTokens) {
        const uint32_t some = smaller(tokens - t, kScratchTokens);
        turn_rows_back<Element>(shape, rows, next, head, first + t, some, work);
        widen_ranges(columns, some, work);
      }
      outside += store_parameters(
          codec, columns, out + (size_t{head} * shape.groups + group) * shape.group_parameters,
          work);
      for (uint32_t t = 0; t < tokens; t += kScratchTokens) {
        const uint32_t some = smaller(tokens - t, kScratchTokens);
        if (tokens > kScratchTokens)
          turn_rows_back<Element>(shape, rows, nullptr, head, first + t, some, work);
        store_words<kBits>(codec, columns, some,
                           codes + (first + t) / shape.per_word * shape.word_bytes,
                           shape.word_bytes, work);
      }
    }
  }
  clear_padding(codec, rows, out);
  return outside;
}

// ---- decoding

// A group at work: scales and zeros of all columns.
struct DerotatedGroup {
  alignas(64) __m512 scale[kMaxColumns];
  alignas(64) __m512 zero[kMaxColumns];
  bool tame;
};

template <typename Element>
void load_parameters(const SectionCodec& codec, const uint8_t* source, uint32_t columns,
                     DerotatedGroup& work) {
  const __m512i end = _mm512_set1_epi32(static_cast<int>(scale_end<Element>() << 16));
  const __m512i most = _mm512_set1_epi32(Element::kEvenOdd ? 0x7E80 : 0x4680);  // as bf16
  uint32_t tame = 0xFFFF;
  for (uint32_t c = 0; c < columns; ++c, source += kColumn * (codec.asymmetric ? 4 : 2)) {
    __m512i stored;
    if (codec.asymmetric) {
      stored = _mm512_loadu_si512(source);
    } else {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
      stored = _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
    }
    const __m512i zero = _mm512_slli_epi32(stored, 16);
    work.scale[c] = _mm512_castsi512_ps(
        _mm512_and_si512(stored, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
    // Adding -0 changes no number.
    work.zero[c] = codec.asymmetric ? _mm512_castsi512_ps(zero) : _mm512_set1_ps(-0.0f);
    tame &= _mm512_cmplt_epu32_mask(stored, end);
    tame &= _mm512_cmplt_epu32_mask(_mm512_and_si512(stored, _mm512_set1_epi32(0x7FFF)), most);
  }
  work.tame = tame == 0xFFFF;
}

template <typename Element, bool kTame>
KVC_INLINE void store_numbers(uint8_t* target, const __m512 v[2], uint32_t count, bool stream) {
  if (count == 1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        Element::narrow(clamp<Element>(v[0])));
    return;
  }
  const __m512i words = join_numbers<Element, kTame>(v[0], v[1]);
  stream ? store_vector<true>(target, words) : store_vector<false>(target, words);
}

// One word of kCount neighbouring columns (kSplit: of as many pairs of columns).
template <typename Element, uint32_t kBits, bool kTame, Turn kTurn, uint32_t kCount>
KVC_INLINE void decode_columns(const DerotatedShape& shape, const DerotatedGroup& work,
                               const CodeRamp<kBits>& ramp, uint32_t channel, const uint8_t* words,
                               uint32_t tokens, const float* angles, uint8_t* row, int64_t stride,
                               bool stream) {
  constexpr uint32_t kSides = kTurn == Turn::kSplit ? 2 : 1;
  __m512i word[kSides][kCount];
  __m512 scale[kSides][kCount];
  __m512 zero[kSides][kCount];
  for (uint32_t side = 0; side < kSides; ++side) {
    const uint32_t start = channel + side * shape.apart;
    for (uint32_t i = 0; i < kCount; ++i) {
      word[side][i] = _mm512_loadu_si512(words + (start + i * kColumn) * 4);
      scale[side][i] = work.scale[start / kColumn + i];
      zero[side][i] = work.zero[start / kColumn + i];
    }
  }
  for (uint32_t k = 0; k < tokens; ++k, row += stride, angles += shape.table_floats) {
    const __m512i shift = _mm512_set1_epi32(static_cast<int>(k * kBits));
    __m512 v[kSides][2];
    for (uint32_t side = 0; side < kSides; ++side) {
      for (uint32_t i = 0; i < kCount; ++i) {
        const __m512 code = ramp.values(_mm512_srlv_epi32(word[side][i], shift));
        v[side][i] = _mm512_add_ps(zero[side][i], _mm512_mul_ps(scale[side][i], code));
      }
    }
    for (uint32_t i = 0; i < kCount; ++i) {
      if constexpr (kTurn == Turn::kSplit) {
        const Angles angle = split_angles(angles + 2 * (channel + i * kColumn));
        const __m512 a = v[0][i];
        const __m512 b = v[1][i];
        v[0][i] = _mm512_sub_ps(_mm512_mul_ps(a, angle.cosine), _mm512_mul_ps(b, angle.sine));
        v[1][i] = _mm512_add_ps(_mm512_mul_ps(b, angle.cosine), _mm512_mul_ps(a, angle.sine));
      } else if constexpr (kTurn == Turn::kInterleaved) {
        v[0][i] = turn_neighbours<false>(v[0][i], angles + channel + i * kColumn);
      }
    }
    for (uint32_t side = 0; side < kSides; ++side)
      store_numbers<Element, kTame>(row + (channel + side * shape.apart) * 2, v[side], kCount,
                                    stream);
  }
}

template <typename Element, uint32_t kBits, bool kTame, Turn kTurn>
KVC_INLINE uint32_t decode_part(const DerotatedShape& shape, const DerotatedGroup& work,
                                const CodeRamp<kBits>& ramp, uint32_t p, const uint8_t* words,
                                uint32_t tokens, const float* angles, uint8_t* row, int64_t stride,
                                bool stream) {
  const uint32_t channel = shape.part[p].channel;
  const bool two = p + 1 < shape.parts && shape.part[p + 1].turn == kTurn;
  if (two) {
    decode_columns<Element, kBits, kTame, kTurn, 2>(shape, work, ramp, channel, words, tokens,
                                                    angles, row, stride, stream);
    return p + 2;
  }
  decode_columns<Element, kBits, kTame, kTurn, 1>(shape, work, ramp, channel, words, tokens, angles,
                                                  row, stride, stream);
  return p + 1;
}

template <typename Element, uint32_t kBits, bool kTame>
void decode_group(const DerotatedShape& shape, const Rows& rows, const DerotatedGroup& work,
                  const CodeRamp<kBits>& ramp, uint32_t head, uint32_t first, uint32_t tokens,
                  const uint8_t* words, bool stream, BytesBehind& behind) {
  constexpr uint32_t kPerWord = 32 / kBits;
  const float* angles = shape.rotary.table + size_t{first} * shape.table_floats;
  for (uint32_t t = 0; t < tokens; t += kPerWord, words += shape.word_bytes) {
    const uint32_t present = smaller(tokens - t, kPerWord);
    uint8_t* row = rows.row(head, first + t);
    behind.fetch(present);
    for (uint32_t p = 0; p < shape.parts;) {
      switch (shape.part[p].turn) {
        case Turn::kSplit:
          p = decode_part<Element, kBits, kTame, Turn::kSplit>(
              shape, work, ramp, p, words, present, angles, row, rows.token_stride, stream);
          break;
        case Turn::kInterleaved:
          p = decode_part<Element, kBits, kTame, Turn::kInterleaved>(
              shape, work, ramp, p, words, present, angles, row, rows.token_stride, stream);
          break;
        default:
          p = decode_part<Element, kBits, kTame, Turn::kNone>(
              shape, work, ramp, p, words, present, angles, row, rows.token_stride, stream);
      }
    }
    angles += kPerWord * shape.table_floats;
  }
}

template <typename Element, uint32_t kBits>
void decode_derotated(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const DerotatedShape shape(codec, rows);
  // Whole lines of the cache: two columns at a time everywhere.
  const bool stream = rows_aligned(rows, size_t{rows.head_size} * 2, 64) &&
                      (shape.rotary.interleaved != 0 ? shape.rotary.size : shape.apart) % 32 == 0;
  const CodeRamp<kBits> ramp(codec.asymmetric);
  BytesBehind behind(codec, in, rows);
  DerotatedGroup work;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t group = 0; group < shape.groups; ++group) {
      const uint32_t first = group * shape.group;
      const uint32_t tokens = smaller(rows.token_count - first, shape.group);
      load_parameters<Element>(
          codec, in + (size_t{head} * shape.groups + group) * shape.group_parameters,
          rows.head_size / kColumn, work);
      const uint8_t* words =
          in + shape.codes + head * shape.head_codes + first / shape.per_word * shape.word_bytes;
      work.tame ? decode_group<Element, kBits, true>(shape, rows, work, ramp, head, first, tokens,
                                                     words, stream, behind)
                : decode_group<Element, kBits, false>(shape, rows, work, ramp, head, first, tokens,
                                                      words, stream, behind);
    }
  }
  if (stream) _mm_sfence();
}
