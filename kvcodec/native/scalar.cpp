// Portable kernels: what every other instruction set must equal byte for byte, and the way out for
// shapes that their fast paths do not cover. They keep no state, so a faster kernel may hand any
// section over to them.
#include <algorithm>
#include <cstring>

#define XXH_INLINE_ALL
#include "xxhash.h"

#include "ecq.h"
#include "fp8.h"
#include "kernels.h"
#include "kvcodec.h"
#include "lossless.h"
#include "numerics.h"

namespace kvc {
namespace {

constexpr uint32_t kBlock =
    64;  // elements of a block of codes; also how many channels are worked on at a time

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

size_t element_bytes(uint32_t dtype) {
  switch (dtype) {
    case KVC_BF16:
    case KVC_FP16:
      return 2;
    case KVC_FP32:
      return 4;
    case KVC_FP8_E4M3:
    case KVC_FP8_E5M2:
    case KVC_U8:
      return 1;
    default:
      return 0;
  }
}

// Bytes of the codes of one row of a per-token section.
size_t row_code_bytes(uint32_t bits, uint32_t head_size) {
  const size_t per_byte = 8 / bits;
  return head_size / kBlock * (kBlock / per_byte) + ceil_div(head_size % kBlock, per_byte);
}

// ---- per token

// One step per loop, on short arrays: compilers turn that into vector code of any instruction set.

template <typename Element>
void load_values(const uint8_t* source, uint32_t count, float* values) {
  for (uint32_t i = 0; i < count; ++i) values[i] = Element::load(source + i * Element::kBytes);
}

void widen_range(const float* values, uint32_t count, Range* range) {
  Range wider = *range;
  for (uint32_t i = 0; i < count; ++i) wider.add(values[i]);
  *range = wider;
}

void store_codes(const float* values, uint32_t count, const Quantizer& quantizer, uint8_t* codes) {
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
void pack_block(uint32_t bits, const uint8_t* codes, uint32_t count, uint8_t* target) {
  const uint32_t per_byte = 8 / bits;
  const uint32_t bytes = (count + per_byte - 1) / per_byte;
  for (uint32_t i = 0; i < bytes; ++i) {
    uint32_t packed = 0;
    for (uint32_t k = 0; k < per_byte; ++k)
      packed |= static_cast<uint32_t>(codes[i + k * bytes]) << k * bits;
    target[i] = static_cast<uint8_t>(packed);
  }
}

void unpack_block(uint32_t bits, const uint8_t* source, uint32_t count, uint8_t* codes) {
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
      store_decoded<Element>(target + i * Element::kBytes, codes[i], d.zero, d.scale, d.bias);
    return;
  }
  // Fewer codes than elements, which are at most a block: each code is worked out once.
  uint8_t table[kBlock * Element::kBytes];
  for (uint32_t code = 0; code < 1u << bits; ++code)
    store_decoded<Element>(table + code * Element::kBytes, code, d.zero, d.scale, d.bias);
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

// Tokens outside, heads inside: the heads of a token are neighbours in the memory of most layouts.
template <typename Element>
uint64_t encode_token_section(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  const TokenLayout layout(codec, rows);
  uint64_t outside = 0;
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      const size_t index = static_cast<size_t>(head) * rows.token_count + token;
      const uint8_t* row = rows.row(head, token);
      uint8_t* parameters = out + index * layout.row_parameters;
      outside += store_row_parameters<Element>(codec, row, rows.head_size, parameters);
      encode_row<Element>(codec, row, rows.head_size, parameters,
                          out + layout.codes + index * layout.row_codes);
    }
  }
  return outside;
}

template <typename Element>
void decode_token_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const TokenLayout layout(codec, rows);
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      const size_t index = static_cast<size_t>(head) * rows.token_count + token;
      decode_row<Element>(codec, in + layout.codes + index * layout.row_codes,
                          in + index * layout.row_parameters, rows.head_size,
                          rows.row(head, token));
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

template <typename Element>
uint64_t store_channel_parameters(const SectionCodec& codec, const Rows& rows,
                                  const ChannelLayout& layout, uint32_t head, uint32_t channel,
                                  uint32_t count, uint8_t* out) {
  uint64_t outside = 0;
  uint8_t* target = out + head * layout.head_parameters + channel * parameter_size(codec);
  for_groups(
      codec.group_size, 0, rows.token_count, [&](uint32_t group, uint32_t first, uint32_t tokens) {
        Range ranges[kBlock];
        for (uint32_t token = first; token < first + tokens; ++token) {
          const uint8_t* row = rows.row(head, token) + channel * Element::kBytes;
          for (uint32_t i = 0; i < count; ++i)
            ranges[i].add(Element::load(row + i * Element::kBytes));
        }
        uint8_t* parameters = target + group * layout.group_parameters;
        for (uint32_t i = 0; i < count; ++i) {
          const Parameter parameter =
              parameter_of<Element>(ranges[i], codec.bits, codec.asymmetric);
          outside += parameter.scale == kNaNScale;
          store_parameter(parameters + i * parameter_size(codec), parameter, codec.asymmetric);
        }
      });
  return outside;
}

template <typename Element>
void store_channel_codes(const SectionCodec& codec, const Rows& rows, const ChannelLayout& layout,
                         uint32_t head, uint32_t channel, uint32_t count, uint8_t* out) {
  const uint32_t per_word = 32 / codec.bits;
  const uint8_t* source = out + head * layout.head_parameters + channel * parameter_size(codec);
  uint8_t* target = out + layout.codes + head * layout.head_codes + channel * sizeof(uint32_t);
  Quantizer quantizers[kBlock];
  uint32_t words[kBlock] = {};
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    if (token % codec.group_size == 0) {
      const uint8_t* parameters = source + token / codec.group_size * layout.group_parameters;
      for (uint32_t i = 0; i < count; ++i) {
        quantizers[i] = quantizer_of<Element>(
            load_parameter(parameters + i * parameter_size(codec), codec.asymmetric), codec.bits,
            codec.asymmetric);
      }
    }
    const uint8_t* row = rows.row(head, token) + channel * Element::kBytes;
    const uint32_t shift = token % per_word * codec.bits;
    for (uint32_t i = 0; i < count; ++i) {
      const Quantizer& q = quantizers[i];
      words[i] |=
          code_of(Element::load(row + i * Element::kBytes), q.zero, q.inverse, q.bias, q.keep)
          << shift;
    }
    if (token % per_word == per_word - 1 || token == rows.token_count - 1) {
      std::memcpy(target + token / per_word * layout.word_bytes, words, count * sizeof(uint32_t));
      std::memset(words, 0, sizeof words);
    }
  }
}

