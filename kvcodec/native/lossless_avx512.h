// Coded exponents on AVX-512 with VBMI and VBMI2, proto/FORMAT.md 3.8: decoding. Included by
// lossless_avx512.cpp inside its target region and namespace, after coded_avx512.h.
//
// Up to four tiles at a time. Lines that are tokens become rows as they are read. Those that are
// channels become bytes in the worker's scratch, and when the tile is complete these and the plane
// become rows.

struct LosslessTables {
  VectorTable scale[kScaleTables];
  VectorTable exponent[kExponentTables];
};

constexpr LosslessTables lossless_tables() {
  LosslessTables result{};
  for (uint32_t i = 0; i < kScaleTables; ++i) result.scale[i] = vector_table(kResidualTables[i]);
  for (uint32_t i = 0; i < kExponentTables; ++i)
    result.exponent[i] = vector_table(kLosslessTables[i]);
  return result;
}

constexpr bool lossless_tables_fit() {
  for (uint32_t i = 0; i < kScaleTables; ++i) {
    if (!fits_vector_table(kResidualTables[i])) return false;
  }
  for (uint32_t i = 0; i < kExponentTables; ++i) {
    if (!fits_vector_table(kLosslessTables[i])) return false;
  }
  return true;
}

static_assert(lossless_tables_fit(), "fewer than 32 symbols, the last one rare");
static_assert(sizeof(LosslessTables) <= 65536, "LineCode has 16 bits");
constexpr LosslessTables kVectorTables = lossless_tables();

// The steps of a writer.
inline uint64_t* plan_steps(size_t table, uint32_t shift, uint32_t out, uint32_t count,
                            uint64_t* step) {
  for (uint32_t at = 0; at < count; at += 32) {
    const uint32_t left = count - at;
    *step++ =
        StreamStep::pack(static_cast<uint32_t>(table), shift, out + at, left < 32 ? left : 32);
  }
  return step;
}

struct LosslessWork {
  alignas(64) uint32_t codes[kTileChannels + 16];
  alignas(64) int16_t scales[kTileChannels];
  // Of each line: the exponent that its integers count down from, where high_bytes() wants it.
  alignas(64) uint8_t base[kTileChannels];
  // Lines of channels, kTileTokens apart. Behind them the rest of a block that is turned.
  alignas(64) uint8_t lines[kTileElements + 4 * kTurnedBytes];
};

struct LosslessScratch {
  LosslessWork work[kInterleaved];
  alignas(64) uint8_t turned[kTileChannels / kTurnedLines * kTurnedBytes];
};
static_assert(sizeof(LosslessScratch) <= kCodedScratchBytes, "a worker's memory");

// The rows of a tile, and its part of the plane.
struct LosslessTarget {
  uint8_t* row = nullptr;  // nullptr: only look
  int64_t row_stride = 0;
  const uint8_t* plane = nullptr;
  uint32_t plane_stride = 0;
  bool stream = false;  // stores are whole lines of the cache

  LosslessTarget() = default;
  LosslessTarget(const Rows& rows, const Tile& tile, const uint8_t* section_plane, bool whole_lines)
      : row(rows.base == nullptr ? nullptr
                                 : rows.row(tile.head, tile.token) + 2 * size_t{tile.channel}),
        row_stride(rows.token_stride),
        plane(section_plane + tile.channel +
              (size_t{tile.head} * rows.token_count + tile.token) * rows.head_size),
        plane_stride(rows.head_size),
        stream(whole_lines) {}

  uint8_t* row_of(uint32_t token) const { return row + token * row_stride; }
  const uint8_t* plane_of(uint32_t token) const { return plane + size_t{token} * plane_stride; }
};

// ---- lines that are tokens

