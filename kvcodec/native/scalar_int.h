// Int sections element by element, in loops that compilers turn into vector code of any instruction
// set: proto/FORMAT.md 3.2 to 3.4. Where the numbers come from and where they go is a template
// parameter, for sections may be transformed (3.12).
//
// Internal linkage on purpose, as in numerics.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "numerics.h"

namespace kvc {
namespace {

constexpr uint32_t kBlock =
    64;  // elements of a block of codes; also how many channels are worked on at a time

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Bytes of the codes of one row of a per-token section.
inline size_t row_code_bytes(uint32_t bits, uint32_t head_size) {
  const size_t per_byte = 8 / bits;
  return head_size / kBlock * (kBlock / per_byte) + ceil_div(head_size % kBlock, per_byte);
}

// ---- per token

// One step per loop, on short arrays: compilers turn that into vector code of any instruction set.

template <typename Element>
void load_values(const uint8_t* source, uint32_t count, float* values) {
  for (uint32_t i = 0; i < count; ++i) values[i] = Element::load(source + i * Element::kBytes);
}

template <typename Element>
void store_row(const float* values, uint32_t count, uint8_t* target) {
  for (uint32_t i = 0; i < count; ++i)
    store_clamped<Element>(target + i * Element::kBytes, values[i]);
}

inline void widen_range(const float* values, uint32_t count, Range* range) {
  Range wider = *range;
  for (uint32_t i = 0; i < count; ++i) wider.add(values[i]);
  *range = wider;
}

inline void store_codes(const float* values, uint32_t count, const Quantizer& quantizer, uint8_t* codes) {
  const Quantizer q = quantizer;
  uint32_t wide[kBlock];
  for (uint32_t i = 0; i < count; ++i)
    wide[i] = code_of(values[i], q.zero, q.inverse, q.bias, q.keep);
  for (uint32_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(wide[i]);
}

template <typename Element>
uint64_t store_row_parameters(const SectionCodec& codec, const uint8_t* row, uint32_t head_size,
                              uint8_t* target) {
  uint64_t outside = 0;
  for (uint32_t start = 0; start < head_size; start += codec.group_size) {
    const uint32_t end = std::min(start + codec.group_size, head_size);
    Range range;
    for (uint32_t at = start; at < end; at += kBlock) {
      float values[kBlock];
      const uint32_t count = std::min(kBlock, end - at);
      load_values<Element>(row + at * Element::kBytes, count, values);
      widen_range(values, count, &range);
    }
    const Parameter parameter = parameter_of<Element>(range, codec.bits, codec.asymmetric);
    outside += parameter.scale == kNaNScale;
    store_parameter(target, parameter, codec.asymmetric);
    target += parameter_size(codec);
  }
  return outside;
}

// Byte i of a block of n codes holds codes i, i + h, i + 2h ... with h bytes in all.
inline void pack_block(uint32_t bits, const uint8_t* codes, uint32_t count, uint8_t* target) {
  const uint32_t per_byte = 8 / bits;
  const uint32_t bytes = (count + per_byte - 1) / per_byte;
  for (uint32_t i = 0; i < bytes; ++i) {
    uint32_t packed = 0;
    for (uint32_t k = 0; k < per_byte; ++k)
      packed |= static_cast<uint32_t>(codes[i + k * bytes]) << k * bits;
    target[i] = static_cast<uint8_t>(packed);
  }
}

inline void unpack_block(uint32_t bits, const uint8_t* source, uint32_t count, uint8_t* codes) {
  const uint32_t per_byte = 8 / bits;
  const uint32_t bytes = (count + per_byte - 1) / per_byte;
  const uint32_t mask = (1u << bits) - 1;
  for (uint32_t k = 0; k < per_byte; ++k) {
    for (uint32_t i = 0; i < bytes; ++i)
      codes[i + k * bytes] = static_cast<uint8_t>(source[i] >> k * bits & mask);
  }
}

// Calls visit(group, first element, element count) for the parts of groups that lie in [start, end)
// of a row.
template <typename Visit>
void for_groups(uint32_t group_size, uint32_t start, uint32_t end, Visit visit) {
  while (start < end) {
    const uint32_t group = start / group_size;
    const uint32_t count = std::min(end - start, group_size - start % group_size);
    visit(group, start, count);
    start += count;
  }
}

template <typename Element>
void encode_row(const SectionCodec& codec, const uint8_t* row, uint32_t head_size,
                const uint8_t* parameters, uint8_t* target) {
  for (uint32_t start = 0; start < head_size; start += kBlock) {
    const uint32_t count = std::min(kBlock, head_size - start);
    uint8_t codes[kBlock] = {};
    for_groups(codec.group_size, start, start + count,
               [&](uint32_t group, uint32_t first, uint32_t elements) {
                 const Quantizer quantizer = quantizer_of<Element>(
                     load_parameter(parameters + group * parameter_size(codec), codec.asymmetric),
                     codec.bits, codec.asymmetric);
                 float values[kBlock];
                 load_values<Element>(row + first * Element::kBytes, elements, values);
                 store_codes(values, elements, quantizer, codes + (first - start));
               });
    pack_block(codec.bits, codes, count, target);
    target += count * codec.bits / 8;  // only the last block may be short, and nothing follows it
  }
}

template <typename Element>
void store_values(uint32_t bits, const uint8_t* codes, uint32_t count,
                  const Dequantizer& dequantizer, uint8_t* target) {
  const Dequantizer d = dequantizer;
  if (count <= 1u << bits) {
    for (uint32_t i = 0; i < count; ++i)
      store_clamped<Element>(target + i * Element::kBytes, decoded_value(codes[i], d));
    return;
  }
  // Fewer codes than elements, which are at most a block: each code is worked out once.
  uint8_t table[kBlock * Element::kBytes];
  for (uint32_t code = 0; code < 1u << bits; ++code)
    store_clamped<Element>(table + code * Element::kBytes, decoded_value(code, d));
  for (uint32_t i = 0; i < count; ++i)
    std::memcpy(target + i * Element::kBytes, table + codes[i] * Element::kBytes, Element::kBytes);
}

template <typename Element>
void decode_row(const SectionCodec& codec, const uint8_t* source, const uint8_t* parameters,
                uint32_t head_size, uint8_t* row) {
  for (uint32_t start = 0; start < head_size; start += kBlock) {
    const uint32_t count = std::min(kBlock, head_size - start);
    uint8_t codes[kBlock];
    unpack_block(codec.bits, source, count, codes);
    source += count * codec.bits / 8;
    for_groups(codec.group_size, start, start + count,
               [&](uint32_t group, uint32_t first, uint32_t elements) {
                 const Dequantizer dequantizer = dequantizer_of<Element>(
                     load_parameter(parameters + group * parameter_size(codec), codec.asymmetric),
                     codec.bits, codec.asymmetric);
                 store_values<Element>(codec.bits, codes + (first - start), elements, dequantizer,
                                       row + first * Element::kBytes);
               });
  }
}

// Where the parts of one row of a per-token section lie.
struct TokenLayout {
  size_t row_parameters;
  size_t row_codes;
  size_t codes;

  TokenLayout(const SectionCodec& codec, const Rows& rows)
      : row_parameters(ceil_div(rows.head_size, codec.group_size) * parameter_size(codec)),
        row_codes(row_code_bytes(codec.bits, rows.head_size)),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))) {}
};

