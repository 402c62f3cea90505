// Kind ecq on AVX-512 with VBMI and VBMI2: decoding. Included by avx512.cpp inside its target
// region and namespace, after coded_avx512.h.
//
// Up to four tiles at a time, in two phases: their streams become half steps in the worker's
// scratch, a byte each, line by line as the stream has them; then these become rows. Lines of
// per-channel tiles are turned 16 x 16 bytes at a time on the way.

constexpr uint32_t kResidualTableCount = 34;

struct ResidualTables {
  VectorTable table[kResidualTableCount];
};

constexpr ResidualTables residual_tables() {
  ResidualTables result{};
  for (uint32_t i = 0; i < kResidualTableCount; ++i)
    result.table[i] = vector_table(kResidualTables[i]);
  return result;
}

constexpr bool residual_tables_fit() {
  for (uint32_t i = 0; i < kResidualTableCount; ++i) {
    if (!fits_vector_table(kResidualTables[i])) return false;
  }
  return true;
}

static_assert(residual_tables_fit(), "values lie in -31...31");
constexpr ResidualTables kVectorTables = residual_tables();

// A tile between the phases.
struct EcqWork {
  uint64_t steps[kMaxTileSteps];
  // As the stream has them: scales of groups, then means of channels.
  alignas(64) int16_t words[2 * kTileChannels];
  // Of each line in the order of `units`.
  alignas(64) float half[kTileChannels];
  alignas(64) int32_t mean[kTileChannels];
  alignas(64) uint32_t coding[kTileChannels];  // of each group: offset of its table, shift << 24
  // Lines kTileTokens or kTileChannels apart. Behind them the rest of a block that is turned.
  alignas(64) int8_t units[kTileElements + 64 * kTileTokens];
};

constexpr uint32_t kTurnedLines = 16;
constexpr size_t kTurnedBytes = kTurnedLines * kTileTokens;
// Tables of cosines and of sines of this many tokens, if all elements of 256 are rotated.
constexpr size_t kRotaryFloats = 2 * kTileTokens * (kTileChannels / 2);
constexpr uint32_t kRotarySlots = 4;

struct EcqScratch {
  EcqWork work[kInterleaved];
  alignas(64) int8_t turned[4 * kTurnedBytes];
  alignas(64) float rotary[kRotarySlots][kRotaryFloats];
};
static_assert(sizeof(EcqScratch) <= kCodedScratchBytes, "a worker's memory");

// Whether all stores of a section are whole lines of the cache.
inline bool stores_are_lines(const Rows& rows, const kvc_rotary* rotary) {
  if (!rows_aligned(rows, static_cast<size_t>(rows.head_size) * 2, 64)) return false;
  return rotary == nullptr || rotary->size / 2 % (rotary->interleaved != 0 ? 16 : 32) == 0;
}

struct EcqDecoder {
  const SectionCodec& codec;
  const Rows& rows;
  const kvc_rotary* rotary;  // of a derotated section, else nullptr
  EcqScratch& scratch;
  bool stream;  // stores are whole lines of the cache
  // For tiles of this shape:
  uint32_t lines = 0;
  uint32_t elements = 0;
  EcqOrder order{};
  uint16_t place[kTileChannels];  // where a sequence lies in `units`: lines before it
  uint32_t step_count;            // of the elements, if no group is empty
  uint64_t place_of_step[kMaxTileSteps];
  uint16_t group_of_step[kMaxTileSteps];
  uint32_t rotary_token[kRotarySlots];  // first tokens of the tables in the scratch

  EcqDecoder(const SectionCodec& c, const Rows& r, const kvc_rotary* turn, uint8_t* memory)
      : codec(c),
        rows(r),
        rotary(turn),
        scratch(*reinterpret_cast<EcqScratch*>(memory)),
        stream(stores_are_lines(r, turn)) {
    for (uint32_t& token : rotary_token) token = ~0u;
  }

