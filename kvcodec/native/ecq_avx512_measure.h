// Kind ecq on AVX-512: what the encoder reads and measures of a tile, proto/FORMAT.md 3.10, steps 1
// to 4. Included by ecq_avx512.cpp inside its target region and namespace, after ecq_avx512.h,
// coded_avx512_writer.h and ecq_avx512_search.h.

// Two lines of 64 elements have four, one of 256 has eight.
constexpr uint32_t kGroupSteps = 8;

// What is kept of a tile until its stream is written.
struct WrittenTile {
  TileEntry entry;
  uint32_t step_count;
  bool shifted;  // some step has raw bits
  uint64_t steps[kMaxTileSteps + kGroupSteps];
  uint64_t side_steps[2 * kTileChannels / 32];
  alignas(64) int16_t scale[kTileChannels];
  alignas(64) int16_t mean[kTileChannels];  // of each channel, in half steps
};

constexpr uint32_t kEncoderRotarySlots = 2;
// Lines that are measured at a time, so that sums need not wait for each other.
constexpr uint32_t kMeasuredLines = 64;

struct MeasuredTile {
  alignas(64) float values[kTileTokens][kMeasuredLines];
  // Rows: strided ones fall on few sets of the first-level cache.
  alignas(64) uint16_t words[kTileElements + kTileTokens * 32 + 32];
};

struct EncoderScratch {
  WrittenTile written[kInterleaved];
  TrellisPair pairs[kInterleaved / 2];
  // Of each line. Behind them the rest of a block.
  alignas(64) float average[kTileChannels + kMeasuredLines];
  alignas(64) float energy[kTileChannels + kMeasuredLines];
  alignas(64) float largest[kTileChannels + kMeasuredLines];
  alignas(64) float factor[kTileChannels + kMeasuredLines];  // to 1/64 half steps
  alignas(64) float offset[kTileChannels + kMeasuredLines];
  EcqGroups groups;
  alignas(64) float rotary[kEncoderRotarySlots][kRotaryFloats];
  union {
    MeasuredTile measured;
    alignas(64) Predecessors before[kMaxTileSteps];
    alignas(64) uint8_t stream[kInterleaved][kMaxStreamBytes + 64];
  };
};
static_assert(sizeof(EncoderScratch) <= kCodedScratchBytes, "a worker's memory");

// The lines of a tile: channels or tokens. Of pairs, first the first channels and then the second
// ones.
struct VectorEncoder {
  const SectionCodec& codec;
  const Rows& rows;
  const kvc_rotary* rotary;  // while tiles are derotated, else nullptr
  EncoderScratch& scratch;
  uint32_t rotary_token[kEncoderRotarySlots];

  VectorEncoder(const SectionCodec& c, const Rows& r, uint8_t* memory)
      : codec(c), rows(r), rotary(nullptr), scratch(*reinterpret_cast<EncoderScratch*>(memory)) {
    for (uint32_t& token : rotary_token) token = ~0u;
  }

  uint32_t pairs() const { return rotary != nullptr ? rotary->size / 2 : 0; }
  uint32_t lines(const Tile& tile) const { return codec.channel ? tile.channels : tile.tokens; }
  uint32_t groups(const Tile& tile) const { return lines(tile) - pairs(); }
  uint32_t elements(const Tile& tile) const { return codec.channel ? tile.tokens : tile.channels; }

  // Cosines of the tokens of a tile, and kTileTokens * kPaddedPairs behind them the sines.
  const float* rotary_of(const Tile& tile) {
    const uint32_t slot = tile.token / kTileTokens % kEncoderRotarySlots;
    float* cosines = scratch.rotary[slot];
    if (rotary_token[slot] != tile.token) {
      rotary_token[slot] = tile.token;
      split_rotary(*rotary, tile, cosines);
    }
    return cosines;
  }
};

// ---- reading

// Whether a magnitude of an element lies outside the domain.
template <typename Element>
KVC_INLINE bool any_outside(__m512i largest) {
  const int outside = Element::kEvenOdd ? 0x4F00 : 0x7C00;
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<int16_t>(outside))) != 0;
}

KVC_INLINE __m512i magnitudes_of(__m512i words) {
  return _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF));
}

// Elements 2i or 2i + 1 of 32 elements.
template <typename Element>
KVC_INLINE __m512 widen_even(__m512i words) {
  if (Element::kEvenOdd) return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words));
}

