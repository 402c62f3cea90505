// Kind ecq with AVX2: decoding. Included by ecq_avx2.cpp inside its target region and namespace,
// after coded_avx2.h.
//
// A tile's stream becomes half steps in the worker's scratch, a byte each, line by line. Then eight
// lines (or channels of a token) at a time become values, are turned and rotated, and stored.

struct EcqGatherTables {
  GatherTable table[34];
};

constexpr EcqGatherTables ecq_gather_tables() {
  EcqGatherTables result{};
  for (uint32_t i = 0; i < 34; ++i) result.table[i] = gather_table(kResidualTables[i]);
  return result;
}

constexpr EcqGatherTables kEcqTables = ecq_gather_tables();

constexpr uint32_t kEight = 8;

// A tile at work, in the worker's scratch. What is turned in blocks has room behind it.
struct EcqWork {
  uint8_t scale[kTileChannels + kStreamLanes];  // of each group
  int16_t mean[kTileChannels + kStreamLanes];   // of each channel
  float half[kTileChannels + kEight];           // of each line
  uint8_t units[kTileElements + kEight * kTileTokens];
};
static_assert(sizeof(EcqWork) <= kCodedScratchBytes, "a worker's memory");

// Both bits of every lane of the trellis.
struct Trellis {
  uint32_t o = 0;
  uint32_t q = 0;

  // `count` indices become half steps.
  KVC_INLINE void take(uint32_t count, uint8_t* units) {
    const __m256i k = load_vector(units);
    const auto odd = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(k, 7)));
    store_vector(units, _mm256_sub_epi8(_mm256_add_epi8(k, k), bytes_of_plane(o, false)));
    const uint32_t active = _bzhi_u32(~0u, count);
    const uint32_t next = q ^ odd;
    q = (q & ~active) | (o & active);
    o = (o & ~active) | (next & active);
  }
};

inline uint32_t smaller_of(uint32_t a, uint32_t b) { return a < b ? a : b; }

// ---- streams

inline bool read_words(ByteStream& stream, const Tile& tile, const TileEntry& entry,
                       const EcqSection& section, EcqWork& work) {
  const CodeClass scale = code_class(entry.scale_class);
  const uint32_t groups = section.order.groups;
  for (uint32_t at = 0; at < groups; at += kStreamLanes) {
    if (!stream.read(kEcqTables.table[scale.table], scale.shift,
                     smaller_of(groups - at, kStreamLanes), work.scale + at)) {
      return false;
    }
  }
  const CodeClass mean = code_class(entry.mean_class);
  const uint32_t means = section.codec.channel ? tile.channels : 0;
  for (uint32_t at = 0; at < means; at += kStreamLanes) {
    if (!stream.read_words(kEcqTables.table[mean.table], mean.shift,
                           smaller_of(means - at, kStreamLanes), work.mean + at)) {
      return false;
    }
  }
  return true;
}

inline bool read_tile(const EcqSection& section, const Tile& tile, const TileEntry& entry,
                      const uint8_t* bytes, EcqWork& work) {
  ByteStream stream;
  if (!stream.start(bytes, bytes + entry.stream_bytes) ||
      !read_words(stream, tile, entry, section, work)) {
    return false;
  }
  const EcqScale scale(section.codec, entry.reference - kReferenceBias);
  const uint32_t elements = section.line_elements(tile);
  Trellis trellis;
  for (uint32_t i = 0; i < section.order.count; ++i) {
    const uint32_t line = section.order.line[i];
    const int32_t s = static_cast<int8_t>(work.scale[section.order.group[i]]);
    uint8_t* units = work.units + line * section.line_stride();
    work.half[line] = power_of_sixteenths(scale.step_of(s) - 16);
    if (s == kEmptyGroup) {
      memset(units, 0, elements);
      continue;
    }
    const CodeClass coding = code_class(scale.class_of(s));
    const GatherTable& table = kEcqTables.table[17 * entry.family + coding.table];
    for (uint32_t at = 0; at < elements; at += kStreamLanes) {
      const uint32_t count = smaller_of(elements - at, kStreamLanes);
      if (!stream.read(table, coding.shift, count, units + at)) return false;
      trellis.take(count, units + at);
    }
  }
  return stream.finished();
}

