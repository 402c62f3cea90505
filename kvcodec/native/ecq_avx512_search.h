// Kind ecq on AVX-512: the search of the trellis. Included by ecq_avx512.cpp inside its target
// region and namespace.

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

// Rows that are read next, prefetched line by line while there is other work.
struct NextRows {
  const uint8_t* row = nullptr;
  int64_t stride = 0;
  uint32_t rows = 0;
  uint32_t row_bytes = 0;
  uint32_t at = 0;

  KVC_INLINE void fetch() {
    if (rows == 0) return;
    prefetch(row, at);
    at += 64;
    if (at < row_bytes) return;
    at = 0;
    row += stride;
    --rows;
  }
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
LaneStates search_forward(TrellisSteps& steps, NextRows next) {
  const __m512i square_low = _mm512_load_si512(kPathTables.square);
  const __m512i square_high = _mm512_load_si512(kPathTables.square + 32);
  __m512i t0 = _mm512_setzero_si512();
  __m512i t1 = _mm512_set1_epi16(kNever);
  __m512i t2 = t1;
  __m512i t3 = t1;
  const uint32_t count = steps.count;
  for (uint32_t i = 0; i < count; ++i) {
    const PathTable& path = kPathTables.table[steps.path_table[i]];
    next.fetch();
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

inline void search_tile(TrellisSteps& steps, bool masked, const NextRows& next, int8_t* k) {
  if (masked) return trace_back<true>(steps, search_forward<true>(steps, next), k);
  trace_back<false>(steps, search_forward<false>(steps, next), k);
}