template <typename Element>
KVC_INLINE __m512 widen_odd(__m512i words) {
  if (Element::kEvenOdd)
    return _mm512_castsi512_ps(_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), words));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)));
}

template <typename Element>
KVC_INLINE __m512 widen_sixteen(__m256i words) {
  if (!Element::kEvenOdd) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// 32 lines of floats in order, of the even ones and the odd ones.
KVC_INLINE void store_zipped(float* lines, __m512 even, __m512 odd) {
  const __m512i first =
      _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(lines, _mm512_permutex2var_ps(even, first, odd));
  _mm512_storeu_ps(lines + 16, _mm512_permutex2var_ps(even, second, odd));
}

KVC_INLINE __mmask16 first_lines(uint32_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xFFFF, smaller_of(count, 16)));
}

// Up to 32 channels that are not rotated: a vector of the even ones, and one of the odd ones.
template <typename Element>
struct PlainBlock {
  static constexpr bool kKeepsValues = false;  // while they are measured
  uint32_t line;
  uint32_t count;
  __mmask32 there;

  KVC_INLINE PlainBlock(const Tile& tile, uint32_t channel)
      : line(channel),
        count(smaller_of(tile.channels - channel, 32)),
        there(first_of(tile.channels - channel)) {}

  KVC_INLINE __m512i words(const uint8_t* row) const {
    return _mm512_maskz_loadu_epi16(there, row + line * 2);
  }

  KVC_INLINE void copy_words(uint8_t* row, __m512i words) const {
    _mm512_storeu_si512(row + line * 2, words);
  }

  // The even channels (half 0) or the odd ones, of a token of the tile.
  template <uint32_t kHalf>
  KVC_INLINE __m512 widen(__m512i words, uint32_t) const {
    return kHalf == 0 ? widen_even<Element>(words) : widen_odd<Element>(words);
  }

  KVC_INLINE void store(float* lines, __m512 a, __m512 b) const {
    store_zipped(lines + line, a, b);
  }

  template <uint32_t kHalf>
  KVC_INLINE __m512 load_lines(const float* lines) const {
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(_mm512_loadu_ps(lines + line),
                                  _mm512_add_epi32(even, _mm512_set1_epi32(kHalf)),
                                  _mm512_loadu_ps(lines + line + 16));
  }

  // Of number `i` of a half; or beyond all lines.
  template <uint32_t kHalf>
  KVC_INLINE uint32_t line_of(uint32_t i) const {
    return 2 * i + kHalf < count ? line + 2 * i + kHalf : kTileChannels;
  }
};

// Up to sixteen pairs, turned back.
template <typename Element, bool kInterleavedPairs>
struct TurnedBlock {
  static constexpr bool kKeepsValues = true;
  uint32_t pair;
  uint32_t pairs;
  __mmask16 there;
  const float* cosines;
  const float* sines;
  uint32_t padded;

  KVC_INLINE TurnedBlock(const kvc_rotary& rotary, const float* table, uint32_t first)
      : pair(first),
        pairs(rotary.size / 2),
        there(first_lines(pairs - first)),
        padded((pairs + 31) & ~31u) {
    cosines = table + first;
    sines = cosines + kTileTokens * padded;
  }

  // The first channels, and the second ones.
  KVC_INLINE __m512i words(const uint8_t* row) const {
    if (kInterleavedPairs)
      return _mm512_maskz_loadu_epi16(first_of(2 * (pairs - pair)), row + 4 * pair);
    const __m256i first = _mm256_maskz_loadu_epi16(there, row + 2 * pair);
    const __m256i second = _mm256_maskz_loadu_epi16(there, row + 2 * (pairs + pair));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }

  KVC_INLINE void copy_words(uint8_t* row, __m512i both) const {
    if (kInterleavedPairs)
      return _mm512_mask_storeu_epi16(row + 4 * pair, first_of(2 * (pairs - pair)), both);
    _mm256_mask_storeu_epi16(row + 2 * pair, there, _mm512_castsi512_si256(both));
    _mm256_mask_storeu_epi16(row + 2 * (pairs + pair), there, _mm512_extracti64x4_epi64(both, 1));
  }

  // The first channels (half 0) or the second ones of a token of the tile.
  template <uint32_t kHalf>
  KVC_INLINE __m512 widen(__m512i both, uint32_t token) const {
    const __m512 a = kInterleavedPairs ? widen_even<Element>(both)
                                       : widen_sixteen<Element>(_mm512_castsi512_si256(both));
    const __m512 b = kInterleavedPairs
                         ? widen_odd<Element>(both)
                         : widen_sixteen<Element>(_mm512_extracti64x4_epi64(both, 1));
    const __m512 cosine = _mm512_loadu_ps(cosines + token * padded);
    const __m512 sine = _mm512_loadu_ps(sines + token * padded);
    if (kHalf == 0) return _mm512_add_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
    return _mm512_sub_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
  }

