// Kind ecq on AVX-512: what the encoder reads and measures of a tile, proto/FORMAT.md 3.10, steps 1
// to 3 and 5. Included by ecq_avx512.cpp inside its target region and namespace, after
// ecq_avx512.h, coded_avx512_writer.h and ecq_avx512_search.h.

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
// Blocks of a tile: pairs and the other channels fill blocks of their own.
constexpr uint32_t kTileBlocks = kTileChannels / 32 + 1;
constexpr uint32_t kBlockLines = 32;

// Tokens of a block of lines: its two vectors of each.
using BlockValues = float[kTileTokens][kBlockLines];

// What is known of a tile until its numbers are.
struct MeasuredTile {
  // Of each line. Behind them the rest of a block.
  alignas(64) float average[kTileChannels + kBlockLines];
  alignas(64) float energy[kTileChannels + kBlockLines];
  alignas(64) float largest[kTileChannels + kBlockLines];
  EcqGroups groups;
  alignas(64) BlockValues values[kTileBlocks];  // of channels
};

struct EncoderScratch {
  WrittenTile written[kInterleaved];
  TrellisPair pairs[kInterleaved / 2];
  // Of each line. Behind them the rest of a block.
  alignas(64) float factor[kTileChannels + kBlockLines];  // to 1/64 half steps
  alignas(64) float offset[kTileChannels + kBlockLines];
  alignas(64) float rotary[kEncoderRotarySlots][kRotaryFloats];
  union {
    MeasuredTile measured[2];
    alignas(64) Predecessors before[kMaxTileSteps];
    alignas(64) uint8_t stream[kInterleaved][kMaxStreamBytes + kWriterSlack];
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
  // In MeasuredTile.
  uint32_t first_plain_block() const { return (pairs() + 15) / 16; }
  const uint8_t* row(const Tile& tile) const {
    return rows.row(tile.head, tile.token) + tile.channel * 2;
  }

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

// The lines of a block: up to 32 channels that are not rotated. Its first vector (half 0) has the
// even ones, its second one the odd ones.
struct PlainLines {
  uint32_t line;
  uint32_t count;

  KVC_INLINE PlainLines(const Tile& tile, uint32_t channel)
      : line(channel), count(smaller_of(tile.channels - channel, 32)) {}

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

// Up to sixteen pairs: a vector of the first channels, and one of the second ones.
struct PairLines {
  uint32_t pairs;
  uint32_t pair;
  __mmask16 there;

  KVC_INLINE PairLines(uint32_t count, uint32_t first)
      : pairs(count), pair(first), there(first_lines(count - first)) {}

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

// Reads channels that are not rotated.
template <typename Element>
struct PlainBlock : PlainLines {
  struct Angles {};
  __mmask32 present;

  KVC_INLINE PlainBlock(const Tile& tile, uint32_t channel)
      : PlainLines(tile, channel), present(first_of(tile.channels - channel)) {}

  KVC_INLINE __m512i words(const uint8_t* row) const {
    return _mm512_maskz_loadu_epi16(present, row + line * 2);
  }

  KVC_INLINE Angles angles(uint32_t) const { return {}; }

  template <uint32_t kHalf>
  KVC_INLINE __m512 widen(__m512i words, const Angles&) const {
    return kHalf == 0 ? widen_even<Element>(words) : widen_odd<Element>(words);
  }
};

// Reads pairs and turns them back.
template <typename Element, bool kInterleavedPairs>
struct TurnedBlock : PairLines {
  // Of a token.
  struct Angles {
    __m512 cosine;
    __m512 sine;
  };
  const float* cosines;
  const float* sines;
  uint32_t padded;

  KVC_INLINE TurnedBlock(const kvc_rotary& rotary, const float* table, uint32_t first)
      : PairLines(rotary.size / 2, first), padded((pairs + 31) & ~31u) {
    cosines = table + first;
    sines = cosines + kTileTokens * padded;
  }

  KVC_INLINE __m512i words(const uint8_t* row) const {
    if (kInterleavedPairs)
      return _mm512_maskz_loadu_epi16(first_of(2 * (pairs - pair)), row + 4 * pair);
    const __m256i first = _mm256_maskz_loadu_epi16(there, row + 2 * pair);
    const __m256i second = _mm256_maskz_loadu_epi16(there, row + 2 * (pairs + pair));
    return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
  }

  KVC_INLINE Angles angles(uint32_t token) const {
    return {_mm512_loadu_ps(cosines + token * padded), _mm512_loadu_ps(sines + token * padded)};
  }

  // The first channels (half 0) or the second ones, as they are.
  template <uint32_t kHalf>
  KVC_INLINE __m512 widen_plain(__m512i both) const {
    if (kInterleavedPairs) return kHalf == 0 ? widen_even<Element>(both) : widen_odd<Element>(both);
    return widen_sixteen<Element>(kHalf == 0 ? _mm512_castsi512_si256(both)
                                             : _mm512_extracti64x4_epi64(both, 1));
  }

