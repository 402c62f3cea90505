// Kind ecq on AVX-512: whether a section is derotated, proto/FORMAT.md 3.10, step 4. Included by
// ecq_avx512.cpp inside its target region and namespace, after ecq_avx512_measure.h.

// Exponents of the four vectors of a block: as they are, and as pairs that are turned back. Empty
// groups need no care here: without energy and mean they have the exponent kNoEnergy.
KVC_INLINE __m512i narrowing_of(const __m512* average, const __m512* energy, uint32_t elements) {
  const __m512i plain =
      _mm512_add_epi32(exponents_of(energy[0], absolute(average[0]), elements),
                       exponents_of(energy[1], absolute(average[1]), elements));
  const __m512i top = _mm512_max_epi32(absolute(average[2]), absolute(average[3]));
  const __m512i turned =
      exponents_of(_mm512_add_ps(energy[2], energy[3]), top, 2 * elements);
  return _mm512_sub_epi32(plain, _mm512_add_epi32(turned, turned));
}

// How much narrower the pairs of a block are when they are turned back.
template <typename Block>
__m512i narrowing_of_block(const VectorEncoder& encoder, const Tile& tile, const Block& given) {
  const uint32_t every = derotation_step(tile);
  const uint32_t tokens = tile.tokens / every;
  const int64_t stride = encoder.rows.token_stride * every;
  float* const values = encoder.scratch.measured[0].values[0][0];
  const uint8_t* row = encoder.row(tile);
  const Block block = given;  // no store can change it
  __m512 average[4];
  for (__m512& vector : average) vector = _mm512_setzero_ps();
  for (uint32_t t = 0; t < tokens; ++t, row += stride) {
    const __m512i words = block.words(row);
    const typename Block::Angles angles = block.angles(t * every);
    __m512 v[4] = {block.template widen_plain<0>(words), block.template widen_plain<1>(words)};
    v[2] = Block::template turn<0>(v[0], v[1], angles);
    v[3] = Block::template turn<1>(v[0], v[1], angles);
    for (uint32_t i = 0; i < 4; ++i) {
      _mm512_store_ps(values + 64 * t + 16 * i, v[i]);
      average[i] = _mm512_add_ps(average[i], v[i]);
    }
  }
  const __m512 count = _mm512_set1_ps(static_cast<float>(tokens));
  __m512 energy[4];
  for (uint32_t i = 0; i < 4; ++i) {
    average[i] = _mm512_div_ps(average[i], count);
    energy[i] = _mm512_setzero_ps();
  }
  for (uint32_t t = 0; t < tokens; ++t) {
    for (uint32_t i = 0; i < 4; ++i) {
      const __m512 deviation =
          _mm512_sub_ps(_mm512_load_ps(values + 64 * t + 16 * i), average[i]);
      energy[i] = _mm512_add_ps(energy[i], _mm512_mul_ps(deviation, deviation));
    }
  }
  return _mm512_maskz_mov_epi32(block.there, narrowing_of(average, energy, tokens));
}

template <typename Element, bool kInterleavedPairs>
int64_t narrowing_of_tile(VectorEncoder& encoder, const Tile& tile) {
  const float* table = encoder.rotary_of(tile);
  __m512i gain = _mm512_setzero_si512();
  for (uint32_t i = 0; i < encoder.pairs(); i += 16) {
    const TurnedBlock<Element, kInterleavedPairs> block(*encoder.rotary, table, i);
    gain = _mm512_add_epi32(gain, narrowing_of_block(encoder, tile, block));
  }
  return _mm512_reduce_add_epi32(gain);
}

// Whether the groups of a section are narrower without the rotation, which the encoder has.
template <typename Element>
bool choose_derotation(VectorEncoder& encoder) {
  const auto narrowing = encoder.rotary->interleaved != 0 ? narrowing_of_tile<Element, true>
                                                          : narrowing_of_tile<Element, false>;
  int64_t gain = 0;
  for (TileWalk walk(encoder.rows); !walk.ended(); walk.advance())
    gain += 4 * narrowing(encoder, walk.tile()) + walk.tile().channels;
  return gain > 0;
}