template <typename Element>
uint64_t encode_channel_section(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  const ChannelLayout layout(codec, rows);
  uint64_t outside = 0;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t channel = 0; channel < rows.head_size; channel += kBlock) {
      const uint32_t count = std::min(kBlock, rows.head_size - channel);
      outside += store_channel_parameters<Element>(codec, rows, layout, head, channel, count, out);
      store_channel_codes<Element>(codec, rows, layout, head, channel, count, out);
    }
  }
  return outside;
}

template <typename Element>
void decode_channels(const SectionCodec& codec, const uint8_t* in, const Rows& rows,
                     const ChannelLayout& layout, uint32_t head, uint32_t channel, uint32_t count) {
  const uint32_t per_word = 32 / codec.bits;
  const uint32_t mask = (1u << codec.bits) - 1;
  const uint8_t* parameters = in + head * layout.head_parameters + channel * parameter_size(codec);
  const uint8_t* codes = in + layout.codes + head * layout.head_codes + channel * sizeof(uint32_t);
  Dequantizer dequantizers[kBlock];
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    if (token % codec.group_size == 0) {
      const uint8_t* source = parameters + token / codec.group_size * layout.group_parameters;
      for (uint32_t i = 0; i < count; ++i) {
        dequantizers[i] = dequantizer_of<Element>(
            load_parameter(source + i * parameter_size(codec), codec.asymmetric), codec.bits,
            codec.asymmetric);
      }
    }
    uint32_t words[kBlock];
    std::memcpy(words, codes + token / per_word * layout.word_bytes, count * sizeof(uint32_t));
    uint8_t* row = rows.row(head, token) + channel * Element::kBytes;
    const uint32_t shift = token % per_word * codec.bits;
    for (uint32_t i = 0; i < count; ++i) {
      const Dequantizer& d = dequantizers[i];
      store_decoded<Element>(row + i * Element::kBytes, words[i] >> shift & mask, d.zero, d.scale,
                             d.bias);
    }
  }
}

template <typename Element>
void decode_channel_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const ChannelLayout layout(codec, rows);
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t channel = 0; channel < rows.head_size; channel += kBlock) {
      decode_channels<Element>(codec, in, rows, layout, head, channel,
                               std::min(kBlock, rows.head_size - channel));
    }
  }
}

