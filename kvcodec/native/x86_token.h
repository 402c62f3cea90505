// Per-token sections on x86: which shapes the vector kernels cover, and the loops over rows around
// them. The loops are plain code; a chunk of rows is large enough that calling the kernels through
// pointers costs nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "kvcodec.h"
#include "x86_rows.h"

namespace kvc {
namespace {

constexpr uint32_t kMaxChunkRows = 32;
constexpr uint32_t kMaxRowElements = 8192;
constexpr uint32_t kMaxChunkGroups = kMaxRowElements / 32;
constexpr uint32_t kBlock = 64;  // elements of a block of codes
// How far encoders look ahead, into the second-level cache. Two passes over a chunk fill the
// out-of-order window, and the hardware prefetchers starve: without this an encoder reaches a third
// of its speed.
constexpr uint32_t kPrefetchBytes = 8192;

// A per-token section of 16-bit elements whose groups are 32, a multiple of 64, or whole rows.
struct TokenShape {
  uint32_t head_size;
  uint32_t group;   // elements
  uint32_t groups;  // per row
  uint32_t blocks;  // whole ones, per row
  uint32_t tail;    // elements of the last, shorter block
  bool halves;      // groups of 32: a block has two
  // Of a row in what quantise() is given: groups, or blocks (half blocks), a short one included.
  uint32_t entries;
  uint32_t entry_shift;   // from the number of a block to its entry
  size_t row_parameters;  // bytes
  size_t row_codes;       // bytes
  size_t codes;           // offset of the codes in the section

  TokenShape(const SectionCodec& codec, const Rows& rows)
      : head_size(rows.head_size),
        group(codec.group_size),
        groups((head_size + group - 1) / group),
        blocks(head_size / kBlock),
        tail(head_size % kBlock),
        halves(group == 32 && head_size > 32),
        entries((blocks + (tail != 0)) << halves),
        entry_shift(0),
        row_parameters(groups * (codec.asymmetric ? 4 : 2)),
        row_codes(blocks * 8 * codec.bits + (tail + 8 / codec.bits - 1) / (8 / codec.bits)),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, head_size))) {
    const uint32_t whole = whole_groups();
    if (groups == 1 || (whole != 0 && (whole & (whole - 1)) == 0)) {
      entries = groups;
      entry_shift = groups == 1 ? 31 : static_cast<uint32_t>(__builtin_ctz(whole));
    }
  }

  uint32_t group_elements(uint32_t index) const {
    return index + 1 < groups ? group : head_size - index * group;
  }

  // Blocks of a group if every group has that many; else 0.
  uint32_t whole_groups() const {
    return head_size % group == 0 && group % kBlock == 0 ? group / kBlock : 0;
  }

  static bool covers(const SectionCodec& codec, const Rows& rows) {
    if (codec.kind != KVC_KIND_INT || is_transformed(codec) || codec.channel ||
        rows.head_size > kMaxRowElements)
      return false;
    if (codec.dtype != KVC_BF16 && codec.dtype != KVC_FP16) return false;
    const uint32_t group = codec.group_size;
    return group == rows.head_size || group == 32 || group % kBlock == 0;
  }
};

// What an encoder knows of a chunk of rows.
struct TokenChunk {
  uint32_t rows;
  const uint8_t* source[kMaxChunkRows];
  int64_t ahead;  // from a source to what is to be prefetched
  size_t index[kMaxChunkRows];
  uint8_t* codes;  // of row 0 of the section
  // By row, then group.
  alignas(64) uint8_t extremes[kMaxChunkGroups * 64];
  alignas(64) uint8_t parameters[kMaxChunkGroups * 4];
  alignas(64) float inverse[kMaxChunkGroups];
  alignas(64) float zero[kMaxChunkGroups];
  alignas(64) bool outside[kMaxChunkGroups];
  // By row, then block or half block; used where that differs from the groups.
  float block_inverse[kMaxChunkGroups];
  float block_zero[kMaxChunkGroups];
};