  uint32_t pairs() const { return rotary != nullptr ? rotary->size / 2 : 0; }

  // The first channels of pairs lie together in `units`, then the second ones.
  void arrange(uint32_t tile_lines, uint32_t line_elements) {
    if (lines == tile_lines && elements == line_elements) return;
    lines = tile_lines;
    elements = line_elements;
    order.arrange(lines, rotary);
    step_count = 0;
    for (uint32_t i = 0; i < lines; ++i) {
      place[i] = static_cast<uint16_t>(i >= 2 * pairs() ? i : i % 2 == 0 ? i / 2 : i / 2 + pairs());
      for (uint32_t at = 0; at < elements; at += 32) {
        const uint32_t out = place[i] * (codec.channel ? kTileTokens : kTileChannels) + at;
        const uint32_t count = elements - at < 32 ? elements - at : 32;
        place_of_step[step_count] = StreamStep::pack(0, 0, out, count);
        group_of_step[step_count++] = order.group[i];
      }
    }
  }
};

inline uint32_t smaller_of(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Steps of `count` integers of one class.
inline uint64_t* plan_sequence(CodeClass coding, uint32_t out, uint32_t count, uint64_t* step) {
  const uint32_t table = static_cast<uint32_t>(coding.table * sizeof(VectorTable));
  for (uint32_t at = 0; at < count; at += 32)
    *step++ = StreamStep::pack(table, coding.shift, out + at, smaller_of(count - at, 32));
  return step;
}

// The steps of scales and means.
inline void plan_words(const EcqDecoder& decoder, const Tile& tile, const TileEntry& entry,
                       EcqWork& work, TileStream& stream) {
  const CodeClass scale = code_class(entry.scale_class);
  const CodeClass mean = code_class(entry.mean_class);
  const uint32_t groups = decoder.order.groups;
  const uint32_t means = decoder.codec.channel ? tile.channels : 0;
  uint64_t* step = plan_sequence(scale, 0, groups, work.steps);
  step = plan_sequence(mean, kTileChannels, means, step);
  stream.step = work.steps;
  stream.steps = static_cast<uint32_t>(step - work.steps);
  stream.out = work.words;
  stream.masked = groups % 32 != 0 || means % 32 != 0;
  stream.shifted = scale.shift != 0 || mean.shift != 0;
}

// Classes and half steps of all groups, and the means of all lines.
inline void plan_groups(const EcqDecoder& decoder, const Tile& tile, const TileEntry& entry,
                        EcqWork& work) {
  alignas(64) float half[kTileChannels];
  const __m512i nominal = _mm512_set1_epi32(35 - decoder.codec.bits);
  const __m512i reference = _mm512_set1_epi32(4 * (entry.reference - kReferenceBias) - 16);
  const __m512i family = _mm512_set1_epi32(17 * entry.family);
  const uint32_t groups = decoder.order.groups;
  for (uint32_t i = 0; i < groups; i += 16) {
    // The scale as a signed byte.
    const __m512i s = _mm512_srai_epi32(
        _mm512_slli_epi32(_mm512_cvtepi16_epi32(_mm256_load_si256(
                              reinterpret_cast<const __m256i*>(work.words + i))),
                          24),
        24);
    const __m512i twice = _mm512_add_epi32(s, s);
    const __m512i weighed = decoder.codec.channel ? twice : s;
    const __m512i t = _mm512_min_epi32(
        _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_add_epi32(weighed, nominal)),
        _mm512_set1_epi32(62));
    const __m512i c = _mm512_max_epi32(
        _mm512_add_epi32(_mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(2)), 2),
                         _mm512_set1_epi32(10)),
        _mm512_setzero_si512());
    const __m512i shift = _mm512_max_epi32(
        _mm512_srai_epi32(_mm512_sub_epi32(c, _mm512_set1_epi32(13)), 2), _mm512_setzero_si512());
    const __m512i table =
        _mm512_add_epi32(_mm512_sub_epi32(c, _mm512_slli_epi32(shift, 2)), family);
    // kEmptyGroup as the shift marks an empty group.
    const __mmask16 empty = _mm512_cmpeq_epi32_mask(s, _mm512_set1_epi32(kEmptyGroup));
    const __m512i bytes = _mm512_mullo_epi32(table, _mm512_set1_epi32(sizeof(VectorTable)));
    const __m512i marked = _mm512_mask_mov_epi32(shift, empty, _mm512_set1_epi32(kEmptyGroup));
    _mm512_store_si512(work.coding + i, _mm512_or_si512(bytes, _mm512_slli_epi32(marked, 24)));
    const __m512i d = _mm512_sub_epi32(
        _mm512_sub_epi32(reference, _mm512_add_epi32(twice, twice)), t);
    const __m512i fraction = _mm512_castps_si512(
        _mm512_permutexvar_ps(d, _mm512_loadu_ps(kSixteenths)));
    const __m512i octaves = _mm512_slli_epi32(_mm512_srai_epi32(d, 4), 23);
    _mm512_store_ps(half + i, _mm512_castsi512_ps(_mm512_add_epi32(fraction, octaves)));
  }
  const uint32_t pairs = decoder.pairs();
  memcpy(work.half, half, pairs * sizeof(float));
  memcpy(work.half + pairs, half, pairs * sizeof(float));
  memcpy(work.half + 2 * pairs, half + pairs, (groups - pairs) * sizeof(float));
  if (!decoder.codec.channel) return;
  const int16_t* means = work.words + kTileChannels;
  if (pairs != 0 && decoder.rotary->interleaved != 0) {
    for (uint32_t i = 0; i < tile.channels; ++i)
      work.mean[decoder.place[i]] = means[decoder.order.line[i]];
    return;
  }
  for (uint32_t i = 0; i < tile.channels; ++i) work.mean[i] = means[i];
}