// ---- raw

// Calls copy(address in memory, offset in the section, bytes) for every run of rows that is
// contiguous in both.
template <typename Copy>
void for_runs(const SectionCodec& codec, const Rows& rows, Copy copy) {
  const size_t row_bytes = rows.head_size * element_bytes(codec.dtype);
  if (rows.token_stride == static_cast<int64_t>(row_bytes)) {
    const size_t head_bytes = row_bytes * rows.token_count;
    for (uint32_t head = 0; head < rows.head_count; ++head)
      copy(rows.row(head, 0), head * head_bytes, head_bytes);
    return;
  }
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      const size_t index = static_cast<size_t>(head) * rows.token_count + token;
      copy(rows.row(head, token), index * row_bytes, row_bytes);
    }
  }
}

// ---- sections

template <typename Element>
uint64_t encode_elements(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  return codec.channel ? encode_channel_section<Element>(codec, rows, out)
                       : encode_token_section<Element>(codec, rows, out);
}

uint64_t encode_section(const SectionCodec& codec, const Rows& rows, const Rows*, uint8_t* out) {
  const size_t parameters =
      parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  const size_t stored =
      pad64(parameters) + code_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  std::memset(out + parameters, 0, pad64(parameters) - parameters);
  std::memset(out + stored, 0, pad64(stored) - stored);
  if (codec.kind == KVC_KIND_RAW) {
    for_runs(codec, rows, [&](const uint8_t* run, size_t offset, size_t bytes) {
      std::memcpy(out + offset, run, bytes);
    });
    return 0;
  }
  if (codec.kind == KVC_KIND_FP8) return encode_fp8(codec, rows, out);
  switch (codec.dtype) {
    case KVC_BF16:
      return encode_elements<BFloat16>(codec, rows, out);
    case KVC_FP16:
      return encode_elements<Float16>(codec, rows, out);
    default:
      return encode_elements<Float32>(codec, rows, out);
  }
}

template <typename Element>
void decode_elements(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  codec.channel ? decode_channel_section<Element>(codec, in, rows)
                : decode_token_section<Element>(codec, in, rows);
}

void decode_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (codec.kind == KVC_KIND_RAW) {
    for_runs(codec, rows, [&](uint8_t* run, size_t offset, size_t bytes) {
      std::memcpy(run, in + offset, bytes);
    });
    return;
  }
  if (codec.kind == KVC_KIND_FP8) return decode_fp8(codec, in, rows);
  switch (codec.dtype) {
    case KVC_BF16:
      return decode_elements<BFloat16>(codec, in, rows);
    case KVC_FP16:
      return decode_elements<Float16>(codec, in, rows);
    default:
      return decode_elements<Float32>(codec, in, rows);
  }
}

void copy_out(uint8_t* target, const uint8_t* source, size_t bytes) {
  std::memcpy(target, source, bytes);
}

uint64_t checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

size_t encode_coded(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary,
                    uint8_t* scratch, uint8_t* out) {
  switch (codec.kind) {
    case KVC_KIND_ECQ:
      return encode_ecq(codec, rows, rotary, scratch, out);
    case KVC_KIND_LOSSLESS:
      return encode_lossless_scalar(codec, rows, scratch, out);
    case KVC_KIND_BLOCK:
      return encode_block_scalar(codec, rows, out);
    default:
      return 0;
  }
}

bool decode_coded(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                  const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  switch (codec.kind) {
    case KVC_KIND_ECQ:
      return decode_ecq(codec, in, stored_bytes, rows, rotary, scratch);
    case KVC_KIND_LOSSLESS:
      return decode_lossless_scalar(codec, in, stored_bytes, rows, scratch);
    case KVC_KIND_BLOCK:
      return decode_block_scalar(codec, in, stored_bytes, rows);
    default:
      return false;
  }
}

// a * b, or a number that no limit lets pass.
uint64_t saturating_product(uint64_t a, uint64_t b) {
  uint64_t product;
  return __builtin_mul_overflow(a, b, &product) ? UINT64_MAX / 4 : product;
}

}  // namespace

const Kernels kScalarKernels = {"scalar", encode_section, decode_section, copy_out,
                                checksum, encode_coded,   decode_coded};

