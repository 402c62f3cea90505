// Kind ecq on AVX-512: encoding. Included by ecq_avx512.cpp inside its target region and namespace,
// after ecq_avx512.h and ecq_avx512_search.h.

struct WriterTables {
  WriterTable table[kResidualTableCount];
};

constexpr WriterTables writer_tables() {
  WriterTables result{};
  for (uint32_t i = 0; i < kResidualTableCount; ++i)
    result.table[i] = writer_table(kResidualTables[i]);
  return result;
}

constexpr bool writer_tables_fit() {
  for (uint32_t i = 0; i < kResidualTableCount; ++i) {
    if (!fits_writer_table(kResidualTables[i])) return false;
  }
  return true;
}

static_assert(writer_tables_fit(), "fewer than 32 symbols");
constexpr WriterTables kWriterTables = writer_tables();

constexpr uint32_t kFamilyStep = 17;

// What is kept of a tile until its stream is written.
struct WrittenTile {
  TileEntry entry;
  uint32_t step_count;
  uint64_t steps[kMaxTileSteps];
  uint64_t side_steps[2 * kTileChannels / 32];
  alignas(64) int16_t scale[kTileChannels];
  alignas(64) int16_t mean[kTileChannels];  // of each channel, in half steps
  alignas(64) int8_t k[kMaxTileSteps * 32];
};

// A tile while it is searched.
struct SearchedTile {
  alignas(64) uint16_t rows[kTileElements];
  // Token by token, a multiple of 32 channels each.
  alignas(64) float values[kTileElements + 64];
  TrellisSteps trellis;
};

constexpr uint32_t kEncoderRotarySlots = 2;

struct EncoderScratch {
  WrittenTile written[kInterleaved];
  // Of each channel or token.
  alignas(64) float average[kTileChannels + 16];
  alignas(64) float energy[kTileChannels + 16];
  alignas(64) float largest[kTileChannels + 16];
  alignas(64) float inverse[kTileChannels];
  alignas(64) float subtracted[kTileChannels];
  EcqGroups groups;
  alignas(64) float rotary[kEncoderRotarySlots][kRotaryFloats];
  union {
    SearchedTile searched;
    uint8_t stream[kInterleaved][kMaxStreamBytes + 64];
  };
};
static_assert(sizeof(EncoderScratch) <= kCodedScratchBytes, "a worker's memory");

struct VectorEncoder {
  const SectionCodec& codec;
  const Rows& rows;
  const kvc_rotary* rotary;  // while tiles are derotated, else nullptr
  EncoderScratch& scratch;
  EcqOrder order{};
  const kvc_rotary* order_rotary = nullptr;  // that `order` is for
  uint32_t rotary_token[kEncoderRotarySlots];
  NextRows next;  // of the tile after this one

  VectorEncoder(const SectionCodec& c, const Rows& r, uint8_t* memory)
      : codec(c), rows(r), rotary(nullptr), scratch(*reinterpret_cast<EncoderScratch*>(memory)) {
    for (uint32_t& token : rotary_token) token = ~0u;
  }

  // `walk` is at the current tile.
  void look_ahead(TileWalk walk) {
    next = {};
    walk.advance();
    if (walk.ended()) return;
    const Tile& tile = walk.tile();
    next.row = rows.row(tile.head, tile.token) + tile.channel * 2;
    next.stride = rows.token_stride;
    next.rows = tile.tokens;
    next.row_bytes = tile.channels * 2;
  }

  uint32_t pairs() const { return rotary != nullptr ? rotary->size / 2 : 0; }
  uint32_t lines(const Tile& tile) const { return codec.channel ? tile.channels : tile.tokens; }

  void arrange(const Tile& tile) {
    if (order.count == lines(tile) && order_rotary == rotary) return;
    order.arrange(lines(tile), rotary);
    order_rotary = rotary;
  }
};

KVC_INLINE uint32_t padded_channels(const Tile& tile) { return (tile.channels + 31) & ~31u; }

// ---- reading