  KVC_INLINE void store(float* lines, __m512 x, __m512 y) const {
    _mm512_mask_storeu_ps(lines + pair, there, x);
    _mm512_mask_storeu_ps(lines + pairs + pair, there, y);
  }

  template <uint32_t kHalf>
  KVC_INLINE __m512 load_lines(const float* lines) const {
    return _mm512_loadu_ps(lines + pair + kHalf * pairs);
  }

  template <uint32_t kHalf>
  KVC_INLINE uint32_t line_of(uint32_t i) const {
    return pair + i < pairs ? pair + i + kHalf * pairs : kTileChannels;
  }
};

// ---- statistics of channels

// Bytes of a copied row. Behind its channels is room for the rest of a block.
inline int64_t copied_row_bytes(const Tile& tile) {
  return static_cast<int64_t>(((tile.channels + 31) & ~31u) + 32) * 2;
}

// Every so many tokens of a tile.
struct TakenTokens {
  const uint8_t* row;  // channel 0 of the first one
  int64_t stride;
  uint32_t count;
  uint32_t step;
  int64_t copied_bytes;  // of a row in MeasuredTile

  TakenTokens(const VectorEncoder& encoder, const Tile& tile, uint32_t every)
      : row(encoder.rows.row(tile.head, tile.token) + tile.channel * 2),
        stride(encoder.rows.token_stride * every),
        count(tile.tokens / every),
        step(every),
        copied_bytes(copied_row_bytes(tile)) {}
};

// Averages, energies and largest deviations of the lines of one or two blocks, which it copies.
// Returns the largest magnitudes of their elements.
template <uint32_t kBlocks, typename Block>
__m512i measure_blocks(EncoderScratch& scratch, const TakenTokens& tokens, const Block* blocks) {
  constexpr uint32_t kVectors = 2 * kBlocks;
  __m512 average[kVectors];
  for (__m512& vector : average) vector = _mm512_setzero_ps();
  __m512i magnitude = _mm512_setzero_si512();
  const uint8_t* row = tokens.row;
  uint8_t* copy = reinterpret_cast<uint8_t*>(scratch.measured.words);
  for (uint32_t t = 0; t < tokens.count; ++t, row += tokens.stride, copy += tokens.copied_bytes) {
    for (uint32_t i = 0; i < kVectors; i += 2) {
      const Block& block = blocks[i / 2];
      const __m512i words = block.words(row);
      block.copy_words(copy, words);
      magnitude = _mm512_max_epu16(magnitude, magnitudes_of(words));
      const __m512 a = block.template widen<0>(words, t * tokens.step);
      const __m512 b = block.template widen<1>(words, t * tokens.step);
      if (Block::kKeepsValues) {
        _mm512_store_ps(scratch.measured.values[t] + 16 * i, a);
        _mm512_store_ps(scratch.measured.values[t] + 16 * i + 16, b);
      }
      average[i] = _mm512_add_ps(average[i], a);
      average[i + 1] = _mm512_add_ps(average[i + 1], b);
    }
  }
  const __m512 count = _mm512_set1_ps(static_cast<float>(tokens.count));
  __m512 energy[kVectors];
  __m512 largest[kVectors];
  for (uint32_t i = 0; i < kVectors; ++i) {
    average[i] = _mm512_div_ps(average[i], count);
    energy[i] = largest[i] = _mm512_setzero_ps();
  }
  copy = reinterpret_cast<uint8_t*>(scratch.measured.words);
  for (uint32_t t = 0; t < tokens.count; ++t, copy += tokens.copied_bytes) {
    for (uint32_t i = 0; i < kVectors; ++i) {
      const Block& block = blocks[i / 2];
      const __m512 value =
          Block::kKeepsValues ? _mm512_load_ps(scratch.measured.values[t] + 16 * i)
          : i % 2 == 0        ? block.template widen<0>(block.words(copy), t)
                              : block.template widen<1>(block.words(copy), t);
      const __m512 deviation = _mm512_sub_ps(value, average[i]);
      energy[i] = _mm512_add_ps(energy[i], _mm512_mul_ps(deviation, deviation));
      largest[i] = _mm512_max_ps(largest[i], _mm512_abs_ps(deviation));
    }
  }
  for (uint32_t i = 0; i < kVectors; i += 2) {
    blocks[i / 2].store(scratch.average, average[i], average[i + 1]);
    blocks[i / 2].store(scratch.energy, energy[i], energy[i + 1]);
    blocks[i / 2].store(scratch.largest, largest[i], largest[i + 1]);
  }
  return magnitude;
}