// Calls visit(head, token, offset of the row's parameters, offset of its codes). Tokens outside,
// heads inside: the heads of a token are neighbours in the memory of most layouts.
template <typename Visit>
void for_token_rows(const TokenLayout& layout, const Rows& rows, Visit visit) {
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      const size_t index = static_cast<size_t>(head) * rows.token_count + token;
      visit(head, token, index * layout.row_parameters, layout.codes + index * layout.row_codes);
    }
  }
}

// ---- per channel

// Where the parts of one head of a per-channel section lie.
struct ChannelLayout {
  size_t group_parameters;
  size_t head_parameters;
  size_t word_bytes;
  size_t head_codes;
  size_t codes;

  ChannelLayout(const SectionCodec& codec, const Rows& rows)
      : group_parameters(rows.head_size * parameter_size(codec)),
        head_parameters(ceil_div(rows.token_count, codec.group_size) * group_parameters),
        word_bytes(rows.head_size * sizeof(uint32_t)),
        head_codes(ceil_div(rows.token_count, 32 / codec.bits) * word_bytes),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))) {}
};

// The rows of a section as they are. `Number` is the type that a group's zero has.
template <typename Element>
struct PlainRows {
  using Number = Element;
  static constexpr uint32_t kColumns = kBlock;  // channels at a time
  const Rows& rows;

  void load(uint32_t head, uint32_t token, uint32_t channel, uint32_t count, float* values) const {
    load_values<Element>(rows.row(head, token) + channel * Element::kBytes, count, values);
  }
  // May change the numbers.
  void store(uint32_t head, uint32_t token, uint32_t channel, uint32_t count,
             float* values) const {
    store_row<Element>(values, count, rows.row(head, token) + channel * Element::kBytes);
  }
};

