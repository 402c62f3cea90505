// Kind ecq on AVX-512: the search of the trellis, proto/FORMAT.md 3.10, step 8. Included by
// ecq_avx512.cpp inside its target region and namespace.
//
// Prices and totals are bytes, so the lanes of two tiles are searched at once: those of the first
// tile are the lower half of a vector, those of the second one the upper half.

// Path costs of even and of odd indices k, by (k >> 1) + 32.
struct alignas(64) PathTable {
  uint8_t even[64];
  uint8_t odd[64];
};

constexpr uint32_t kPathTableCount = 18;  // the last one: classes above 16, which have none

struct PathTables {
  PathTable table[kPathTableCount];
  // Of each coset, by 64ths of the four half steps between its points.
  alignas(64) uint8_t square[4][64];
};

constexpr uint8_t path_cost_at(int c, int k) {
  return kPathCost[c][(k < -32 ? -32 : k > 31 ? 31 : k) + 32];
}

constexpr PathTables path_tables() {
  PathTables result{};
  for (int c = 0; c < 17; ++c) {
    for (int i = 0; i < 64; ++i) {
      result.table[c].even[i] = path_cost_at(c, 2 * (i - 32));
      result.table[c].odd[i] = path_cost_at(c, 2 * (i - 32) + 1);
    }
  }
  for (int coset = 0; coset < 4; ++coset) {
    for (int i = 0; i < 64; ++i) result.square[coset][i] = path_square((i - 16 * coset) & 63);
  }
  return result;
}

constexpr PathTables kPathTables = path_tables();

// Two tiles while they are searched, step by step. A number v of 1/64 half step is stored as
// v + 128 + 64 * 128: a fraction of 256ths of four half steps, and a whole part to which 64 is
// added in the second tile. The search puts the indices k in the place of the fractions.
struct TrellisPair {
  uint32_t count[2];  // steps
  bool masked;        // some step has idle lanes
  alignas(64) uint8_t fraction[kMaxTileSteps][64];
  alignas(64) uint8_t whole[kMaxTileSteps][64];
  uint8_t path_table[2][kMaxTileSteps + 8];
  uint8_t lanes[2][kMaxTileSteps + 8];

  uint32_t steps() const { return count[0] > count[1] ? count[0] : count[1]; }

  // Lets the shorter tile idle until the longer one ends.
  void even_out() {
    if (count[0] == count[1]) return;
    masked = true;
    const uint32_t shorter = count[0] < count[1] ? 0 : 1;
    const uint32_t missing = count[1 - shorter] - count[shorter];
    memset(path_table[shorter] + count[shorter], 0, missing);
    memset(lanes[shorter] + count[shorter], 0, missing);
  }

  uint64_t active(uint32_t step) const {
    return _bzhi_u32(~0u, lanes[0][step]) |
           static_cast<uint64_t>(_bzhi_u32(~0u, lanes[1][step])) << 32;
  }
};

// Of each step, which predecessor each state has.
using Predecessors = uint64_t[4];

// The two bits of the state of every lane.
struct LaneStates {
  uint64_t o;
  uint64_t q;
};

// Prices of the four cosets: of their points next to the number.
struct CosetPrices {
  __m512i of[4];

  KVC_INLINE CosetPrices(const TrellisPair& pair, uint32_t step) {
    const PathTable& first = kPathTables.table[pair.path_table[0][step]];
    const PathTable& second = kPathTables.table[pair.path_table[1][step]];
    const __m512i fraction = _mm512_load_si512(pair.fraction[step]);
    const __m512i whole = _mm512_load_si512(pair.whole[step]);
    const __m512i sixty_fourths = _mm512_srli_epi16(fraction, 2);  // its low six bits count
    const __m512i one = _mm512_set1_epi8(1);
    for (int coset = 0; coset < 4; ++coset) {
      // Below the coset's own place in the four half steps its point is the one before.
      __m512i m = whole;
      if (coset != 0) {
        const __mmask64 before =
            _mm512_cmplt_epu8_mask(fraction, _mm512_set1_epi8(static_cast<char>(64 * coset)));
        m = _mm512_mask_sub_epi8(whole, before, whole, one);
      }
      const bool odd = coset >= 2;
      const __m512i cost = _mm512_permutex2var_epi8(
          _mm512_load_si512(odd ? first.odd : first.even), m,
          _mm512_load_si512(odd ? second.odd : second.even));
      const __m512i square =
          _mm512_permutexvar_epi8(sixty_fourths, _mm512_load_si512(kPathTables.square[coset]));
      of[coset] = _mm512_adds_epi8(square, cost);
    }
  }
};

