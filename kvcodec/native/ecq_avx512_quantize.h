// Kind ecq on AVX-512: scales, means and the numbers that the trellis is searched for,
// proto/FORMAT.md 3.10, steps 5 to 7. Included by ecq_avx512.cpp inside its target region and
// namespace, after ecq_avx512_measure.h.

struct ChosenScales {
  __m512i scale;
  __m512 inverse;  // to half steps
  __m512 gain;
  __m512i coding;  // offset of the table of family 0, shift << 24
  __m512i path;
};

// levelled() of sixteen exponents.
KVC_INLINE __m512i levelled_sixteen(__m512i exponent, __m512i reference) {
  const __m512i octave = _mm512_set1_epi32(kOctave);
  const __m512i x = _mm512_sub_epi32(exponent, reference);
  const __mmask16 near = _mm512_cmpge_epi32_mask(_mm512_add_epi32(x, octave),
                                                 _mm512_setzero_si512());
  const __m512i half = _mm512_srai_epi32(_mm512_min_epi32(x, octave), 1);
  return _mm512_mask_sub_epi32(exponent, near, exponent, half);
}

// Sixteen groups: EcqGroups::scale(), and what follows from it.
KVC_INLINE ChosenScales choose_sixteen(const EcqGroups& groups, uint32_t group, uint32_t count,
                                       const EcqScale& steps) {
  const __mmask16 there = first_lines(count);
  const __m512 largest = _mm512_maskz_loadu_ps(there, groups.largest + group);
  const __m512 top = _mm512_maskz_loadu_ps(there, groups.top + group);
  const __mmask16 empty = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_EQ_OQ) &
                          _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_EQ_OQ);
  const __m512i r = _mm512_set1_epi32(steps.reference);
  const __m512i zero = _mm512_setzero_si512();
  __m512i e = _mm512_maskz_loadu_epi32(there, groups.exponent + group);
  if (steps.per_token()) e = levelled_sixteen(e, r);
  e = _mm512_max_epi32(e, _mm512_sub_epi32(r, _mm512_set1_epi32(126)));
  const __m512 sixteenths = _mm512_loadu_ps(kSixteenths);
  ChosenScales chosen;
  chosen.scale = _mm512_mask_mov_epi32(_mm512_sub_epi32(r, e), empty,
                                       _mm512_set1_epi32(kEmptyGroup));
  __m512i c;
  for (;;) {
    const __m512i weighed =
        _mm512_mullo_epi32(chosen.scale, _mm512_set1_epi32(steps.weight));
    const __m512i t = _mm512_min_epi32(
        _mm512_sub_epi32(_mm512_set1_epi32(-steps.nominal), weighed), _mm512_set1_epi32(62));
    const __m512i d =
        _mm512_sub_epi32(_mm512_slli_epi32(_mm512_sub_epi32(r, chosen.scale), 2), t);
    const __m512i i = _mm512_sub_epi32(_mm512_set1_epi32(16), d);
    const __m512i octaves = _mm512_slli_epi32(_mm512_srai_epi32(i, 4), 23);
    chosen.inverse = _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(_mm512_permutexvar_ps(i, sixteenths)), octaves));
    c = _mm512_srai_epi32(_mm512_add_epi32(t, _mm512_set1_epi32(2)), 2);
    c = _mm512_max_epi32(_mm512_add_epi32(c, _mm512_set1_epi32(10)), zero);
    const __m512i more = _mm512_srai_epi32(_mm512_sub_epi32(_mm512_set1_epi32(17), c), 1);
    chosen.gain = _mm512_cvtepi32_ps(
        _mm512_add_epi32(_mm512_max_epi32(more, zero), _mm512_set1_epi32(64)));
    const __mmask16 fails =
        _mm512_cmp_ps_mask(_mm512_mul_ps(largest, _mm512_mul_ps(chosen.inverse, chosen.gain)),
                           _mm512_set1_ps(kLargestNumber), _CMP_NLE_UQ) |
        _mm512_cmp_ps_mask(_mm512_mul_ps(top, chosen.inverse), _mm512_set1_ps(kLargestMean),
                           _CMP_NLE_UQ);
    const __mmask16 coarser = fails & static_cast<__mmask16>(~empty);
    if (coarser == 0) break;
    chosen.scale =
        _mm512_mask_sub_epi32(chosen.scale, coarser, chosen.scale, _mm512_set1_epi32(1));
  }
  const __m512i shift = _mm512_max_epi32(
      _mm512_srai_epi32(_mm512_sub_epi32(c, _mm512_set1_epi32(13)), 2), zero);
  const __m512i table = _mm512_sub_epi32(c, _mm512_slli_epi32(shift, 2));
  chosen.coding =
      _mm512_or_si512(_mm512_mullo_epi32(table, _mm512_set1_epi32(sizeof(WriterTable))),
                      _mm512_slli_epi32(shift, 24));
  chosen.path = _mm512_min_epi32(c, _mm512_set1_epi32(17));
  return chosen;
}

