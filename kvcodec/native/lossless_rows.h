// From the streams of lossless sections to rows, line by line. Included by the files of the
// instruction sets inside their target regions and namespaces, after a class TileReader.

// A tile at work, in the worker's scratch.
struct ReadTile {
  uint8_t scales[kTileChannels];
  // Line by line. Behind it room for the rest of a step.
  uint8_t high[kTileElements + kStreamLanes];
};

// High bytes of a line from the integers of its stream, which count down from the exponent `base`.
template <typename Element>
void finish_line(uint8_t base, uint32_t count, uint8_t* line) {
  for (uint32_t i = 0; i < count; ++i) {
    const uint8_t value = line[i];
    line[i] = static_cast<uint8_t>(
        Element::kRawBits == 0
            ? base - value
            : ((base - (value >> 3)) & 31) << 2 | (value & 4) << 5 | (value & 3));
  }
}

// Leaves the high bytes of all elements in `work.high`.
template <typename Element>
bool read_tile(const SectionCodec& codec, const Tile& tile, const TileEntry& entry,
               const uint8_t* stream, ReadTile& work) {
  const LosslessShape shape(codec, tile);
  TileReader reader;
  if (!reader.start(stream, stream + entry.stream_bytes)) return false;
  const CodeClass coding = code_class(entry.scale_class);
  for (uint32_t at = 0; at < shape.lines; at += kStreamLanes) {
    const uint32_t left = shape.lines - at;
    if (!reader.read(coding.table, coding.shift, left < kStreamLanes ? left : kStreamLanes,
                     work.scales + at)) {
      return false;
    }
  }
  for (uint32_t line = 0; line < shape.lines; ++line) {
    uint8_t* high = work.high + line * line_stride(codec);
    const int32_t s = static_cast<int8_t>(work.scales[line]);
    if (s == kEmptyGroup) {
      memset(high, 0, shape.elements);
      continue;
    }
    const int32_t e = 4 * entry.reference - s;
    const uint32_t table = kScaleTables + 4 * entry.family + (static_cast<uint32_t>(e) & 3);
    for (uint32_t at = 0; at < shape.elements; at += kStreamLanes) {
      const uint32_t left = shape.elements - at;
      if (!reader.read(table, Element::kRawBits, left < kStreamLanes ? left : kStreamLanes,
                       high + at)) {
        return false;
      }
    }
    finish_line<Element>(static_cast<uint8_t>(e >> 2), shape.elements, high);
  }
  return reader.finished();
}

// Changes places of the upper parts of `a` with the lower parts of `b`, so many bits apart.
inline void swap_parts(uint64_t* a, uint64_t* b, uint32_t bits, uint64_t lower) {
  const uint64_t difference = (*a >> bits ^ *b) & lower;
  *b ^= difference;
  *a ^= difference << bits;
}

// Eight bytes of eight lines, kTileTokens apart, become eight bytes of rows, kLineStride apart.
inline void turn_eight(const uint8_t* lines, uint8_t* rows) {
  uint64_t v[8];
  for (uint32_t i = 0; i < 8; ++i) memcpy(&v[i], lines + i * kTileTokens, 8);
  for (uint32_t i = 0; i < 4; ++i) swap_parts(&v[i], &v[i + 4], 32, 0x00000000FFFFFFFF);
  for (uint32_t i = 0; i < 8; i += 4) {
    swap_parts(&v[i], &v[i + 2], 16, 0x0000FFFF0000FFFF);
    swap_parts(&v[i + 1], &v[i + 3], 16, 0x0000FFFF0000FFFF);
  }
  for (uint32_t i = 0; i < 8; i += 2) swap_parts(&v[i], &v[i + 1], 8, 0x00FF00FF00FF00FF);
  for (uint32_t i = 0; i < 8; ++i) memcpy(rows + i * kLineStride, &v[i], 8);
}

// A row from its high and low bytes.
template <typename Element>
void store_row(const uint8_t* high, const uint8_t* low, uint32_t count, uint8_t* row) {
  uint16_t words[kTileChannels];
  for (uint32_t c = 0; c < count; ++c) {
    const uint32_t word = static_cast<uint32_t>(high[c] << 8 | low[c]);
    words[c] = static_cast<uint16_t>(Element::kRotated ? word >> 1 | word << 15 : word);
  }
  memcpy(row, words, 2 * size_t{count});
}

// Eight tokens at a time.
template <typename Element>
void store_tile(const SectionCodec& codec, const Rows& rows, const Tile& tile,
                const ReadTile& work, const uint8_t* plane) {
  uint8_t turned[8 * kLineStride];
  for (uint32_t t = 0; t < tile.tokens; t += 8) {
    const uint8_t* high = codec.channel ? turned : work.high + t * kLineStride;
    for (uint32_t c = 0; codec.channel && c < tile.channels; c += 8)
      turn_eight(work.high + c * kTileTokens + t, turned + c);
    const uint32_t end = tile.tokens - t < 8 ? tile.tokens : t + 8;
    for (uint32_t i = t; i < end; ++i, high += kLineStride) {
      const size_t row = size_t{tile.head} * rows.token_count + tile.token + i;
      store_row<Element>(high, plane + row * rows.head_size + tile.channel, tile.channels,
                         rows.row(tile.head, tile.token + i) + 2 * size_t{tile.channel});
    }
  }
}

template <typename Element>
bool decode_tiles(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                  const Rows& rows, ReadTile& work) {
  const uint64_t elements = uint64_t{rows.head_count} * rows.token_count * rows.head_size;
  CodedParts parts;
  if (!open_coded(in, stored_bytes, tile_count(rows), elements, 0, &parts)) return false;
  const uint8_t* stream = parts.streams;
  uint64_t index = 0;
  for (TileWalk walk(rows); !walk.ended(); walk.advance(), ++index) {
    const TileEntry entry = parts.entry(index);
    if (!read_tile<Element>(codec, walk.tile(), entry, stream, work)) return false;
    stream += entry.stream_bytes;
    if (rows.base != nullptr) store_tile<Element>(codec, rows, walk.tile(), work, parts.plane);
  }
  return true;
}

inline bool decode_coded_section(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                                 const Rows& rows, uint8_t* scratch) {
  static_assert(sizeof(ReadTile) <= kCodedScratchBytes, "a worker's memory");
  ReadTile& work = *reinterpret_cast<ReadTile*>(scratch);
  return codec.dtype == KVC_BF16 ? decode_tiles<Bf16Bytes>(codec, in, stored_bytes, rows, work)
                                 : decode_tiles<Fp16Bytes>(codec, in, stored_bytes, rows, work);
}
