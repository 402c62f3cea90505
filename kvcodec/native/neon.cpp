// AArch64: sections per token of bf16 and fp16 whose rows are whole blocks and whose groups end at half blocks, which is
// what models have. Everything else is handed over to the scalar kernels.
#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "kvcodec.h"
#include "numerics.h"

namespace kvc {
namespace {

constexpr uint32_t kBlock = 64;
constexpr uint32_t kHalf = 32;  // a group boundary may lie here and nowhere else inside a block

struct Floats8 {
  float32x4_t low;
  float32x4_t high;
};

// Vector forms of the element types of numerics.h.
struct VectorBFloat16 : BFloat16 {
  static constexpr uint16_t kDomainEndBits = 0x7F00;
  static constexpr uint16_t kExponent = 0x7F80;  // all ones: NaN or infinity
  static Floats8 widen(uint16x8_t bits) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
  }
  static uint16x8_t narrow(Floats8 values) {
    const uint32x4_t half = vdupq_n_u32(0x8000);
    return vaddhn_high_u32(vaddhn_u32(vreinterpretq_u32_f32(values.low), half),
                           vreinterpretq_u32_f32(values.high), half);
  }
};

struct VectorFloat16 : Float16 {
  static constexpr uint16_t kDomainEndBits = 0x7C00;
  static constexpr uint16_t kExponent = 0x7C00;
  static Floats8 widen(uint16x8_t bits) {
    const float16x8_t halves = vreinterpretq_f16_u16(bits);
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
  static uint16x8_t narrow(Floats8 values) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(values.low), values.high));
  }
};

uint16x8_t load8(const uint8_t* source) { return vreinterpretq_u16_u8(vld1q_u8(source)); }

// The bits of half-precision numbers as integers in the order of the numbers, -0 below +0.
int16x8_t ordered8(uint16x8_t bits) {
  const int16x8_t key = vreinterpretq_s16_u16(bits);
  return veorq_s16(key, vandq_s16(vshrq_n_s16(key, 15), vdupq_n_s16(0x7FFF)));
}

template <typename Element>
int32_t ordered_of_key(int16_t key) {
  const uint16_t bits = static_cast<uint16_t>(key ^ ((key >> 15) & 0x7FFF));
  return ordered(bits_of(Element::zero(bits)));
}

template <typename Element>
Range range_of(const uint8_t* source, uint32_t count) {
  int16x8_t low = vdupq_n_s16(INT16_MAX);
  int16x8_t high = vdupq_n_s16(INT16_MIN);
  uint16x8_t magnitude = vdupq_n_u16(0);
  for (uint32_t i = 0; i < count; i += 8) {
    const uint16x8_t bits = load8(source + 2 * i);
    const int16x8_t key = ordered8(bits);
    low = vminq_s16(low, key);
    high = vmaxq_s16(high, key);
    magnitude = vmaxq_u16(magnitude, vandq_u16(bits, vdupq_n_u16(0x7FFF)));
  }
  Range range;
  const uint16_t largest = vmaxvq_u16(magnitude);
  range.magnitude =
      largest >= Element::kDomainEndBits ? kDomainEnd : bits_of(Element::zero(largest));
  range.low = ordered_of_key<Element>(vminvq_s16(low));
  range.high = ordered_of_key<Element>(vmaxvq_s16(high));
  return range;
}

struct VectorQuantizer {
  float32x4_t zero;
  float32x4_t inverse;
  float32x4_t rounder;
};

// Eight codes in the low bytes of eight 16-bit lanes.
template <typename Element>
uint16x8_t codes8(const uint8_t* source, const VectorQuantizer& quantizer) {
  const Floats8 values = Element::widen(load8(source));
  // One rounding of the exact product: the sum's unit in the last place is 1, and the bias is even.
  const float32x4_t low =
      vfmaq_f32(quantizer.rounder, vsubq_f32(values.low, quantizer.zero), quantizer.inverse);
  const float32x4_t high =
      vfmaq_f32(quantizer.rounder, vsubq_f32(values.high, quantizer.zero), quantizer.inverse);
  return vuzp1q_u16(vreinterpretq_u16_f32(low), vreinterpretq_u16_f32(high));
}

