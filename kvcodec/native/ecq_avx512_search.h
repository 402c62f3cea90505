// Kind ecq on AVX-512: the search of the trellis and the writing of streams. Included by
// ecq_avx512.cpp inside its target region and namespace, after coded_avx512.h.

// ---- the trellis

// Path costs of even and of odd indices k, by k >> 1 modulo 64.
struct alignas(64) PathTable {
  uint16_t even[64];
  uint16_t odd[64];
};

constexpr uint32_t kPathTableCount = 18;  // the last one: classes above 16, which have none

struct PathTables {
  PathTable table[kPathTableCount];
  alignas(64) uint16_t square[64];  // of x - 32
};

constexpr int path_index(int k) { return (k < -32 ? -32 : k > 31 ? 31 : k) + 32; }

constexpr PathTables path_tables() {
  PathTables result{};
  for (int c = 0; c < 17; ++c) {
    for (int m = -32; m < 32; ++m) {
      result.table[c].even[m & 63] = kPathCost[c][path_index(2 * m)];
      result.table[c].odd[m & 63] = kPathCost[c][path_index(2 * m + 1)];
    }
  }
  for (int i = 0; i < 64; ++i) result.square[i] = static_cast<uint16_t>((i - 32) * (i - 32));
  return result;
}

constexpr PathTables kPathTables = path_tables();

// Total costs are kept in 16 bits: a step adds at most 1024 + 1664, and the four never differ by
// more than two steps.
constexpr uint16_t kNever = 16384;
constexpr uint32_t kRebaseSteps = 8;
constexpr uint16_t largest_path_cost() {
  uint16_t largest = 0;
  for (int c = 0; c < 17; ++c) {
    for (int k = 0; k < 64; ++k) largest = kPathCost[c][k] > largest ? kPathCost[c][k] : largest;
  }
  return largest;
}
static_assert(2 * (1024 + largest_path_cost()) < kNever &&
                  kNever + (2 + kRebaseSteps) * (1024 + largest_path_cost()) <= UINT16_MAX,
              "sums of costs fit");

// Of each step of a tile: sixteenths of half steps, and which predecessor each state has.
struct TrellisSteps {
  uint32_t count;
  alignas(64) int16_t v[kMaxTileSteps][32];
  uint32_t before[kMaxTileSteps][4];
  uint8_t path_table[kMaxTileSteps];
  uint8_t lanes[kMaxTileSteps];
};

// The two bits of the state of every lane.
struct LaneStates {
  uint32_t o;
  uint32_t q;
};

KVC_INLINE __m512i price_of(__m512i x, const uint16_t* path, __m512i square_low,
                            __m512i square_high) {
  const __m512i square = _mm512_permutex2var_epi16(square_low, x, square_high);
  const __m512i cost = _mm512_permutex2var_epi16(_mm512_load_si512(path), _mm512_srai_epi16(x, 6),
                                                 _mm512_load_si512(path + 32));
  return _mm512_add_epi16(square, cost);
}