// One codec on one instruction set.
struct TokenEncoder {
  // Partly reduced largest magnitude (or smallest and largest) of every group.
  void (*find_extremes)(const TokenShape&, TokenChunk&);
  // extremes -> parameters, inverse, zero, outside; true if a group is outside the domain.
  bool (*find_parameters)(const TokenShape&, TokenChunk&);
  void (*quantise)(const TokenShape&, const TokenChunk&, const float* inverse, const float* zero);
};

// Where scales and magnitudes of zeros end of which no value needs clamping or can be a NaN. bf16:
// |zero| below 2^126 and 255 * scale far below; fp16: below 2^14 and 2^15.
template <typename Element>
constexpr uint32_t scale_end() {
  return Element::kEvenOdd ? 0x7600 : 0x4280;
}

template <typename Element>
constexpr uint32_t zero_end() {
  return Element::kEvenOdd ? 0x7E80 : 0x7400;
}

template <typename Element>
inline bool is_tame(uint16_t scale_bits, uint16_t zero_bits) {
  return scale_bits < scale_end<Element>() && (zero_bits & 0x7FFFu) < zero_end<Element>();
}

// The bits of the element of a group that has the smallest magnitude.
inline uint32_t smallest_bits(const TokenShape& shape, const TokenChunk& chunk, uint32_t group) {
  const uint32_t in_row = group % shape.groups;
  const uint8_t* source =
      chunk.source[group / shape.groups] + static_cast<size_t>(in_row) * shape.group * 2;
  uint16_t smallest = 0xFFFF;
  for (uint32_t i = 0; i < shape.group_elements(in_row); ++i) {
    uint16_t bits;
    std::memcpy(&bits, source + i * 2, sizeof bits);
    smallest = bits < smallest ? bits : smallest;
  }
  return smallest;
}

// `outside`: a bit for each of `count` groups.
inline void note_outside(TokenChunk& chunk, uint32_t first, uint32_t count, uint32_t outside,
                         bool* any) {
  if (__builtin_expect(!*any && outside == 0, true)) return;
  if (!*any) std::memset(chunk.outside, 0, sizeof chunk.outside);
  *any = true;
  for (uint32_t i = 0; i < count; ++i) chunk.outside[first + i] = outside >> i & 1;
}

inline uint32_t chunk_rows(const TokenShape& shape) {
  // Some multiple of the groups that one vector of parameters holds, and a fraction of the
  // first-level cache.
  const uint32_t by_groups = 32 / shape.groups;
  const uint32_t by_bytes = 8192 / (shape.head_size * 2);
  const uint32_t rows = by_groups < by_bytes ? by_groups : by_bytes;
  return rows == 0 ? 1 : rows < kMaxChunkRows ? rows : kMaxChunkRows;
}

template <size_t kBytes>
inline void store_row_parameters(const TokenChunk& chunk, uint8_t* out) {
  for (uint32_t r = 0; r < chunk.rows; ++r) {
    std::memcpy(out + chunk.index[r] * kBytes, chunk.parameters + r * kBytes, kBytes);
  }
}

inline void store_chunk_parameters(const TokenShape& shape, const TokenChunk& chunk, bool in_order,
                                   uint8_t* out) {
  const size_t bytes = shape.row_parameters;
  if (in_order) {
    std::memcpy(out + chunk.index[0] * bytes, chunk.parameters, chunk.rows * bytes);
  } else if (bytes == 2) {
    store_row_parameters<2>(chunk, out);
  } else if (bytes == 4) {
    store_row_parameters<4>(chunk, out);
  } else if (bytes == 8) {
    store_row_parameters<8>(chunk, out);
  } else {
    for (uint32_t r = 0; r < chunk.rows; ++r) {
      std::memcpy(out + chunk.index[r] * bytes, chunk.parameters + r * bytes, bytes);
    }
  }
}

// Where a group is larger than a block, or the last one is short: what quantise() wants, by block.
inline void spread_over_blocks(const TokenShape& shape, TokenChunk& chunk) {
  const uint32_t width = shape.halves ? 32 : kBlock;
  const uint32_t per_group = shape.group / width + (shape.group % width != 0);
  uint32_t entry = 0;
  for (uint32_t r = 0; r < chunk.rows; ++r) {
    uint32_t group = r * shape.groups;
    for (uint32_t e = 0, used = 0; e < shape.entries; ++e, ++used, ++entry) {
      const bool more = used == per_group && group + 1 < (r + 1) * shape.groups;
      group += more;
      if (more) used = 0;
      chunk.block_inverse[entry] = chunk.inverse[group];
      chunk.block_zero[entry] = chunk.zero[group];
    }
  }
}