template <typename Element>
void half_codes(const uint8_t* source, const Quantizer& quantizer, uint8x16_t* codes) {
  if (quantizer.keep == 0) {
    codes[0] = codes[1] = vdupq_n_u8(0);
    return;
  }
  const VectorQuantizer vectors = {vdupq_n_f32(quantizer.zero), vdupq_n_f32(quantizer.inverse),
                                   vdupq_n_f32(0x1.8p23f + static_cast<float>(quantizer.bias))};
  for (uint32_t i = 0; i < 2; ++i) {
    codes[i] = vuzp1q_u8(vreinterpretq_u8_u16(codes8<Element>(source + 32 * i, vectors)),
                         vreinterpretq_u8_u16(codes8<Element>(source + 32 * i + 16, vectors)));
  }
}

void pack_block(uint32_t bits, const uint8x16_t* codes, uint8_t* target) {
  if (bits == 8) {
    for (uint32_t i = 0; i < 4; ++i) vst1q_u8(target + 16 * i, codes[i]);
  } else if (bits == 4) {
    vst1q_u8(target, vsliq_n_u8(codes[0], codes[2], 4));
    vst1q_u8(target + 16, vsliq_n_u8(codes[1], codes[3], 4));
  } else {
    const uint8x16_t low = vsliq_n_u8(codes[0], codes[1], 2);
    const uint8x16_t high = vsliq_n_u8(codes[2], codes[3], 2);
    vst1q_u8(target, vsliq_n_u8(low, high, 4));
  }
}

void unpack_block(uint32_t bits, const uint8_t* source, uint8x16_t* codes) {
  if (bits == 8) {
    for (uint32_t i = 0; i < 4; ++i) codes[i] = vld1q_u8(source + 16 * i);
  } else if (bits == 4) {
    for (uint32_t i = 0; i < 2; ++i) {
      const uint8x16_t packed = vld1q_u8(source + 16 * i);
      codes[i] = vandq_u8(packed, vdupq_n_u8(15));
      codes[i + 2] = vshrq_n_u8(packed, 4);
    }
  } else {
    const uint8x16_t packed = vld1q_u8(source);
    const uint8x16_t mask = vdupq_n_u8(3);
    codes[0] = vandq_u8(packed, mask);
    codes[1] = vandq_u8(vshrq_n_u8(packed, 2), mask);
    codes[2] = vandq_u8(vshrq_n_u8(packed, 4), mask);
    codes[3] = vshrq_n_u8(packed, 6);
  }
}

template <typename Element>
uint16x8_t decoded8(int16x8_t offsets, float32x4_t zero, float32x4_t scale) {
  const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(offsets)));
  const float32x4_t high = vcvtq_f32_s32(vmovl_high_s16(offsets));
  const float32x4_t largest = vdupq_n_f32(Element::kLargest);
  const float32x4_t smallest = vdupq_n_f32(-Element::kLargest);
  // Product and sum apart: a product that overflows must not be saved by a fused sum.
  const Floats8 values = {vaddq_f32(zero, vmulq_f32(scale, low)),
                          vaddq_f32(zero, vmulq_f32(scale, high))};
  return Element::narrow({vminq_f32(vmaxq_f32(values.low, smallest), largest),
                          vminq_f32(vmaxq_f32(values.high, smallest), largest)});
}

// What each code of up to four bits stands for, as two tables of bytes.
struct Table {
  uint8x16_t low;
  uint8x16_t high;
};