// The steps of the elements.
inline void plan_elements(const EcqDecoder& decoder, const Tile& tile, const TileEntry& entry,
                          EcqWork& work, TileStream& stream) {
  plan_groups(decoder, tile, entry, work);
  uint32_t all = 0;
  for (uint32_t i = 0; i < decoder.order.groups; ++i) all |= work.coding[i];
  uint64_t* step = work.steps;
  const uint32_t count = decoder.step_count;
  if (all >> 24 <= kMaxShift + 3) {
    for (uint32_t i = 0; i < count; ++i)
      step[i] = decoder.place_of_step[i] | work.coding[decoder.group_of_step[i]];
    step += count;
  } else {
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t coding = work.coding[decoder.group_of_step[i]];
      const uint64_t next = decoder.place_of_step[i] | coding;
      if (coding >> 24 == kEmptyGroup) {
        memset(work.units + StreamStep(next).out(), 0, 32);
      } else {
        *step++ = next;
      }
    }
  }
  stream.step = work.steps;
  stream.steps = static_cast<uint32_t>(step - work.steps);
  stream.out = work.units;
  stream.masked = (decoder.codec.channel ? tile.tokens : tile.channels) % 32 != 0;
  stream.shifted = all >> 24 != 0;
}

// ---- lines to tokens

// 16 lines of 64 tokens -> 16 bytes for each token: token t at turned_place(t).
KVC_INLINE void turn_lines(const int8_t* lines, int8_t* turned) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(lines + i * kTileTokens);
  for (int round = 0; round < 4; ++round) {
    __m512i w[16];
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
      w[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = w[i];
  }
  for (int i = 0; i < 16; ++i) _mm512_store_si512(turned + i * 64, v[i]);
}

KVC_INLINE size_t turned_place(uint32_t token) { return (token & 15) * 64 + (token >> 4) * 16; }

// ---- values

