// Per-channel sections of 16-bit elements. Included by avx2.cpp and avx512.cpp inside their target
// regions and namespaces, after what differs: avx2_lanes.h or avx512_lanes.h.
//
// The work is cut into units: one head, one group of tokens, and a segment of up to kSegment
// vectors ("columns") of channels. An encoder reads the rows of a unit once, keeps the extremes of
// all its channels in registers and copies the rows into a scratch: strided rows fall on few cache
// sets, and the second pass would not find them again. What does not depend on element type and
// width is not compiled for each of them.

constexpr uint32_t kSegment = 4;
constexpr uint32_t kScratchTokens = 128;
constexpr uint32_t kPrefetchTokens = 256;

KVC_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

class UnitWalk;

struct ChannelShape {
  uint32_t group;  // tokens
  uint32_t groups;
  uint32_t per_word;        // codes
  size_t parameter_bytes;   // of a channel
  size_t group_parameters;  // bytes of a head and token group
  size_t word_bytes;        // of all channels
  size_t head_codes;        // bytes
  size_t codes;             // offset of the codes in the section

  ChannelShape(const SectionCodec& codec, const Rows& rows)
      : group(codec.group_size),
        groups((rows.token_count + group - 1) / group),
        per_word(32u / codec.bits),
        parameter_bytes(codec.asymmetric ? 4 : 2),
        group_parameters(rows.head_size * parameter_bytes),
        word_bytes(static_cast<size_t>(rows.head_size) * 4),
        head_codes((rows.token_count + per_word - 1) / per_word * word_bytes),
        codes(
            pad64(kvc::parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))) {
  }

  // Offsets of the parameters and the codes of a unit in the section.
  size_t parameters_of(const UnitWalk& unit) const;
  size_t codes_of(const UnitWalk& unit) const;

  static bool covers(const SectionCodec& codec, const Rows& rows) {
    if (codec.kind != KVC_KIND_INT || is_transformed(codec) || !codec.channel ||
        rows.head_size % kChannelMultiple != 0)
      return false;
    if (codec.dtype != KVC_BF16 && codec.dtype != KVC_FP16) return false;
    // No word holds codes of two groups.
    return codec.group_size == rows.token_count || codec.group_size * codec.bits % 32 == 0;
  }
};

// The units of a section in the order of the work.
class UnitWalk {
 public:
  uint32_t head = 0;
  uint32_t group = 0;
  uint32_t channel = 0;  // the first one
  uint32_t columns = 0;  // 0: no more units
  uint32_t tokens = 0;

  UnitWalk(const Rows& rows, const ChannelShape& shape) : rows_(rows), group_size_(shape.group) {
    settle();
  }

  uint32_t first_token() const { return group * group_size_; }
  uint32_t channels() const {
    const uint32_t left = rows_.head_size - channel;
    return left < columns * kColumn ? left : columns * kColumn;
  }
  uint8_t* row() const { return rows_.row(head, first_token()) + channel * 2; }
  int64_t stride() const { return rows_.token_stride; }

  void advance() {
    channel += columns * kColumn;
    if (channel >= rows_.head_size) {
      channel = 0;
      ++group;
    }
    if (group * static_cast<uint64_t>(group_size_) >= rows_.token_count) {
      group = 0;
      ++head;
    }
    settle();
  }

 private:
  Rows rows_;
  uint32_t group_size_;

  // Whole segments, then two columns, then one.
  void settle() {
    columns = 0;
    if (head == rows_.head_count) return;
    const uint32_t whole = (rows_.head_size - channel) / kColumn;
    columns = whole >= kSegment ? kSegment : whole >= 2 ? 2 : 1;
    const uint32_t left = rows_.token_count - first_token();
    tokens = group_size_ < left ? group_size_ : left;
  }
};

inline size_t ChannelShape::parameters_of(const UnitWalk& unit) const {
  return (static_cast<size_t>(unit.head) * groups + unit.group) * group_parameters +
         unit.channel * parameter_bytes;
}

inline size_t ChannelShape::codes_of(const UnitWalk& unit) const {
  return codes + unit.head * head_codes + unit.first_token() / per_word * word_bytes +
         unit.channel * 4;
}