size_t parameter_bytes(const SectionCodec& codec, uint32_t head_count, uint32_t token_count,
                       uint32_t head_size) {
  if (codec.kind != KVC_KIND_INT) return 0;
  const size_t size = parameter_size(codec);
  if (codec.channel) {
    return saturating_product(
        saturating_product(head_count, ceil_div(token_count, codec.group_size)), head_size * size);
  }
  return saturating_product(static_cast<uint64_t>(head_count) * token_count,
                            ceil_div(head_size, codec.group_size) * size);
}

size_t code_bytes(const SectionCodec& codec, uint32_t head_count, uint32_t token_count,
                  uint32_t head_size) {
  const uint64_t row_count = static_cast<uint64_t>(head_count) * token_count;
  if (codec.kind == KVC_KIND_RAW)
    return saturating_product(row_count, head_size * element_bytes(codec.dtype));
  if (codec.kind == KVC_KIND_FP8) return saturating_product(row_count, head_size);
  if (codec.channel) {
    const uint64_t words = ceil_div(token_count, 32 / codec.bits);
    return saturating_product(words * head_count, head_size * sizeof(uint32_t));
  }
  return saturating_product(row_count, row_code_bytes(codec.bits, head_size));
}

}  // namespace kvc

namespace {

bool coded_is_valid(uint32_t dtype, uint32_t kind, uint32_t bits, uint32_t options,
                    uint32_t group_size) {
  constexpr uint32_t kFewestBits = 24;  // sixteenths
  constexpr uint32_t kMostBits = 97;
  if (group_size != 0 || (options & ~static_cast<uint32_t>(KVC_OPTION_CHANNEL)) != 0) return false;
  if (kind == KVC_KIND_ECQ) return dtype <= KVC_FP32 && bits >= kFewestBits && bits <= kMostBits;
  if (kind == KVC_KIND_BLOCK && options != 0) return false;
  return (dtype == KVC_BF16 || dtype == KVC_FP16) && bits == 16;
}

}  // namespace

extern "C" uint64_t kvc_section_bytes(uint32_t dtype, uint32_t head_count, uint32_t token_count,
                                      uint32_t head_size, uint32_t kind, uint32_t bits,
                                      uint32_t options, uint32_t group_size) {
  constexpr uint32_t kMaxHeads = 65536;
  constexpr uint32_t kMaxTokens = 65536;
  constexpr uint32_t kMaxHeadSize = 1u << 30;
  constexpr uint64_t kMaxSectionBytes = (uint64_t{1} << 31) - 1;
  const size_t bytes = kvc::element_bytes(dtype);
  if (bytes == 0 || head_count == 0 || head_count > kMaxHeads || token_count == 0 ||
      token_count > kMaxTokens || head_size == 0 || head_size > kMaxHeadSize) {
    return 0;
  }
  if (kind > 0xFF) return 0;
  if (kind == KVC_KIND_RAW) {
    if (bits != 8 * bytes || options != 0 || group_size != 0) return 0;
  } else if (kind == KVC_KIND_INT) {
    const uint32_t axis = options & KVC_OPTION_CHANNEL ? token_count : head_size;
    if (dtype > KVC_FP32 || (bits != 2 && bits != 4 && bits != 8)) return 0;
    if (options > (KVC_OPTION_ASYMMETRIC | KVC_OPTION_CHANNEL) || group_size == 0 ||
        group_size > axis)
      return 0;
  } else if (kind == KVC_KIND_FP8) {
    if (dtype > KVC_FP32 || bits != 8 || options != 0 || group_size != 0) return 0;
  } else if (kvc::is_coded(static_cast<uint8_t>(kind))) {
    if (!coded_is_valid(dtype, kind, bits, options, group_size)) return 0;
    kind = KVC_KIND_RAW;
  } else {
    return 0;
  }
  const kvc::SectionCodec codec{
      static_cast<uint8_t>(dtype),         static_cast<uint8_t>(kind),
      static_cast<uint8_t>(bits),          (options & KVC_OPTION_ASYMMETRIC) != 0,
      (options & KVC_OPTION_CHANNEL) != 0, group_size};
  const uint64_t parameters = kvc::parameter_bytes(codec, head_count, token_count, head_size);
  const uint64_t codes = kvc::code_bytes(codec, head_count, token_count, head_size);
  if (parameters > kMaxSectionBytes || codes > kMaxSectionBytes) return 0;
  const uint64_t stored = kvc::pad64(parameters) + codes;
  return stored > kMaxSectionBytes ? 0 : stored;
}
