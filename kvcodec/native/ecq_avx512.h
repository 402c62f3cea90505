// Kind ecq on AVX-512 with VBMI and VBMI2: decoding. Included by ecq_avx512.cpp inside its target
// region and namespace, after coded_avx512.h and turn_avx512.h.
//
// Up to four tiles at a time. Lines that are tokens become rows as they are read. Those that are
// channels become half steps in the worker's scratch, a byte each, and when the tile is complete
// they are turned 16 x 16 bytes at a time and become rows.

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

static_assert(residual_tables_fit(), "fewer than 32 symbols, the last one rare");
static_assert(sizeof(ResidualTables) <= 65536, "LineCode has 16 bits");
constexpr ResidualTables kVectorTables = residual_tables();

// A tile between its phases.
struct EcqWork {
  // As the stream has them.
  alignas(64) int16_t scales[kTileChannels];
  alignas(64) int16_t means[kTileChannels];
  alignas(64) uint32_t codes[kTileChannels + 16];
  // Of each line in the order of `units`.
  alignas(64) float half[kTileChannels + 32];
  alignas(64) int32_t mean[kTileChannels + 32];
  // Lines kTileTokens apart. Behind them the rest of a block that is turned.
  alignas(64) int8_t units[kTileElements + 32 * kTileTokens];
};

// Blocks of a tile that is turned: its first and second channels of pairs, and those that are not
// rotated, fill an even number of blocks each.
constexpr uint32_t kTurnedBlocks = kTileChannels / kTurnedLines + 3 * 2;
// Tables of cosines and of sines of this many tokens, if all elements of 256 are rotated.
constexpr size_t kRotaryFloats = 2 * kTileTokens * (kTileChannels / 2);
constexpr uint32_t kRotarySlots = 4;

struct EcqScratch {
  EcqWork work[kInterleaved];
  alignas(64) uint8_t turned[kTurnedBlocks * kTurnedBytes];
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
  alignas(64) uint32_t place[kTileChannels + 16];  // where a sequence lies in `units`: LineCode
  uint32_t rotary_token[kRotarySlots];             // first tokens of the tables in the scratch

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
  void arrange(const Tile& tile) {
    const uint32_t tile_lines = codec.channel ? tile.channels : tile.tokens;
    elements = codec.channel ? tile.tokens : tile.channels;
    if (lines == tile_lines) return;
    lines = tile_lines;
    order.arrange(lines, rotary);
    for (uint32_t i = 0; i < lines; ++i) {
      const uint32_t at = i >= 2 * pairs() ? i : i % 2 == 0 ? i / 2 : i / 2 + pairs();
      place[i] = LineCode::pack(0, 0, at);
    }
  }

  uint8_t* row(const Tile& tile) const {
    return rows.row(tile.head, tile.token) + tile.channel * 2;
  }
};

// The sequence of scales, or of means: integers of one class.
inline uint32_t code_of_class(uint8_t number) {
  const CodeClass coding = code_class(number);
  return LineCode::pack(static_cast<uint32_t>(coding.table * sizeof(VectorTable)), coding.shift, 0);
}

// One sequence of `count` integers of each stream.
inline bool read_words(uint32_t count, const uint32_t* codes, WordSink* sinks,
                       TileStream* streams, uint32_t stream_count, SectionBehind& behind) {
  for (uint32_t i = 0; i < stream_count; ++i)
    streams[i].plan(codes + i, 1, LineCode(codes[i]).shift() != 0);
  return run_streams(&kVectorTables, LineShape(count), streams, sinks, stream_count, &behind);
}

// What scales say of their groups.
struct EcqGroupCodes {
  alignas(64) uint32_t code[kTileChannels + 16];  // LineCode; kEmptyGroup as the shift: empty
  alignas(64) float half[kTileChannels + 16];