template <typename Element>
Table table_of(const Dequantizer& dequantizer) {
  static const int16_t kCodes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int16x8_t bias = vdupq_n_s16(static_cast<int16_t>(dequantizer.bias));
  const float32x4_t zero = vdupq_n_f32(dequantizer.zero);
  const float32x4_t scale = vdupq_n_f32(dequantizer.scale);
  const uint8x16_t first =
      vreinterpretq_u8_u16(decoded8<Element>(vsubq_s16(vld1q_s16(kCodes), bias), zero, scale));
  const uint8x16_t second =
      vreinterpretq_u8_u16(decoded8<Element>(vsubq_s16(vld1q_s16(kCodes + 8), bias), zero, scale));
  return {vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
}

void store_looked_up(uint8_t* target, uint8x16_t codes, const Table& table) {
  const uint8x16_t low = vqtbl1q_u8(table.low, codes);
  const uint8x16_t high = vqtbl1q_u8(table.high, codes);
  vst1q_u8(target, vzip1q_u8(low, high));
  vst1q_u8(target + 16, vzip2q_u8(low, high));
}

template <typename Element>
void store_computed(uint8_t* target, uint8x16_t codes, const Dequantizer& dequantizer) {
  const int16x8_t bias = vdupq_n_s16(static_cast<int16_t>(dequantizer.bias));
  const float32x4_t zero = vdupq_n_f32(dequantizer.zero);
  const float32x4_t scale = vdupq_n_f32(dequantizer.scale);
  const int16x8_t first = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
  const int16x8_t second = vreinterpretq_s16_u16(vmovl_high_u8(codes));
  vst1q_u8(target, vreinterpretq_u8_u16(decoded8<Element>(vsubq_s16(first, bias), zero, scale)));
  vst1q_u8(target + 16,
           vreinterpretq_u8_u16(decoded8<Element>(vsubq_s16(second, bias), zero, scale)));
}

// A parameter that is not finite makes NaNs, whose form only the scalar code cares for.
template <typename Element>
void store_special(uint8_t* target, const uint8x16_t* codes, const Dequantizer& dequantizer) {
  uint8_t plain[kHalf];
  vst1q_u8(plain, codes[0]);
  vst1q_u8(plain + 16, codes[1]);
  for (uint32_t i = 0; i < kHalf; ++i) {
    store_clamped<Element>(target + 2 * i, decoded_value(plain[i], dequantizer));
  }
}

template <typename Element>
bool is_special(const Parameter& parameter, bool asymmetric) {
  return (parameter.scale & 0x7F80) == 0x7F80 ||
         (asymmetric && (parameter.zero & Element::kExponent) == Element::kExponent);
}

template <typename Element>
uint64_t encode_row(const SectionCodec& codec, const uint8_t* row, uint32_t head_size,
                    uint8_t* parameters, uint8_t* target) {
  uint64_t outside = 0;
  uint8x16_t codes[4];
  for (uint32_t start = 0; start < head_size; start += codec.group_size) {
    const uint32_t end = std::min(head_size, start + codec.group_size);
    const Range range = range_of<Element>(row + 2 * start, end - start);
    const Parameter parameter = parameter_of<Element>(range, codec.bits, codec.asymmetric);
    outside += parameter.scale == kNaNScale;
    store_parameter(parameters, parameter, codec.asymmetric);
    parameters += parameter_size(codec);
    const Quantizer quantizer = quantizer_of<Element>(parameter, codec.bits, codec.asymmetric);
    for (uint32_t at = start; at < end; at += kHalf) {
      const uint32_t half = at / kHalf % 2;
      half_codes<Element>(row + 2 * at, quantizer, codes + 2 * half);
      if (half == 0) continue;
      pack_block(codec.bits, codes, target);
      target += kBlock * codec.bits / 8;
    }
  }
  return outside;
}

template <typename Element>
void decode_row(const SectionCodec& codec, const uint8_t* source, const uint8_t* parameters,
                uint32_t head_size, uint8_t* row) {
  uint8x16_t codes[4];
  for (uint32_t start = 0; start < head_size; start += codec.group_size) {
    const uint32_t end = std::min(head_size, start + codec.group_size);
    const Parameter parameter = load_parameter(parameters, codec.asymmetric);
    parameters += parameter_size(codec);
    const Dequantizer dequantizer =
        dequantizer_of<Element>(parameter, codec.bits, codec.asymmetric);
    const bool special = is_special<Element>(parameter, codec.asymmetric);
    const Table table = table_of<Element>(dequantizer);
    for (uint32_t at = start; at < end; at += kHalf) {
      const uint32_t half = at / kHalf % 2;
      if (half == 0) {
        unpack_block(codec.bits, source, codes);
        source += kBlock * codec.bits / 8;
      }
      uint8_t* target = row + 2 * at;
      const uint8x16_t* part = codes + 2 * half;
      if (special) {
        store_special<Element>(target, part, dequantizer);
      } else if (codec.bits == 8) {
        store_computed<Element>(target, part[0], dequantizer);
        store_computed<Element>(target + 32, part[1], dequantizer);
      } else {
        store_looked_up(target, part[0], table);
        store_looked_up(target + 32, part[1], table);
      }
    }
  }
}

bool is_covered(const SectionCodec& codec, const Rows& rows) {
  return codec.kind == KVC_KIND_INT && !is_transformed(codec) && !codec.channel && codec.dtype != KVC_FP32 &&
         rows.head_size % kBlock == 0 && codec.group_size % kHalf == 0;
}

struct TokenLayout {
  size_t row_parameters;
  size_t row_codes;
  size_t codes;

  TokenLayout(const SectionCodec& codec, const Rows& rows)
      : row_parameters((size_t{rows.head_size} + codec.group_size - 1) / codec.group_size *
                       parameter_size(codec)),
        row_codes(size_t{rows.head_size} * codec.bits / 8),
        codes(pad64(parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size))) {}
};