// High bytes of elements, in place. `base`: in the high bytes.
template <typename Element>
KVC_INLINE __m512i high_halves(__m512i base, __m512i value) {
  const __m512i upper = _mm512_slli_epi16(value, 8);
  if (Element::kRawBits == 0) return _mm512_sub_epi16(base, upper);
  const __m512i difference =
      _mm512_sub_epi16(base, _mm512_and_si512(upper, _mm512_set1_epi16(-0x0800)));
  const __m512i exponent =
      _mm512_and_si512(_mm512_srli_epi16(difference, 1), _mm512_set1_epi16(0x7C00));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(value, 13), _mm512_set1_epi16(-0x8000));
  const __m512i rest = _mm512_and_si512(upper, _mm512_set1_epi16(0x0300));
  return _mm512_ternarylogic_epi64(exponent, sign, rest, 0xFE);
}

template <typename Element, bool kStream>
struct TokenSink {
  static constexpr bool kWords = false;
  struct Line {
    uint8_t* row;
    const uint8_t* plane;
    __m512i base;
  };

  LosslessTarget target;
  const uint8_t* base;

  KVC_INLINE Line line(uint32_t index) const {
    return {target.row_of(index), target.plane_of(index),
            _mm512_maskz_set1_epi8(~kLowBytes, static_cast<char>(base[index]))};
  }

  template <bool kMasked>
  KVC_INLINE void put(Line& line, uint32_t, __m512i value, __mmask32 active) const {
    const __m256i bytes =
        kMasked ? _mm256_maskz_loadu_epi8(active, line.plane)
                : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line.plane));
    __m512i words = _mm512_add_epi16(high_halves<Element>(line.base, value),
                                     _mm512_cvtepu8_epi16(bytes));
    if (Element::kRotated) words = _mm512_shrdi_epi16(words, words, 1);
    store_elements<kStream, kMasked>(line.row, words, active);
    line.row += 2 * kStreamLanes;
    line.plane += kStreamLanes;
  }

  // A row of which the stream has nothing.
  void put_empty(uint32_t index, const LineShape& shape) const {
    Line empty = line(index);
    for (uint32_t step = 0; step < shape.steps; ++step) {
      const __mmask32 active = step + 1 == shape.steps ? shape.last : ~0u;
      put<true>(empty, step, _mm512_setzero_si512(), active);
    }
  }
};

// ---- lines that are channels

// A byte of each integer, line by line.
struct ByteSink {
  static constexpr bool kWords = false;
  using Line = uint8_t*;

  uint8_t* lines;

  KVC_INLINE Line line(uint32_t index) const { return lines + index * kTileTokens; }

  template <bool kMasked>
  KVC_INLINE void put(Line& line, uint32_t step, __m512i value, __mmask32) const {
    _mm256_store_si256(reinterpret_cast<__m256i*>(line + kStreamLanes * step),
                       _mm512_cvtepi16_epi8(value));
  }

  void put_empty(uint32_t index, const LineShape&) const { memset(line(index), 0, kTileTokens); }
};

// High bytes of elements from their bases and the bytes of the stream.
template <typename Element>
KVC_INLINE __m512i high_bytes(__m512i base, __m512i value) {
  if (Element::kRawBits == 0) return _mm512_sub_epi8(base, value);
  const __m512i upper = _mm512_and_si512(value, _mm512_set1_epi8(static_cast<char>(0xF8)));
  const __m512i exponent = _mm512_and_si512(
      _mm512_srli_epi16(_mm512_sub_epi8(base, upper), 1), _mm512_set1_epi8(0x7C));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(value, 5),
                                        _mm512_set1_epi8(static_cast<char>(0x80)));
  const __m512i rest = _mm512_and_si512(value, _mm512_set1_epi8(3));
  return _mm512_ternarylogic_epi64(exponent, sign, rest, 0xFE);
}

// A column of 64, see turn_lines().
KVC_INLINE __m512i load_turned(const uint8_t* turned) {
  const auto* piece = reinterpret_cast<const __m128i*>(turned);
  constexpr size_t kApart = kTurnedBytes / sizeof(__m128i);
  __m512i value = _mm512_castsi128_si512(_mm_load_si128(piece));
  value = _mm512_inserti64x2(value, _mm_load_si128(piece + kApart), 1);
  value = _mm512_inserti64x2(value, _mm_load_si128(piece + 2 * kApart), 2);
  return _mm512_inserti64x2(value, _mm_load_si128(piece + 3 * kApart), 3);
}