  EcqGroupCodes(const EcqDecoder& decoder, const TileEntry& entry, const int16_t* scales) {
    const __m512i nominal = _mm512_set1_epi32(35 - decoder.codec.bits);
    const __m512i reference = _mm512_set1_epi32(4 * (entry.reference - kReferenceBias) - 16);
    const __m512i family = _mm512_set1_epi32(17 * entry.family);
    for (uint32_t i = 0; i < decoder.order.groups; i += 16) {
      // The scale as a signed byte.
      const __m512i words = _mm512_cvtepi16_epi32(
          _mm256_load_si256(reinterpret_cast<const __m256i*>(scales + i)));
      const __m512i s = _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24);
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
          _mm512_srai_epi32(_mm512_sub_epi32(c, _mm512_set1_epi32(13)), 2),
          _mm512_setzero_si512());
      const __m512i table =
          _mm512_add_epi32(_mm512_sub_epi32(c, _mm512_slli_epi32(shift, 2)), family);
      const __mmask16 empty = _mm512_cmpeq_epi32_mask(s, _mm512_set1_epi32(kEmptyGroup));
      const __m512i bytes = _mm512_mullo_epi32(table, _mm512_set1_epi32(sizeof(VectorTable)));
      const __m512i marked = _mm512_mask_mov_epi32(shift, empty, _mm512_set1_epi32(kEmptyGroup));
      _mm512_store_si512(code + i, _mm512_or_si512(bytes, _mm512_slli_epi32(marked, 16)));
      const __m512i d = _mm512_sub_epi32(
          _mm512_sub_epi32(reference, _mm512_add_epi32(twice, twice)), t);
      const __m512i fraction = _mm512_castps_si512(
          _mm512_permutexvar_ps(d, _mm512_loadu_ps(kSixteenths)));
      const __m512i octaves = _mm512_slli_epi32(_mm512_srai_epi32(d, 4), 23);
      _mm512_store_ps(half + i, _mm512_castsi512_ps(_mm512_add_epi32(fraction, octaves)));
    }
  }
};

// From groups to sequences: each pair of channels shares the group of the pair.
inline void spread_codes(const EcqDecoder& decoder, const uint32_t* groups, uint32_t* sequences) {
  const uint32_t pairs = decoder.pairs();
  const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  for (uint32_t i = 0; i < pairs; i += 8) {
    const __m512i eight = _mm512_castsi256_si512(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups + i)));
    _mm512_storeu_si512(sequences + 2 * i, _mm512_permutexvar_epi32(twice, eight));
  }
  for (uint32_t i = pairs; i < decoder.order.groups; i += 16)
    _mm512_storeu_si512(sequences + pairs + i, _mm512_loadu_si512(groups + i));
}

// The sequences of the elements, half steps of lines, and their means. Empty lines get zeros.
template <typename Sink>
void plan_elements(const EcqDecoder& decoder, const TileEntry& entry, EcqWork& work,
                   const Sink& sink, TileStream& stream) {
  const EcqGroupCodes groups(decoder, entry, work.scales);
  const uint32_t pairs = decoder.pairs();
  const uint32_t lines = decoder.lines;
  memcpy(work.half, groups.half, pairs * sizeof(float));
  memcpy(work.half + pairs, groups.half, pairs * sizeof(float));
  memcpy(work.half + 2 * pairs, groups.half + pairs, (lines - 2 * pairs) * sizeof(float));
  alignas(64) uint32_t sequences[kTileChannels + 32];
  spread_codes(decoder, groups.code, sequences);
  uint32_t count = 0;
  __m512i all = _mm512_setzero_si512();
  for (uint32_t i = 0; i < lines; i += 16) {
    const __m512i code = _mm512_load_si512(sequences + i);
    const __m512i placed = _mm512_or_si512(code, _mm512_load_si512(decoder.place + i));
    const __mmask16 there = static_cast<__mmask16>(first_of(lines - i));
    const __mmask16 empty = _mm512_mask_cmpeq_epi32_mask(
        there, _mm512_srli_epi32(code, 16), _mm512_set1_epi32(kEmptyGroup));
    const __mmask16 full = there & static_cast<__mmask16>(~empty);
    all = _mm512_mask_or_epi32(all, full, all, code);
    _mm512_storeu_si512(work.codes + count, _mm512_maskz_compress_epi32(full, placed));
    count += static_cast<uint32_t>(__builtin_popcount(full));
    for (uint32_t left = empty; left != 0; left &= left - 1)
      sink.put_empty(LineCode(decoder.place[i + __builtin_ctz(left)]).line(), decoder.elements);
  }
  stream.plan(work.codes, count,
              LineCode(static_cast<uint32_t>(_mm512_reduce_or_epi32(all))).shift() != 0);
}

