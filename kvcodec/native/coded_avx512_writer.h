// Writing the streams of coded sections on AVX-512 with VBMI2: a step is one vector of 32 states.
// Included after coded_avx512.h inside its target region and namespace.

constexpr int kEscapeByte = 2048;  // its length in 1/256 bit

// A static table for an encoder, by symbol.
struct alignas(64) WriterTable {
  uint16_t freq[32];
  uint16_t inverse[32];  // 65536 / frequency, rounded down
  uint16_t cum[32];
  uint16_t cost[32];  // with the escape's byte
  uint16_t first[32];  // the same number everywhere
  uint16_t escape[32];
};

constexpr WriterTable writer_table(const CodingTable& table) {
  WriterTable result{};
  for (int j = 0; j <= table.escape; ++j) {
    result.freq[j] = table.freq[j];
    result.inverse[j] = static_cast<uint16_t>(table.freq[j] == 1 ? 65535 : 65536 / table.freq[j]);
    result.cum[j] = table.cum[j];
    result.cost[j] = static_cast<uint16_t>(table.cost[j] + (j == table.escape ? kEscapeByte : 0));
  }
  for (int i = 0; i < 32; ++i) {
    result.first[i] = static_cast<uint16_t>(static_cast<int16_t>(table.first));
    result.escape[i] = table.escape;
  }
  return result;
}

constexpr bool fits_writer_table(const CodingTable& table) { return table.escape < 32; }

struct StreamTarget {
  uint8_t* at;                // where it is written to
  const uint64_t* step;       // behind the last one to write
  uint32_t steps;
  const void* values;         // that the steps point into
  const WriterTable* tables;  // of the family
  bool shifted;               // some step has raw bits
  bool masked;                // or fewer than 32 lanes
  __m512i x;
};

KVC_INLINE __m512i symbols_of(const WriterTable& table, __m512i upper) {
  const __m512i j = _mm512_sub_epi16(upper, _mm512_load_si512(table.first));
  return _mm512_min_epu16(j, _mm512_load_si512(table.escape));
}

// A stream is written from its last byte to its first, but towards higher addresses: vectors hold
// lane 31 first, what compresses to their beginning is what comes next, and what is stored behind it
// is overwritten. finish_stream() turns it round.

struct alignas(64) ReversedBytes {
  uint8_t from_bytes[64];  // byte 31 - i in the upper half of word i
  uint8_t pending[64];     // low bytes of the words of a second vector, then of a first one
  uint8_t all[64];
  uint16_t words[32];
};

constexpr ReversedBytes reversed_bytes() {
  ReversedBytes result{};
  for (int i = 0; i < 32; ++i) {
    result.from_bytes[2 * i + 1] = static_cast<uint8_t>(31 - i);
    result.pending[i] = static_cast<uint8_t>(64 + 2 * i);
    result.pending[32 + i] = static_cast<uint8_t>(2 * i);
    result.words[i] = static_cast<uint16_t>(31 - i);
  }
  for (int i = 0; i < 64; ++i) result.all[i] = static_cast<uint8_t>(63 - i);
  return result;
}

constexpr ReversedBytes kReversed = reversed_bytes();
// Stores reach so far behind what is written.
constexpr size_t kWriterSlack = 64;

KVC_INLINE __m512i reversed_words(__m512i words) {
  return _mm512_permutexvar_epi16(_mm512_load_si512(kReversed.words), words);
}

KVC_INLINE __m512i reversed_all(__m512i bytes) {
  return _mm512_permutexvar_epi8(_mm512_load_si512(kReversed.all), bytes);
}

inline void reverse_in_place(uint8_t* begin, uint8_t* end) {
  for (; end - begin >= 64; begin += 64, end -= 64) {
    // Of fewer than 128 bytes both ends have some in common, which get the same values twice.
    const __m512i first = _mm512_loadu_si512(begin);
    const __m512i last = _mm512_loadu_si512(end - 64);
    _mm512_storeu_si512(begin, reversed_all(last));
    _mm512_storeu_si512(end - 64, reversed_all(first));
    if (end - begin < 128) return;
  }
  const uint32_t left = static_cast<uint32_t>(end - begin);
  const __mmask64 there = _bzhi_u64(~uint64_t{0}, left);
  const __m512i places = _mm512_add_epi8(_mm512_load_si512(kReversed.all),
                                         _mm512_set1_epi8(static_cast<char>(left - 64)));
  _mm512_mask_storeu_epi8(
      begin, there,
      _mm512_permutexvar_epi8(places, _mm512_maskz_loadu_epi8(there, begin)));
}