// Copies the rows of a tile, channels padded with zeros: strided rows fall on few cache sets. The
// first channels of interleaved pairs are put before the second ones. False: a value outside the
// domain.
template <typename Element>
bool copy_rows(VectorEncoder& encoder, const Tile& tile) {
  const uint32_t padded = padded_channels(tile);
  const uint8_t* row = encoder.rows.row(tile.head, tile.token) + tile.channel * 2;
  uint16_t* copy = encoder.scratch.searched.rows;
  __m512i largest = _mm512_setzero_si512();
  for (uint32_t t = 0; t < tile.tokens; ++t, row += encoder.rows.token_stride, copy += padded) {
    for (uint32_t c = 0; c < padded; c += 32) {
      const __m512i words = _mm512_maskz_loadu_epi16(first_of(tile.channels - c), row + c * 2);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(words, _mm512_set1_epi16(0x7FFF)));
      _mm512_store_si512(copy + c, words);
    }
  }
  const int outside = Element::kEvenOdd ? 0x4F00 : 0x7C00;
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(static_cast<int16_t>(outside))) == 0;
}

template <typename Element>
KVC_INLINE __m512 widen_words(__m256i words) {
  if (!Element::kEvenOdd) return _mm512_cvtph_ps(words);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// 16 elements from `words` on.
template <typename Element>
KVC_INLINE __m512 load_values(const uint16_t* words) {
  return widen_words<Element>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
}

// Elements 2i + odd of 32 elements.
template <typename Element>
KVC_INLINE __m512 load_every_other(const uint16_t* words, int odd) {
  const __m512i both = _mm512_loadu_si512(words);
  if (!Element::kEvenOdd)
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd ? _mm512_srli_epi32(both, 16) : both));
  return _mm512_castsi512_ps(
      odd ? _mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), both) : _mm512_slli_epi32(both, 16));
}

// Sixteen pairs from pair `i` on of a row of `words`.
template <typename Element>
KVC_INLINE void load_pairs(const kvc_rotary& rotary, const uint16_t* words, uint32_t i, __m512* a,
                           __m512* b) {
  if (rotary.interleaved != 0) {
    *a = load_every_other<Element>(words + 2 * i, 0);
    *b = load_every_other<Element>(words + 2 * i, 1);
  } else {
    *a = load_values<Element>(words + i);
    *b = load_values<Element>(words + rotary.size / 2 + i);
  }
}

// ---- statistics of channels

// Sums of 16 channels, of which `mean` is made.
struct ChannelSums {
  __m512 sum;
  __m512 energy;
  __m512 largest;

  KVC_INLINE ChannelSums()
      : sum(_mm512_setzero_ps()), energy(_mm512_setzero_ps()), largest(_mm512_setzero_ps()) {}
  KVC_INLINE void add(__m512 v) { sum = _mm512_add_ps(sum, v); }
  KVC_INLINE void divide(float tokens) { sum = _mm512_div_ps(sum, _mm512_set1_ps(tokens)); }
  KVC_INLINE void add_deviation(__m512 v) {
    const __m512 deviation = _mm512_sub_ps(v, sum);
    energy = _mm512_add_ps(energy, _mm512_mul_ps(deviation, deviation));
    largest = _mm512_max_ps(largest, _mm512_abs_ps(deviation));
  }
  void store(EncoderScratch& scratch, uint32_t channel, uint32_t count) const {
    const __mmask16 there = static_cast<__mmask16>(_bzhi_u32(0xFFFF, smaller_of(count, 16)));
    _mm512_mask_storeu_ps(scratch.average + channel, there, sum);
    _mm512_mask_storeu_ps(scratch.energy + channel, there, energy);
    _mm512_mask_storeu_ps(scratch.largest + channel, there, largest);
  }
};

