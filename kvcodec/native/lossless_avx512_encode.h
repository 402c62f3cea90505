// Coded exponents on AVX-512 with VBMI and VBMI2, proto/FORMAT.md 3.8 and 3.10: encoding. Included
// by lossless_avx512.cpp inside its target region and namespace, after coded_avx512_writer.h.

struct LosslessWriterTables {
  WriterTable scale[kScaleTables];
  WriterTable exponent[kExponentTables];
};

constexpr LosslessWriterTables lossless_writer_tables() {
  LosslessWriterTables result{};
  for (uint32_t i = 0; i < kScaleTables; ++i) result.scale[i] = writer_table(kResidualTables[i]);
  for (uint32_t i = 0; i < kExponentTables; ++i)
    result.exponent[i] = writer_table(kLosslessTables[i]);
  return result;
}

constexpr bool lossless_writer_tables_fit() {
  for (uint32_t i = 0; i < kScaleTables; ++i) {
    if (!fits_writer_table(kResidualTables[i])) return false;
  }
  for (uint32_t i = 0; i < kExponentTables; ++i) {
    if (!fits_writer_table(kLosslessTables[i])) return false;
  }
  return true;
}

static_assert(lossless_writer_tables_fit(), "symbols are looked up among 32");
constexpr LosslessWriterTables kWriterTables = lossless_writer_tables();

// What is kept of a tile until its stream is written.
struct LosslessLines {
  uint64_t steps[kMaxTileSteps];
  uint64_t side_steps[kTileChannels / 32];
  uint32_t step_count;
  uint32_t lines_count;
  bool masked;  // some step of the elements has fewer than 32 lanes
  TileEntry entry;
  alignas(64) int16_t scales[kTileChannels];
  // High bytes, and then the symbols of bf16; those of fp16 are words. Lines kTileTokens or
  // kTileChannels apart.
  alignas(64) uint8_t lines[kTileElements];
  alignas(64) int16_t words[kTileElements];
};

struct LosslessEncoderScratch {
  LosslessLines tile[kInterleaved];
  uint8_t stream[kInterleaved][kMaxStreamBytes + kWriterSlack];
  alignas(64) uint8_t rows[kTurnedBytes];
  alignas(64) uint8_t turned[4 * kTurnedBytes];
  uint32_t sum[kTileChannels];
  uint8_t full[kTileChannels];
  LosslessScales scales;
};
static_assert(sizeof(LosslessEncoderScratch) <= kCodedScratchBytes, "a worker's memory");

// Masks of what there is of a vector.
KVC_INLINE __mmask32 words_of(uint32_t count) { return _bzhi_u32(~0u, count < 32 ? count : 32); }
KVC_INLINE __mmask64 bytes_of(uint32_t count) {
  return _bzhi_u64(~uint64_t{0}, count < 64 ? count : 64);
}

template <typename Element>
KVC_INLINE __m512i exponents_of(__m512i high) {
  if (Element::kRawBits == 0) return high;
  return _mm512_and_si512(_mm512_srli_epi16(high, 2), _mm512_set1_epi8(31));
}

KVC_INLINE uint32_t horizontal_sum(__m512i bytes) {
  return static_cast<uint32_t>(
      _mm_cvtsi128_si32(_mm512_castsi512_si128(sum_bytes(bytes))));
}

// High bytes of up to 64 elements; the low ones go to the plane.
template <typename Element>
KVC_INLINE __m512i split_elements(const uint8_t* source, uint32_t count, uint8_t* plane) {
  __m512i first, second;
  if (count >= 64) {
    first = _mm512_loadu_si512(source);
    second = _mm512_loadu_si512(source + 64);
  } else {
    first = _mm512_maskz_loadu_epi16(words_of(count), source);
    second = _mm512_maskz_loadu_epi16(words_of(count > 32 ? count - 32 : 0), source + 64);
  }
  if (Element::kRotated) {
    first = _mm512_shldi_epi16(first, first, 1);
    second = _mm512_shldi_epi16(second, second, 1);
  }
  _mm512_mask_storeu_epi8(plane, bytes_of(count), every_other_byte(first, second, 0));
  return every_other_byte(first, second, 1);
}

template <typename Element>
struct LosslessEncoder {
  const SectionCodec& codec;
  const Rows& rows;
  LosslessEncoderScratch& scratch;
  uint8_t* plane;  // of the section
  RowsFetcher ahead;

  LosslessEncoder(const SectionCodec& c, const Rows& r, LosslessEncoderScratch& memory,
                  uint8_t* low_bytes)
      : codec(c), rows(r), scratch(memory), plane(low_bytes), ahead(r, false) {}

  const uint8_t* source_of(const Tile& tile, uint32_t token) const {
    return rows.row(tile.head, tile.token + token) + 2 * size_t{tile.channel};
  }