template <typename Access>
uint64_t store_channel_parameters(const SectionCodec& codec, const Rows& rows, const Access& access,
                                  const ChannelLayout& layout, uint32_t head, uint32_t channel,
                                  uint32_t count, uint8_t* out) {
  uint64_t outside = 0;
  uint8_t* target = out + head * layout.head_parameters + channel * parameter_size(codec);
  for_groups(
      codec.group_size, 0, rows.token_count, [&](uint32_t group, uint32_t first, uint32_t tokens) {
        Range ranges[Access::kColumns];
        for (uint32_t token = first; token < first + tokens; ++token) {
          float values[Access::kColumns];
          access.load(head, token, channel, count, values);
          for (uint32_t i = 0; i < count; ++i) ranges[i].add(values[i]);
        }
        uint8_t* parameters = target + group * layout.group_parameters;
        for (uint32_t i = 0; i < count; ++i) {
          const Parameter parameter =
              parameter_of<typename Access::Number>(ranges[i], codec.bits, codec.asymmetric);
          outside += parameter.scale == kNaNScale;
          store_parameter(parameters + i * parameter_size(codec), parameter, codec.asymmetric);
        }
      });
  return outside;
}

template <typename Access>
void store_channel_codes(const SectionCodec& codec, const Rows& rows, const Access& access,
                         const ChannelLayout& layout, uint32_t head, uint32_t channel,
                         uint32_t count, uint8_t* out) {
  const uint32_t per_word = 32 / codec.bits;
  const uint8_t* source = out + head * layout.head_parameters + channel * parameter_size(codec);
  uint8_t* target = out + layout.codes + head * layout.head_codes + channel * sizeof(uint32_t);
  Quantizer quantizers[Access::kColumns];
  uint32_t words[Access::kColumns] = {};
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    if (token % codec.group_size == 0) {
      const uint8_t* parameters = source + token / codec.group_size * layout.group_parameters;
      for (uint32_t i = 0; i < count; ++i) {
        quantizers[i] = quantizer_of<typename Access::Number>(
            load_parameter(parameters + i * parameter_size(codec), codec.asymmetric), codec.bits,
            codec.asymmetric);
      }
    }
    float values[Access::kColumns];
    access.load(head, token, channel, count, values);
    const uint32_t shift = token % per_word * codec.bits;
    for (uint32_t i = 0; i < count; ++i) {
      const Quantizer& q = quantizers[i];
      words[i] |= code_of(values[i], q.zero, q.inverse, q.bias, q.keep) << shift;
    }
    if (token % per_word == per_word - 1 || token == rows.token_count - 1) {
      std::memcpy(target + token / per_word * layout.word_bytes, words, count * sizeof(uint32_t));
      std::memset(words, 0, sizeof words);
    }
  }
}

template <typename Access>
uint64_t encode_channels(const SectionCodec& codec, const Rows& rows, const Access& access,
                         uint8_t* out) {
  const ChannelLayout layout(codec, rows);
  uint64_t outside = 0;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t channel = 0; channel < rows.head_size; channel += Access::kColumns) {
      const uint32_t count = std::min(Access::kColumns, rows.head_size - channel);
      outside += store_channel_parameters(codec, rows, access, layout, head, channel, count, out);
      store_channel_codes(codec, rows, access, layout, head, channel, count, out);
    }
  }
  return outside;
}

template <typename Access>
void decode_some_channels(const SectionCodec& codec, const uint8_t* in, const Rows& rows,
                          const Access& access, const ChannelLayout& layout, uint32_t head,
                          uint32_t channel, uint32_t count) {
  const uint32_t per_word = 32 / codec.bits;
  const uint32_t mask = (1u << codec.bits) - 1;
  const uint8_t* parameters = in + head * layout.head_parameters + channel * parameter_size(codec);
  const uint8_t* codes = in + layout.codes + head * layout.head_codes + channel * sizeof(uint32_t);
  Dequantizer dequantizers[Access::kColumns];
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    if (token % codec.group_size == 0) {
      const uint8_t* source = parameters + token / codec.group_size * layout.group_parameters;
      for (uint32_t i = 0; i < count; ++i) {
        dequantizers[i] = dequantizer_of<typename Access::Number>(
            load_parameter(source + i * parameter_size(codec), codec.asymmetric), codec.bits,
            codec.asymmetric);
      }
    }
    uint32_t words[Access::kColumns];
    std::memcpy(words, codes + token / per_word * layout.word_bytes, count * sizeof(uint32_t));
    float values[Access::kColumns];
    const uint32_t shift = token % per_word * codec.bits;
    for (uint32_t i = 0; i < count; ++i)
      values[i] = decoded_value(words[i] >> shift & mask, dequantizers[i]);
    access.store(head, token, channel, count, values);
  }
}

template <typename Access>
void decode_channels(const SectionCodec& codec, const uint8_t* in, const Rows& rows,
                     const Access& access) {
  const ChannelLayout layout(codec, rows);
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t channel = 0; channel < rows.head_size; channel += Access::kColumns) {
      decode_some_channels(codec, in, rows, access, layout, head, channel,
                           std::min(Access::kColumns, rows.head_size - channel));
    }
  }
}

}  // namespace
}  // namespace kvc