// Channels that are not rotated, 32 at a time; their values are kept.
template <typename Element>
void measure_plain_channels(VectorEncoder& encoder, const Tile& tile, uint32_t first) {
  SearchedTile& work = encoder.scratch.searched;
  const uint32_t padded = padded_channels(tile);
  const float tokens = static_cast<float>(tile.tokens);
  for (uint32_t c = first; c < tile.channels; c += 32) {
    const uint16_t* words = work.rows + c;
    float* values = work.values + c;
    const __mmask32 there = first_of(tile.channels - c);
    ChannelSums low;
    ChannelSums high;
    for (uint32_t t = 0; t < tile.tokens; ++t, words += padded, values += padded) {
      const __m512 v = load_values<Element>(words);
      const __m512 w = load_values<Element>(words + 16);
      _mm512_mask_storeu_ps(values, static_cast<__mmask16>(there), v);
      _mm512_mask_storeu_ps(values + 16, static_cast<__mmask16>(there >> 16), w);
      low.add(v);
      high.add(w);
    }
    low.divide(tokens);
    high.divide(tokens);
    values = work.values + c;
    for (uint32_t t = 0; t < tile.tokens; ++t, values += padded) {
      low.add_deviation(_mm512_loadu_ps(values));
      high.add_deviation(_mm512_loadu_ps(values + 16));
    }
    low.store(encoder.scratch, c, tile.channels - c);
    if (c + 16 < tile.channels) high.store(encoder.scratch, c + 16, tile.channels - c - 16);
  }
}

// Pairs, 16 at a time, turned back; in `values` the first channels lie before the second ones.
template <typename Element>
void measure_pairs(VectorEncoder& encoder, const Tile& tile, const float* cosines) {
  SearchedTile& work = encoder.scratch.searched;
  const kvc_rotary& rotary = *encoder.rotary;
  const uint32_t padded = padded_channels(tile);
  const uint32_t pairs = rotary.size / 2;
  const uint32_t rotary_padded = (pairs + 31) & ~31u;
  const float* sines = cosines + kTileTokens * rotary_padded;
  const float tokens = static_cast<float>(tile.tokens);
  for (uint32_t i = 0; i < pairs; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(_bzhi_u32(0xFFFF, smaller_of(pairs - i, 16)));
    ChannelSums first;
    ChannelSums second;
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      encoder.next.fetch();
      __m512 a;
      __m512 b;
      load_pairs<Element>(rotary, work.rows + t * padded, i, &a, &b);
      const __m512 cosine = _mm512_load_ps(cosines + t * rotary_padded + i);
      const __m512 sine = _mm512_load_ps(sines + t * rotary_padded + i);
      const __m512 x = _mm512_add_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
      const __m512 y = _mm512_sub_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
      _mm512_mask_storeu_ps(work.values + t * padded + i, there, x);
      _mm512_mask_storeu_ps(work.values + t * padded + pairs + i, there, y);
      first.add(x);
      second.add(y);
    }
    first.divide(tokens);
    second.divide(tokens);
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      first.add_deviation(_mm512_loadu_ps(work.values + t * padded + i));
      second.add_deviation(_mm512_loadu_ps(work.values + t * padded + pairs + i));
    }
    first.store(encoder.scratch, i, pairs - i);
    second.store(encoder.scratch, pairs + i, pairs - i);
  }
}

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
  const __mmask16 there = static_cast<__mmask16>(_bzhi_u32(0xFFFF, smaller_of(count, 16)));
  EcqGroups& groups = scratch.groups;
  _mm512_mask_storeu_epi32(groups.exponent + group, there, e);
  _mm512_mask_storeu_ps(groups.largest + group, there, largest);
  _mm512_mask_storeu_epi32(groups.top + group, there, top);
}

// Groups of channels: pairs first.
inline void measure_groups(VectorEncoder& encoder, const Tile& tile) {
  EncoderScratch& scratch = encoder.scratch;
  const uint32_t pairs = encoder.pairs();
  const uint32_t groups = encoder.order.groups;
  const uint32_t elements = encoder.codec.channel ? tile.tokens : tile.channels;
  for (uint32_t g = 0; g < pairs; g += 16)
    measure_sixteen(scratch, g, pairs - g, g, pairs, elements);
  for (uint32_t g = pairs; g < groups; g += 16)
    measure_sixteen(scratch, g, groups - g, g + pairs, 0, elements);
  memset(scratch.groups.sequences, 2, pairs);
  memset(scratch.groups.sequences + pairs, 1, groups - pairs);
}

template <typename Element>
void measure_channels(VectorEncoder& encoder, const Tile& tile) {
  const uint32_t pairs = encoder.pairs();
  if (pairs != 0) {
    const uint32_t slot = tile.token / kTileTokens % kEncoderRotarySlots;
    float* cosines = encoder.scratch.rotary[slot];
    if (encoder.rotary_token[slot] != tile.token) {
      encoder.rotary_token[slot] = tile.token;
      split_rotary(*encoder.rotary, tile, cosines);
    }
    measure_pairs<Element>(encoder, tile, cosines);
  }
  measure_plain_channels<Element>(encoder, tile, 2 * pairs);
  measure_groups(encoder, tile);
}