// ---- values

// How eight values in a row become elements.
struct Bf16Eight {
  static constexpr size_t kBytes = 2;
  // Decoded values are far from the largest number of bf16.
  static KVC_INLINE void store(uint8_t* target, __m256 v) {
    const __m256i rounded =
        _mm256_add_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(0x8000));
    const __m256i words = _mm256_srli_epi32(rounded, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                     _mm_packus_epi32(_mm256_castsi256_si128(words),
                                      _mm256_extracti128_si256(words, 1)));
  }
};

struct Fp16Eight {
  static constexpr size_t kBytes = 2;
  static KVC_INLINE void store(uint8_t* target, __m256 v) {
    v = _mm256_max_ps(v, _mm256_set1_ps(-65504.0f));
    v = _mm256_min_ps(v, _mm256_set1_ps(65504.0f));
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph(v, kNearest));
  }
};

struct Fp32Eight {
  static constexpr size_t kBytes = 4;
  static KVC_INLINE void store(uint8_t* target, __m256 v) {
    _mm256_storeu_ps(reinterpret_cast<float*>(target), v);
  }
};

template <typename Element>
KVC_INLINE void store_eight(uint8_t* target, __m256 v, uint32_t count) {
  if (count >= kEight) return Element::store(target, v);
  uint8_t elements[kEight * Element::kBytes];
  Element::store(elements, v);
  memcpy(target, elements, count * Element::kBytes);
}

KVC_INLINE __m256 eight_values(const uint8_t* units, __m256i mean, __m256 half) {
  const __m256i u = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(units)));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(u, mean)), half);
}