// Floats near 2^23 are integers: adding this rounds, and leaves in the low half of the bits the
// number as a TrellisPair stores it, of its tile `parity`.
constexpr float trellis_bias(uint32_t parity) {
  return 0x1.8p23f + static_cast<float>(128 + 64 * 128 + 64 * 256 * parity);
}

// What is chosen for each group, and for each line.
struct TilePlan {
  alignas(64) uint32_t coding[kTileChannels];
  alignas(64) uint8_t path[kTileChannels];
  // Where the steps of a line begin; ~0: it has none. Behind the last line there are no lines.
  uint32_t steps_of[kTileChannels + 1];
};

// Of each group: what makes numbers from elements.
struct GroupFactors {
  alignas(64) float inverse[kTileChannels];
  alignas(64) float gain[kTileChannels];
};

// Sixteen lines from `line` on, of groups from `group` on: their factors, offsets and means.
inline void plan_sixteen(EncoderScratch& scratch, const MeasuredTile& measured,
                         const WrittenTile& written, uint32_t line, uint32_t group,
                         const GroupFactors& factors, float bias, int16_t* means) {
  const __m512i scale = _mm512_cvtepi16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(written.scale + group)));
  const __mmask16 full = _mm512_cmpneq_epi32_mask(scale, _mm512_set1_epi32(kEmptyGroup));
  const __m512 inverse = _mm512_loadu_ps(factors.inverse + group);
  const __m512 gain = _mm512_loadu_ps(factors.gain + group);
  const __m512i mean = _mm512_maskz_cvtps_epi32(
      full, _mm512_mul_ps(_mm512_loadu_ps(measured.average + line), inverse));
  _mm512_storeu_ps(scratch.factor + line, _mm512_mul_ps(inverse, gain));
  const __m512 numbers = _mm512_mul_ps(_mm512_cvtepi32_ps(mean), gain);
  _mm512_storeu_ps(scratch.offset + line, _mm512_sub_ps(_mm512_set1_ps(bias), numbers));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(means + line), _mm512_cvtepi32_epi16(mean));
}

// Factors, offsets and means of all lines.
inline void plan_lines(const VectorEncoder& encoder, const Tile& tile,
                       const MeasuredTile& measured, const GroupFactors& factors, float bias,
                       WrittenTile& written) {
  const uint32_t pairs = encoder.pairs();
  const uint32_t lines = encoder.lines(tile);
  int16_t means[kTileChannels + 32];
  // What is written behind the last line of one part is overwritten by the next.
  for (uint32_t i = 0; i < pairs; i += 16)
    plan_sixteen(encoder.scratch, measured, written, i, i, factors, bias, means);
  for (uint32_t i = 0; i < pairs; i += 16)
    plan_sixteen(encoder.scratch, measured, written, pairs + i, i, factors, bias, means);
  for (uint32_t i = 2 * pairs; i < lines; i += 16)
    plan_sixteen(encoder.scratch, measured, written, i, i - pairs, factors, bias, means);
  if (pairs == 0 || encoder.rotary->interleaved == 0) {
    memcpy(written.mean, means, lines * sizeof(int16_t));
    return;
  }
  for (uint32_t i = 0; i < pairs; ++i) {
    written.mean[2 * i] = means[i];
    written.mean[2 * i + 1] = means[pairs + i];
  }
  memcpy(written.mean + 2 * pairs, means + 2 * pairs, (lines - 2 * pairs) * sizeof(int16_t));
}

