// Streams of coded sections with AVX2: a step is four vectors of eight states. Included by
// lossless_avx2.cpp and ecq_avx2.cpp inside their target regions and namespaces.

// What a slot means, in one word: frequency, slot - cum, value; the upper byte marks the escape.
struct GatherTable {
  uint32_t slot[256];
};

constexpr GatherTable gather_table(const CodingTable& from) {
  GatherTable result{};
  for (uint32_t slot = 0; slot < 256; ++slot) {
    const uint32_t j = from.slots[slot];
    const uint32_t value = static_cast<uint8_t>(from.first + static_cast<int32_t>(j));
    result.slot[slot] = from.freq[j] | (slot - from.cum[j]) << 8 | value << 16 |
                        (j == from.escape ? 0x80000000u : 0u);
  }
  return result;
}

KVC_INLINE __m256i load_vector(const void* source) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(source));
}

KVC_INLINE void store_vector(void* target, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(target), v);
}

// Bytes of 0xFF where a bit of the plane's lower or upper half is set.
KVC_INLINE __m256i bytes_of_plane(uint64_t plane, bool upper) {
  const __m256i lower_bytes = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                               2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i from =
      upper ? _mm256_add_epi8(lower_bytes, _mm256_set1_epi8(4)) : lower_bytes;
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i all = _mm256_set1_epi64x(static_cast<int64_t>(plane));
  return _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(all, from), bit), bit);
}

// For each set of lanes: which of the next bytes a lane takes.
struct TakenBytes {
  uint8_t lane[256][8];
};

constexpr TakenBytes taken_bytes() {
  TakenBytes result{};
  for (uint32_t set = 0; set < 256; ++set) {
    uint8_t next = 0;
    for (uint32_t i = 0; i < 8; ++i) {
      result.lane[set][i] = next;
      next = static_cast<uint8_t>(next + (set >> i & 1));
    }
  }
  return result;
}

constexpr TakenBytes kTakenBytes = taken_bytes();

KVC_INLINE __m256i load_dwords_of_bytes(const uint8_t* source) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
}

class ByteStream {
 public:
  bool start(const uint8_t* begin, const uint8_t* end) {
    if (static_cast<size_t>(end - begin) < kStateBytes) return false;
    at_ = begin + kStateBytes;
    end_ = end;
    __m256i lowest = _mm256_set1_epi32(kFirstState);
    for (int i = 0; i < 4; ++i) {
      state_[i] = _mm256_cvtepu16_epi32(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(begin + 16 * i)));
      lowest = _mm256_min_epi32(lowest, state_[i]);
    }
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(lowest, _mm256_set1_epi32(kFirstState))) == -1;
  }

  // A step of up to 32 integers, modulo 256; 32 bytes are written. Up to 32 + 32 + 16
  // bytes are taken, each of the three from a place at most 32 bytes behind the end, which lies in
  // the guard.
  bool read(const GatherTable& table, uint32_t shift, uint32_t count, uint8_t* out) {
    if (at_ > end_) return false;
    const uint32_t active = _bzhi_u32(~0u, count);
    uint32_t escapes = 0;
    for (uint32_t i = 0; i < 4; ++i)
      escapes |= take_eight(table, i, active >> 8 * i & 255, out) << 8 * i;
    if (__builtin_expect(escapes != 0, false)) {
      if (at_ > end_) return false;
      for (; escapes != 0; escapes = _blsr_u32(escapes)) out[_tzcnt_u32(escapes)] = *at_++;
    }
    if (shift == 0) return true;
    if (at_ > end_) return false;
    __m256i values = load_vector(out);
    for (uint32_t i = shift; i-- != 0;) {
      const __m256i bit = bytes_of_plane(load32(at_ + 4 * i), false);
      values = i == shift - 1 ? shifted(values, shift) : values;
      values = _mm256_or_si256(values,
                               _mm256_and_si256(bit, _mm256_set1_epi8(static_cast<char>(1 << i))));
    }
    store_vector(out, values);
    at_ += 4 * shift;
    return true;
  }

  // A step of up to 32 integers, modulo 2^16.
  bool read_words(const GatherTable& table, uint32_t shift, uint32_t count, int16_t* out) {
    uint8_t upper[kStreamLanes];
    if (!read(table, 0, count, upper) || at_ > end_) return false;
    for (uint32_t i = 0; i < count; ++i) {
      int32_t value = static_cast<int8_t>(upper[i]);
      for (uint32_t plane = shift; plane-- != 0;)
        value = 2 * value + static_cast<int32_t>(load32(at_ + 4 * plane) >> i & 1);
      out[i] = static_cast<int16_t>(value);
    }
    at_ += 4 * shift;
    return true;
  }

  bool finished() const {
    __m256i all = _mm256_set1_epi8(-1);
    for (int i = 0; i < 4; ++i)
      all = _mm256_and_si256(all, _mm256_cmpeq_epi32(state_[i], _mm256_set1_epi32(kFirstState)));
    return at_ == end_ && _mm256_movemask_epi8(all) == -1;
  }

 private:
  __m256i state_[4];
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;

  static KVC_INLINE __m256i shifted(__m256i bytes, uint32_t shift) {
    const __m256i kept = _mm256_set1_epi8(static_cast<char>(0xFF << shift));
    return _mm256_and_si256(_mm256_sll_epi16(bytes, _mm_cvtsi32_si128(static_cast<int>(shift))),
                            kept);
  }

  // Lanes 8i ... 8i + 7; which of the active ones are escaped.
  KVC_INLINE uint32_t take_eight(const GatherTable& table, uint32_t i, uint32_t active,
                                 uint8_t* out) {
    const __m256i low_byte = _mm256_set1_epi32(0xFF);
    const __m256i x = state_[i];
    const __m256i word = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table.slot),
                                                _mm256_and_si256(x, low_byte), 4);
    // Two numbers of a byte: their product fits, and so does the sum.
    const __m256i product =
        _mm256_madd_epi16(_mm256_and_si256(word, low_byte), _mm256_srli_epi32(x, 8));
    __m256i y = _mm256_add_epi32(product, _mm256_and_si256(_mm256_srli_epi32(word, 8), low_byte));
    const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i there = _mm256_cmpeq_epi32(
        _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(active)), lanes), lanes);
    y = _mm256_blendv_epi8(x, y, there);
    const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(kFirstState), y);
    const auto set = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(small)));
    const __m256i bytes = _mm256_permutevar8x32_epi32(load_dwords_of_bytes(at_),
                                                      load_dwords_of_bytes(kTakenBytes.lane[set]));
    state_[i] = _mm256_blendv_epi8(y, _mm256_or_si256(_mm256_slli_epi32(y, 8), bytes), small);
    at_ += _mm_popcnt_u32(set);
    // Byte 2 of each word.
    const __m256i values = _mm256_shuffle_epi8(
        word, _mm256_setr_epi8(2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                               2, 6, 10, 14, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(values),
                                              _mm256_extracti128_si256(values, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), joined);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(word))) & active;
  }
};
