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
#include "scalar_int.h"
#include "transformed.h"

namespace kvc {
namespace {

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

// ---- int

template <typename Element>
uint64_t encode_token_section(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  uint64_t outside = 0;
  for_token_rows(TokenLayout(codec, rows), rows,
                 [&](uint32_t head, uint32_t token, size_t parameters, size_t codes) {
                   const uint8_t* row = rows.row(head, token);
                   outside += store_row_parameters<Element>(codec, row, rows.head_size,
                                                            out + parameters);
                   encode_row<Element>(codec, row, rows.head_size, out + parameters, out + codes);
                 });
  return outside;
}

template <typename Element>
void decode_token_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  for_token_rows(TokenLayout(codec, rows), rows,
                 [&](uint32_t head, uint32_t token, size_t parameters, size_t codes) {
                   decode_row<Element>(codec, in + codes, in + parameters, rows.head_size,
                                       rows.row(head, token));
                 });
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
  return codec.channel ? encode_channels(codec, rows, PlainRows<Element>{rows}, out)
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
  if (is_transformed(codec)) return encode_transformed(codec, rows, out);
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
  codec.channel ? decode_channels(codec, in, rows, PlainRows<Element>{rows})
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
  if (is_transformed(codec)) return decode_transformed(codec, in, rows);
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

size_t encode_coded(const SectionCodec& codec, const Rows& rows, const Rows*,
                    const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
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

bool options_are_valid(uint32_t options, uint32_t head_size) {
  const bool channel = (options & KVC_OPTION_CHANNEL) != 0;
  switch (options & ~static_cast<uint32_t>(KVC_OPTION_ASYMMETRIC | KVC_OPTION_CHANNEL)) {
    case 0:
      return true;
    case KVC_OPTION_DEROTATED:
      return channel && head_size <= kvc::kMaxDerotatedSize;
    case KVC_OPTION_HADAMARD:
      return !channel && head_size <= kvc::kMaxHadamardSize && (head_size & (head_size - 1)) == 0;
    default:
      return false;
  }
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
    if (!options_are_valid(options, head_size) || group_size == 0 || group_size > axis) return 0;
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