template <typename Element, bool kInterleavedPairs>
__m512i measure_pairs(VectorEncoder& encoder, const Tile& tile, const TakenTokens& tokens) {
  using Block = TurnedBlock<Element, kInterleavedPairs>;
  const kvc_rotary& rotary = *encoder.rotary;
  const float* table = encoder.rotary_of(tile);
  const uint32_t pairs = encoder.pairs();
  __m512i magnitude = _mm512_setzero_si512();
  uint32_t i = 0;
  for (; i + 16 < pairs; i += 32) {
    const Block blocks[2] = {Block(rotary, table, i), Block(rotary, table, i + 16)};
    magnitude =
        _mm512_max_epu16(magnitude, measure_blocks<2>(encoder.scratch, tokens, blocks));
  }
  if (i < pairs) {
    const Block block(rotary, table, i);
    magnitude =
        _mm512_max_epu16(magnitude, measure_blocks<1>(encoder.scratch, tokens, &block));
  }
  return magnitude;
}

// Channels from `line` on, which are not rotated.
template <typename Element>
__m512i measure_plain(EncoderScratch& scratch, const Tile& tile, const TakenTokens& tokens,
                      uint32_t line) {
  using Block = PlainBlock<Element>;
  __m512i magnitude = _mm512_setzero_si512();
  for (; line + 32 < tile.channels; line += 64) {
    const Block blocks[2] = {Block(tile, line), Block(tile, line + 32)};
    magnitude = _mm512_max_epu16(magnitude, measure_blocks<2>(scratch, tokens, blocks));
  }
  if (line < tile.channels) {
    const Block block(tile, line);
    magnitude = _mm512_max_epu16(magnitude, measure_blocks<1>(scratch, tokens, &block));
  }
  return magnitude;
}

// ---- statistics of groups

// Sixteen groups of one line each, or of two that lie `other` apart.
inline void measure_sixteen(EncoderScratch& scratch, uint32_t group, uint32_t count, uint32_t line,
                            uint32_t other, uint32_t elements) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512 energy = _mm512_loadu_ps(scratch.energy + line);
  __m512 largest = _mm512_loadu_ps(scratch.largest + line);
  __m512i top = _mm512_and_si512(_mm512_loadu_si512(scratch.average + line), magnitude);
  if (other != 0) {
    energy = _mm512_add_ps(energy, _mm512_loadu_ps(scratch.energy + line + other));
    largest = _mm512_max_ps(largest, _mm512_loadu_ps(scratch.largest + line + other));
    top = _mm512_max_epi32(
        top,
        _mm512_and_si512(_mm512_loadu_si512(scratch.average + line + other), magnitude));
  }
  const __m512 divisor = _mm512_set1_ps(static_cast<float>(other != 0 ? 2 * elements : elements));
  const __m512i square = _mm512_castps_si512(_mm512_div_ps(energy, divisor));
  const __m512i mantissa = _mm512_and_si512(square, _mm512_set1_epi32(0x7FFFFF));
  const __m512i biased = _mm512_srli_epi32(square, 23);
  const __m512i one = _mm512_set1_epi32(1);
  __m512i e = _mm512_sub_epi32(_mm512_add_epi32(biased, biased), _mm512_set1_epi32(254));
  e = _mm512_mask_add_epi32(
      e, _mm512_cmpge_epi32_mask(mantissa, _mm512_set1_epi32(0x1837F0)), e, one);
  e = _mm512_mask_add_epi32(
      e, _mm512_cmpge_epi32_mask(mantissa, _mm512_set1_epi32(0x5744FD)), e, one);
  e = _mm512_mask_mov_epi32(e, _mm512_testn_epi32_mask(biased, biased),
                            _mm512_set1_epi32(kNoEnergy));
  const __m512i floor = _mm512_sub_epi32(_mm512_slli_epi32(_mm512_srli_epi32(top, 23), 2),
                                         _mm512_set1_epi32(4 * 127 + 32));
  e = _mm512_mask_max_epi32(e, _mm512_test_epi32_mask(top, top), e, floor);
  const __mmask16 there = first_lines(count);
  EcqGroups& groups = scratch.groups;
  _mm512_mask_storeu_epi32(groups.exponent + group, there, e);
  _mm512_mask_storeu_ps(groups.largest + group, there, largest);
  _mm512_mask_storeu_epi32(groups.top + group, there, top);
}