KVC_INLINE __m512 sixteen_values(const int8_t* units, __m512i mean, __m512 half) {
  const __m512i u = _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(units)));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(u, mean)), half);
}

// Decoded values are far from the largest number of bf16.
template <typename Element>
KVC_INLINE __m512 within(__m512 v) {
  if (Element::kEvenOdd) return v;
  v = _mm512_max_ps(v, _mm512_sub_ps(_mm512_setzero_ps(), Element::largest()));
  return _mm512_min_ps(v, Element::largest());
}

// 32 values in a row as elements.
template <typename Element>
KVC_INLINE __m512i join_values(__m512 first, __m512 second) {
  first = within<Element>(first);
  second = within<Element>(second);
  if (Element::kEvenOdd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    alignas(64) static constexpr uint16_t kUpper[32] = {
        1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(first), half),
                                     _mm512_load_si512(kUpper),
                                     _mm512_add_epi32(_mm512_castps_si512(second), half));
  }
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(first, kNearest));
  return _mm512_inserti64x4(low, _mm512_cvtps_ph(second, kNearest), 1);
}

// 16 pairs of values as neighbours.
template <typename Element>
KVC_INLINE __m512i zip_values(__m512 a, __m512 b) {
  a = within<Element>(a);
  b = within<Element>(b);
  if (Element::kEvenOdd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(a), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(b), half);
    return _mm512_mask_mov_epi16(high, 0x55555555, low);
  }
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(a, kNearest));
  const __m512i high = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(b, kNearest));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

template <bool kStream>
KVC_INLINE void store_elements(uint8_t* target, __m512i words, __mmask32 there) {
  if (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), words);
  _mm512_mask_storeu_epi16(target, there, words);
}

KVC_INLINE __mmask32 first_of(uint32_t count) {
  return static_cast<__mmask32>(_bzhi_u32(~0u, smaller_of(count, 32)));
}

// 32 channels (or fewer: `count`) of a tile that are not rotated, from line `line` on.
template <typename Element, bool kStream>
void store_plain_channels(const EcqDecoder& decoder, const EcqWork& work, uint32_t tokens,
                          uint32_t line, uint32_t count, uint8_t* row) {
  int8_t* turned = decoder.scratch.turned;
  for (uint32_t i = 0; i < 2; ++i)
    turn_lines(work.units + (line + 16 * i) * kTileTokens, turned + i * kTurnedBytes);
  const __mmask32 there = first_of(count);
  const __m512i mean[2] = {_mm512_loadu_si512(work.mean + line),
                           _mm512_loadu_si512(work.mean + line + 16)};
  const __m512 half[2] = {_mm512_loadu_ps(work.half + line),
                          _mm512_loadu_ps(work.half + line + 16)};
  const int64_t stride = decoder.rows.token_stride;
  for (uint32_t t = 0; t < tokens; ++t, row += stride) {
    const int8_t* units = turned + turned_place(t);
    const __m512 low = sixteen_values(units, mean[0], half[0]);
    const __m512 high = sixteen_values(units + kTurnedBytes, mean[1], half[1]);
    store_elements<kStream>(row, join_values<Element>(low, high), there);
  }
}