// Means in the order of `units`.
inline void place_means(const EcqDecoder& decoder, EcqWork& work) {
  if (decoder.pairs() != 0 && decoder.rotary->interleaved != 0) {
    for (uint32_t i = 0; i < decoder.lines; ++i)
      work.mean[LineCode(decoder.place[i]).line()] = work.means[decoder.order.line[i]];
    return;
  }
  for (uint32_t i = 0; i < decoder.lines; ++i) work.mean[i] = work.means[i];
}

// ---- what becomes of integers

// Indices as half steps, in the low byte of each word.
struct Trellis {
  __m512i o;
  __m512i q;

  void start() { o = q = _mm512_setzero_si512(); }

  template <bool kMasked>
  KVC_INLINE __m512i half_steps(__m512i k, __mmask32 active) {
    // (o, q) = (q xor (k & 1), o)
    const __m512i next = _mm512_ternarylogic_epi64(q, k, _mm512_set1_epi16(1), 0x78);
    const __m512i units = _mm512_add_epi16(_mm512_add_epi16(k, k), o);
    q = kMasked ? _mm512_mask_mov_epi16(q, active, o) : o;
    o = kMasked ? _mm512_mask_mov_epi16(o, active, next) : next;
    return units;
  }
};

// A byte of each half step, line by line.
struct UnitSink {
  static constexpr bool kWords = false;
  using Line = int8_t*;

  int8_t* units;
  Trellis trellis;

  KVC_INLINE Line line(uint32_t index) const { return units + index * kTileTokens; }

  template <bool kMasked>
  KVC_INLINE void put(Line& line, uint32_t step, __m512i k, __mmask32 active) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(line + kStreamLanes * step),
                       _mm512_cvtepi16_epi8(trellis.half_steps<kMasked>(k, active)));
  }

  void put_empty(uint32_t index, uint32_t) const { memset(line(index), 0, kTileTokens); }
};

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
  if (Element::kEvenOdd) return Bf16::join(first, second);
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

// Rows of a tile whose lines are tokens.
template <typename Element, bool kStream>
struct TokenSink {
  static constexpr bool kWords = false;
  struct Line {
    uint8_t* row;
    __m512 half;  // of 2^-24 half steps
  };

  uint8_t* row;
  int64_t row_stride;
  const float* half;
  Trellis trellis;

  KVC_INLINE Line line(uint32_t index) const {
    return {row + index * row_stride,
            _mm512_mul_ps(_mm512_set1_ps(half[index]), _mm512_set1_ps(0x1p-24f))};
  }

  template <bool kMasked>
  KVC_INLINE void put(Line& line, uint32_t, __m512i k, __mmask32 active) {
    // In the upper byte of each word, and then of each number.
    const __m512i units = _mm512_slli_epi16(trellis.half_steps<kMasked>(k, active), 8);
    const __m512i even = _mm512_slli_epi32(units, 16);
    const __m512i odd =
        _mm512_and_si512(units, _mm512_set1_epi32(static_cast<int>(0xFF000000)));
    const __m512i words =
        zip_values<Element>(_mm512_mul_ps(_mm512_cvtepi32_ps(even), line.half),
                            _mm512_mul_ps(_mm512_cvtepi32_ps(odd), line.half));
    store_elements<kStream, kMasked>(line.row, words, active);
    line.row += 2 * kStreamLanes;
  }

  void put_empty(uint32_t index, uint32_t elements) const {
    memset(row + index * row_stride, 0, 2 * elements);
  }
};

// Columns of a tile whose lines are channels: the lines from `line` on, as turned blocks.
struct TurnedLines {
  const int8_t* blocks;
  const int32_t* mean;
  const float* half;

  // 16 values of a token.
  KVC_INLINE __m512 values(uint32_t token, uint32_t block) const {
    const int8_t* units = blocks + block * kTurnedBytes + turned_place(token);
    const __m512i mean_units = _mm512_loadu_si512(mean + block * kTurnedLines);
    return sixteen_values(units, mean_units, _mm512_loadu_ps(half + block * kTurnedLines));
  }
};

