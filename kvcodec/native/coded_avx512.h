// Streams of coded sections on AVX-512 with VBMI and VBMI2: a step is one vector of 32 states.
// Included by avx512.cpp inside its target region and namespace.
//
// A step depends on the one before it, and takes about 30 cycles from state to state; so the
// streams of up to four tiles are decoded side by side.

constexpr uint32_t kInterleaved = 4;
constexpr int8_t kEscapeValue = 96;
constexpr __mmask64 kLowBytes = 0x5555555555555555;

// A static table by vector look-ups: the slot gives the value, the value modulo 64 the rest. Values
// lie in -31...31, hence the place of the escape is free.
struct alignas(64) VectorTable {
  int8_t value[256];
  uint8_t rest[64];  // 256 - frequency
  uint8_t cum[64];
};

constexpr VectorTable vector_table(const CodingTable& table) {
  VectorTable result{};
  for (int slot = 0; slot < 256; ++slot) {
    const int j = table.slots[slot];
    const int value = j == table.escape ? kEscapeValue : table.first + j;
    result.value[slot] = static_cast<int8_t>(value);
    result.rest[value & 63] = static_cast<uint8_t>(256 - table.freq[j]);
    result.cum[value & 63] = table.cum[j];
  }
  return result;
}

constexpr bool fits_vector_table(const CodingTable& table) {
  return table.first >= -31 && table.first + table.escape - 1 <= 31;
}

// What a step takes and where its values go, in one word.
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

// What becomes of the integers of a step.
enum class Emit {
  kTrellis,  // ecq: half steps, as bytes
  kBytes,    // the integers modulo 256
  kWords     // the integers
};

struct TileStream {
  const uint8_t* at;
  const uint8_t* end;
  const uint64_t* step;
  uint32_t steps;
  void* out;
  bool masked;   // some step has fewer than 32 lanes
  bool shifted;  // some step has raw bits
  __m512i x;
  __m512i o;
  __m512i q;

  // False: too short, or a state that no writer leaves.
  bool start(const uint8_t* begin, const uint8_t* stream_end) {
    if (static_cast<size_t>(stream_end - begin) < kStateBytes) return false;
    at = begin + kStateBytes;
    end = stream_end;
    x = _mm512_loadu_si512(begin);
    o = q = _mm512_setzero_si512();
    return _mm512_cmplt_epu16_mask(x, _mm512_set1_epi16(kFirstState)) == 0;
  }

  bool finished() const {
    return at == end && _mm512_cmpneq_epu16_mask(x, _mm512_set1_epi16(kFirstState)) == 0;
  }
};

KVC_INLINE __m512i next_bytes(const uint8_t* at) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
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

// One step of one stream. False: the stream ended too early. At most 32 + 32 + 16 bytes are taken;
// each of the three is read from a place not more than 32 bytes behind the end, which lies in the
// guard.
template <Emit kEmit, bool kShift, bool kMasked>
KVC_INLINE bool take_step(const uint8_t* tables, TileStream& s) {
  const StreamStep step(*s.step++);
  if (__builtin_expect(s.at > s.end, false)) return false;
  const uint8_t* table = tables + step.table();
  const __mmask32 active = kMasked ? static_cast<__mmask32>(_bzhi_u32(~0u, step.count())) : ~0u;
  const __m512i x = s.x;
  const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(table), x,
                                               _mm512_load_si512(table + 64));
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), x,
                                                _mm512_load_si512(table + 192));
  __m512i value = _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(x), high);
  const __m512i rest =
      _mm512_maskz_permutexvar_epi8(kLowBytes, value, _mm512_load_si512(table + 256));
  const __m512i cum =
      _mm512_maskz_permutexvar_epi8(kLowBytes, value, _mm512_load_si512(table + 320));
  // frequency * (x >> 8) + slot - cum
  __m512i y = _mm512_sub_epi16(_mm512_sub_epi16(x, cum),
                               _mm512_mullo_epi16(_mm512_srli_epi16(x, 8), rest));
  if (kMasked) y = _mm512_mask_mov_epi16(x, active, y);
  const __mmask32 small = _mm512_cmplt_epu16_mask(y, _mm512_set1_epi16(256));
  const __m512i bytes = _mm512_maskz_expand_epi16(small, next_bytes(s.at));
  s.x = _mm512_or_si512(_mm512_mask_slli_epi16(y, small, y, 8), bytes);
  s.at += __builtin_popcount(small);
  const __mmask64 escapes =
      _mm512_mask_cmpeq_epi8_mask(kLowBytes, value, _mm512_set1_epi8(kEscapeValue));
  if (__builtin_expect(escapes != 0, false)) {
    const __mmask32 escaped = static_cast<__mmask32>(_pext_u64(escapes, kLowBytes)) & active;
    if (s.at > s.end) return false;
    value = _mm512_mask_expand_epi16(value, escaped, next_bytes(s.at));
    s.at += __builtin_popcount(escaped);
  }
  if (kEmit == Emit::kWords)
    value = _mm512_srai_epi16(_mm512_slli_epi16(value, 8), 8);
  if (kShift) value = add_raw_bits(value, step.shift(), &s.at);
  if (kEmit == Emit::kWords) {
    _mm512_storeu_si512(static_cast<int16_t*>(s.out) + step.out(), value);
    return true;
  }
  if (kEmit == Emit::kTrellis) {
    // (o, q) = (q xor (k & 1), o)
    const __m512i next = _mm512_ternarylogic_epi64(s.q, value, _mm512_set1_epi16(1), 0x78);
    value = _mm512_add_epi16(_mm512_add_epi16(value, value), s.o);
    s.q = kMasked ? _mm512_mask_mov_epi16(s.q, active, s.o) : s.o;
    s.o = kMasked ? _mm512_mask_mov_epi16(s.o, active, next) : next;
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint8_t*>(s.out) + step.out()),
                      _mm512_cvtepi16_epi8(value));
  return true;
}