// 32 pairs (or fewer) from pair `pair` on. `row`: of channel 0.
template <typename Element, bool kStream, bool kInterleavedPairs>
void store_rotated_channels(const EcqDecoder& decoder, const EcqWork& work, uint32_t tokens,
                            uint32_t pair, const float* rotary, uint8_t* row) {
  const uint32_t pairs = decoder.pairs();
  const uint32_t padded = (pairs + 31) & ~31u;
  int8_t* turned = decoder.scratch.turned;
  __m512i mean[4];
  __m512 half[4];
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t line = pair + 16 * (i % 2) + (i < 2 ? 0 : pairs);
    turn_lines(work.units + line * kTileTokens, turned + i * kTurnedBytes);
    mean[i] = _mm512_loadu_si512(work.mean + line);
    half[i] = _mm512_loadu_ps(work.half + line);
  }
  const uint32_t count = smaller_of(pairs - pair, 32);
  const int64_t stride = decoder.rows.token_stride;
  const float* cosines = rotary + pair;
  const float* sines = cosines + kTileTokens * padded;
  for (uint32_t t = 0; t < tokens; ++t, row += stride, cosines += padded, sines += padded) {
    const int8_t* units = turned + turned_place(t);
    __m512 first[2];
    __m512 second[2];
    for (uint32_t i = 0; i < 2; ++i) {
      const __m512 a = sixteen_values(units + i * kTurnedBytes, mean[i], half[i]);
      const __m512 b = sixteen_values(units + (2 + i) * kTurnedBytes, mean[2 + i], half[2 + i]);
      const __m512 cosine = _mm512_load_ps(cosines + 16 * i);
      const __m512 sine = _mm512_load_ps(sines + 16 * i);
      first[i] = _mm512_sub_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
      second[i] = _mm512_add_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
    }
    if (kInterleavedPairs) {
      uint8_t* target = row + pair * 4;
      store_elements<kStream>(target, zip_values<Element>(first[0], second[0]),
                              first_of(2 * count));
      if (count > 16)
        store_elements<kStream>(target + 64, zip_values<Element>(first[1], second[1]),
                                first_of(2 * (count - 16)));
    } else {
      uint8_t* target = row + pair * 2;
      store_elements<kStream>(target, join_values<Element>(first[0], first[1]),
                              first_of(count));
      store_elements<kStream>(target + pairs * 2, join_values<Element>(second[0], second[1]),
                              first_of(count));
    }
  }
}

// Cosines and sines of the tokens of a tile apart, padded to 32 pairs.
inline void split_rotary(const kvc_rotary& rotary, const Tile& tile, float* cosines) {
  const uint32_t pairs = rotary.size / 2;
  const uint32_t padded = (pairs + 31) & ~31u;
  float* sines = cosines + kTileTokens * padded;
  const float* source = rotary.table + static_cast<size_t>(tile.token) * pairs * 2;
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  for (uint32_t t = 0; t < tile.tokens; ++t, source += 2 * pairs) {
    for (uint32_t i = 0; i < pairs; i += 16) {
      const uint32_t left = pairs - i;
      const __mmask32 there = left >= 16 ? ~0u : _bzhi_u32(~0u, 2 * left);
      const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), source + 2 * i);
      const __m512 high =
          _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), source + 2 * i + 16);
      _mm512_store_ps(cosines + t * padded + i, _mm512_permutex2var_ps(low, even, high));
      _mm512_store_ps(sines + t * padded + i, _mm512_permutex2var_ps(low, odd, high));
    }
  }
}

// The tables for a tile, which a few tiles share.
inline const float* rotary_of(EcqDecoder& decoder, const Tile& tile) {
  const uint32_t slot = tile.token / kTileTokens % kRotarySlots;
  float* cosines = decoder.scratch.rotary[slot];
  if (decoder.rotary_token[slot] != tile.token) {
    decoder.rotary_token[slot] = tile.token;
    split_rotary(*decoder.rotary, tile, cosines);
  }
  return cosines;
}

template <typename Element, bool kStream>
void store_channels(EcqDecoder& decoder, const Tile& tile, const EcqWork& work) {
  uint8_t* row = decoder.rows.row(tile.head, tile.token) + tile.channel * 2;
  const uint32_t pairs = decoder.pairs();
  const float* rotary = pairs != 0 ? rotary_of(decoder, tile) : nullptr;
  for (uint32_t pair = 0; pair < pairs; pair += 32) {
    if (decoder.rotary->interleaved != 0) {
      store_rotated_channels<Element, kStream, true>(decoder, work, tile.tokens, pair,
                                                            rotary, row);
    } else {
      store_rotated_channels<Element, kStream, false>(decoder, work, tile.tokens, pair,
                                                             rotary, row);
    }
  }
  for (uint32_t line = 2 * pairs; line < tile.channels; line += 32)
    store_plain_channels<Element, kStream>(decoder, work, tile.tokens, line,
                                                  tile.channels - line, row + line * 2);
}