// ---- statistics of tokens

template <typename Element>
void measure_tokens(VectorEncoder& encoder, const Tile& tile) {
  EncoderScratch& scratch = encoder.scratch;
  const uint32_t padded = padded_channels(tile);
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    const uint16_t* words = scratch.searched.rows + t * padded;
    float* values = scratch.searched.values + t * padded;
    __m512 sum = _mm512_setzero_ps();
    __m512 largest = _mm512_setzero_ps();
    for (uint32_t c = 0; c < padded; c += 16) {
      const __m512 v = load_values<Element>(words + c);
      _mm512_store_ps(values + c, v);
      sum = _mm512_add_ps(sum, _mm512_mul_ps(v, v));
      largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    }
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    scratch.energy[t] = _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    scratch.largest[t] = _mm512_reduce_max_ps(largest);
    scratch.average[t] = 0;
  }
  measure_groups(encoder, tile);
}

// Loads a tile and measures it. False: a value outside the domain.
template <typename Element>
bool take_tile(VectorEncoder& encoder, const Tile& tile) {
  encoder.arrange(tile);
  if (!copy_rows<Element>(encoder, tile)) return false;
  encoder.codec.channel ? measure_channels<Element>(encoder, tile)
                        : measure_tokens<Element>(encoder, tile);
  return true;
}

// ---- quantizing

struct ChosenScales {
  __m512i scale;
  __m512 inverse;
  __m512i coding;  // offset of the table of family 0, shift << 24
  __m512i path;
};

// Sixteen groups: EcqGroups::scale(), and what follows from it.
KVC_INLINE ChosenScales choose_sixteen(const EcqGroups& groups, uint32_t group, uint32_t count,
                                       const EcqScale& steps) {
  const __mmask16 there = static_cast<__mmask16>(_bzhi_u32(0xFFFF, smaller_of(count, 16)));
  const __m512 largest = _mm512_maskz_loadu_ps(there, groups.largest + group);
  const __m512 top = _mm512_maskz_loadu_ps(there, groups.top + group);
  const __mmask16 empty = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_EQ_OQ) &
                          _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_EQ_OQ);
  const __m512i r = _mm512_set1_epi32(steps.reference);
  const __m512i e = _mm512_max_epi32(_mm512_maskz_loadu_epi32(there, groups.exponent + group),
                                     _mm512_sub_epi32(r, _mm512_set1_epi32(126)));
  const __m512 sixteenths = _mm512_loadu_ps(kSixteenths);
  ChosenScales chosen;
  chosen.scale = _mm512_mask_mov_epi32(_mm512_sub_epi32(r, e), empty,
                                       _mm512_set1_epi32(kEmptyGroup));
  __m512i t;
  for (;;) {
    const __m512i weighed =
        _mm512_mullo_epi32(chosen.scale, _mm512_set1_epi32(steps.weight));
    t = _mm512_min_epi32(
        _mm512_sub_epi32(_mm512_set1_epi32(-steps.nominal), weighed), _mm512_set1_epi32(62));
    const __m512i d =
        _mm512_sub_epi32(_mm512_slli_epi32(_mm512_sub_epi32(r, chosen.scale), 2), t);
    const __m512i i = _mm512_sub_epi32(_mm512_set1_epi32(16), d);
    const __m512i octaves = _mm512_slli_epi32(_mm512_srai_epi32(i, 4), 23);
    chosen.inverse = _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(_mm512_permutexvar_ps(i, sixteenths)), octaves));
    const __mmask16 fails =
        _mm512_cmp_ps_mask(_mm512_mul_ps(largest, chosen.inverse),
                           _mm512_set1_ps(kLargestDeviation), _CMP_NLE_UQ) |
        _mm512_cmp_ps_mask(_mm512_mul_ps(top, chosen.inverse), _mm512_set1_ps(kLargestMean),
                           _CMP_NLE_UQ);
    const __mmask16 coarser = fails & static_cast<__mmask16>(~empty);
    if (coarser == 0) break;
    chosen.scale =
        _mm512_mask_sub_epi32(chosen.scale, coarser, chosen.scale, _mm512_set1_epi32(1));
  }
  const __m512i zero = _mm512_setzero_si512();
  const __m512i c = _mm512_max_epi32(
      _mm512_add_epi32(_mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(2)), 2),
                       _mm512_set1_epi32(10)),
      zero);
  const __m512i shift = _mm512_max_epi32(
      _mm512_srai_epi32(_mm512_sub_epi32(c, _mm512_set1_epi32(13)), 2), zero);
  const __m512i table = _mm512_sub_epi32(c, _mm512_slli_epi32(shift, 2));
  chosen.coding =
      _mm512_or_si512(_mm512_mullo_epi32(table, _mm512_set1_epi32(sizeof(WriterTable))),
                      _mm512_slli_epi32(shift, 24));
  chosen.path = _mm512_min_epi32(c, _mm512_set1_epi32(17));
  return chosen;
}