// `count` steps of each of the first kStreams streams.
template <uint32_t kStreams, Emit kEmit, bool kShift, bool kMasked>
bool take_steps(const void* all_tables, TileStream** streams, uint32_t count) {
  const uint8_t* tables = static_cast<const uint8_t*>(all_tables);
  TileStream a = *streams[0];
  TileStream b = *streams[kStreams > 1 ? 1 : 0];
  TileStream c = *streams[kStreams > 2 ? 2 : 0];
  TileStream d = *streams[kStreams > 3 ? 3 : 0];
  for (uint32_t i = 0; i < count; ++i) {
    bool sound = take_step<kEmit, kShift, kMasked>(tables, a);
    if (kStreams > 1) sound &= take_step<kEmit, kShift, kMasked>(tables, b);
    if (kStreams > 2) sound &= take_step<kEmit, kShift, kMasked>(tables, c);
    if (kStreams > 3) sound &= take_step<kEmit, kShift, kMasked>(tables, d);
    if (__builtin_expect(!sound, false)) return false;
  }
  *streams[0] = a;
  if (kStreams > 1) *streams[1] = b;
  if (kStreams > 2) *streams[2] = c;
  if (kStreams > 3) *streams[3] = d;
  return true;
}

template <Emit kEmit, bool kShift, bool kMasked>
bool take_steps_of(const void* tables, TileStream** streams, uint32_t stream_count,
                   uint32_t count) {
  switch (stream_count) {
    case 4:
      return take_steps<4, kEmit, kShift, kMasked>(tables, streams, count);
    case 3:
      return take_steps<3, kEmit, kShift, kMasked>(tables, streams, count);
    case 2:
      return take_steps<2, kEmit, kShift, kMasked>(tables, streams, count);
    default:
      return take_steps<1, kEmit, kShift, kMasked>(tables, streams, count);
  }
}

// All steps of up to kInterleaved streams, side by side as long as there are several.
template <Emit kEmit>
bool run_streams(const void* tables, TileStream* streams, uint32_t stream_count) {
  for (;;) {
    TileStream* running[kInterleaved];
    uint32_t count = 0;
    uint32_t steps = UINT32_MAX;
    bool masked = false;
    bool shifted = false;
    for (uint32_t i = 0; i < stream_count; ++i) {
      TileStream& stream = streams[i];
      if (stream.steps == 0) continue;
      running[count++] = &stream;
      steps = stream.steps < steps ? stream.steps : steps;
      masked |= stream.masked;
      shifted |= stream.shifted;
    }
    if (count == 0) return true;
    for (uint32_t i = 0; i < count; ++i) running[i]->steps -= steps;
    const bool sound =
        masked    ? take_steps_of<kEmit, true, true>(tables, running, count, steps)
        : shifted ? take_steps_of<kEmit, true, false>(tables, running, count, steps)
                  : take_steps_of<kEmit, false, false>(tables, running, count, steps);
    if (!sound) return false;
  }
}