template <bool kMasked>
LaneStates search_forward(TrellisSteps& steps) {
  const __m512i square_low = _mm512_load_si512(kPathTables.square);
  const __m512i square_high = _mm512_load_si512(kPathTables.square + 32);
  __m512i t0 = _mm512_setzero_si512();
  __m512i t1 = _mm512_set1_epi16(kNever);
  __m512i t2 = t1;
  __m512i t3 = t1;
  const uint32_t count = steps.count;
  for (uint32_t i = 0; i < count; ++i) {
    const PathTable& path = kPathTables.table[steps.path_table[i]];
    const __m512i x0 = _mm512_add_epi16(_mm512_load_si512(steps.v[i]), _mm512_set1_epi16(32));
    const __m512i x1 = _mm512_sub_epi16(x0, _mm512_set1_epi16(16));
    const __m512i x2 = _mm512_sub_epi16(x0, _mm512_set1_epi16(32));
    const __m512i x3 = _mm512_sub_epi16(x0, _mm512_set1_epi16(48));
    const __m512i c0 = price_of(x0, path.even, square_low, square_high);
    const __m512i c1 = price_of(x1, path.even, square_low, square_high);
    const __m512i c2 = price_of(x2, path.odd, square_low, square_high);
    const __m512i c3 = price_of(x3, path.odd, square_low, square_high);
    const __m512i low0 = _mm512_add_epi16(t0, c0);
    const __m512i high0 = _mm512_add_epi16(t1, c2);
    const __m512i low1 = _mm512_add_epi16(t2, c1);
    const __m512i high1 = _mm512_add_epi16(t3, c3);
    const __m512i low2 = _mm512_add_epi16(t0, c2);
    const __m512i high2 = _mm512_add_epi16(t1, c0);
    const __m512i low3 = _mm512_add_epi16(t2, c3);
    const __m512i high3 = _mm512_add_epi16(t3, c1);
    uint32_t* before = steps.before[i];
    before[0] = _mm512_cmplt_epu16_mask(high0, low0);
    before[1] = _mm512_cmplt_epu16_mask(high1, low1);
    before[2] = _mm512_cmplt_epu16_mask(high2, low2);
    before[3] = _mm512_cmplt_epu16_mask(high3, low3);
    const __mmask32 active = kMasked ? _bzhi_u32(~0u, steps.lanes[i]) : ~0u;
    t0 = kMasked ? _mm512_mask_min_epu16(t0, active, low0, high0) : _mm512_min_epu16(low0, high0);
    t1 = kMasked ? _mm512_mask_min_epu16(t1, active, low1, high1) : _mm512_min_epu16(low1, high1);
    t2 = kMasked ? _mm512_mask_min_epu16(t2, active, low2, high2) : _mm512_min_epu16(low2, high2);
    t3 = kMasked ? _mm512_mask_min_epu16(t3, active, low3, high3) : _mm512_min_epu16(low3, high3);
    if (i % kRebaseSteps == kRebaseSteps - 1) {
      const __m512i least = _mm512_min_epu16(_mm512_min_epu16(t0, t1), _mm512_min_epu16(t2, t3));
      t0 = _mm512_sub_epi16(t0, least);
      t1 = _mm512_sub_epi16(t1, least);
      t2 = _mm512_sub_epi16(t2, least);
      t3 = _mm512_sub_epi16(t3, least);
    }
  }
  const uint32_t low_q = _mm512_cmplt_epu16_mask(t1, t0);
  const uint32_t high_q = _mm512_cmplt_epu16_mask(t3, t2);
  const uint32_t o =
      _mm512_cmplt_epu16_mask(_mm512_min_epu16(t2, t3), _mm512_min_epu16(t0, t1));
  return {o, (o & high_q) | (~o & low_q)};
}

// Walks the cheapest path back; `k` gets 32 indices for each step. Inlined, because GCC 12 takes a
// call of it for one without effect and leaves it out.
template <bool kMasked>
KVC_INLINE void trace_back(const TrellisSteps& steps, LaneStates states, int8_t* k) {
  uint32_t o = states.o;
  uint32_t q = states.q;
  for (uint32_t i = steps.count; i-- != 0;) {
    const uint32_t* before = steps.before[i];
    const uint32_t low = (before[0] & ~q) | (before[1] & q);
    const uint32_t high = (before[2] & ~q) | (before[3] & q);
    const uint32_t taken = (low & ~o) | (high & o);
    const uint32_t odd = o ^ taken;
    // The point of coset q + 2 * odd.
    __m512i x = _mm512_add_epi16(_mm512_load_si512(steps.v[i]), _mm512_set1_epi16(32));
    x = _mm512_mask_sub_epi16(x, q, x, _mm512_set1_epi16(16));
    x = _mm512_mask_sub_epi16(x, odd, x, _mm512_set1_epi16(32));
    const __m512i m = _mm512_srai_epi16(x, 6);
    __m512i index = _mm512_add_epi16(m, m);
    index = _mm512_mask_add_epi16(index, odd, index, _mm512_set1_epi16(1));
    _mm256_store_si256(reinterpret_cast<__m256i*>(k + 32 * i), _mm512_cvtepi16_epi8(index));
    const uint32_t active = kMasked ? _bzhi_u32(~0u, steps.lanes[i]) : ~0u;
    const uint32_t before_o = q;
    q = kMasked ? (q & ~active) | (taken & active) : taken;
    o = kMasked ? (o & ~active) | (before_o & active) : before_o;
  }
}

inline void search_tile(TrellisSteps& steps, bool masked, int8_t* k) {
  if (masked) return trace_back<true>(steps, search_forward<true>(steps), k);
  trace_back<false>(steps, search_forward<false>(steps), k);
}

// ---- streams

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
    result.cost[j] = static_cast<uint16_t>(table.cost[j] + (j == table.escape ? kEscapeLength : 0));
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