// Scales of all groups, the multipliers of all lines, and the steps of all elements.
inline void plan_tile(VectorEncoder& encoder, const Tile& tile, const EcqScale& steps,
                      WrittenTile& written) {
  EncoderScratch& scratch = encoder.scratch;
  TrellisSteps& trellis = scratch.searched.trellis;
  const EcqOrder& order = encoder.order;
  const uint32_t pairs = encoder.pairs();
  const uint32_t elements = encoder.codec.channel ? tile.tokens : tile.channels;
  alignas(64) float inverse[kTileChannels];
  alignas(64) uint32_t coding[kTileChannels];
  alignas(16) uint8_t path[kTileChannels];
  for (uint32_t g = 0; g < order.groups; g += 16) {
    const ChosenScales chosen = choose_sixteen(scratch.groups, g, order.groups - g, steps);
    _mm256_store_si256(reinterpret_cast<__m256i*>(written.scale + g),
                       _mm512_cvtepi32_epi16(chosen.scale));
    _mm512_store_ps(inverse + g, chosen.inverse);
    _mm512_store_si512(coding + g, chosen.coding);
    _mm_store_si128(reinterpret_cast<__m128i*>(path + g), _mm512_cvtepi32_epi8(chosen.path));
  }
  uint32_t count = 0;
  for (uint32_t i = 0; i < order.count; ++i) {
    const uint32_t g = order.group[i];
    const uint32_t line = i >= 2 * pairs ? i : i % 2 == 0 ? i / 2 : i / 2 + pairs;
    scratch.inverse[line] = inverse[g];
    const bool empty = written.scale[g] == kEmptyGroup;
    const float mean = empty ? 0.0f : scratch.average[line] * inverse[g];
    const float rounded = _mm_cvtss_f32(_mm_cvtepi32_ps(_mm_cvtps_epi32(_mm_set_ss(mean))));
    scratch.subtracted[line] = rounded;
    written.mean[order.line[i]] = static_cast<int16_t>(rounded);
    for (uint32_t at = 0; !empty && at < elements; at += 32, ++count) {
      const uint32_t lanes = smaller_of(elements - at, 32);
      written.steps[count] =
          StreamStep::pack(coding[g] & 0xFFFFFF, coding[g] >> 24, 32 * count, lanes);
      trellis.path_table[count] = path[g];
      trellis.lanes[count] = static_cast<uint8_t>(lanes);
    }
  }
  written.step_count = trellis.count = count;
}

// Sixteenths of half steps, as dwords.
KVC_INLINE __m512i quantized(const float* values, __m512 inverse, __m512 subtracted) {
  const __m512 scaled = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(values), inverse), subtracted);
  return _mm512_cvtps_epi32(_mm512_mul_ps(scaled, _mm512_set1_ps(16.0f)));
}

// 16 x 16 dwords, turned in place.
KVC_INLINE void turn_dwords(__m512i v[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm512_unpacklo_epi64(a, c);
    w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d);
    w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xDD);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// 16 channels from line `line` on: 32 tokens of each become a step. `steps_of[i]`: where the steps