template <typename Element, bool kStream>
void store_tokens(EcqDecoder& decoder, const Tile& tile, const EcqWork& work) {
  uint8_t* row = decoder.rows.row(tile.head, tile.token) + tile.channel * 2;
  const int8_t* units = work.units;
  for (uint32_t t = 0; t < tile.tokens; ++t, row += decoder.rows.token_stride) {
    const __m512 half = _mm512_set1_ps(work.half[t]);
    for (uint32_t c = 0; c < tile.channels; c += 32) {
      const __m512 low = sixteen_values(units + c, _mm512_setzero_si512(), half);
      const __m512 high = sixteen_values(units + c + 16, _mm512_setzero_si512(), half);
      store_elements<kStream>(row + c * 2, join_values<Element>(low, high),
                              first_of(tile.channels - c));
    }
    units += kTileChannels;
  }
}

template <typename Element, bool kStream>
void store_tile(EcqDecoder& decoder, const Tile& tile, const EcqWork& work) {
  decoder.codec.channel ? store_channels<Element, kStream>(decoder, tile, work)
                        : store_tokens<Element, kStream>(decoder, tile, work);
}

template <typename Element>
void store_any_tile(EcqDecoder& decoder, const Tile& tile, const EcqWork& work) {
  decoder.stream ? store_tile<Element, true>(decoder, tile, work)
                 : store_tile<Element, false>(decoder, tile, work);
}

bool decode_ecq_section(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                        const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  if (codec.dtype == KVC_FP32) return decode_ecq(codec, in, stored_bytes, rows, rotary, scratch);
  CodedParts parts;
  const uint8_t known = can_derotate(codec, rows, rotary) ? kFlagDerotated : 0;
  if (!open_coded(in, stored_bytes, tile_count(rows), 0, known, &parts)) return false;
  rotary = parts.flags & kFlagDerotated ? rotary : nullptr;
  EcqDecoder decoder(codec, rows, rotary, scratch);
  const uint8_t* at = parts.streams;
  uint64_t index = 0;
  for (TileWalk walk(rows); !walk.ended();) {
    Tile tiles[kInterleaved];
    TileEntry entries[kInterleaved];
    TileStream streams[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count, ++index) {
      const Tile& tile = tiles[count] = walk.tile();
      const TileEntry& entry = entries[count] = parts.entry(index);
      const uint32_t lines = codec.channel ? tile.channels : tile.tokens;
      const uint32_t elements = codec.channel ? tile.tokens : tile.channels;
      if (count != 0 && (lines != decoder.lines || elements != decoder.elements)) break;
      if (!streams[count].start(at, at + entry.stream_bytes)) return false;
      at += entry.stream_bytes;
      decoder.arrange(lines, elements);
      plan_words(decoder, tile, entry, decoder.scratch.work[count], streams[count]);
    }
    if (!run_streams<Emit::kWords>(&kVectorTables, streams, count)) return false;
    for (uint32_t i = 0; i < count; ++i)
      plan_elements(decoder, tiles[i], entries[i], decoder.scratch.work[i], streams[i]);
    if (!run_streams<Emit::kTrellis>(&kVectorTables, streams, count)) return false;
    for (uint32_t i = 0; i < count; ++i) {
      if (!streams[i].finished()) return false;
      if (rows.base == nullptr) continue;
      codec.dtype == KVC_BF16 ? store_any_tile<Bf16>(decoder, tiles[i], decoder.scratch.work[i])
                              : store_any_tile<Fp16>(decoder, tiles[i], decoder.scratch.work[i]);
    }
  }
  if (decoder.stream) _mm_sfence();
  return true;
}
