// Streams of coded sections on AVX-512 with VBMI and VBMI2: a step is one vector of 32 states.
// Included inside the target regions and namespaces of ecq_avx512.cpp and lossless_avx512.cpp.
//
// A step depends on the one before it, and takes about 30 cycles from state to state; so the
// streams of up to four tiles are decoded side by side. No branch depends on the data: one step in
// eight has an escape, and a branch that nobody foresees costs more than looking each time.

constexpr uint32_t kInterleaved = 4;
constexpr __mmask64 kLowBytes = 0x5555555555555555;

inline uint32_t smaller_of(uint32_t a, uint32_t b) { return a < b ? a : b; }

KVC_INLINE __mmask32 first_of(uint32_t count) {
  return static_cast<__mmask32>(_bzhi_u32(~0u, smaller_of(count, 32)));
}

// 32 elements of a row, or those that are there. With kStream they fill a line of the cache.
template <bool kStream, bool kMasked>
KVC_INLINE void store_elements(uint8_t* target, __m512i words, __mmask32 there) {
  if (kStream) return _mm512_stream_si512(reinterpret_cast<__m512i*>(target), words);
  if (kMasked) return _mm512_mask_storeu_epi16(target, there, words);
  _mm512_storeu_si512(target, words);
}

// A static table by vector look-ups: the slot gives the value, and the value modulo 64 or 32 the
// rest. The escape counts as the value behind the last one.
struct alignas(64) VectorTable {
  int8_t value[256];
  uint8_t rest[64];  // 256 - frequency
  uint8_t cum[64];
  uint16_t limit[32];  // the largest state that will take a byte
};

constexpr VectorTable vector_table(const CodingTable& table) {
  VectorTable result{};
  for (int slot = 0; slot < 256; ++slot) {
    const int j = table.slots[slot];
    const int value = table.first + j;
    const int frequency = table.freq[j];
    result.value[slot] = static_cast<int8_t>(value);
    result.rest[value & 63] = static_cast<uint8_t>(256 - frequency);
    result.cum[value & 63] = table.cum[j];
    // frequency * (x >> 8) + slot - cum < 256. The quotient may be 256.
    const int limit = 256 / frequency * 256 + table.cum[j] + 256 % frequency - 1;
    result.limit[value & 31] = static_cast<uint16_t>(limit < 65535 ? limit : 65535);
  }
  return result;
}

// Values differ modulo 32, and the escape has the last slot to itself.
constexpr bool fits_vector_table(const CodingTable& table) {
  return table.escape < 32 && table.freq[table.escape] == 1 && table.slots[255] == table.escape;
}

// What a step of a writer takes and where its values are, in one word.
struct StreamStep {
  uint64_t word;

  explicit StreamStep(uint64_t packed) : word(packed) {}

  // `table`: its offset in the tables, bytes. `out`: in the output of the tile, elements. `count`:
  // lanes.
  static uint64_t pack(uint32_t table, uint32_t shift, uint32_t out, uint32_t count) {
    return table | shift << 24 | static_cast<uint64_t>(out) << 32 |
           static_cast<uint64_t>(count) << 48;
  }
  uint32_t table() const { return static_cast<uint32_t>(word) & 0xFFFFFF; }
  uint32_t shift() const { return static_cast<uint32_t>(word) >> 24; }
  uint32_t out() const { return static_cast<uint32_t>(word >> 32) & 0xFFFF; }
  uint32_t count() const { return static_cast<uint32_t>(word >> 48); }
};

// A sequence to read: where its table lies in the tables (bytes), its shift, and the line of the
// tile that it is.
struct LineCode {
  uint32_t word;

  explicit LineCode(uint32_t packed) : word(packed) {}

  static constexpr uint32_t pack(uint32_t table, uint32_t shift, uint32_t line) {
    return table | shift << 16 | line << 24;
  }
  uint32_t table() const { return word & 0xFFFF; }
  uint32_t shift() const { return word >> 16 & 0xFF; }
  uint32_t line() const { return word >> 24; }
};

// All sequences that are read together have one length.
struct LineShape {
  uint32_t steps;
  uint32_t elements;
  __mmask32 last;  // lanes of the last step

  explicit LineShape(uint32_t count)
      : steps((count + kStreamLanes - 1) / kStreamLanes),
        elements(count),
        last(first_of(count - kStreamLanes * (steps - 1))) {}
};

struct TileStream {
  const uint8_t* at;
  const uint8_t* end;
  const uint32_t* codes;  // LineCode
  uint32_t lines;
  bool shifted;  // some line has raw bits
  __m512i x;