// of line i begin, or ~0.
inline void quantize_channels(EncoderScratch& scratch, const Tile& tile, uint32_t line,
                              const uint32_t* steps_of) {
  SearchedTile& work = scratch.searched;
  const uint32_t padded = padded_channels(tile);
  const uint32_t lines = smaller_of(tile.channels - line, 16);
  const __m512 inverse = _mm512_loadu_ps(scratch.inverse + line);
  const __m512 subtracted = _mm512_loadu_ps(scratch.subtracted + line);
  for (uint32_t first = 0; first < tile.tokens; first += 32) {
    const uint32_t tokens = smaller_of(tile.tokens - first, 32);
    const float* values = work.values + first * padded + line;
    __m512i v[16];
    for (uint32_t i = 0; i < 16; ++i) {
      __m512i even = _mm512_setzero_si512();
      __m512i odd = even;
      if (2 * i < tokens) even = quantized(values + 2 * i * padded, inverse, subtracted);
      if (2 * i + 1 < tokens) odd = quantized(values + (2 * i + 1) * padded, inverse, subtracted);
      v[i] = _mm512_mask_mov_epi16(even, 0xAAAAAAAA, _mm512_slli_epi32(odd, 16));
    }
    turn_dwords(v);
    alignas(64) int16_t turned[16][32];
    for (uint32_t i = 0; i < 16; ++i) _mm512_store_si512(turned[i], v[i]);
    for (uint32_t i = 0; i < lines; ++i) {
      if (steps_of[line + i] == ~0u) continue;
      _mm512_store_si512(work.trellis.v[steps_of[line + i] + first / 32],
                         _mm512_load_si512(turned[i]));
    }
  }
}

inline void quantize_tokens(EncoderScratch& scratch, const Tile& tile, const WrittenTile& written) {
  SearchedTile& work = scratch.searched;
  const uint32_t padded = padded_channels(tile);
  uint32_t step = 0;
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    if (written.scale[t] == kEmptyGroup) continue;
    const float* values = work.values + t * padded;
    const __m512 inverse = _mm512_set1_ps(scratch.inverse[t]);
    for (uint32_t c = 0; c < padded; c += 32, ++step) {
      const __m512i low = quantized(values + c, inverse, _mm512_setzero_ps());
      const __m512i high = quantized(values + c + 16, inverse, _mm512_setzero_ps());
      const __m256i words[2] = {_mm512_cvtepi32_epi16(low), _mm512_cvtepi32_epi16(high)};
      _mm256_store_si256(reinterpret_cast<__m256i*>(work.trellis.v[step]), words[0]);
      _mm256_store_si256(reinterpret_cast<__m256i*>(work.trellis.v[step] + 16), words[1]);
    }
  }
}

inline void quantize_tile(VectorEncoder& encoder, const Tile& tile, const WrittenTile& written) {
  if (!encoder.codec.channel) return quantize_tokens(encoder.scratch, tile, written);
  const EcqOrder& order = encoder.order;
  const uint32_t pairs = encoder.pairs();
  uint32_t steps_of[kTileChannels + 16];
  uint32_t step = 0;
  for (uint32_t i = 0; i < order.count; ++i) {
    const uint32_t line = i >= 2 * pairs ? i : i % 2 == 0 ? i / 2 : i / 2 + pairs;
    const bool empty = written.scale[order.group[i]] == kEmptyGroup;
    steps_of[line] = empty ? ~0u : step;
    step += empty ? 0 : (tile.tokens + 31) / 32;
  }
  for (uint32_t line = 0; line < tile.channels; line += 16)
    quantize_channels(encoder.scratch, tile, line, steps_of);
}

// ---- classes