// Turns `count` lines into an even number of blocks; where they end.
inline uint8_t* turn_blocks(const EcqWork& work, uint32_t line, uint32_t count, uint8_t* turned,
                            TurnedLines* lines) {
  *lines = {reinterpret_cast<const int8_t*>(turned), work.mean + line, work.half + line};
  for (uint32_t i = 0; i < count; i += kTurnedLines, turned += kTurnedBytes) {
    turn_lines(reinterpret_cast<const uint8_t*>(work.units) + (line + i) * kTileTokens, turned);
  }
  return turned + (count + kTurnedLines - 1) / kTurnedLines % 2 * kTurnedBytes;
}

// The rows of a tile whose lines are channels.
template <typename Element, bool kStream>
struct ChannelRows {
  TurnedLines first;   // channels of pairs
  TurnedLines second;
  TurnedLines plain;
  uint32_t pairs;
  uint32_t plain_count;

  ChannelRows(EcqDecoder& decoder, const Tile& tile, const EcqWork& work)
      : pairs(decoder.pairs()), plain_count(tile.channels - 2 * pairs) {
    uint8_t* turned = decoder.scratch.turned;
    turned = turn_blocks(work, 0, pairs, turned, &first);
    turned = turn_blocks(work, pairs, pairs, turned, &second);
    turn_blocks(work, 2 * pairs, plain_count, turned, &plain);
  }

  void store_plain(uint32_t token, uint8_t* row) const {
    for (uint32_t i = 0; i < plain_count; i += 32) {
      const __m512 low = plain.values(token, i / kTurnedLines);
      const __m512 high = plain.values(token, i / kTurnedLines + 1);
      store_elements<kStream, true>(row + i * 2, join_values<Element>(low, high),
                                    first_of(plain_count - i));
    }
  }

  // `cosines`, `sines`: of the token.
  template <bool kInterleavedPairs>
  void store_pairs(uint32_t token, const float* cosines, const float* sines, uint8_t* row) const {
    for (uint32_t pair = 0; pair < pairs; pair += 32) {
      __m512 x[2];
      __m512 y[2];
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t block = pair / kTurnedLines + i;
        const __m512 a = first.values(token, block);
        const __m512 b = second.values(token, block);
        const __m512 cosine = _mm512_load_ps(cosines + pair + 16 * i);
        const __m512 sine = _mm512_load_ps(sines + pair + 16 * i);
        x[i] = _mm512_sub_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
        y[i] = _mm512_add_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
      }
      const uint32_t count = pairs - pair;
      if (kInterleavedPairs) {
        uint8_t* target = row + pair * 4;
        store_elements<kStream, true>(target, zip_values<Element>(x[0], y[0]),
                                      first_of(2 * count));
        if (count > 16)
          store_elements<kStream, true>(target + 64, zip_values<Element>(x[1], y[1]),
                                        first_of(2 * count - 32));
      } else {
        uint8_t* target = row + pair * 2;
        const __mmask32 there = first_of(count);
        store_elements<kStream, true>(target, join_values<Element>(x[0], x[1]), there);
        store_elements<kStream, true>(target + pairs * 2, join_values<Element>(y[0], y[1]), there);
      }
    }
  }
};

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
  const ChannelRows<Element, kStream> rows(decoder, tile, work);
  uint8_t* row = decoder.row(tile);
  const int64_t stride = decoder.rows.token_stride;
  if (rows.pairs == 0) {
    for (uint32_t t = 0; t < tile.tokens; ++t, row += stride) rows.store_plain(t, row);
    return;
  }
  const bool interleaved = decoder.rotary->interleaved != 0;
  const uint32_t padded = (rows.pairs + 31) & ~31u;
  const float* cosines = rotary_of(decoder, tile);
  const float* sines = cosines + kTileTokens * padded;
  for (uint32_t t = 0; t < tile.tokens; ++t, row += stride, cosines += padded, sines += padded) {
    if (interleaved)
      rows.template store_pairs<true>(t, cosines, sines, row);
    else
      rows.template store_pairs<false>(t, cosines, sines, row);
    rows.store_plain(t, row + 4 * rows.pairs);
  }
}

