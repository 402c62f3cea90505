// Writing the streams of coded sections on AVX-512 with VBMI2: a step is one vector of 32 states.
// Included after coded_avx512.h inside its target region and namespace.

constexpr int kEscapeByte = 2048;  // its length in 1/256 bit

// A static table for an encoder, by symbol.
struct alignas(64) WriterTable {
  uint16_t freq[32];
  uint16_t inverse[32];  // 65536 / frequency, rounded down
  uint16_t cum[32];
  uint16_t cost[32];  // with the escape's byte
  uint16_t first;
  uint16_t escape;
};

constexpr WriterTable writer_table(const CodingTable& table) {
  WriterTable result{};
  for (int j = 0; j <= table.escape; ++j) {
    result.freq[j] = table.freq[j];
    result.inverse[j] = static_cast<uint16_t>(table.freq[j] == 1 ? 65535 : 65536 / table.freq[j]);
    result.cum[j] = table.cum[j];
    result.cost[j] = static_cast<uint16_t>(table.cost[j] + (j == table.escape ? kEscapeByte : 0));
  }
  result.first = static_cast<uint16_t>(static_cast<int16_t>(table.first));
  result.escape = table.escape;
  return result;
}

constexpr bool fits_writer_table(const CodingTable& table) { return table.escape < 32; }

struct StreamTarget {
  uint8_t* at;                // first byte so far; the stream grows towards lower addresses
  const uint64_t* step;       // behind the last one to write
  uint32_t steps;
  const void* values;         // that the steps point into
  const WriterTable* tables;  // of the family
  __m512i x;
};

KVC_INLINE __m512i symbols_of(const WriterTable& table, __m512i upper) {
  const __m512i j =
      _mm512_sub_epi16(upper, _mm512_set1_epi16(static_cast<int16_t>(table.first)));
  return _mm512_min_epu16(j, _mm512_set1_epi16(static_cast<int16_t>(table.escape)));
}

// Puts the low bytes of the chosen words before the stream.
KVC_INLINE uint8_t* put_bytes(uint8_t* at, __mmask32 chosen, __m512i words) {
  const uint32_t count = static_cast<uint32_t>(__builtin_popcount(chosen));
  at -= count;
  _mm256_mask_storeu_epi8(at, _bzhi_u32(~0u, count),
                          _mm512_cvtepi16_epi8(_mm512_maskz_compress_epi16(chosen, words)));
  return at;
}

// One step of one stream. The values of words are integers of 16 bits, otherwise of 8.
template <bool kWords>
KVC_INLINE void put_step(StreamTarget& s) {
  const StreamStep step(*--s.step);
  const WriterTable& table = *reinterpret_cast<const WriterTable*>(
      reinterpret_cast<const uint8_t*>(s.tables) + step.table());
  const __mmask32 active = _bzhi_u32(~0u, step.count());
  __m512i value;
  if (kWords) {
    value = _mm512_loadu_si512(static_cast<const int16_t*>(s.values) + step.out());
  } else {
    value = _mm512_cvtepi8_epi16(_mm256_load_si256(
        reinterpret_cast<const __m256i*>(static_cast<const int8_t*>(s.values) + step.out())));
  }
  const uint32_t shift = step.shift();
  if (__builtin_expect(shift != 0, false)) {
    s.at -= 4 * shift;
    for (uint32_t i = 0; i < shift; ++i) {
      const __m512i bit = _mm512_set1_epi16(static_cast<int16_t>(1 << i));
      const uint32_t plane = _mm512_mask_test_epi16_mask(active, value, bit);
      memcpy(s.at + 4 * i, &plane, sizeof plane);
    }
    value = _mm512_sra_epi16(value, _mm_cvtsi32_si128(static_cast<int>(shift)));
  }
  const __m512i j = symbols_of(table, value);
  const __mmask32 escaped = _mm512_mask_cmpeq_epi16_mask(
      active, j, _mm512_set1_epi16(static_cast<int16_t>(table.escape)));
  if (__builtin_expect(escaped != 0, false)) s.at = put_bytes(s.at, escaped, value);
  const __m512i freq = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.freq));
  const __m512i inverse = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.inverse));
  const __m512i cum = _mm512_permutexvar_epi16(j, _mm512_load_si512(table.cum));
  const __mmask32 full = _mm512_mask_cmpge_epu16_mask(active, _mm512_srli_epi16(s.x, 8), freq);
  s.at = put_bytes(s.at, full, s.x);
  const __m512i x = _mm512_mask_srli_epi16(s.x, full, s.x, 8);
  // The quotient, or one less.
  const __m512i quotient = _mm512_mulhi_epu16(x, inverse);
  const __m512i rest = _mm512_sub_epi16(x, _mm512_mullo_epi16(quotient, freq));
  const __mmask32 less = _mm512_cmpge_epu16_mask(rest, freq);
  __m512i y = _mm512_add_epi16(_mm512_add_epi16(rest, cum), _mm512_slli_epi16(quotient, 8));
  y = _mm512_mask_add_epi16(y, less, y, _mm512_sub_epi16(_mm512_set1_epi16(256), freq));
  s.x = _mm512_mask_mov_epi16(s.x, active, y);
}

template <uint32_t kStreams, bool kWords>
void put_steps(StreamTarget** targets, uint32_t count) {
  StreamTarget a = *targets[0];
  StreamTarget b = *targets[kStreams > 1 ? 1 : 0];
  StreamTarget c = *targets[kStreams > 2 ? 2 : 0];
  StreamTarget d = *targets[kStreams > 3 ? 3 : 0];
  for (uint32_t i = 0; i < count; ++i) {
    put_step<kWords>(a);
    if (kStreams > 1) put_step<kWords>(b);
    if (kStreams > 2) put_step<kWords>(c);
    if (kStreams > 3) put_step<kWords>(d);
  }
  *targets[0] = a;
  if (kStreams > 1) *targets[1] = b;
  if (kStreams > 2) *targets[2] = c;
  if (kStreams > 3) *targets[3] = d;
}

// All steps of up to kInterleaved streams, from the last one to the first.
template <bool kWords>
void put_streams(StreamTarget* targets, uint32_t target_count) {
  for (;;) {
    StreamTarget* running[kInterleaved];
    uint32_t count = 0;
    uint32_t steps = UINT32_MAX;
    for (uint32_t i = 0; i < target_count; ++i) {
      if (targets[i].steps == 0) continue;
      running[count++] = &targets[i];
      steps = targets[i].steps < steps ? targets[i].steps : steps;
    }
    if (count == 0) return;
    for (uint32_t i = 0; i < count; ++i) running[i]->steps -= steps;
    switch (count) {
      case 4:
        put_steps<4, kWords>(running, steps);
        break;
      case 3:
        put_steps<3, kWords>(running, steps);
        break;
      case 2:
        put_steps<2, kWords>(running, steps);
        break;
      default:
        put_steps<1, kWords>(running, steps);
    }
  }
}