// Family 1 if it codes the elements in fewer bits.
inline uint8_t cheapest_family(const WrittenTile& written) {
  __m512i gain = _mm512_setzero_si512();
  for (uint32_t i = 0; i < written.step_count; ++i) {
    const StreamStep step(written.steps[i]);
    const auto* table = reinterpret_cast<const WriterTable*>(
        reinterpret_cast<const uint8_t*>(kWriterTables.table) + step.table());
    const __m512i k = _mm512_cvtepi8_epi16(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(written.k + step.out())));
    const __m512i upper = _mm512_sra_epi16(k, _mm_cvtsi32_si128(static_cast<int>(step.shift())));
    __m512i difference = _mm512_setzero_si512();
    const __m512i first = _mm512_permutexvar_epi16(symbols_of(table[0], upper),
                                                   _mm512_load_si512(table[0].cost));
    const __m512i second = _mm512_permutexvar_epi16(symbols_of(table[kFamilyStep], upper),
                                                    _mm512_load_si512(table[kFamilyStep].cost));
    difference = _mm512_maskz_sub_epi16(_bzhi_u32(~0u, step.count()), first, second);
    gain = _mm512_add_epi32(gain, _mm512_madd_epi16(difference, _mm512_set1_epi16(1)));
  }
  return _mm512_reduce_add_epi32(gain) > 0;
}

// The class (0, 4, ... 32) that codes integers in the fewest bits.
inline uint8_t cheapest_class_of(const int16_t* values, uint32_t count) {
  __m512i smallest = _mm512_setzero_si512();
  __m512i largest = _mm512_setzero_si512();
  for (uint32_t i = 0; i < count; i += 32) {
    const __m512i v = _mm512_maskz_loadu_epi16(first_of(count - i), values + i);
    smallest = _mm512_min_epi16(smallest, v);
    largest = _mm512_max_epi16(largest, v);
  }
  // Beyond a byte some classes cannot hold them, which is rare.
  if (_mm512_cmpgt_epi16_mask(largest, _mm512_set1_epi16(127)) != 0 ||
      _mm512_cmplt_epi16_mask(smallest, _mm512_set1_epi16(-128)) != 0) {
    return static_cast<uint8_t>(cheapest_class(values, count));
  }
  uint32_t best = 0;
  uint32_t least = UINT32_MAX;
  for (uint32_t c = 0; c <= kMaxClass; c += 4) {
    const CodeClass coding = code_class(c);
    const WriterTable& table = kWriterTables.table[coding.table];
    __m512i sum = _mm512_setzero_si512();
    for (uint32_t i = 0; i < count; i += 32) {
      const __mmask32 there = first_of(count - i);
      const __m512i v = _mm512_maskz_loadu_epi16(there, values + i);
      const __m512i upper = _mm512_sra_epi16(v, _mm_cvtsi32_si128(static_cast<int>(coding.shift)));
      const __m512i cost = _mm512_maskz_permutexvar_epi16(there, symbols_of(table, upper),
                                                          _mm512_load_si512(table.cost));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(cost, _mm512_set1_epi16(1)));
    }
    const uint32_t length =
        static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)) + 256 * coding.shift * count;
    if (length < least) {
      least = length;
      best = c;
    }
  }
  return static_cast<uint8_t>(best);
}

// ---- tiles and sections

// All that precedes the stream of a tile.
template <typename Element>
bool search_tile_of(VectorEncoder& encoder, const Tile& tile, WrittenTile& written) {
  if (!take_tile<Element>(encoder, tile)) return false;
  const uint32_t groups = encoder.order.groups;
  const EcqScale steps(encoder.codec, encoder.scratch.groups.reference(groups));
  plan_tile(encoder, tile, steps, written);
  quantize_tile(encoder, tile, written);
  const uint32_t elements = encoder.codec.channel ? tile.tokens : tile.channels;
  search_tile(encoder.scratch.searched.trellis, elements % 32 != 0, encoder.next, written.k);
  written.entry.reference = static_cast<uint8_t>(steps.reference + kReferenceBias);
  written.entry.family = cheapest_family(written);
  written.entry.scale_class = cheapest_class_of(written.scale, groups);
  written.entry.mean_class =
      encoder.codec.channel ? cheapest_class_of(written.mean, tile.channels) : 0;
  return true;
}

inline uint64_t* plan_side(uint32_t c, uint32_t first, uint32_t count, uint64_t* step) {
  const CodeClass coding = code_class(c);
  const uint32_t table = static_cast<uint32_t>(coding.table * sizeof(WriterTable));
  for (uint32_t at = 0; at < count; at += 32)
    *step++ = StreamStep::pack(table, coding.shift, first + at, smaller_of(count - at, 32));
  return step;
}

