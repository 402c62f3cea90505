// Kind ecq on AVX-512: encoding. Included by ecq_avx512.cpp inside its target region and namespace,
// after ecq_avx512_measure.h and ecq_avx512_quantize.h.
//
// Four tiles at a time: two and two are measured, quantized and searched, and the streams of all
// four are written side by side.

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

// ---- classes

// Family 1 if it codes some of the elements in fewer bits.
inline uint8_t cheapest_family(const WrittenTile& written, const TrellisPair& trellis) {
  const uint8_t* indices = trellis.fraction[0];
  __m512i gain = _mm512_setzero_si512();
  for (uint32_t i = 0; i < written.step_count; i += kFamilySteps) {
    const StreamStep step(written.steps[i]);
    const auto* table = reinterpret_cast<const WriterTable*>(
        reinterpret_cast<const uint8_t*>(kWriterTables.table) + step.table());
    const __m512i k = _mm512_cvtepi8_epi16(
        _mm256_load_si256(reinterpret_cast<const __m256i*>(indices + step.out())));
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

inline uint64_t* plan_side(uint32_t c, uint32_t first, uint32_t count, uint64_t* step) {
  const CodeClass coding = code_class(c);
  const uint32_t table = static_cast<uint32_t>(coding.table * sizeof(WriterTable));
  for (uint32_t at = 0; at < count; at += 32)
    *step++ = StreamStep::pack(table, coding.shift, first + at, smaller_of(count - at, 32));
  return step;
}

// The streams of some tiles.
inline bool write_tiles(const VectorEncoder& encoder, const Tile* tiles, uint32_t count,
                        LinesAhead& ahead, CodedWriter& writer) {
  EncoderScratch& scratch = encoder.scratch;
  StreamTarget targets[kInterleaved];
  for (uint32_t i = 0; i < count; ++i) {
    WrittenTile& written = scratch.written[i];
    targets[i] = {stream_body(scratch.stream[i]),
                  written.steps + written.step_count,
                  written.step_count,
                  scratch.pairs[i / 2].fraction,
                  kWriterTables.table + kFamilyStep * written.entry.family,
                  written.shifted,
                  encoder.elements(tiles[i]) % 32 != 0,
                  _mm512_set1_epi16(kFirstState)};
  }
  put_streams<false>(targets, count, ahead);
  for (uint32_t i = 0; i < count; ++i) {
    WrittenTile& written = scratch.written[i];
    static_assert(offsetof(WrittenTile, mean) ==
                      offsetof(WrittenTile, scale) + kTileChannels * sizeof(int16_t),
                  "means follow the scales");
    uint64_t* end = plan_side(written.entry.scale_class, 0, encoder.groups(tiles[i]),
                              written.side_steps);
    if (encoder.codec.channel)
      end = plan_side(written.entry.mean_class, kTileChannels, tiles[i].channels, end);
    targets[i].step = end;
    targets[i].steps = static_cast<uint32_t>(end - written.side_steps);
    targets[i].values = written.scale;
    targets[i].tables = kWriterTables.table;
    targets[i].shifted = written.entry.scale_class > 16 || written.entry.mean_class > 16;
    targets[i].masked = (encoder.groups(tiles[i]) | tiles[i].channels) % 32 != 0;
  }
  put_streams<true>(targets, count, ahead);
  for (uint32_t i = 0; i < count; ++i) {
    TileEntry& entry = scratch.written[i].entry;
    entry.stream_bytes = static_cast<uint16_t>(finish_stream(targets[i], scratch.stream[i]));
    if (!writer.add(entry, scratch.stream[i])) return false;
  }
  return true;
}

// The tiles of a section and then of the one that the worker encodes next, in groups of up to four.
struct TilesAhead {
  Rows rows;
  TileWalk walk;
  const Rows* next;

  TilesAhead(const Rows& here, const Rows* after) : rows(here), walk(here), next(after) {}

  LinesAhead take() {
    LinesAhead lines;
    if (walk.ended() && next != nullptr) {
      rows = *next;
      walk = TileWalk(rows);
      next = nullptr;
    }
    for (; lines.tiles < kInterleaved && !walk.ended(); walk.advance()) {
      const Tile& tile = walk.tile();
      lines.row[lines.tiles++] = rows.row(tile.head, tile.token) + tile.channel * 2;
      lines.rows = tile.tokens;
      lines.row_bytes = tile.channels * 2;
    }
    lines.stride = rows.token_stride;
    return lines;
  }
};

// What precedes the search of a tile that is measured. `index`: of those that are written together.
template <typename Element>
void take_tile(VectorEncoder& encoder, const Tile& tile, uint32_t index) {
  EncoderScratch& scratch = encoder.scratch;
  WrittenTile& written = scratch.written[index];
  TrellisPair& trellis = scratch.pairs[index / 2];
  const uint32_t parity = index % 2;
  const EcqScale scales(encoder.codec, reference_of(scratch.measured[parity].groups,
                                                    encoder.groups(tile),
                                                    encoder.pairs()));
  TilePlan plan;
  plan_tile(encoder, tile, scales, parity, plan, written, trellis);
  encoder.codec.channel ? quantize_channels(encoder, tile, plan, parity, trellis)
                        : quantize_tokens<Element>(encoder, tile, plan, parity, trellis);
  written.entry.reference = static_cast<uint8_t>(scales.reference + kReferenceBias);
  written.entry.scale_class = cheapest_class_of(written.scale, encoder.groups(tile));
  written.entry.mean_class =
      encoder.codec.channel ? cheapest_class_of(written.mean, tile.channels) : 0;
}

// Up to four tiles: the first `count` of `tiles`.
template <typename Element>
bool encode_tiles(VectorEncoder& encoder, const Tile* tiles, uint32_t count, LinesAhead& ahead,
                  CodedWriter& writer) {
  EncoderScratch& scratch = encoder.scratch;
  for (uint32_t first = 0; first < count; first += 2) {
    TrellisPair& trellis = scratch.pairs[first / 2];
    trellis.count[1] = 0;
    trellis.masked = false;
    const uint32_t end = smaller_of(first + 2, count);
    if (!measure_tiles<Element>(encoder, tiles + first, end - first)) return false;
    for (uint32_t i = first; i < end; ++i) {
      trellis.masked |= encoder.elements(tiles[i]) % 32 != 0;
      take_tile<Element>(encoder, tiles[i], i);
    }
    search_pair(trellis, scratch.before, ahead);
    for (uint32_t i = first; i < end; ++i)
      scratch.written[i].entry.family = cheapest_family(scratch.written[i], trellis);
  }
  return write_tiles(encoder, tiles, count, ahead, writer);
}

template <typename Element>
size_t encode_elements(const SectionCodec& codec, const Rows& rows, const Rows* next,
                       const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
  VectorEncoder encoder(codec, rows, scratch);
  if (can_derotate(codec, rows, rotary)) {
    encoder.rotary = rotary;
    if (!choose_derotation<Element>(encoder)) encoder.rotary = nullptr;
  }
  const size_t raw_bytes =
      static_cast<size_t>(rows.head_count) * rows.token_count * rows.head_size * 2;
  CodedWriter writer(out, pad64(raw_bytes), tile_count(rows), 0,
                     encoder.rotary != nullptr ? kFlagDerotated : 0);
  TilesAhead tiles_ahead(rows, next);
  tiles_ahead.take();
  for (TileWalk walk(rows); !walk.ended() && writer.fits();) {
    Tile tiles[kInterleaved];
    uint32_t count = 0;
    for (; count < kInterleaved && !walk.ended(); walk.advance(), ++count)
      tiles[count] = walk.tile();
    LinesAhead ahead = tiles_ahead.take();
    if (!encode_tiles<Element>(encoder, tiles, count, ahead, writer)) return 0;
  }
  return writer.finish(raw_bytes);
}

size_t encode_ecq_section(const SectionCodec& codec, const Rows& rows, const Rows* next,
                          const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
  if (codec.dtype == KVC_BF16)
    return encode_elements<Bf16>(codec, rows, next, rotary, scratch, out);
  if (codec.dtype == KVC_FP16)
    return encode_elements<Fp16>(codec, rows, next, rotary, scratch, out);
  return encode_ecq(codec, rows, rotary, scratch, out);
}