// A group outside the domain has codes 0. It is rare: the kernels compute something, and this
// clears it.
inline uint64_t clear_outside(const SectionCodec& codec, const TokenShape& shape,
                              const TokenChunk& chunk) {
  uint64_t count = 0;
  const uint32_t per_byte = 8 / codec.bits;
  for (uint32_t g = 0; g < chunk.rows * shape.groups; ++g) {
    if (!chunk.outside[g]) continue;
    ++count;
    const uint32_t start = g % shape.groups * shape.group;
    for (uint32_t i = start; i < start + shape.group_elements(g % shape.groups); ++i) {
      const uint32_t block = i / kBlock;
      const uint32_t bytes =
          block < shape.blocks ? 8u * codec.bits : (shape.tail + per_byte - 1) / per_byte;
      const uint32_t shift = i % kBlock / bytes * codec.bits;
      uint8_t* code = chunk.codes + chunk.index[g / shape.groups] * shape.row_codes +
                      block * 8 * codec.bits + i % kBlock % bytes;
      *code = static_cast<uint8_t>(*code & ~(((1u << codec.bits) - 1) << shift));
    }
  }
  return count;
}

inline void clear_padding(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  const size_t parameters =
      parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  const size_t stored =
      pad64(parameters) + code_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  std::memset(out + parameters, 0, pad64(parameters) - parameters);
  std::memset(out + stored, 0, pad64(stored) - stored);
}

inline uint64_t encode_token_rows(const TokenEncoder& encoder, const SectionCodec& codec,
                                  const Rows& rows, const Rows* next, uint8_t* out) {
  const TokenShape shape(codec, rows);
  clear_padding(codec, rows, out);
  const uint32_t at_once = chunk_rows(shape);
  const bool direct = shape.entries == shape.groups;
  const uint32_t distance = kPrefetchBytes / (shape.head_size * 2) + 1;
  const bool in_order = !heads_are_neighbours(rows);
  RowWalk walk(rows);
  RowsAhead ahead(rows, next, distance > at_once ? distance : at_once);
  TokenChunk chunk;
  chunk.codes = out + shape.codes;
  uint64_t outside = 0;
  for (uint64_t left = static_cast<uint64_t>(rows.head_count) * rows.token_count; left != 0;
       left -= chunk.rows) {
    chunk.ahead = ahead.offset(walk.address(), at_once);
    chunk.rows = walk.take(chunk.source, chunk.index, at_once);
    encoder.find_extremes(shape, chunk);
    const bool any_outside = encoder.find_parameters(shape, chunk);
    store_chunk_parameters(shape, chunk, in_order, out);
    if (!direct) spread_over_blocks(shape, chunk);
    encoder.quantise(shape, chunk, direct ? chunk.inverse : chunk.block_inverse,
                     direct ? chunk.zero : chunk.block_zero);
    if (__builtin_expect(any_outside, false)) outside += clear_outside(codec, shape, chunk);
  }
  return outside;
}

// Rows to decode at once.
struct TokenTargets {
  uint32_t rows;
  const uint8_t* target[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  const uint8_t* codes;  // of row 0 of the section
  const uint8_t* parameters;
};

using TokenDecoder = void (*)(const TokenShape&, const TokenTargets&);

inline void decode_token_rows(TokenDecoder decoder, const SectionCodec& codec, const uint8_t* in,
                              const Rows& rows) {
  const TokenShape shape(codec, rows);
  RowWalk walk(rows);
  TokenTargets targets;
  targets.codes = in + shape.codes;
  targets.parameters = in;
  BytesBehind behind(codec, in, rows);
  while ((targets.rows = walk.take(targets.target, targets.index, kMaxChunkRows)) != 0) {
    behind.fetch(targets.rows);
    decoder(shape, targets);
  }
}

}  // namespace
}  // namespace kvc