KVC_INLINE void turn_eight(__m256 v[kEight]) {
  __m256 w[kEight];
  for (uint32_t i = 0; i < 4; ++i) {
    w[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    w[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  for (uint32_t i = 0; i < 2; ++i) {
    v[4 * i] = _mm256_shuffle_ps(w[4 * i], w[4 * i + 2], 0x44);
    v[4 * i + 1] = _mm256_shuffle_ps(w[4 * i], w[4 * i + 2], 0xEE);
    v[4 * i + 2] = _mm256_shuffle_ps(w[4 * i + 1], w[4 * i + 3], 0x44);
    v[4 * i + 3] = _mm256_shuffle_ps(w[4 * i + 1], w[4 * i + 3], 0xEE);
  }
  for (uint32_t i = 0; i < 4; ++i) {
    w[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
    w[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
  }
  for (uint32_t i = 0; i < kEight; ++i) v[i] = w[i];
}

// Eight channels from `line` on, `step` apart, at eight tokens: a vector for each token.
KVC_INLINE void load_block(const EcqWork& work, uint32_t line, uint32_t step, uint32_t token,
                           __m256 v[kEight]) {
  for (uint32_t i = 0; i < kEight; ++i) {
    const uint32_t at = line + i * step;
    v[i] = eight_values(work.units + at * kTileTokens + token, _mm256_set1_epi32(work.mean[at]),
                        _mm256_set1_ps(work.half[at]));
  }
  turn_eight(v);
}

template <typename Element>
void store_plain_channels(const EcqSection& section, const Tile& tile, const EcqWork& work,
                          uint32_t line) {
  const uint32_t count = smaller_of(tile.channels - line, kEight);
  for (uint32_t token = 0; token < tile.tokens; token += kEight) {
    __m256 v[kEight];
    load_block(work, line, 1, token, v);
    for (uint32_t i = 0; i < smaller_of(tile.tokens - token, kEight); ++i) {
      uint8_t* row = section.rows.row(tile.head, tile.token + token + i);
      store_eight<Element>(row + (tile.channel + line) * Element::kBytes, v[i], count);
    }
  }
}

// A shuffle works in halves: this puts the quarters in order.
KVC_INLINE __m256 in_order(__m256 v) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xD8));
}

// Cosines and sines of eight pairs of a token.
KVC_INLINE void load_turns(const float* table, __m256* cosine, __m256* sine) {
  const __m256 low = _mm256_loadu_ps(table);
  const __m256 high = _mm256_loadu_ps(table + kEight);
  *cosine = in_order(_mm256_shuffle_ps(low, high, 0x88));
  *sine = in_order(_mm256_shuffle_ps(low, high, 0xDD));
}

// Up to eight pairs from `pair` on. A derotated tile has all channels of its head.
template <typename Element>
void store_rotated_channels(const EcqSection& section, const Tile& tile, const EcqWork& work,
                            uint32_t pair) {
  const uint32_t pairs = section.pairs();
  const uint32_t count = smaller_of(pairs - pair, kEight);
  const bool interleaved = section.rotary->interleaved != 0;
  const uint32_t step = interleaved ? 2 : 1;
  const uint32_t first = pair * step;
  const uint32_t second = interleaved ? first + 1 : first + pairs;
  for (uint32_t token = 0; token < tile.tokens; token += kEight) {
    __m256 a[kEight], b[kEight];
    load_block(work, first, step, token, a);
    load_block(work, second, step, token, b);
    for (uint32_t i = 0; i < smaller_of(tile.tokens - token, kEight); ++i) {
      const uint32_t t = tile.token + token + i;
      float turns[2 * kEight];
      const float* table = section.rotary->table + (size_t{t} * pairs + pair) * 2;
      if (count < kEight) table = static_cast<float*>(memcpy(turns, table, count * 8));
      __m256 cosine, sine;
      load_turns(table, &cosine, &sine);
      const __m256 x = _mm256_sub_ps(_mm256_mul_ps(a[i], cosine), _mm256_mul_ps(b[i], sine));
      const __m256 y = _mm256_add_ps(_mm256_mul_ps(b[i], cosine), _mm256_mul_ps(a[i], sine));
      uint8_t* row = section.rows.row(tile.head, t);
      if (!interleaved) {
        store_eight<Element>(row + first * Element::kBytes, x, count);
        store_eight<Element>(row + second * Element::kBytes, y, count);
        continue;
      }
      const __m256 low = _mm256_unpacklo_ps(x, y);
      const __m256 high = _mm256_unpackhi_ps(x, y);
      store_eight<Element>(row + first * Element::kBytes,
                           _mm256_permute2f128_ps(low, high, 0x20), 2 * count);
      if (count > 4) {
        store_eight<Element>(row + (first + kEight) * Element::kBytes,
                             _mm256_permute2f128_ps(low, high, 0x31), 2 * count - kEight);
      }
    }
  }
}

template <typename Element>
void store_tokens(const EcqSection& section, const Tile& tile, const EcqWork& work) {
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    const __m256 half = _mm256_set1_ps(work.half[t]);
    const uint8_t* units = work.units + t * kTileChannels;
    uint8_t* row =
        section.rows.row(tile.head, tile.token + t) + size_t{tile.channel} * Element::kBytes;
    for (uint32_t c = 0; c < tile.channels; c += kEight) {
      store_eight<Element>(row + c * Element::kBytes,
                           eight_values(units + c, _mm256_setzero_si256(), half),
                           tile.channels - c);
    }
  }
}

template <typename Element>
void store_tile(const EcqSection& section, const Tile& tile, const TileEntry&,
                const EcqWork& work) {
  if (!section.codec.channel) return store_tokens<Element>(section, tile, work);
  const uint32_t pairs = section.pairs();
  for (uint32_t pair = 0; pair < pairs; pair += kEight)
    store_rotated_channels<Element>(section, tile, work, pair);
  for (uint32_t line = 2 * pairs; line < tile.channels; line += kEight)
    store_plain_channels<Element>(section, tile, work, line);
}