template <typename Sink>
bool read_elements(const EcqDecoder& decoder, const TileEntry* entries, TileStream* streams,
                   Sink* sinks, uint32_t count, SectionBehind& behind) {
  for (uint32_t i = 0; i < count; ++i)
    plan_elements(decoder, entries[i], decoder.scratch.work[i], sinks[i], streams[i]);
  return run_streams(&kVectorTables, LineShape(decoder.elements), streams, sinks, count, &behind);
}

template <typename Element, bool kStream>
bool read_tokens(const EcqDecoder& decoder, const Tile* tiles, const TileEntry* entries,
                 TileStream* streams, uint32_t count, SectionBehind& behind) {
  TokenSink<Element, kStream> sinks[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) {
    sinks[i].row = decoder.row(tiles[i]);
    sinks[i].row_stride = decoder.rows.token_stride;
    sinks[i].half = decoder.scratch.work[i].half;
    sinks[i].trellis.start();
  }
  return read_elements(decoder, entries, streams, sinks, count, behind);
}

// Up to four tiles of one shape.
template <typename Element>
bool decode_tiles(EcqDecoder& decoder, const Tile* tiles, const TileEntry* entries,
                  TileStream* streams, uint32_t count, SectionBehind& behind) {
  decoder.arrange(tiles[0]);
  EcqWork* work = decoder.scratch.work;
  const bool channel = decoder.codec.channel;
  const bool look = decoder.rows.base == nullptr;
  uint32_t scale_codes[kInterleaved];
  uint32_t mean_codes[kInterleaved];
  WordSink scales[kInterleaved];
  WordSink means[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) {
    scale_codes[i] = code_of_class(entries[i].scale_class);
    mean_codes[i] = code_of_class(entries[i].mean_class);
    scales[i] = {work[i].scales};
    means[i] = {work[i].means};
  }
  if (!read_words(decoder.order.groups, scale_codes, scales, streams, count, behind) ||
      (channel && !read_words(decoder.lines, mean_codes, means, streams, count, behind))) {
    return false;
  }
  if (channel || look) {
    UnitSink sinks[kInterleaved];
    for (uint32_t i = 0; i < count; ++i) {
      sinks[i].units = work[i].units;
      sinks[i].trellis.start();
    }
    if (!read_elements(decoder, entries, streams, sinks, count, behind)) return false;
  } else {
    const auto read = decoder.stream ? read_tokens<Element, true> : read_tokens<Element, false>;
    if (!read(decoder, tiles, entries, streams, count, behind)) return false;
  }
  const auto store =
      decoder.stream ? store_channels<Element, true> : store_channels<Element, false>;
  for (uint32_t i = 0; i < count; ++i) {
    if (!streams[i].finished()) return false;
    if (!channel || look) continue;
    place_means(decoder, work[i]);
    store(decoder, tiles[i], work[i]);
  }
  return true;
}

bool decode_ecq_section(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                        const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  if (codec.dtype == KVC_FP32) return decode_ecq(codec, in, stored_bytes, rows, rotary, scratch);
  CodedParts parts;
  const uint8_t known = can_derotate(codec, rows, rotary) ? kFlagDerotated : 0;
  if (!open_coded(in, stored_bytes, tile_count(rows), 0, known, &parts)) return false;
  rotary = parts.flags & kFlagDerotated ? rotary : nullptr;
  EcqDecoder decoder(codec, rows, rotary, scratch);
  SectionBehind behind(in, stored_bytes,
                       uint64_t{rows.head_count} * rows.token_count * rows.head_size);
  const auto decode = codec.dtype == KVC_BF16 ? decode_tiles<Bf16> : decode_tiles<Fp16>;
  const uint8_t* at = parts.streams;
  uint64_t index = 0;
  for (TileWalk walk(rows); !walk.ended();) {
    Tile tiles[kInterleaved];
    TileEntry entries[kInterleaved];
    TileStream streams[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count, ++index) {
      tiles[count] = walk.tile();
      if (!tiles[count].has_shape_of(tiles[0])) break;
      const TileEntry& entry = entries[count] = parts.entry(index);
      if (!streams[count].start(at, at + entry.stream_bytes)) return false;
      at += entry.stream_bytes;
    }
    if (!decode(decoder, tiles, entries, streams, count, behind)) return false;
  }
  if (decoder.stream) _mm_sfence();
  return true;
}