// Groups of `elements` to a line: pairs first.
inline void measure_groups(const VectorEncoder& encoder, const Tile& tile, uint32_t elements) {
  EncoderScratch& scratch = encoder.scratch;
  const uint32_t pairs = encoder.pairs();
  const uint32_t groups = encoder.groups(tile);
  for (uint32_t g = 0; g < pairs; g += 16)
    measure_sixteen(scratch, g, pairs - g, g, pairs, elements);
  for (uint32_t g = pairs; g < groups; g += 16)
    measure_sixteen(scratch, g, groups - g, g + pairs, 0, elements);
}

template <typename Element>
__m512i measure_channels(VectorEncoder& encoder, const Tile& tile, uint32_t every) {
  const TakenTokens tokens(encoder, tile, every);
  const uint32_t pairs = encoder.pairs();
  __m512i magnitude = measure_plain<Element>(encoder.scratch, tile, tokens, 2 * pairs);
  if (pairs != 0) {
    magnitude = _mm512_max_epu16(
        magnitude, encoder.rotary->interleaved != 0
                       ? measure_pairs<Element, true>(encoder, tile, tokens)
                       : measure_pairs<Element, false>(encoder, tile, tokens));
  }
  measure_groups(encoder, tile, tokens.count);
  return magnitude;
}

// ---- statistics of tokens

struct Sum {
  static KVC_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
};