  template <uint32_t kHalf>
  static KVC_INLINE __m512 turn(__m512 a, __m512 b, const Angles& by) {
    if (kHalf == 0) return _mm512_add_ps(_mm512_mul_ps(a, by.cosine), _mm512_mul_ps(b, by.sine));
    return _mm512_sub_ps(_mm512_mul_ps(b, by.cosine), _mm512_mul_ps(a, by.sine));
  }

  template <uint32_t kHalf>
  KVC_INLINE __m512 widen(__m512i both, const Angles& by) const {
    return turn<kHalf>(widen_plain<0>(both), widen_plain<1>(both), by);
  }
};

// ---- statistics of channels

// Averages, energies, largest deviations and values of a block of the same channels of one or two
// tiles of the same tokens. Returns the largest magnitudes of their elements.
template <uint32_t kTiles, typename Block>
__m512i measure_block(MeasuredTile* measured, const VectorEncoder& encoder, const Tile* tiles,
                      const Block& block, uint32_t index) {
  constexpr uint32_t kVectors = 2 * kTiles;
  const uint32_t tokens = tiles[0].tokens;
  const int64_t stride = encoder.rows.token_stride;
  const uint8_t* row[kTiles];
  float* values[kTiles];
  for (uint32_t i = 0; i < kTiles; ++i) {
    row[i] = encoder.row(tiles[i]);
    values[i] = measured[i].values[index][0];
  }
  __m512 average[kVectors];
  for (__m512& vector : average) vector = _mm512_setzero_ps();
  __m512i magnitude = _mm512_setzero_si512();
  for (uint32_t t = 0; t < tokens; ++t) {
    const typename Block::Angles angles = block.angles(t);
    for (uint32_t i = 0; i < kTiles; ++i) {
      const __m512i words = block.words(row[i]);
      row[i] += stride;
      magnitude = _mm512_max_epu16(magnitude, magnitudes_of(words));
      const __m512 a = block.template widen<0>(words, angles);
      const __m512 b = block.template widen<1>(words, angles);
      _mm512_store_ps(values[i] + t * kBlockLines, a);
      _mm512_store_ps(values[i] + t * kBlockLines + 16, b);
      average[2 * i] = _mm512_add_ps(average[2 * i], a);
      average[2 * i + 1] = _mm512_add_ps(average[2 * i + 1], b);
    }
  }
  const __m512 count = _mm512_set1_ps(static_cast<float>(tokens));
  __m512 energy[kVectors];
  __m512 largest[kVectors];
  for (uint32_t i = 0; i < kVectors; ++i) {
    average[i] = _mm512_div_ps(average[i], count);
    energy[i] = largest[i] = _mm512_setzero_ps();
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t i = 0; i < kVectors; ++i) {
      const __m512 value = _mm512_load_ps(values[i / 2] + t * kBlockLines + 16 * (i % 2));
      const __m512 deviation = _mm512_sub_ps(value, average[i]);
      energy[i] = _mm512_add_ps(energy[i], _mm512_mul_ps(deviation, deviation));
      largest[i] = _mm512_max_ps(largest[i], _mm512_abs_ps(deviation));
    }
  }
  for (uint32_t i = 0; i < kTiles; ++i) {
    block.store(measured[i].average, average[2 * i], average[2 * i + 1]);
    block.store(measured[i].energy, energy[2 * i], energy[2 * i + 1]);
    block.store(measured[i].largest, largest[2 * i], largest[2 * i + 1]);
  }
  return magnitude;
}

template <typename Element, uint32_t kTiles, bool kInterleavedPairs>
__m512i measure_pairs(VectorEncoder& encoder, const Tile* tiles, MeasuredTile* measured) {
  const float* table = encoder.rotary_of(tiles[0]);
  __m512i magnitude = _mm512_setzero_si512();
  for (uint32_t i = 0; i < encoder.pairs(); i += 16) {
    const TurnedBlock<Element, kInterleavedPairs> block(*encoder.rotary, table, i);
    magnitude = _mm512_max_epu16(
        magnitude, measure_block<kTiles>(measured, encoder, tiles, block, i / 16));
  }
  return magnitude;
}

// ---- statistics of groups

// EcqGroups::measure() of sixteen groups.
KVC_INLINE __m512i exponents_of(__m512 energy, __m512i top, uint32_t elements) {
  const __m512 divisor = _mm512_set1_ps(static_cast<float>(elements));
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
  return _mm512_mask_max_epi32(e, _mm512_test_epi32_mask(top, top), e, floor);
}

// Magnitudes of floats, as integers.
KVC_INLINE __m512i absolute(__m512 v) { return _mm512_castps_si512(_mm512_abs_ps(v)); }

// Sixteen groups of one line each, or of two that lie `other` apart.
inline void measure_sixteen(MeasuredTile& tile, uint32_t group, uint32_t count, uint32_t line,
                            uint32_t other, uint32_t elements) {
  __m512 energy = _mm512_loadu_ps(tile.energy + line);
  __m512 largest = _mm512_loadu_ps(tile.largest + line);
  __m512i top = absolute(_mm512_loadu_ps(tile.average + line));
  if (other != 0) {
    energy = _mm512_add_ps(energy, _mm512_loadu_ps(tile.energy + line + other));
    largest = _mm512_max_ps(largest, _mm512_loadu_ps(tile.largest + line + other));
    top = _mm512_max_epi32(top, absolute(_mm512_loadu_ps(tile.average + line + other)));
  }
  const __m512i e = exponents_of(energy, top, other != 0 ? 2 * elements : elements);
  const __mmask16 there = first_lines(count);
  _mm512_mask_storeu_epi32(tile.groups.exponent + group, there, e);
  _mm512_mask_storeu_ps(tile.groups.largest + group, there, largest);
  _mm512_mask_storeu_epi32(tile.groups.top + group, there, top);
}

// Groups of a tile whose lines are measured: pairs first.
inline void measure_groups(const VectorEncoder& encoder, const Tile& tile,
                           MeasuredTile& measured) {
  const uint32_t elements = encoder.elements(tile);
  const uint32_t pairs = encoder.pairs();
  const uint32_t groups = encoder.groups(tile);
  for (uint32_t g = 0; g < pairs; g += 16)
    measure_sixteen(measured, g, pairs - g, g, pairs, elements);
  for (uint32_t g = pairs; g < groups; g += 16)
    measure_sixteen(measured, g, groups - g, g + pairs, 0, elements);
}

// One or two tiles of the same tokens.
template <typename Element, uint32_t kTiles>
__m512i measure_channels(VectorEncoder& encoder, const Tile* tiles, MeasuredTile* measured) {
  const uint32_t pairs = encoder.pairs();
  __m512i magnitude = _mm512_setzero_si512();
  if (pairs != 0) {
    magnitude = encoder.rotary->interleaved != 0
                    ? measure_pairs<Element, kTiles, true>(encoder, tiles, measured)
                    : measure_pairs<Element, kTiles, false>(encoder, tiles, measured);
  }
  uint32_t index = encoder.first_plain_block();
  for (uint32_t line = 2 * pairs; line < tiles[0].channels; line += 32, ++index) {
    const PlainBlock<Element> block(tiles[0], line);
    magnitude = _mm512_max_epu16(
        magnitude, measure_block<kTiles>(measured, encoder, tiles, block, index));
  }
  for (uint32_t i = 0; i < kTiles; ++i) measure_groups(encoder, tiles[i], measured[i]);
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

// kWhole: the channels fill vectors, and no mask is needed.
template <typename Element, bool kWhole>
__m512i measure_tokens(const VectorEncoder& encoder, const Tile& tile, MeasuredTile& measured) {
  const uint8_t* row = encoder.row(tile);
  __m512i magnitude = _mm512_setzero_si512();
  for (uint32_t first = 0; first < tile.tokens; first += 16) {
    __m512 sums[16];
    __m512 tops[16];
    for (uint32_t i = 0; i < 16; ++i) {
      __m512 sum = _mm512_setzero_ps();
      __m512i top = _mm512_setzero_si512();
      for (uint32_t c = 0; c < tile.channels; c += 32) {
        const __m512i words =
            kWhole ? _mm512_loadu_si512(row + c * 2)
                   : _mm512_maskz_loadu_epi16(first_of(tile.channels - c), row + c * 2);
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
    _mm512_store_ps(measured.energy + first, fold_sixteen<Sum>(sums));
    _mm512_store_ps(measured.largest + first, fold_sixteen<Largest>(tops));
    _mm512_store_ps(measured.average + first, _mm512_setzero_ps());
  }
  measure_groups(encoder, tile, measured);
  return magnitude;
}

// Whether tiles differ by their heads alone.
inline bool same_tokens(const Tile& a, const Tile& b) {
  return a.token == b.token && a.channel == b.channel && a.has_shape_of(b);
}

// Measures one or two tiles. False: a value outside the domain.
template <typename Element>
bool measure_tiles(VectorEncoder& encoder, const Tile* tiles, uint32_t count) {
  MeasuredTile* measured = encoder.scratch.measured;
  __m512i magnitude = _mm512_setzero_si512();
  if (encoder.codec.channel && count == 2 && same_tokens(tiles[0], tiles[1])) {
    magnitude = measure_channels<Element, 2>(encoder, tiles, measured);
  } else {
    for (uint32_t i = 0; i < count; ++i) {
      const __m512i largest =
          encoder.codec.channel ? measure_channels<Element, 1>(encoder, tiles + i, measured + i)
          : tiles[i].channels % 32 == 0
              ? measure_tokens<Element, true>(encoder, tiles[i], measured[i])
              : measure_tokens<Element, false>(encoder, tiles[i], measured[i]);
      magnitude = _mm512_max_epu16(magnitude, largest);
    }
  }
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
