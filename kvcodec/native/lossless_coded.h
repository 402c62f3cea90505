// What all instruction sets share of kind lossless: what a tile's encoder chooses, and the order of
// its sequences. proto/FORMAT.md 3.8. Plain code with internal linkage.
#pragma once

#include <cstddef>
#include <cstdint>

#include "coded.h"

namespace kvc {
namespace {

// Lines of a tile in memory: so many elements apart.
constexpr uint32_t kLineStride = kTileChannels;

constexpr uint32_t kEscapeLength = 2048;  // an escape's byte, in 1/256 bit

// The lines of a tile are its groups: channels, or tokens.
struct LosslessShape {
  uint32_t lines;
  uint32_t elements;  // of a line

  LosslessShape(const SectionCodec& codec, const Tile& tile)
      : lines(codec.channel ? tile.channels : tile.tokens),
        elements(codec.channel ? tile.tokens : tile.channels) {}
};

inline const CodingTable& lossless_table(uint32_t family, int32_t e) {
  return kLosslessTables[4 * family + (static_cast<uint32_t>(e) & 3)];
}

// A tile's lines are kLineStride apart, or kTileTokens where they are channels.
inline uint32_t line_stride(const SectionCodec& codec) {
  return codec.channel ? kTileTokens : kLineStride;
}

// The tables of a stream by number: those of scales, then those of exponents.
constexpr uint32_t kScaleTables = 17;
constexpr uint32_t kExponentTables = 8;

constexpr const CodingTable& stream_table(uint32_t number) {
  return number < kScaleTables ? kResidualTables[number] : kLosslessTables[number - kScaleTables];
}

// Four times the mean exponent of each group, and what the tile's entry says of them.
struct LosslessScales {
  int32_t reference;
  int32_t scale[kTileChannels];

  // `sum`: of the exponents of each line. `full`: not 0 where a line has something for the stream.
  void choose(const uint32_t* sum, const uint8_t* full, const LosslessShape& shape) {
    uint32_t total = 0;
    uint32_t count = 0;
    for (uint32_t i = 0; i < shape.lines; ++i) {
      scale[i] = static_cast<int32_t>((8 * sum[i] + shape.elements) / (2 * shape.elements));
      total += static_cast<uint32_t>(scale[i]);
      count += full[i] != 0;
    }
    reference = count == 0 ? 0 : static_cast<int32_t>((total + 2 * count) / (4 * count));
    for (uint32_t i = 0; i < shape.lines; ++i) {
      const int32_t s = 4 * reference - scale[i];
      scale[i] = full[i] == 0 ? kEmptyGroup : s < -128 ? -128 : s > 126 ? 126 : s;
    }
  }

  bool empty(uint32_t line) const { return scale[line] == kEmptyGroup; }
  int32_t exponent(uint32_t line) const { return 4 * reference - scale[line]; }
};

// The class (0, 4, ... 32) that codes the scales in the fewest bits.
inline uint8_t cheapest_scale_class(const int32_t* scales, uint32_t count) {
  uint32_t best = 0;
  uint64_t least = UINT64_MAX;
  for (uint32_t c = 0; c <= kMaxClass; c += 4) {
    const CodeClass coding = code_class(c);
    const CodingTable& table = kResidualTables[coding.table];
    uint64_t length = uint64_t{256} * coding.shift * count;
    for (uint32_t i = 0; i < count; ++i) {
      const int32_t j = (scales[i] >> coding.shift) - table.first;
      const bool known = j >= 0 && j < table.escape;
      length += known ? table.cost[j] : table.cost[table.escape] + kEscapeLength;
    }
    if (length < least) {
      least = length;
      best = c;
    }
  }
  return static_cast<uint8_t>(best);
}

// The sequences of a class, from the last step to the first.
inline void write_sequence(StreamWriter& writer, const CodingTable& table, uint32_t shift,
                           const int32_t* values, uint32_t count) {
  for (uint32_t end = count; end != 0;) {
    const uint32_t start = (end - 1) / kStreamLanes * kStreamLanes;
    writer.write(table, shift, end - start, values + start);
    end = start;
  }
}

}  // namespace
}  // namespace kvc
