// Coded exponents on AVX-512 with VBMI and VBMI2, proto/FORMAT.md 3.8: decoding. Included by
// lossless_avx512.cpp inside its target region and namespace, after coded_avx512.h.
//
// Up to four tiles at a time: their streams become bytes in the worker's scratch, line by line as
// the stream has them; then these and the plane become rows.

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

static_assert(lossless_tables_fit(), "values lie in -31...31");
constexpr LosslessTables kVectorTables = lossless_tables();

struct LosslessWork {
  uint64_t steps[kMaxTileSteps];
  alignas(64) int16_t scales[kTileChannels];
  // Of each line: the exponent that its integers count down from, in place for high_bytes().
  alignas(64) uint8_t base[kTileChannels];
  // Lines kTileTokens or kTileChannels apart. Behind them the rest of a block that is turned.
  alignas(64) uint8_t lines[kTileElements + kTurnedBytes];
};

struct LosslessScratch {
  LosslessWork work[kInterleaved];
  alignas(64) uint8_t turned[4 * kTurnedBytes];
};
static_assert(sizeof(LosslessScratch) <= kCodedScratchBytes, "a worker's memory");

// ---- streams

inline uint64_t* plan_steps(size_t table, uint32_t shift, uint32_t out, uint32_t count,
                            uint64_t* step) {
  for (uint32_t at = 0; at < count; at += 32) {
    const uint32_t left = count - at;
    *step++ =
        StreamStep::pack(static_cast<uint32_t>(table), shift, out + at, left < 32 ? left : 32);
  }
  return step;
}

inline void plan_scales(const LosslessShape& shape, const TileEntry& entry, LosslessWork& work,
                        TileStream& stream) {
  const CodeClass coding = code_class(entry.scale_class);
  const size_t table = offsetof(LosslessTables, scale) + coding.table * sizeof(VectorTable);
  uint64_t* end = plan_steps(table, coding.shift, 0, shape.lines, work.steps);
  stream.step = work.steps;
  stream.steps = static_cast<uint32_t>(end - work.steps);
  stream.out = work.scales;
  stream.masked = shape.lines % 32 != 0;
  stream.shifted = coding.shift != 0;
}

template <typename Element>
void plan_elements(const LosslessShape& shape, const TileEntry& entry, uint32_t stride,
                   LosslessWork& work, TileStream& stream) {
  uint64_t* step = work.steps;
  for (uint32_t line = 0; line < shape.lines; ++line) {
    const int32_t s = static_cast<int8_t>(work.scales[line]);
    if (s == kEmptyGroup) {
      work.base[line] = 0;
      memset(work.lines + line * stride, 0, shape.elements);
      continue;
    }
    const int32_t e = 4 * entry.reference - s;
    work.base[line] = static_cast<uint8_t>(static_cast<uint32_t>(e >> 2) << Element::kRawBits);
    const size_t table = 4 * entry.family + (static_cast<uint32_t>(e) & 3);
    step = plan_steps(offsetof(LosslessTables, exponent) + table * sizeof(VectorTable),
                      Element::kRawBits, line * stride, shape.elements, step);
  }
  stream.step = work.steps;
  stream.steps = static_cast<uint32_t>(step - work.steps);
  stream.out = work.lines;
  stream.masked = shape.elements % 32 != 0;
  stream.shifted = Element::kRawBits != 0;
}

// ---- rows

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