template <typename Element, bool kStream>
void store_channels(const LosslessTarget& target, const Tile& tile, const LosslessWork& work,
                    uint8_t* turned) {
  const uint32_t blocks = (tile.channels + kTurnedLines - 1) / kTurnedLines;
  for (uint32_t i = 0; i < blocks; ++i)
    turn_lines(work.lines + i * kTurnedLines * kTileTokens, turned + i * kTurnedBytes);
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    uint8_t* row = target.row_of(t);
    const uint8_t* plane = target.plane_of(t);
    const uint8_t* column = turned + turned_place(t);
    for (uint32_t c = 0; c < tile.channels; c += 64, column += 4 * kTurnedBytes) {
      const uint32_t count = tile.channels - c;
      const __m512i high =
          high_bytes<Element>(_mm512_load_si512(work.base + c), load_turned(column));
      __m512i first;
      __m512i second;
      if (count >= 64) {
        join_bytes<Element>(high, _mm512_loadu_si512(plane + c), &first, &second);
        store_elements<kStream, false>(row + 2 * c, first, ~0u);
        store_elements<kStream, false>(row + 2 * c + 64, second, ~0u);
      } else {
        const __m512i low = _mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t{0}, count), plane + c);
        join_bytes<Element>(high, low, &first, &second);
        store_elements<kStream, true>(row + 2 * c, first, first_of(count));
        if (count > 32)
          store_elements<kStream, true>(row + 2 * c + 64, second, first_of(count - 32));
      }
    }
  }
}

// ---- tiles

// Leaves the sequences of all lines in `work`, but for those that are empty.
template <typename Element, typename Sink>
void plan_elements(uint32_t lines, const LineShape& shape, const TileEntry& entry,
                   LosslessWork& work, const Sink& sink, TileStream& stream) {
  const __m512i reference = _mm512_set1_epi32(4 * entry.reference);
  const __m512i place = _mm512_slli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 24);
  uint32_t count = 0;
  for (uint32_t i = 0; i < lines; i += 16) {
    const __m512i words = _mm512_cvtepi16_epi32(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(work.scales + i)));
    const __m512i scale = _mm512_srai_epi32(_mm512_slli_epi32(words, 24), 24);
    const __mmask16 there = static_cast<__mmask16>(first_of(lines - i));
    const __mmask16 empty =
        _mm512_mask_cmpeq_epi32_mask(there, scale, _mm512_set1_epi32(kEmptyGroup));
    const __m512i e = _mm512_sub_epi32(reference, scale);
    const __m512i exponent = _mm512_maskz_srai_epi32(static_cast<__mmask16>(~empty), e, 2);
    _mm_store_si128(reinterpret_cast<__m128i*>(work.base + i),
                    _mm512_cvtepi32_epi8(_mm512_slli_epi32(exponent, Element::kRawBits)));
    const __m512i table = _mm512_mullo_epi32(_mm512_and_si512(e, _mm512_set1_epi32(3)),
                                             _mm512_set1_epi32(sizeof(VectorTable)));
    const uint32_t first =
        static_cast<uint32_t>(offsetof(LosslessTables, exponent) +
                              4 * entry.family * sizeof(VectorTable));
    const __m512i rest = _mm512_set1_epi32(
        static_cast<int>(LineCode::pack(first, Element::kRawBits, i)));
    const __mmask16 full = there & static_cast<__mmask16>(~empty);
    _mm512_storeu_si512(work.codes + count,
                        _mm512_maskz_compress_epi32(
                            full, _mm512_add_epi32(_mm512_add_epi32(table, place), rest)));
    count += static_cast<uint32_t>(__builtin_popcount(full));
    for (uint32_t left = empty; left != 0; left &= left - 1)
      sink.put_empty(i + static_cast<uint32_t>(__builtin_ctz(left)), shape);
  }
  stream.plan(work.codes, count, Element::kRawBits != 0);
}