// The steps of all lines in the order of their sequences. A group has at most eight; they are
// written at once, and what is behind them is overwritten by the next group.
inline void plan_steps(const VectorEncoder& encoder, const Tile& tile, uint32_t parity,
                       TilePlan& plan, WrittenTile& written, TrellisPair& trellis) {
  const uint32_t pairs = encoder.pairs();
  const uint32_t groups = encoder.groups(tile);
  const uint32_t elements = encoder.elements(tile);
  const uint32_t steps = (elements + 31) / 32;  // of a line
  alignas(64) uint64_t place[kGroupSteps];
  uint8_t lanes[kGroupSteps];
  for (uint32_t i = 0; i < kGroupSteps; ++i) {
    lanes[i] = static_cast<uint8_t>((i + 1) % steps == 0 ? elements - 32 * (steps - 1) : 32);
    place[i] = StreamStep::pack(0, 0, 64 * i + 32 * parity, lanes[i]);
  }
  const __m512i places = _mm512_load_si512(place);
  uint32_t count = 0;
  for (uint32_t g = 0; g < groups; ++g) {
    const bool empty = written.scale[g] == kEmptyGroup;
    const bool pair = g < pairs;
    plan.steps_of[pair ? g : g + pairs] = empty ? ~0u : count;
    if (pair) plan.steps_of[g + pairs] = empty ? ~0u : count + steps;
    if (empty) continue;
    const uint64_t first = StreamStep::pack(plan.coding[g], 0, 64 * count, 0);
    _mm512_storeu_si512(written.steps + count,
                        _mm512_add_epi64(places, _mm512_set1_epi64(static_cast<int64_t>(first))));
    memset(trellis.path_table[parity] + count, plan.path[g], kGroupSteps);
    memcpy(trellis.lanes[parity] + count, lanes, kGroupSteps);
    count += pair ? 2 * steps : steps;
  }
  written.step_count = trellis.count[parity] = count;
}

// Scales, means and steps of a tile that is measured.
inline void plan_tile(const VectorEncoder& encoder, const Tile& tile, const EcqScale& scales,
                      uint32_t parity, TilePlan& plan, WrittenTile& written,
                      TrellisPair& trellis) {
  const MeasuredTile& measured = encoder.scratch.measured[parity];
  const uint32_t groups = encoder.groups(tile);
  GroupFactors factors;
  __m512i codings = _mm512_setzero_si512();
  for (uint32_t g = 0; g < groups; g += 16) {
    const ChosenScales chosen = choose_sixteen(measured.groups, g, groups - g, scales);
    _mm256_store_si256(reinterpret_cast<__m256i*>(written.scale + g),
                       _mm512_cvtepi32_epi16(chosen.scale));
    _mm512_store_ps(factors.inverse + g, chosen.inverse);
    _mm512_store_ps(factors.gain + g, chosen.gain);
    _mm512_store_si512(plan.coding + g, chosen.coding);
    codings = _mm512_or_si512(codings, chosen.coding);
    _mm_store_si128(reinterpret_cast<__m128i*>(plan.path + g), _mm512_cvtepi32_epi8(chosen.path));
  }
  written.shifted = _mm512_test_epi32_mask(codings, _mm512_set1_epi32(0xFF << 24)) != 0;
  plan.steps_of[kTileChannels] = ~0u;
  plan_lines(encoder, tile, measured, factors, trellis_bias(parity), written);
  plan_steps(encoder, tile, parity, plan, written, trellis);
}

// Bytes of numbers as TrellisPair has them: the fractions of 32 of them, then their whole parts.
struct alignas(64) NumberBytes {
  uint8_t of_words[64];     // of 32 words
  uint8_t of_even_odd[64];  // of words that are the low halves of two vectors
};

constexpr NumberBytes number_bytes() {
  NumberBytes result{};
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32;
    const int whole = i / 32;
    result.of_words[i] = static_cast<uint8_t>(2 * lane + whole);
    result.of_even_odd[i] = static_cast<uint8_t>(64 * (lane % 2) + 4 * (lane / 2) + whole);
  }
  return result;
}

constexpr NumberBytes kNumberBytes = number_bytes();

KVC_INLINE void store_numbers(TrellisPair& trellis, uint32_t step, uint32_t parity,
                              __m512i bytes) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(trellis.fraction[step] + 32 * parity),
                     _mm512_castsi512_si256(bytes));
  _mm256_store_si256(reinterpret_cast<__m256i*>(trellis.whole[step] + 32 * parity),
                     _mm512_extracti64x4_epi64(bytes, 1));
}

KVC_INLINE __m512i number_of(__m512 value, __m512 factor, __m512 offset) {
  return _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(value, factor), offset));
}