// 64 elements or the `count` that there are. With kStream they are a multiple of 32.
template <typename Element, bool kStream>
KVC_INLINE void store_high_bytes(__m512i high, const uint8_t* low_bytes, uint32_t count,
                                 uint8_t* target) {
  using Store = ElementStore<Element, kStream>;
  if (count >= 64)
    return Store::join(high, _mm512_loadu_si512(low_bytes), target);
  const __m512i low = _mm512_maskz_loadu_epi8(_bzhi_u64(~uint64_t{0}, count), low_bytes);
  if (kStream) return Store::join_half(high, low, target);
  alignas(64) uint8_t elements[128];
  ElementStore<Element, false>::join(high, low, elements);
  memcpy(target, elements, 2 * count);
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
void store_channels(const Rows& rows, const Tile& tile, const LosslessWork& work, uint8_t* turned,
                    const uint8_t* plane, SectionBehind& behind) {
  for (uint32_t c = 0; c < tile.channels; c += 64) {
    const uint32_t count = tile.channels - c;
    for (uint32_t i = 0; i < 4; ++i) {
      if (16 * i < count)
        turn_lines(work.lines + (c + 16 * i) * kTileTokens, turned + i * kTurnedBytes);
    }
    const __m512i base = _mm512_load_si512(work.base + c);
    uint8_t* target = rows.row(tile.head, tile.token) + 2 * (size_t{tile.channel} + c);
    const uint8_t* low = plane + c;
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      behind.fetch(count < 64 ? count : 64);
      const __m512i value = load_turned(turned + turned_place(t));
      store_high_bytes<Element, kStream>(high_bytes<Element>(base, value), low, count, target);
      target += rows.token_stride;
      low += rows.head_size;
    }
  }
}

template <typename Element, bool kStream>
void store_tokens(const Rows& rows, const Tile& tile, const LosslessWork& work,
                  const uint8_t* plane, SectionBehind& behind) {
  uint8_t* target = rows.row(tile.head, tile.token) + 2 * size_t{tile.channel};
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    behind.fetch(tile.channels);
    const __m512i base = _mm512_set1_epi8(static_cast<char>(work.base[t]));
    const uint8_t* line = work.lines + t * kTileChannels;
    for (uint32_t c = 0; c < tile.channels; c += 64) {
      const __m512i high = high_bytes<Element>(base, _mm512_load_si512(line + c));
      store_high_bytes<Element, kStream>(high, plane + c, tile.channels - c, target + 2 * c);
    }
    target += rows.token_stride;
    plane += rows.head_size;
  }
}

template <typename Element, bool kStream>
bool decode_coded_rows(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                       const Rows& rows, LosslessScratch& scratch) {
  const uint64_t elements = uint64_t{rows.head_count} * rows.token_count * rows.head_size;
  CodedParts parts;
  if (!open_coded(in, stored_bytes, tile_count(rows), elements, 0, &parts)) return false;
  const uint32_t stride = codec.channel ? kTileTokens : kTileChannels;
  const uint8_t* at = parts.streams;
  uint64_t index = 0;
  SectionBehind behind(in, stored_bytes, elements);
  for (TileWalk walk(rows); !walk.ended();) {
    Tile tiles[kInterleaved];
    TileEntry entries[kInterleaved];
    TileStream streams[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count, ++index) {
      tiles[count] = walk.tile();
      const TileEntry& entry = entries[count] = parts.entry(index);
      if (!streams[count].start(at, at + entry.stream_bytes)) return false;
      at += entry.stream_bytes;
      plan_scales({codec, tiles[count]}, entry, scratch.work[count], streams[count]);
    }
    if (!run_streams<Emit::kWords>(&kVectorTables, streams, count)) return false;
    for (uint32_t i = 0; i < count; ++i)
      plan_elements<Element>({codec, tiles[i]}, entries[i], stride, scratch.work[i], streams[i]);
    if (!run_streams<Emit::kBytes>(&kVectorTables, streams, count)) return false;
    for (uint32_t i = 0; i < count; ++i) {
      if (!streams[i].finished()) return false;
      if (rows.base == nullptr) continue;
      const Tile& tile = tiles[i];
      const size_t row = size_t{tile.head} * rows.token_count + tile.token;
      const uint8_t* plane = parts.plane + row * rows.head_size + tile.channel;
      if (codec.channel)
        store_channels<Element, kStream>(rows, tile, scratch.work[i], scratch.turned, plane,
                                         behind);
      else
        store_tokens<Element, kStream>(rows, tile, scratch.work[i], plane, behind);
    }
  }
  return true;
}