  // False: too short, or a state that no writer leaves.
  bool start(const uint8_t* begin, const uint8_t* stream_end) {
    if (static_cast<size_t>(stream_end - begin) < kStateBytes) return false;
    at = begin + kStateBytes;
    end = stream_end;
    x = _mm512_loadu_si512(begin);
    return _mm512_cmplt_epu16_mask(x, _mm512_set1_epi16(kFirstState)) == 0;
  }

  void plan(const uint32_t* line_codes, uint32_t count, bool has_raw_bits) {
    codes = line_codes;
    lines = count;
    shifted = has_raw_bits;
  }

  bool finished() const {
    return at == end && _mm512_cmpneq_epu16_mask(x, _mm512_set1_epi16(kFirstState)) == 0;
  }
};

KVC_INLINE __m256i next_bytes(const uint8_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

// `value << shift | raw bits`, where the low byte of each word counts; advances `*at`.
KVC_INLINE __m512i add_raw_bits(__m512i value, uint32_t shift, const uint8_t** at) {
  uint32_t plane;
  memcpy(&plane, *at, sizeof plane);
  value = _mm512_sll_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
  plane = shift == 0 ? 0 : plane;
  value = _mm512_mask_add_epi16(value, plane, value, _mm512_set1_epi16(1));
  if (__builtin_expect(shift > 1, false)) {
    for (uint32_t i = 1; i < shift; ++i) {
      memcpy(&plane, *at + 4 * i, sizeof plane);
      value = _mm512_mask_add_epi16(value, plane, value, _mm512_set1_epi16(1 << i));
    }
  }
  *at += 4 * shift;
  return value;
}

// One of the streams that are read side by side. A sink takes what is read:
//
//   kWords                            it wants integers of 16 bits; else only their low bytes count
//   Line line(index)                  what it needs to know of a line
//   put<kMasked>(line, step, integers, active)
template <typename Sink, bool kShift, bool kMasked>
struct Reader {
  TileStream stream;
  Sink sink;
  typename Sink::Line line;
  const uint8_t* table;
  uint32_t shift;

  Reader(const TileStream& from, const Sink& to) : stream(from), sink(to) {}

  KVC_INLINE void start_line(const uint8_t* tables) {
    const LineCode code(*stream.codes++);
    table = tables + code.table();
    shift = code.shift();
    line = sink.line(code.line());
  }

  // False: the stream ended too early. Bytes of states and of escapes are read up to 64 bytes
  // behind the end, which lies in the guard; raw bits only before the end, where they are at most
  // 16 bytes.
  KVC_INLINE bool take_step(uint32_t step, __mmask32 active) {
    TileStream& s = stream;
    if (__builtin_expect(s.at > s.end, false)) return false;
    const __m512i x = s.x;
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), x,
                                                 _mm512_load_si512(table + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), x,
                                                  _mm512_load_si512(table + 192));
    __m512i value = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(x), high);
    const __m512i limit = _mm512_permutexvar_epi16(value, _mm512_load_si512(table + 384));
    __mmask32 small = _mm512_cmple_epu16_mask(x, limit);
    __mmask64 escaped = _mm512_mask_cmpeq_epi8_mask(kLowBytes, x, _mm512_set1_epi8(-1));
    if (kMasked) {
      small &= active;
      escaped &= _pdep_u64(active, kLowBytes);
    }
    const __m512i rest =
        _mm512_maskz_permutexvar_epi8(kLowBytes, value, _mm512_load_si512(table + 256));
    const __m512i cum =
        _mm512_maskz_permutexvar_epi8(kLowBytes, value, _mm512_load_si512(table + 320));
    // frequency * (x >> 8) + slot - cum
    __m512i y = _mm512_sub_epi16(_mm512_sub_epi16(x, cum),
                                 _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), rest));
    if (kMasked) y = _mm512_mask_mov_epi16(x, active, y);
    const __m512i bytes =
        _mm512_maskz_expand_epi16(small, _mm512_cvtepu8_epi16(next_bytes(s.at)));
    s.x = _mm512_or_si512(_mm512_mask_slli_epi16(y, small, y, 8), bytes);
    s.at += __builtin_popcount(small);
    value = _mm512_mask_expand_epi8(value, escaped, _mm512_castsi256_si512(next_bytes(s.at)));
    s.at += __builtin_popcountll(escaped);
    if (Sink::kWords) value = _mm512_srai_epi16(_mm512_slli_epi16(value, 8), 8);
    if (kShift) {
      if (__builtin_expect(s.at > s.end, false)) return false;
      value = add_raw_bits(value, shift, &s.at);
    }
    sink.template put<kMasked>(line, step, value, active);
    return true;
  }
};