// The unit after the current one, be it in the next section, to prefetch row by row.
class UnitAhead {
 public:
  UnitAhead(const UnitWalk& current, const ChannelShape& shape, const Rows* next) : unit_(current) {
    unit_.advance();
    if (unit_.columns == 0 && next != nullptr && next->token_count != 0)
      unit_ = UnitWalk(*next, shape);
    left_ = unit_.columns == 0               ? 0
            : unit_.tokens < kPrefetchTokens ? unit_.tokens
                                             : kPrefetchTokens;
    if (left_ != 0) row_ = unit_.row();
  }

  void fetch(uint32_t rows) {
    for (; rows != 0 && left_ != 0; --rows, --left_, row_ += unit_.stride()) {
      for (uint32_t i = 0; i < unit_.channels() * 2; i += 64) prefetch(row_, i);
    }
  }

 private:
  UnitWalk unit_;
  uint32_t left_;
  const uint8_t* row_ = nullptr;
};

// A unit at work in an encoder.
template <typename Extremes>
struct EncodedUnit {
  // Of a column: what its elements are quantised with, in the two vectors that widening gives.
  struct Column {
    Floats inverse[2];
    Floats zero[2];
    Lanes inside[2];
  };

  Extremes extremes[kSegment];
  Column column[kSegment];
  uint8_t* parameters;  // of the first channel
  uint8_t* codes;
  size_t word_bytes;  // of all channels of a row of words
  alignas(64) uint8_t scratch[kScratchTokens * kSegment * kVectorBytes];
};

// ---- encoding, first pass

// Copies rows into the scratch and keeps their extremes. A third of the prefetches of a unit goes
// with this pass, which takes about a third of the time.
template <typename Extremes, uint32_t kColumns>
void read_columns(const UnitWalk& unit, uint32_t first, uint32_t tokens, UnitAhead& ahead,
                  EncodedUnit<Extremes>& work) {
  const uint32_t channels = kColumns == 1 ? unit.channels() : kColumn;
  const uint8_t* row = unit.row() + first * unit.stride();
  uint8_t* copy = work.scratch;
  Extremes extremes[kColumns];
  for (uint32_t c = 0; c < kColumns; ++c) {
    extremes[c] = work.extremes[c];
    if (first == 0) extremes[c].start(load_column(row + c * kVectorBytes, channels));
  }
  for (uint32_t t = 0; t < tokens; ++t, row += unit.stride()) {
    if (t % 3 == 0) ahead.fetch(1);
    for (uint32_t c = 0; c < kColumns; ++c, copy += kVectorBytes) {
      const Words words = load_column(row + c * kVectorBytes, channels);
      extremes[c].add(words);
      store_column(copy, words);
    }
  }
  for (uint32_t c = 0; c < kColumns; ++c) work.extremes[c] = extremes[c];
}

template <typename Extremes>
void read_rows(const UnitWalk& unit, uint32_t first, uint32_t tokens, UnitAhead& ahead,
               EncodedUnit<Extremes>& work) {
  if (unit.columns == kSegment)
    return read_columns<Extremes, kSegment>(unit, first, tokens, ahead, work);
  if (unit.columns == 2) return read_columns<Extremes, 2>(unit, first, tokens, ahead, work);
  read_columns<Extremes, 1>(unit, first, tokens, ahead, work);
}

template <typename Element, uint32_t kBits, bool kAsymmetric, typename Extremes>
uint64_t store_unit_parameters(const UnitWalk& unit, EncodedUnit<Extremes>& work) {
  const uint32_t channels = unit.columns == 1 ? unit.channels() : kColumn;
  uint64_t outside = 0;
  for (uint32_t c = 0; c < unit.columns; ++c) {
    Dwords smallest[2];
    Dwords largest[2];
    Dwords stored[2];
    uint64_t inside = 0;
    work.extremes[c].template split<Element>(smallest, largest);
    for (int i = 0; i < 2; ++i) {
      GroupParameters p;
      if constexpr (kAsymmetric) {
        p = range_parameters<Element, kBits>(smallest[i], largest[i]);
      } else {
        p = magnitude_parameters<Element, kBits>(largest[i]);
      }
      work.column[c].inverse[i] = p.inverse;
      work.column[c].zero[i] = p.zero;
      work.column[c].inside[i] = p.inside;
      stored[i] = p.stored;
      inside |= lane_bits(p.inside) << 32 * i;
    }
    store_column_parameters<Element, kAsymmetric>(
        stored, channels, work.parameters + c * kColumn * (kAsymmetric ? 4 : 2));
    outside += count_outside<Element>(inside, channels);
  }
  return outside;
}