  uint8_t* plane_of(const Tile& tile, uint32_t token) const {
    const size_t row = size_t{tile.head} * rows.token_count + tile.token + token;
    return plane + row * rows.head_size + tile.channel;
  }

  // Rows are lines.
  void take_tokens(const Tile& tile, LosslessLines& work) {
    for (uint32_t t = 0; t < tile.tokens; ++t) {
      ahead.fetch();
      const uint8_t* source = source_of(tile, t);
      uint8_t* low = plane_of(tile, t);
      uint8_t* line = work.lines + t * kTileChannels;
      __m512i sum = _mm512_setzero_si512();
      __m512i any = sum;
      for (uint32_t c = 0; c < tile.channels; c += 64) {
        const __m512i high = split_elements<Element>(source + 2 * c, tile.channels - c, low + c);
        _mm512_store_si512(line + c, high);
        sum = _mm512_add_epi64(
            sum, _mm512_sad_epu8(exponents_of<Element>(high), _mm512_setzero_si512()));
        any = _mm512_or_si512(any, high);
      }
      scratch.sum[t] = static_cast<uint32_t>(_mm512_reduce_add_epi64(sum));
      scratch.full[t] = _mm512_test_epi8_mask(any, any) != 0;
    }
  }

  // Columns are lines; 64 of them at a time.
  void take_channels(const Tile& tile, LosslessLines& work) {
    for (uint32_t c = 0; c < tile.channels; c += 64) {
      const uint32_t count = tile.channels - c < 64 ? tile.channels - c : 64;
      for (uint32_t k = 0; k < 4; ++k) {
        for (uint32_t i = 0; i < 16; ++i) {
          const uint32_t t = 16 * k + i;
          __m512i high = _mm512_setzero_si512();
          if (t < tile.tokens) {
            if (c == 0) ahead.fetch();
            high =
                split_elements<Element>(source_of(tile, t) + 2 * c, count, plane_of(tile, t) + c);
          }
          _mm512_store_si512(scratch.rows + 64 * i, high);
        }
        turn_lines(scratch.rows, scratch.turned + k * kTurnedBytes);
      }
      for (uint32_t i = 0; i < count; ++i) {
        const __m512i high = load_turned(scratch.turned + turned_place(i));
        _mm512_store_si512(work.lines + (c + i) * kTileTokens, high);
        scratch.sum[c + i] = horizontal_sum(exponents_of<Element>(high));
        scratch.full[c + i] = _mm512_test_epi8_mask(high, high) != 0;
      }
    }
  }

  // Symbols and steps of a line, and how many 1/256 bits family 1 saves.
  KVC_INLINE __m512i take_line(uint8_t* line, int16_t* words, uint32_t elements, int32_t e) const {
    const WriterTable& first = kWriterTables.exponent[e & 3];
    const WriterTable& second = kWriterTables.exponent[4 + (e & 3)];
    const __m512i base = _mm512_set1_epi8(static_cast<char>(e >> 2));
    __m512i gain = _mm512_setzero_si512();
    for (uint32_t at = 0; at < elements; at += 64) {
      const __m512i high = _mm512_load_si512(line + at);
      const __m512i symbols = _mm512_sub_epi8(base, exponents_of<Element>(high));
      const __m512i raw = _mm512_or_si512(
          _mm512_and_si512(_mm512_srli_epi16(high, 5), _mm512_set1_epi8(4)),
          _mm512_and_si512(high, _mm512_set1_epi8(3)));
      if (Element::kRawBits == 0) _mm512_store_si512(line + at, symbols);
      for (uint32_t half = 0; half < 2 && at + 32 * half < elements; ++half) {
        const __m512i wide = _mm512_cvtepi8_epi16(
            half == 0 ? _mm512_castsi512_si256(symbols) : _mm512_extracti64x4_epi64(symbols, 1));
        if (Element::kRawBits != 0) {
          const __m512i bits = _mm512_cvtepu8_epi16(
              half == 0 ? _mm512_castsi512_si256(raw) : _mm512_extracti64x4_epi64(raw, 1));
          _mm512_store_si512(words + at + 32 * half,
                             _mm512_or_si512(_mm512_slli_epi16(wide, 3), bits));
        }
        const __m512i before = _mm512_permutexvar_epi16(symbols_of(first, wide),
                                                        _mm512_load_si512(first.cost));
        const __m512i after = _mm512_permutexvar_epi16(symbols_of(second, wide),
                                                       _mm512_load_si512(second.cost));
        const uint32_t left = elements - at - 32 * half;
        const __m512i saved = _mm512_maskz_sub_epi16(words_of(left), before, after);
        gain = _mm512_add_epi32(gain, _mm512_madd_epi16(saved, _mm512_set1_epi16(1)));
      }
    }
    return gain;
  }