template <typename Element, typename Sink>
bool read_elements(uint32_t lines, const LineShape& shape, const TileEntry* entries,
                   LosslessScratch& scratch, TileStream* streams, Sink* sinks, uint32_t count,
                   SectionBehind& behind) {
  for (uint32_t i = 0; i < count; ++i)
    plan_elements<Element>(lines, shape, entries[i], scratch.work[i], sinks[i], streams[i]);
  return run_streams(&kVectorTables, shape, streams, sinks, count, &behind);
}

template <typename Element, bool kStream>
bool read_tokens(uint32_t lines, const LineShape& shape, const TileEntry* entries,
                 const LosslessTarget* targets, LosslessScratch& scratch, TileStream* streams,
                 uint32_t count, SectionBehind& behind) {
  TokenSink<Element, kStream> sinks[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) sinks[i] = {targets[i], scratch.work[i].base};
  return read_elements<Element>(lines, shape, entries, scratch, streams, sinks, count, behind);
}

// Up to four tiles of one shape.
template <typename Element>
bool decode_tiles(const SectionCodec& codec, const Tile* tiles, const TileEntry* entries,
                  const LosslessTarget* targets, TileStream* streams, uint32_t count,
                  LosslessScratch& scratch, SectionBehind& behind) {
  const LosslessShape shape(codec, tiles[0]);
  WordSink scales[kInterleaved];
  uint32_t codes[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) {
    const CodeClass coding = code_class(entries[i].scale_class);
    const size_t table = offsetof(LosslessTables, scale) + coding.table * sizeof(VectorTable);
    codes[i] = LineCode::pack(static_cast<uint32_t>(table), coding.shift, 0);
    streams[i].plan(&codes[i], 1, coding.shift != 0);
    scales[i] = {scratch.work[i].scales};
  }
  if (!run_streams(&kVectorTables, LineShape(shape.lines), streams, scales, count, &behind))
    return false;
  const LineShape line(shape.elements);
  if (codec.channel || targets[0].row == nullptr) {
    ByteSink sinks[kInterleaved];
    for (uint32_t i = 0; i < count; ++i) sinks[i] = {scratch.work[i].lines};
    if (!read_elements<Element>(shape.lines, line, entries, scratch, streams, sinks, count,
                                behind)) {
      return false;
    }
  } else {
    const auto read = targets[0].stream ? read_tokens<Element, true> : read_tokens<Element, false>;
    if (!read(shape.lines, line, entries, targets, scratch, streams, count, behind)) return false;
  }
  const auto store =
      targets[0].stream ? store_channels<Element, true> : store_channels<Element, false>;
  for (uint32_t i = 0; i < count; ++i) {
    if (!streams[i].finished()) return false;
    if (codec.channel && targets[i].row != nullptr)
      store(targets[i], tiles[i], scratch.work[i], scratch.turned);
  }
  return true;
}

template <typename Element>
bool decode_coded_rows(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                       const Rows& rows, LosslessScratch& scratch) {
  const uint64_t elements = uint64_t{rows.head_count} * rows.token_count * rows.head_size;
  CodedParts parts;
  if (!open_coded(in, stored_bytes, tile_count(rows), elements, 0, &parts)) return false;
  const bool stream = rows_aligned(rows, size_t{2} * rows.head_size, 64);
  const uint8_t* at = parts.streams;
  uint64_t index = 0;
  SectionBehind behind(in, stored_bytes, elements);
  for (TileWalk walk(rows); !walk.ended();) {
    Tile tiles[kInterleaved];
    TileEntry entries[kInterleaved];
    LosslessTarget targets[kInterleaved];
    TileStream streams[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count, ++index) {
      const Tile& tile = tiles[count] = walk.tile();
      if (!tile.has_shape_of(tiles[0])) break;
      const TileEntry& entry = entries[count] = parts.entry(index);
      if (!streams[count].start(at, at + entry.stream_bytes)) return false;
      at += entry.stream_bytes;
      targets[count] = {rows, tile, parts.plane, stream};
    }
    if (!decode_tiles<Element>(codec, tiles, entries, targets, streams, count, scratch, behind))
      return false;
  }
  if (stream) _mm_sfence();
  return true;
}