// Where a target writes to in the memory of its stream: before that come the states.
inline uint8_t* stream_body(uint8_t* stream) { return stream + kStateBytes; }

// Makes a stream of what a target has written. Returns its length.
inline size_t finish_stream(const StreamTarget& target, uint8_t* stream) {
  reverse_in_place(stream_body(stream), target.at);
  _mm512_storeu_si512(stream, reversed_words(target.x));
  return static_cast<size_t>(target.at - stream);
}

// Bit `i` of the words or bytes of a step.
template <bool kWords>
KVC_INLINE uint32_t plane_of(__m512i words, __m256i bytes, __mmask32 lanes, uint32_t i) {
  if (kWords)
    return _mm512_mask_test_epi16_mask(lanes, words,
                                       _mm512_set1_epi16(static_cast<int16_t>(1 << i)));
  return _mm256_mask_test_epi8_mask(lanes, bytes, _mm256_set1_epi8(static_cast<char>(1 << i)));
}

// One step of one stream. The values of words are integers of 16 bits, otherwise of 8. No branch
// depends on them: one step in eight has an escape.
template <bool kWords, bool kShifted, bool kMasked>
KVC_INLINE void put_step(StreamTarget& s) {
  const StreamStep step(*--s.step);
  const WriterTable& table = *reinterpret_cast<const WriterTable*>(
      reinterpret_cast<const uint8_t*>(s.tables) + step.table());
  const uint32_t shift = kShifted ? step.shift() : 0;
  const __mmask32 active = kMasked ? ~0u << (32 - step.count()) : ~0u;
  __m512i words;
  __m256i bytes;
  __m512i value;
  if (kWords) {
    words = _mm512_loadu_si512(static_cast<const int16_t*>(s.values) + step.out());
    value = reversed_words(words);
    if (kShifted) value = _mm512_sra_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
  } else {
    bytes = _mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const int8_t*>(s.values) + step.out()));
    value = _mm512_permutexvar_epi8(_mm512_load_si512(kReversed.from_bytes),
                                    _mm512_castsi256_si512(bytes));
    value = kShifted ? _mm512_sra_epi16(value, _mm_cvtsi32_si128(static_cast<int>(8 + shift)))
                     : _mm512_srai_epi16(value, 8);
  }
  if (kShifted) {
    const __mmask32 lanes = kMasked ? _bzhi_u32(~0u, step.count()) : ~0u;
    s.at += 4 * shift;
    // Of no planes the lowest one is overwritten.
    const uint32_t lowest = __builtin_bswap32(plane_of<kWords>(words, bytes, lanes, 0));
    memcpy(s.at - 4 * (shift != 0), &lowest, sizeof lowest);
    for (uint32_t i = 1; __builtin_expect(i < shift, false); ++i) {
      const uint32_t plane = __builtin_bswap32(plane_of<kWords>(words, bytes, lanes, i));
      memcpy(s.at - 4 * (i + 1), &plane, sizeof plane);
    }
  }
  const __m512i j = symbols_of(table, value);
  const __mmask32 escaped =
      _mm512_mask_cmpeq_epi16_mask(active, j, _mm512_load_si512(table.escape));
  const __m512i freq = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.freq));
  const __m512i inverse = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.inverse));
  const __m512i cum = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.cum));
  const __mmask32 full = _mm512_mask_cmpge_epu16_mask(active, _mm512_srli_epi16(s.x, 8), freq);
  // The bytes of escapes, and before them those of states.
  const __mmask64 taken = _mm512_kunpackd(full, escaped);
  const __m512i pending =
      _mm512_permutex2var_epi8(s.x, _mm512_load_si512(kReversed.pending), value);
  _mm512_storeu_si512(s.at, _mm512_maskz_compress_epi8(taken, pending));
  s.at += __builtin_popcountll(taken);
  const __m512i x = _mm512_mask_srli_epi16(s.x, full, s.x, 8);
  // The quotient, or one less.
  const __m512i quotient = _mm512_mulhi_epu16(x, inverse);
  const __m512i rest = _mm512_sub_epi16(x, _mm512_mullo_epi16(quotient, freq));
  const __mmask32 less = _mm512_cmpge_epu16_mask(rest, freq);
  __m512i y = _mm512_add_epi16(_mm512_add_epi16(rest, cum), _mm512_slli_epi16(quotient, 8));
  y = _mm512_mask_add_epi16(y, less, y, _mm512_sub_epi16(_mm512_set1_epi16(256), freq));
  s.x = kMasked ? _mm512_mask_mov_epi16(s.x, active, y) : y;
}