  static uint8_t cheapest_class(const int16_t* scales, uint32_t count) {
    uint32_t best = 0;
    uint32_t least = UINT32_MAX;
    for (uint32_t c = 0; c <= kMaxClass; c += 4) {
      const CodeClass coding = code_class(c);
      const WriterTable& table = kWriterTables.scale[coding.table];
      __m512i sum = _mm512_setzero_si512();
      for (uint32_t i = 0; i < count; i += 32) {
        const __m512i upper = _mm512_sra_epi16(_mm512_load_si512(scales + i),
                                               _mm_cvtsi32_si128(static_cast<int>(coding.shift)));
        const __m512i cost = _mm512_maskz_permutexvar_epi16(
            words_of(count - i), symbols_of(table, upper), _mm512_load_si512(table.cost));
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(cost, _mm512_set1_epi16(1)));
      }
      const uint32_t length =
          static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)) + 256 * coding.shift * count;
      best = length < least ? c : best;
      least = length < least ? length : least;
    }
    return static_cast<uint8_t>(best);
  }

  // All that precedes the stream of a tile.
  void take_tile(const Tile& tile, LosslessLines& work) {
    const LosslessShape shape(codec, tile);
    const uint32_t stride = codec.channel ? kTileTokens : kTileChannels;
    codec.channel ? take_channels(tile, work) : take_tokens(tile, work);
    LosslessScales& scales = scratch.scales;
    scales.choose(scratch.sum, scratch.full, shape);
    __m512i gain = _mm512_setzero_si512();
    uint64_t* step = work.steps;
    for (uint32_t line = 0; line < shape.lines; ++line) {
      work.scales[line] = static_cast<int16_t>(scales.scale[line]);
      if (scales.empty(line)) continue;
      const int32_t e = scales.exponent(line);
      const uint32_t at = line * stride;
      gain = _mm512_add_epi32(gain,
                              take_line(work.lines + at, work.words + at, shape.elements, e));
      const uint32_t table =
          static_cast<uint32_t>((static_cast<uint32_t>(e) & 3) * sizeof(WriterTable));
      step = plan_steps(table, Element::kRawBits, at, shape.elements, step);
    }
    work.step_count = static_cast<uint32_t>(step - work.steps);
    work.lines_count = shape.lines;
    work.masked = shape.elements % 32 != 0;
    work.entry = TileEntry{};
    work.entry.reference = static_cast<uint8_t>(scales.reference);
    work.entry.family = _mm512_reduce_add_epi32(gain) > 0;
    work.entry.scale_class = cheapest_class(work.scales, shape.lines);
  }

  // The streams of the first `count` tiles.
  bool write_tiles(uint32_t count, CodedWriter& writer) {
    StreamTarget targets[kInterleaved];
    for (uint32_t i = 0; i < count; ++i) {
      const LosslessLines& work = scratch.tile[i];
      const void* values = work.lines;
      if (Element::kRawBits != 0) values = work.words;
      targets[i] = {stream_body(scratch.stream[i]),
                    work.steps + work.step_count,
                    work.step_count,
                    values,
                    kWriterTables.exponent + 4 * work.entry.family,
                    Element::kRawBits != 0,
                    work.masked,
                    _mm512_set1_epi16(kFirstState)};
    }
    LinesAhead nothing;
    put_streams<Element::kRawBits != 0>(targets, count, nothing);
    for (uint32_t i = 0; i < count; ++i) {
      LosslessLines& work = scratch.tile[i];
      const CodeClass coding = code_class(work.entry.scale_class);
      const uint64_t* end = plan_steps(coding.table * sizeof(WriterTable), coding.shift, 0,
                                       work.lines_count, work.side_steps);
      targets[i].step = end;
      targets[i].steps = static_cast<uint32_t>(end - work.side_steps);
      targets[i].values = work.scales;
      targets[i].tables = kWriterTables.scale;
      targets[i].shifted = coding.shift != 0;
      targets[i].masked = work.lines_count % 32 != 0;
    }
    put_streams<true>(targets, count, nothing);
    for (uint32_t i = 0; i < count; ++i) {
      TileEntry& entry = scratch.tile[i].entry;
      entry.stream_bytes = static_cast<uint16_t>(finish_stream(targets[i], scratch.stream[i]));
      if (!writer.add(entry, scratch.stream[i])) return false;
    }
    return true;
  }
};

template <typename Element>
size_t encode_coded_rows(const SectionCodec& codec, const Rows& rows,
                         LosslessEncoderScratch& scratch, uint8_t* out) {
  const size_t elements = size_t{rows.head_count} * rows.token_count * rows.head_size;
  CodedWriter writer(out, pad64(2 * elements), tile_count(rows), elements, 0);
  if (!writer.fits()) return 0;
  LosslessEncoder<Element> encoder(codec, rows, scratch, writer.plane());
  for (TileWalk walk(rows); !walk.ended();) {
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count)
      encoder.take_tile(walk.tile(), scratch.tile[count]);
    if (!encoder.write_tiles(count, writer)) return 0;
  }
  return writer.finish(2 * elements);
}