// ---- encoding, second pass

template <typename Element, uint32_t kBits, bool kAsymmetric, typename Column>
KVC_INLINE void store_word(const WordJoiner& joiner, const uint8_t* row, size_t row_bytes,
                           const Column& column, uint32_t word_mask, uint32_t channels,
                           uint8_t* target) {
  using P = Packer<Element, kBits, kAsymmetric, false>;
  Dwords q[2][32 / kBits];
  for (uint32_t k = 0; k < 32 / kBits; ++k, row += row_bytes) {
    Floats x[2];
    widen_column<Element>(load_column(row, kColumn), x);
    for (int i = 0; i < 2; ++i) q[i][k] = P::quantise(x[i], column.inverse[i], column.zero[i]);
  }
  Dwords words[2];
  for (int i = 0; i < 2; ++i)
    words[i] = keep_bits(keep_lanes(join_word<kBits>(joiner, q[i]), column.inside[i]), word_mask);
  store_column_words<Element>(words, channels, target);
}

// Codes of the tokens in the scratch.
template <typename Element, uint32_t kBits, bool kAsymmetric, typename Extremes>
void store_codes(const UnitWalk& unit, uint32_t first, uint32_t tokens, UnitAhead& ahead,
                 EncodedUnit<Extremes>& work) {
  constexpr uint32_t kPerWord = 32 / kBits;
  const uint32_t channels = unit.columns == 1 ? unit.channels() : kColumn;
  const size_t row_bytes = unit.columns * kVectorBytes;
  const WordJoiner joiner{};
  uint8_t* target = work.codes + first / kPerWord * work.word_bytes;
  for (uint32_t t = 0; t < tokens; t += kPerWord, target += work.word_bytes) {
    const uint32_t present = tokens - t < kPerWord ? tokens - t : kPerWord;
    const uint32_t word_mask = static_cast<uint32_t>((uint64_t{1} << present * kBits) - 1);
    const uint8_t* row = work.scratch + t * row_bytes;
    ahead.fetch(kPerWord);
#pragma GCC unroll 1
    for (uint32_t c = 0; c < unit.columns; ++c) {
      store_word<Element, kBits, kAsymmetric>(joiner, row + c * kVectorBytes, row_bytes,
                                              work.column[c], word_mask, channels,
                                              target + c * kColumn * 4);
    }
  }
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
uint64_t encode_channel_units(const SectionCodec& codec, const Rows& rows, const Rows* next,
                              uint8_t* out) {
  using Extremes = typename std::conditional<kAsymmetric, ChannelRange, Magnitude>::type;
  const ChannelShape shape(codec, rows);
  clear_padding(codec, rows, out);
  EncodedUnit<Extremes> work;
  std::memset(work.scratch, 0, sizeof work.scratch);
  work.word_bytes = shape.word_bytes;
  uint64_t outside = 0;
  for (UnitWalk unit(rows, shape); unit.columns != 0; unit.advance()) {
    UnitAhead ahead(unit, shape, next);
    work.parameters = out + shape.parameters_of(unit);
    work.codes = out + shape.codes_of(unit);
    for (uint32_t t = 0; t < unit.tokens; t += kScratchTokens) {
      read_rows(unit, t, smaller(unit.tokens - t, kScratchTokens), ahead, work);
    }
    outside += store_unit_parameters<Element, kBits, kAsymmetric>(unit, work);
    for (uint32_t t = 0; t < unit.tokens; t += kScratchTokens) {
      const uint32_t tokens = smaller(unit.tokens - t, kScratchTokens);
      if (unit.tokens > kScratchTokens) read_rows(unit, t, tokens, ahead, work);
      store_codes<Element, kBits, kAsymmetric>(unit, t, tokens, ahead, work);
    }
  }
  return outside;
}

// ---- decoding

struct DecodedUnit {
  const uint8_t* codes;
  size_t word_bytes;
  Floats scale[kSegment][2];
  Floats zero[kSegment][2];
};

// Any parameters, any number of tokens in the word.
template <typename Element, uint32_t kBits, bool kAsymmetric, bool kStream>
void decode_any_word(const UnitWalk& unit, const DecodedUnit& work, const uint8_t* source,
                     uint8_t* target, uint32_t tokens) {
  const uint32_t channels = unit.columns == 1 ? unit.channels() : kColumn;
#pragma GCC unroll 1
  for (uint32_t k = 0; k < tokens; ++k, target += unit.stride()) {
#pragma GCC unroll 1
    for (uint32_t c = 0; c < unit.columns; ++c) {
      Dwords words[2];
      Floats v[2];
      load_column_words<Element>(source + c * kColumn * 4, channels, words);
      for (int i = 0; i < 2; ++i) {
        const Floats code = code_values<kBits, kAsymmetric>(words[i], k * kBits);
        v[i] = exact_value<Element, kAsymmetric>(code, work.scale[c][i], work.zero[c][i]);
      }
      store_column_values<Element, kStream>(target + c * kVectorBytes, channels, v[0], v[1]);
    }
  }
}

// A full word of `kTogether` columns, a line of each row at once: lines written in parts leave the
// write-combining buffers half empty.
template <typename Element, uint32_t kBits, bool kAsymmetric, bool kStream, uint32_t kTogether>
KVC_INLINE void decode_word(const UnitWalk& unit, const DecodedUnit& work, const uint8_t* source,
                            uint8_t* target, uint32_t c) {
  const uint32_t channels = kTogether == 1 && unit.columns == 1 ? unit.channels() : kColumn;
  Dwords words[kTogether][2];
  for (uint32_t j = 0; j < kTogether; ++j) {
    load_column_words<Element>(source + (c + j) * kColumn * 4, channels, words[j]);
  }
  target += c * kVectorBytes;
  for (uint32_t k = 0; k < 32 / kBits; ++k, target += unit.stride()) {
    for (uint32_t j = 0; j < kTogether; ++j) {
      Floats v[2];
      for (int i = 0; i < 2; ++i) {
        const Floats code = code_values<kBits, kAsymmetric>(words[j][i], k * kBits);
        v[i] = tame_value<kAsymmetric>(code, work.scale[c + j][i], work.zero[c + j][i]);
      }
      store_column_values<Element, kStream>(target + j * kVectorBytes, channels, v[0], v[1]);
    }
  }
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kStream>
void decode_unit(const UnitWalk& unit, const DecodedUnit& work, bool tame, BytesBehind& behind) {
  constexpr uint32_t kPerWord = 32 / kBits;
  constexpr uint32_t kTogether = 64 / kVectorBytes;
  const uint8_t* source = work.codes;
  uint8_t* target = unit.row();
  for (uint32_t token = 0; token < unit.tokens; token += kPerWord, source += work.word_bytes) {
    const uint32_t tokens = smaller(unit.tokens - token, kPerWord);
    if (unit.channel == 0) behind.fetch(tokens);
    if (!tame || tokens < kPerWord) {
      decode_any_word<Element, kBits, kAsymmetric, kStream>(unit, work, source, target, tokens);
    } else if (unit.columns % kTogether == 0) {
#pragma GCC unroll 1
      for (uint32_t c = 0; c < unit.columns; c += kTogether) {
        decode_word<Element, kBits, kAsymmetric, kStream, kTogether>(unit, work, source, target, c);
      }
    } else if (kTogether != 1) {
      decode_word<Element, kBits, kAsymmetric, kStream, 1>(unit, work, source, target, 0);
    }
    target += tokens * unit.stride();
  }
}

template <typename Element, uint32_t kBits, bool kAsymmetric, bool kStream>
void decode_channel_units(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const ChannelShape shape(codec, rows);
  BytesBehind behind(codec, in, rows);
  DecodedUnit work;
  work.word_bytes = shape.word_bytes;
  for (UnitWalk unit(rows, shape); unit.columns != 0; unit.advance()) {
    const uint32_t channels = unit.columns == 1 ? unit.channels() : kColumn;
    work.codes = in + shape.codes_of(unit);
    const uint8_t* source = in + shape.parameters_of(unit);
    bool tame = true;
    for (uint32_t c = 0; c < unit.columns; ++c) {
      tame &= load_column_parameters<Element, kAsymmetric>(
          source + c * kColumn * (kAsymmetric ? 4 : 2), channels, work.scale[c], work.zero[c]);
    }
    decode_unit<Element, kBits, kAsymmetric, kStream>(unit, work, tame, behind);
  }
  if (kStream) _mm_sfence();
}