// 16 x 16 dwords, turned in place.
KVC_INLINE void turn_dwords(__m512i v[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    w[i] = _mm512_unpacklo_epi64(a, c);
    w[i + 1] = _mm512_unpackhi_epi64(a, c);
    w[i + 2] = _mm512_unpacklo_epi64(b, d);
    w[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(w[i], w[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(w[i], w[i + 4], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(w[i + 8], w[i + 12], 0xDD);
    v[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    v[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// Half of the lines of a block: 32 tokens of each, from `first` on, become a step. Where there are
// not so many (unless `kWhole`), the last one stands in for the others.
template <uint32_t kHalf, bool kWhole, typename Block>
KVC_INLINE void quantize_half(const EncoderScratch& scratch, const Tile& tile, const Block& block,
                              const BlockValues& values, uint32_t first,
                              const uint32_t* steps_of, uint32_t parity, TrellisPair& trellis) {
  const __m512 factor = block.template load_lines<kHalf>(scratch.factor);
  const __m512 offset = block.template load_lines<kHalf>(scratch.offset);
  const __m512i bytes = _mm512_load_si512(kNumberBytes.of_words);
  const uint32_t last = tile.tokens - 1;
  // Words of two neighbouring tokens.
  __m512i v[16];
#pragma GCC unroll 16
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t even = kWhole ? first + 2 * i : smaller_of(first + 2 * i, last);
    const uint32_t odd = kWhole ? first + 2 * i + 1 : smaller_of(first + 2 * i + 1, last);
    const __m512i low = number_of(_mm512_load_ps(values[even] + 16 * kHalf), factor, offset);
    const __m512i high = number_of(_mm512_load_ps(values[odd] + 16 * kHalf), factor, offset);
    v[i] = _mm512_mask_mov_epi16(low, 0xAAAAAAAA, _mm512_slli_epi32(high, 16));
  }
  turn_dwords(v);
#pragma GCC unroll 16
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t step = steps_of[block.template line_of<kHalf>(i)];
    if (step == ~0u) continue;
    store_numbers(trellis, step + first / 32, parity, _mm512_permutexvar_epi8(bytes, v[i]));
  }
}

template <typename Block>
void quantize_block(const EncoderScratch& scratch, const Tile& tile, const Block& block,
                    uint32_t index, const uint32_t* steps_of, uint32_t parity,
                    TrellisPair& trellis) {
  const BlockValues& v = scratch.measured[parity].values[index];
  for (uint32_t first = 0; first < tile.tokens; first += 32) {
    if (first + 32 <= tile.tokens) {
      quantize_half<0, true>(scratch, tile, block, v, first, steps_of, parity, trellis);
      quantize_half<1, true>(scratch, tile, block, v, first, steps_of, parity, trellis);
    } else {
      quantize_half<0, false>(scratch, tile, block, v, first, steps_of, parity, trellis);
      quantize_half<1, false>(scratch, tile, block, v, first, steps_of, parity, trellis);
    }
  }
}

inline void quantize_channels(const VectorEncoder& encoder, const Tile& tile,
                              const TilePlan& plan, uint32_t parity, TrellisPair& trellis) {
  const EncoderScratch& scratch = encoder.scratch;
  const uint32_t pairs = encoder.pairs();
  for (uint32_t i = 0; i < pairs; i += 16)
    quantize_block(scratch, tile, PairLines(pairs, i), i / 16, plan.steps_of, parity, trellis);
  uint32_t index = encoder.first_plain_block();
  for (uint32_t line = 2 * pairs; line < tile.channels; line += 32, ++index)
    quantize_block(scratch, tile, PlainLines(tile, line), index, plan.steps_of, parity, trellis);
}

template <typename Element>
void quantize_tokens(const VectorEncoder& encoder, const Tile& tile, const TilePlan& plan,
                     uint32_t parity, TrellisPair& trellis) {
  const EncoderScratch& scratch = encoder.scratch;
  const __m512i bytes = _mm512_load_si512(kNumberBytes.of_even_odd);
  const __m512 offset = _mm512_set1_ps(trellis_bias(parity));
  const uint8_t* row = encoder.row(tile);
  for (uint32_t t = 0; t < tile.tokens; ++t, row += encoder.rows.token_stride) {
    uint32_t step = plan.steps_of[t];
    if (step == ~0u) continue;
    const __m512 factor = _mm512_set1_ps(scratch.factor[t]);
    for (uint32_t c = 0; c < tile.channels; c += 32, ++step) {
      const __m512i words =
          _mm512_maskz_loadu_epi16(first_of(tile.channels - c), row + c * 2);
      const __m512i even = number_of(widen_even<Element>(words), factor, offset);
      const __m512i odd = number_of(widen_odd<Element>(words), factor, offset);
      store_numbers(trellis, step, parity, _mm512_permutex2var_epi8(even, bytes, odd));
    }
  }
}