template <bool kMasked>
LaneStates search_forward(const TrellisPair& pair, Predecessors* before, LinesAhead& ahead) {
  // What states 1, 2 and 3 have paid more than state 0.
  const __m512i never = _mm512_set1_epi8(127);
  __m512i t1 = never;
  __m512i t2 = never;
  __m512i t3 = never;
  const uint32_t count = pair.steps();
  for (uint32_t i = 0; i < count; ++i) {
    ahead.fetch();
    const CosetPrices price(pair, i);
    const __m512i low0 = price.of[0];
    const __m512i high0 = _mm512_adds_epi8(t1, price.of[2]);
    const __m512i low1 = _mm512_adds_epi8(t2, price.of[1]);
    const __m512i high1 = _mm512_adds_epi8(t3, price.of[3]);
    const __m512i low2 = price.of[2];
    const __m512i high2 = _mm512_adds_epi8(t1, price.of[0]);
    const __m512i low3 = _mm512_adds_epi8(t2, price.of[3]);
    const __m512i high3 = _mm512_adds_epi8(t3, price.of[1]);
    before[i][0] = _mm512_cmplt_epi8_mask(high0, low0);
    before[i][1] = _mm512_cmplt_epi8_mask(high1, low1);
    before[i][2] = _mm512_cmplt_epi8_mask(high2, low2);
    before[i][3] = _mm512_cmplt_epi8_mask(high3, low3);
    const __mmask64 active = kMasked ? pair.active(i) : ~uint64_t{0};
    const __m512i least = _mm512_min_epi8(low0, high0);
    t1 = _mm512_mask_subs_epi8(t1, active, _mm512_min_epi8(low1, high1), least);
    t2 = _mm512_mask_subs_epi8(t2, active, _mm512_min_epi8(low2, high2), least);
    t3 = _mm512_mask_subs_epi8(t3, active, _mm512_min_epi8(low3, high3), least);
    // Every lane is active in the first step if ever. States 1 and 3 have no path of one step.
    if (i == 0) t1 = t3 = never;
  }
  const __m512i zero = _mm512_setzero_si512();
  const uint64_t low_q = _mm512_cmplt_epi8_mask(t1, zero);
  const uint64_t high_q = _mm512_cmplt_epi8_mask(t3, t2);
  const uint64_t o =
      _mm512_cmplt_epi8_mask(_mm512_min_epi8(t2, t3), _mm512_min_epi8(zero, t1));
  return {o, (o & high_q) | (~o & low_q)};
}

// Walks the cheapest path back.
template <bool kMasked>
void trace_back(TrellisPair& pair, const Predecessors* before, LaneStates states) {
  // From whole parts to twice the index.
  const __m512i offset = _mm512_inserti64x4(_mm512_set1_epi8(-64), _mm256_set1_epi8(64), 1);
  uint64_t o = states.o;
  uint64_t q = states.q;
  for (uint32_t i = pair.steps(); i-- != 0;) {
    const uint64_t* b = before[i];
    const uint64_t low = b[0] ^ ((b[0] ^ b[1]) & q);
    const uint64_t high = b[2] ^ ((b[2] ^ b[3]) & q);
    const uint64_t taken = low ^ ((low ^ high) & o);
    const uint64_t odd = o ^ taken;
    // The point of coset q + 2 * odd.
    __m512i place = _mm512_maskz_mov_epi8(q, _mm512_set1_epi8(64));
    place = _mm512_mask_add_epi8(place, odd, place, _mm512_set1_epi8(-128));
    const __m512i fraction = _mm512_load_si512(pair.fraction[i]);
    const __m512i whole = _mm512_load_si512(pair.whole[i]);
    __m512i k = _mm512_add_epi8(_mm512_add_epi8(whole, whole), offset);
    k = _mm512_mask_sub_epi8(k, _mm512_cmplt_epu8_mask(fraction, place), k, _mm512_set1_epi8(2));
    k = _mm512_mask_add_epi8(k, odd, k, _mm512_set1_epi8(1));
    _mm512_store_si512(pair.fraction[i], k);
    const uint64_t active = kMasked ? pair.active(i) : ~uint64_t{0};
    const uint64_t before_o = q;
    q = kMasked ? (q & ~active) | (taken & active) : taken;
    o = kMasked ? (o & ~active) | (before_o & active) : before_o;
  }
}

inline void search_pair(TrellisPair& pair, Predecessors* before, LinesAhead& ahead) {
  pair.even_out();
  if (pair.masked) return trace_back<true>(pair, before, search_forward<true>(pair, before, ahead));
  trace_back<false>(pair, before, search_forward<false>(pair, before, ahead));
}