// `count` lines of each of the first kStreams streams.
template <uint32_t kStreams, bool kShift, bool kMasked, typename Sink>
bool take_lines(const void* all_tables, const LineShape& shape, TileStream** streams, Sink** sinks,
                uint32_t count, SectionBehind* behind) {
  using R = Reader<Sink, kShift, kMasked>;
  const uint8_t* tables = static_cast<const uint8_t*>(all_tables);
  R a(*streams[0], *sinks[0]);
  R b(*streams[kStreams > 1 ? 1 : 0], *sinks[kStreams > 1 ? 1 : 0]);
  R c(*streams[kStreams > 2 ? 2 : 0], *sinks[kStreams > 2 ? 2 : 0]);
  R d(*streams[kStreams > 3 ? 3 : 0], *sinks[kStreams > 3 ? 3 : 0]);
  const uint32_t steps = shape.steps;
  for (uint32_t i = 0; i < count; ++i) {
    behind->fetch(kStreams * shape.elements);
    a.start_line(tables);
    if (kStreams > 1) b.start_line(tables);
    if (kStreams > 2) c.start_line(tables);
    if (kStreams > 3) d.start_line(tables);
    for (uint32_t step = 0; step < steps; ++step) {
      const __mmask32 active = kMasked && step + 1 == steps ? shape.last : ~0u;
      bool sound = a.take_step(step, active);
      if (kStreams > 1) sound &= b.take_step(step, active);
      if (kStreams > 2) sound &= c.take_step(step, active);
      if (kStreams > 3) sound &= d.take_step(step, active);
      if (__builtin_expect(!sound, false)) return false;
    }
  }
  const auto put_back = [&](const R& reader, uint32_t i) {
    *streams[i] = reader.stream;
    *sinks[i] = reader.sink;
  };
  put_back(a, 0);
  if (kStreams > 1) put_back(b, 1);
  if (kStreams > 2) put_back(c, 2);
  if (kStreams > 3) put_back(d, 3);
  return true;
}

template <bool kShift, bool kMasked, typename Sink>
bool take_lines_of(const void* tables, const LineShape& shape, TileStream** streams, Sink** sinks,
                   uint32_t stream_count, uint32_t count, SectionBehind* behind) {
  switch (stream_count) {
    case 4:
      return take_lines<4, kShift, kMasked>(tables, shape, streams, sinks, count, behind);
    case 3:
      return take_lines<3, kShift, kMasked>(tables, shape, streams, sinks, count, behind);
    case 2:
      return take_lines<2, kShift, kMasked>(tables, shape, streams, sinks, count, behind);
    default:
      return take_lines<1, kShift, kMasked>(tables, shape, streams, sinks, count, behind);
  }
}

// All lines of up to kInterleaved streams, side by side as long as there are several.
template <typename Sink>
bool run_streams(const void* tables, const LineShape& shape, TileStream* streams, Sink* sinks,
                 uint32_t stream_count, SectionBehind* behind) {
  for (;;) {
    TileStream* running[kInterleaved];
    Sink* taking[kInterleaved];
    uint32_t count = 0;
    uint32_t lines = UINT32_MAX;
    bool shifted = false;
    for (uint32_t i = 0; i < stream_count; ++i) {
      TileStream& stream = streams[i];
      if (stream.lines == 0) continue;
      taking[count] = &sinks[i];
      running[count++] = &stream;
      lines = stream.lines < lines ? stream.lines : lines;
      shifted |= stream.shifted;
    }
    if (count == 0) return true;
    for (uint32_t i = 0; i < count; ++i) running[i]->lines -= lines;
    const auto take = shape.last != ~0u ? take_lines_of<true, true, Sink>
                      : shifted         ? take_lines_of<true, false, Sink>
                                        : take_lines_of<false, false, Sink>;
    if (!take(tables, shape, running, taking, count, lines, behind)) return false;
  }
}

// Takes integers as they are. Writes whole steps.
struct WordSink {
  static constexpr bool kWords = true;
  struct Line {};

  int16_t* out;

  KVC_INLINE Line line(uint32_t) const { return {}; }

  template <bool kMasked>
  KVC_INLINE void put(const Line&, uint32_t step, __m512i value, __mmask32) const {
    _mm512_store_si512(out + kStreamLanes * step, value);
  }
};