struct Largest {
  static KVC_INLINE __m512 of(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
};

// Of each of sixteen vectors, all elements: i + 8 with i, then i + 4, i + 2 and i + 1.
template <typename Operation>
KVC_INLINE __m512 fold_sixteen(const __m512* v) {
  __m512 eight[8];
  for (int i = 0; i < 8; ++i) {
    eight[i] = Operation::of(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                             _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
  }
  __m512 four[4];
  for (int i = 0; i < 4; ++i) {
    four[i] = Operation::of(_mm512_shuffle_f32x4(eight[i], eight[i + 4], 0x88),
                            _mm512_shuffle_f32x4(eight[i], eight[i + 4], 0xDD));
  }
  __m512 two[2];
  for (int i = 0; i < 2; ++i) {
    two[i] = Operation::of(_mm512_shuffle_ps(four[i], four[i + 2], 0x44),
                           _mm512_shuffle_ps(four[i], four[i + 2], 0xEE));
  }
  const __m512 folded = Operation::of(_mm512_shuffle_ps(two[0], two[1], 0x88),
                                      _mm512_shuffle_ps(two[0], two[1], 0xDD));
  const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
  return _mm512_permutexvar_ps(order, folded);
}

template <typename Element>
__m512i measure_tokens(VectorEncoder& encoder, const Tile& tile) {
  EncoderScratch& scratch = encoder.scratch;
  const uint8_t* row = encoder.rows.row(tile.head, tile.token) + tile.channel * 2;
  __m512i magnitude = _mm512_setzero_si512();
  for (uint32_t first = 0; first < tile.tokens; first += 16) {
    __m512 sums[16];
    __m512 tops[16];
    for (uint32_t i = 0; i < 16; ++i) {
      __m512 sum = _mm512_setzero_ps();
      __m512i top = _mm512_setzero_si512();
      for (uint32_t c = 0; c < tile.channels; c += 32) {
        const __m512i words = _mm512_maskz_loadu_epi16(first_of(tile.channels - c), row + c * 2);
        const __m512 even = widen_even<Element>(words);
        const __m512 odd = widen_odd<Element>(words);
        sum = _mm512_add_ps(sum, _mm512_mul_ps(even, even));
        sum = _mm512_add_ps(sum, _mm512_mul_ps(odd, odd));
        top = _mm512_max_epu16(top, magnitudes_of(words));
      }
      magnitude = _mm512_max_epu16(magnitude, top);
      sums[i] = sum;
      tops[i] = _mm512_max_ps(widen_even<Element>(top), widen_odd<Element>(top));
      // The last token stands in for those that are not there.
      if (first + i + 1 < tile.tokens) row += encoder.rows.token_stride;
    }
    _mm512_store_ps(scratch.energy + first, fold_sixteen<Sum>(sums));
    _mm512_store_ps(scratch.largest + first, fold_sixteen<Largest>(tops));
    _mm512_store_ps(scratch.average + first, _mm512_setzero_ps());
  }
  measure_groups(encoder, tile, tile.channels);
  return magnitude;
}

// Measures a tile. False: a value outside the domain.
template <typename Element>
bool measure_tile(VectorEncoder& encoder, const Tile& tile) {
  const __m512i magnitude = encoder.codec.channel ? measure_channels<Element>(encoder, tile, 1)
                                                  : measure_tokens<Element>(encoder, tile);
  return !any_outside<Element>(magnitude);
}

// ---- all groups of a tile

// Sixteen groups from `group` on, of which some are not empty.
struct SixteenGroups {
  __m512i exponent;
  __m512i weight;  // sequences; 0: an empty group
  __mmask16 full;

  KVC_INLINE SixteenGroups(const EcqGroups& groups, uint32_t group, uint32_t count,
                           uint32_t pairs) {
    const __mmask16 there = first_lines(count - group);
    exponent = _mm512_maskz_loadu_epi32(there, groups.exponent + group);
    const __m512i largest = _mm512_maskz_loadu_epi32(there, groups.largest + group);
    const __m512i top = _mm512_maskz_loadu_epi32(there, groups.top + group);
    const __m512i any = _mm512_or_si512(largest, top);
    full = _mm512_test_epi32_mask(any, any);
    const __m512i numbers = _mm512_add_epi32(
        _mm512_set1_epi32(static_cast<int>(group)),
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    weight = _mm512_set1_epi32(1);
    weight = _mm512_mask_add_epi32(
        weight, _mm512_cmplt_epi32_mask(numbers, _mm512_set1_epi32(static_cast<int>(pairs))),
        weight, weight);
    weight = _mm512_maskz_mov_epi32(there, weight);
  }
};

// EcqGroups::cost().
inline int64_t cost_of(const EcqGroups& groups, uint32_t count, uint32_t pairs) {
  __m512i sum = _mm512_setzero_si512();
  for (uint32_t g = 0; g < count; g += 16) {
    const SixteenGroups some(groups, g, count, pairs);
    const __m512i exponent =
        _mm512_mask_mov_epi32(_mm512_set1_epi32(kNoEnergy), some.full, some.exponent);
    sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(exponent, some.weight));
  }
  return _mm512_reduce_add_epi32(sum);
}

// EcqGroups::reference().
inline int32_t reference_of(const EcqGroups& groups, uint32_t count, uint32_t pairs) {
  __m512i largest = _mm512_set1_epi32(-10000);  // less than any
  for (uint32_t g = 0; g < count; g += 16) {
    const SixteenGroups some(groups, g, count, pairs);
    largest = _mm512_mask_max_epi32(largest, some.full, largest, some.exponent);
  }
  const __m512i floor = _mm512_set1_epi32(_mm512_reduce_max_epi32(largest) - 48);
  __m512i sum = _mm512_setzero_si512();
  __m512i weights = sum;
  for (uint32_t g = 0; g < count; g += 16) {
    const SixteenGroups some(groups, g, count, pairs);
    const __m512i weight = _mm512_maskz_mov_epi32(some.full, some.weight);
    weights = _mm512_add_epi32(weights, weight);
    sum = _mm512_add_epi32(
        sum, _mm512_mullo_epi32(_mm512_max_epi32(some.exponent, floor), weight));
  }
  return EcqGroups::mean_exponent(_mm512_reduce_add_epi32(sum), _mm512_reduce_add_epi32(weights));
}

// Whether the groups of a section are narrower without the rotation.
template <typename Element>
bool choose_derotation(VectorEncoder& encoder, const kvc_rotary* rotary) {
  const EcqGroups& groups = encoder.scratch.groups;
  int64_t gain = 0;
  for (TileWalk walk(encoder.rows); !walk.ended(); walk.advance()) {
    const Tile& tile = walk.tile();
    const uint32_t every = derotation_step(tile);
    encoder.rotary = nullptr;
    measure_channels<Element>(encoder, tile, every);
    gain += 4 * cost_of(groups, encoder.groups(tile), 0) + tile.channels;
    encoder.rotary = rotary;
    measure_channels<Element>(encoder, tile, every);
    gain -= 4 * cost_of(groups, encoder.groups(tile), encoder.pairs());
  }
  return gain > 0;
}