// The streams of some tiles.
inline bool write_tiles(const VectorEncoder& encoder, const Tile* tiles, uint32_t count,
                        CodedWriter& writer) {
  EncoderScratch& scratch = encoder.scratch;
  StreamTarget targets[kInterleaved];
  uint8_t* ends[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) {
    WrittenTile& written = scratch.written[i];
    ends[i] = scratch.stream[i] + kMaxStreamBytes;
    targets[i] = {ends[i],
                  written.steps + written.step_count,
                  written.step_count,
                  written.k,
                  kWriterTables.table + kFamilyStep * written.entry.family,
                  _mm512_set1_epi16(kFirstState)};
  }
  put_streams<false>(targets, count);
  for (uint32_t i = 0; i < count; ++i) {
    WrittenTile& written = scratch.written[i];
    static_assert(offsetof(WrittenTile, mean) ==
                      offsetof(WrittenTile, scale) + kTileChannels * sizeof(int16_t),
                  "means follow the scales");
    const uint32_t lines = encoder.lines(tiles[i]);
    const uint32_t groups = lines - encoder.pairs();
    uint64_t* end = plan_side(written.entry.scale_class, 0, groups, written.side_steps);
    if (encoder.codec.channel)
      end = plan_side(written.entry.mean_class, kTileChannels, tiles[i].channels, end);
    targets[i].step = end;
    targets[i].steps = static_cast<uint32_t>(end - written.side_steps);
    targets[i].values = written.scale;
    targets[i].tables = kWriterTables.table;
  }
  put_streams<true>(targets, count);
  for (uint32_t i = 0; i < count; ++i) {
    uint8_t* stream = targets[i].at - kStateBytes;
    _mm512_storeu_si512(stream, targets[i].x);
    TileEntry& entry = scratch.written[i].entry;
    entry.stream_bytes = static_cast<uint16_t>(ends[i] - stream);
    if (!writer.add(entry, stream)) return false;
  }
  return true;
}

// Whether the groups of a section are narrower without the rotation.
template <typename Element>
bool choose_derotation(VectorEncoder& encoder, const kvc_rotary* rotary, bool* inside) {
  int64_t gain = 0;
  for (TileWalk walk(encoder.rows); !walk.ended(); walk.advance()) {
    const Tile& tile = walk.tile();
    encoder.look_ahead(walk);
    encoder.rotary = nullptr;
    *inside = take_tile<Element>(encoder, tile);
    if (!*inside) return false;
    gain += 4 * encoder.scratch.groups.cost(encoder.order.groups) + tile.channels;
    encoder.rotary = rotary;
    encoder.arrange(tile);
    measure_channels<Element>(encoder, tile);
    gain -= 4 * encoder.scratch.groups.cost(encoder.order.groups);
  }
  return gain > 0;
}

template <typename Element>
size_t encode_elements(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary,
                       uint8_t* scratch, uint8_t* out) {
  VectorEncoder encoder(codec, rows, scratch);
  if (can_derotate(codec, rows, rotary)) {
    bool inside = true;
    const bool derotated = choose_derotation<Element>(encoder, rotary, &inside);
    if (!inside) return 0;
    encoder.rotary = derotated ? rotary : nullptr;
  }
  const size_t raw_bytes =
      static_cast<size_t>(rows.head_count) * rows.token_count * rows.head_size * 2;
  CodedWriter writer(out, pad64(raw_bytes), tile_count(rows), 0,
                     encoder.rotary != nullptr ? kFlagDerotated : 0);
  for (TileWalk walk(rows); !walk.ended() && writer.fits();) {
    Tile tiles[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count) {
      tiles[count] = walk.tile();
      encoder.look_ahead(walk);
      if (!search_tile_of<Element>(encoder, tiles[count], encoder.scratch.written[count])) return 0;
    }
    if (!write_tiles(encoder, tiles, count, writer)) return 0;
  }
  return writer.finish(raw_bytes);
}

size_t encode_ecq_section(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary,
                          uint8_t* scratch, uint8_t* out) {
  if (codec.dtype == KVC_BF16) return encode_elements<Bf16>(codec, rows, rotary, scratch, out);
  if (codec.dtype == KVC_FP16) return encode_elements<Fp16>(codec, rows, rotary, scratch, out);
  return encode_ecq(codec, rows, rotary, scratch, out);
}