template <typename Element>
uint64_t encode_tokens(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  const TokenLayout layout(codec, rows);
  uint64_t outside = 0;
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      const size_t index = static_cast<size_t>(head) * rows.token_count + token;
      outside += encode_row<Element>(codec, rows.row(head, token), rows.head_size,
                                     out + index * layout.row_parameters,
                                     out + layout.codes + index * layout.row_codes);
    }
  }
  return outside;
}

template <typename Element>
void decode_tokens(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
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

uint64_t encode_section(const SectionCodec& codec, const Rows& rows, const Rows* next,
                        uint8_t* out) {
  if (!is_covered(codec, rows)) return kScalarKernels.encode_section(codec, rows, next, out);
  const size_t parameters =
      parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  const size_t stored =
      pad64(parameters) + code_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
  std::memset(out + parameters, 0, pad64(parameters) - parameters);
  std::memset(out + stored, 0, pad64(stored) - stored);
  return codec.dtype == KVC_BF16 ? encode_tokens<VectorBFloat16>(codec, rows, out)
                                 : encode_tokens<VectorFloat16>(codec, rows, out);
}

void decode_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (!is_covered(codec, rows)) return kScalarKernels.decode_section(codec, in, rows);
  codec.dtype == KVC_BF16 ? decode_tokens<VectorBFloat16>(codec, in, rows)
                          : decode_tokens<VectorFloat16>(codec, in, rows);
}

void copy_out(uint8_t* target, const uint8_t* source, size_t bytes) {
  std::memcpy(target, source, bytes);
}

// xxhash.h uses NEON by itself wherever the compiler has it.
uint64_t checksum(const void* data, size_t bytes) { return kScalarKernels.checksum(data, bytes); }

size_t encode_coded(const SectionCodec& codec, const Rows& rows, const Rows* next,
                    const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
  return kScalarKernels.encode_coded(codec, rows, next, rotary, scratch, out);
}

bool decode_coded(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                  const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  return kScalarKernels.decode_coded(codec, in, stored_bytes, rows, rotary, scratch);
}

constexpr Kernels kNeonKernels = {"neon",   encode_section, decode_section, copy_out,
                                  checksum, encode_coded,   decode_coded};

}  // namespace

// Part of every AArch64 processor.
const Kernels* neon_kernels() { return &kNeonKernels; }

}  // namespace kvc

#else

namespace kvc {

const Kernels* neon_kernels() { return nullptr; }

}  // namespace kvc

#endif
