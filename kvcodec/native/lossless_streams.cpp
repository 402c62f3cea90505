// Sections of coded exponents, proto/FORMAT.md 3.8, in portable code.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>

#include "kvcodec.h"
#include "lossless.h"
#include "lossless_coded.h"
#include "lossless_element.h"

namespace kvc {
namespace {

// A tile at work, in the worker's scratch.
struct LosslessTile {
  uint8_t exponent[kTileElements];  // line by line, kLineStride apart
  uint8_t raw[kTileElements];
  uint32_t sum[kTileChannels];
  uint8_t full[kTileChannels];
  LosslessScales scales;
  int32_t values[kLineStride];
  uint8_t stream[kMaxStreamBytes];
};
static_assert(sizeof(LosslessTile) <= kCodedScratchBytes, "a worker's memory");

// ---- elements

template <typename Element>
inline uint32_t rotated(uint16_t bits) {
  return Element::kRotated ? (uint32_t{bits} << 1 | bits >> 15) & 0xFFFF : bits;
}

// The raw bits of a high byte: the sign, then the upper bits of the mantissa.
inline uint8_t raw_bits_of(uint32_t high) {
  return static_cast<uint8_t>((high >> 7) << 2 | (high & 3));
}

template <typename Element>
void take_tile(const SectionCodec& codec, const Rows& rows, const Tile& tile, LosslessTile& work,
               uint8_t* plane) {
  const uint32_t line_step = codec.channel ? 1 : kLineStride;
  const uint32_t channel_step = codec.channel ? kTileTokens : 1;
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    const uint8_t* source = rows.row(tile.head, tile.token + t) + 2 * size_t{tile.channel};
    const size_t row = size_t{tile.head} * rows.token_count + tile.token + t;
    uint8_t* low = plane + row * rows.head_size + tile.channel;
    uint8_t* exponent = work.exponent + t * line_step;
    uint8_t* raw = work.raw + t * line_step;
    for (uint32_t c = 0; c < tile.channels; ++c) {
      uint16_t bits;
      memcpy(&bits, source + 2 * c, sizeof bits);
      const uint32_t word = rotated<Element>(bits);
      low[c] = static_cast<uint8_t>(word);
      const uint32_t high = word >> 8;
      exponent[c * channel_step] =
          static_cast<uint8_t>(Element::kRawBits == 0 ? high : high >> 2 & 31);
      if (Element::kRawBits != 0) raw[c * channel_step] = raw_bits_of(high);
    }
  }
}

// Lengths of all exponents' codes for each family, and with it the shorter one.
uint8_t cheapest_family(const LosslessTile& work, const LosslessShape& shape, uint32_t stride) {
  uint64_t length[2] = {};
  for (uint32_t line = 0; line < shape.lines; ++line) {
    if (work.scales.empty(line)) continue;
    const int32_t e = work.scales.exponent(line);
    const uint8_t* exponent = work.exponent + line * stride;
    for (uint32_t family = 0; family < 2; ++family) {
      const CodingTable& table = lossless_table(family, e);
      for (uint32_t i = 0; i < shape.elements; ++i) {
        const int32_t j = static_cast<int8_t>((e >> 2) - exponent[i]) - table.first;
        const bool known = j >= 0 && j < table.escape;
        length[family] += known ? table.cost[j] : table.cost[table.escape] + kEscapeLength;
      }
    }
  }
  return length[1] < length[0];
}

template <typename Element>
bool write_tile(const SectionCodec& codec, const Tile& tile, LosslessTile& work,
                CodedWriter& out) {
  const LosslessShape shape(codec, tile);
  const uint32_t stride = line_stride(codec);
  for (uint32_t line = 0; line < shape.lines; ++line) {
    const uint8_t* exponent = work.exponent + line * stride;
    const uint8_t* raw = work.raw + line * stride;
    uint32_t sum = 0;
    uint32_t any = 0;
    for (uint32_t i = 0; i < shape.elements; ++i) sum += exponent[i];
    for (uint32_t i = 0; i < shape.elements && Element::kRawBits != 0; ++i) any |= raw[i];
    work.sum[line] = sum;
    work.full[line] = (sum | any) != 0;
  }
  LosslessScales& scales = work.scales;
  scales.choose(work.sum, work.full, shape);
  TileEntry entry{};
  entry.reference = static_cast<uint8_t>(scales.reference);
  entry.family = cheapest_family(work, shape, stride);
  entry.scale_class = cheapest_scale_class(scales.scale, shape.lines);
  StreamWriter writer(work.stream + sizeof work.stream);
  for (uint32_t line = shape.lines; line-- != 0;) {
    if (scales.empty(line)) continue;
    const int32_t e = scales.exponent(line);
    const uint8_t* exponent = work.exponent + line * stride;
    const uint8_t* raw = work.raw + line * stride;
    for (uint32_t i = 0; i < shape.elements; ++i) {
      const int32_t symbol = static_cast<int8_t>((e >> 2) - exponent[i]);
      work.values[i] = Element::kRawBits == 0 ? symbol : symbol * 8 + raw[i];
    }
    write_sequence(writer, lossless_table(entry.family, e), Element::kRawBits, work.values,
                   shape.elements);
  }
  const CodeClass coding = code_class(entry.scale_class);
  write_sequence(writer, kResidualTables[coding.table], coding.shift, scales.scale, shape.lines);
  const uint8_t* stream = writer.finish();
  entry.stream_bytes = static_cast<uint16_t>(writer.bytes());
  return out.add(entry, stream);
}

template <typename Element>
size_t encode_section(const SectionCodec& codec, const Rows& rows, LosslessTile& work,
                      uint8_t* out) {
  const size_t elements = size_t{rows.head_count} * rows.token_count * rows.head_size;
  CodedWriter writer(out, pad64(2 * elements), tile_count(rows), elements, 0);
  for (TileWalk walk(rows); !walk.ended() && writer.fits(); walk.advance()) {
    take_tile<Element>(codec, rows, walk.tile(), work, writer.plane());
    write_tile<Element>(codec, walk.tile(), work, writer);
  }
  return writer.finish(2 * elements);
}

// ---- reading

// The streams of a tile, symbol by symbol.
class TileReader {
 public:
  bool start(const uint8_t* begin, const uint8_t* end) { return reader_.start(begin, end); }

  // A step of up to 32 integers of a table, modulo 256.
  bool read(uint32_t table, uint32_t shift, uint32_t count, uint8_t* out) {
    int32_t values[kStreamLanes];
    if (!reader_.read(stream_table(table), shift, count, values)) return false;
    for (uint32_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(values[i]);
    return true;
  }

  bool finished() const { return reader_.finished(); }

 private:
  StreamReader reader_;
};

#include "lossless_rows.h"

}  // namespace

size_t encode_lossless_scalar(const SectionCodec& codec, const Rows& rows, uint8_t* scratch,
                              uint8_t* out) {
  LosslessTile& work = *reinterpret_cast<LosslessTile*>(scratch);
  return codec.dtype == KVC_BF16 ? encode_section<Bf16Bytes>(codec, rows, work, out)
                                 : encode_section<Fp16Bytes>(codec, rows, work, out);
}

bool decode_lossless_scalar(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                            const Rows& rows, uint8_t* scratch) {
  return decode_coded_section(codec, in, stored_bytes, rows, scratch);
}

}  // namespace kvc