// What is read next, line by line of the cache: fetched while there is other work, because the
// hardware foresees no strided rows, and not all at once, because then it would have to wait.
struct LinesAhead {
  const uint8_t* row[kInterleaved];
  int64_t stride;
  uint32_t tiles = 0;
  uint32_t tile = 0;
  uint32_t row_bytes = 0;
  uint32_t at = 0;
  uint32_t rows = 0;  // left

  // Line by line of a row, and row by row of all tiles: heads often are neighbours.
  KVC_INLINE void fetch() {
    if (rows == 0) return;
    prefetch(row[tile], at);
    at += 64;
    if (at < row_bytes) return;
    at = 0;
    row[tile] += stride;
    if (++tile < tiles) return;
    tile = 0;
    --rows;
  }
};

template <uint32_t kStreams, bool kWords, bool kShifted, bool kMasked>
void put_steps(StreamTarget** targets, uint32_t count, LinesAhead& ahead) {
  StreamTarget a = *targets[0];
  StreamTarget b = *targets[kStreams > 1 ? 1 : 0];
  StreamTarget c = *targets[kStreams > 2 ? 2 : 0];
  StreamTarget d = *targets[kStreams > 3 ? 3 : 0];
  for (uint32_t i = 0; i < count; ++i) {
    ahead.fetch();
    ahead.fetch();
    put_step<kWords, kShifted, kMasked>(a);
    if (kStreams > 1) put_step<kWords, kShifted, kMasked>(b);
    if (kStreams > 2) put_step<kWords, kShifted, kMasked>(c);
    if (kStreams > 3) put_step<kWords, kShifted, kMasked>(d);
  }
  *targets[0] = a;
  if (kStreams > 1) *targets[1] = b;
  if (kStreams > 2) *targets[2] = c;
  if (kStreams > 3) *targets[3] = d;
}

template <bool kWords, bool kShifted, bool kMasked>
void put_steps_of(StreamTarget** targets, uint32_t target_count, uint32_t count,
                  LinesAhead& ahead) {
  switch (target_count) {
    case 4:
      return put_steps<4, kWords, kShifted, kMasked>(targets, count, ahead);
    case 3:
      return put_steps<3, kWords, kShifted, kMasked>(targets, count, ahead);
    case 2:
      return put_steps<2, kWords, kShifted, kMasked>(targets, count, ahead);
    default:
      return put_steps<1, kWords, kShifted, kMasked>(targets, count, ahead);
  }
}

// All steps of up to kInterleaved streams, from the last one to the first.
template <bool kWords>
void put_streams(StreamTarget* targets, uint32_t target_count, LinesAhead& ahead) {
  for (;;) {
    StreamTarget* running[kInterleaved];
    uint32_t count = 0;
    uint32_t steps = UINT32_MAX;
    bool shifted = false;
    bool masked = false;
    for (uint32_t i = 0; i < target_count; ++i) {
      if (targets[i].steps == 0) continue;
      running[count++] = &targets[i];
      steps = targets[i].steps < steps ? targets[i].steps : steps;
      shifted |= targets[i].shifted;
      masked |= targets[i].masked;
    }
    if (count == 0) return;
    for (uint32_t i = 0; i < count; ++i) running[i]->steps -= steps;
    masked    ? put_steps_of<kWords, true, true>(running, count, steps, ahead)
    : shifted ? put_steps_of<kWords, true, false>(running, count, steps, ahead)
              : put_steps_of<kWords, false, false>(running, count, steps, ahead);
  }
}
