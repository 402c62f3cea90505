// The arithmetic of one element and one group, as proto/FORMAT.md 3.3 and 3.4 fix it.
//
// Everything has internal linkage on purpose: a file that is compiled for a newer instruction set
// must not lend its copy of a function to the baseline path through the linker.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "kvcodec.h"

namespace kvc {
namespace {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t load16(const uint8_t* source) {
  uint16_t bits;
  std::memcpy(&bits, source, sizeof bits);
  return bits;
}

inline void store16(uint8_t* target, uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  std::memcpy(target, &half, sizeof half);
}

inline float float_of_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline float float_of_fp16(uint16_t bits) {
  // The exponent is five bits in the place of eight: a product with 2^112 moves the bias, denormals
  // included.
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  const uint32_t special = magnitude >= 0x0F800000 ? 0x7F800000u : 0u;
  const uint32_t moved = bits_of(float_of(magnitude) * 0x1p112f);
  return float_of(moved | special | static_cast<uint32_t>(bits & 0x8000) << 16);
}

// `value` is a number with |value| <= 65504. Nearest, ties to even.
inline uint32_t fp16_of_float(float value) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(value) & 0x7FFFFFFF;
  const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  // One unit in the last place of 0.5 is the smallest denormal of fp16: the addition rounds.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
  return sign | (magnitude < 0x38800000 ? denormal : normal);
}

// Element types: load widens exactly; store takes a number within +-kLargest, or NaN.
struct BFloat16 {
  static constexpr size_t kBytes = 2;
  static constexpr float kLargest = 0x1.FEp127f;
  static float load(const uint8_t* source) { return float_of_bf16(load16(source)); }
  static void store(uint8_t* target, float value) {
    store16(target, value != value ? 0x7FC0 : (bits_of(value) + 0x8000) >> 16);
  }
  static uint16_t zero_of(float low) { return static_cast<uint16_t>(bits_of(low) >> 16); }
  static float zero(uint16_t bits) { return float_of_bf16(bits); }
};

struct Float16 {
  static constexpr size_t kBytes = 2;
  static constexpr float kLargest = 65504.0f;
  static float load(const uint8_t* source) { return float_of_fp16(load16(source)); }
  static void store(uint8_t* target, float value) {
    store16(target, value != value ? 0x7E00 : fp16_of_float(value));
  }
  static uint16_t zero_of(float low) { return static_cast<uint16_t>(fp16_of_float(low)); }
  static float zero(uint16_t bits) { return float_of_fp16(bits); }
};

struct Float32 {
  static constexpr size_t kBytes = 4;
  static constexpr float kLargest = 0x1.FFFFFEp127f;
  static float load(const uint8_t* source) {
    float value;
    std::memcpy(&value, source, sizeof value);
    return value;
  }
  static void store(uint8_t* target, float value) {
    const uint32_t bits = value != value ? 0x7FC00000 : bits_of(value);
    std::memcpy(target, &bits, sizeof bits);
  }
  // Towards minus infinity: away from zero if negative.
  static uint16_t zero_of(float low) {
    const uint32_t bits = bits_of(low);
    return static_cast<uint16_t>((bits + (bits >> 31 ? 0xFFFF : 0)) >> 16);
  }
  static float zero(uint16_t bits) { return float_of_bf16(bits); }
};

// Integers in the order of the floats they stand for, -0 below +0; the function is its own inverse.
inline int32_t ordered(uint32_t bits) {
  const int32_t key = static_cast<int32_t>(bits);
  return key ^ (key >> 31 & 0x7FFFFFFF);
}

inline float float_of_ordered(int32_t key) {
  return float_of(static_cast<uint32_t>(ordered(static_cast<uint32_t>(key))));
}

// What a group is encoded from.
struct Range {
  int32_t low = INT32_MAX;
  int32_t high = INT32_MIN;
  uint32_t magnitude = 0;

  void add(float value) {
    const uint32_t bits = bits_of(value);
    const int32_t key = ordered(bits);
    low = key < low ? key : low;
    high = key > high ? key : high;
    magnitude = (bits & 0x7FFFFFFF) > magnitude ? bits & 0x7FFFFFFF : magnitude;
  }
};

constexpr uint32_t kDomainEnd = 0x7F000000;  // 2^127; infinities and NaNs lie above
constexpr uint16_t kNaNScale = 0x7FC0;
constexpr uint16_t kSmallestScale = 0x0080;  // 2^-126

// D and E of the format.
inline float symmetric_factor(uint32_t bits) {
  return bits == 8   ? static_cast<float>(1 / (127.5 - 0x1p-10))
         : bits == 4 ? static_cast<float>(1 / (7.5 - 0x1p-10))
                     : static_cast<float>(1 / (1.5 - 0x1p-10));
}

inline float asymmetric_factor(uint32_t bits) {
  return static_cast<float>(1.0 / static_cast<double>((1u << bits) - 1));
}

inline uint16_t scale_of(float extent, float factor) {
  if (extent == 0) return 0;
  const float scale = extent * factor;
  if (scale < 0x1p-126f) return kSmallestScale;
  return static_cast<uint16_t>((bits_of(scale) + 0xFFFF) >> 16);
}

// The stored parameter of a group.
struct Parameter {
  uint16_t scale;
  uint16_t zero;
};

constexpr Parameter kOutsideDomain{kNaNScale, 0};

template <typename Element>
inline Parameter parameter_of(const Range& range, uint32_t bits, bool asymmetric) {
  if (range.magnitude >= kDomainEnd) return kOutsideDomain;
  if (!asymmetric) return {scale_of(float_of(range.magnitude), symmetric_factor(bits)), 0};
  const uint16_t zero = Element::zero_of(float_of_ordered(range.low));
  const float extent = float_of_ordered(range.high) - Element::zero(zero);
  // fp32 alone: rounding the zero down to -2^127 can push the range beyond the largest float.
  if (bits_of(extent) >= 0x7F800000) return kOutsideDomain;
  return {scale_of(extent, asymmetric_factor(bits)), zero};
}

inline size_t parameter_size(const SectionCodec& codec) { return codec.asymmetric ? 4 : 2; }

inline void store_parameter(uint8_t* target, const Parameter& parameter, bool asymmetric) {
  if (asymmetric) {
    store16(target, parameter.zero);
    target += 2;
  }
  store16(target, parameter.scale);
}

inline Parameter load_parameter(const uint8_t* source, bool asymmetric) {
  if (asymmetric) return {load16(source + 2), load16(source)};
  return {load16(source), 0};
}

// How elements of a group become codes: ((x - zero) * inverse rounded + bias) & keep.
struct Quantizer {
  float zero;
  float inverse;
  uint32_t bias;
  uint32_t keep;  // 0 outside the domain: all codes 0
};

template <typename Element>
inline Quantizer quantizer_of(const Parameter& parameter, uint32_t bits, bool asymmetric) {
  const float scale = float_of_bf16(parameter.scale);
  const bool inside = parameter.scale != kNaNScale;
  return {asymmetric ? Element::zero(parameter.zero) : 0.0f,
          inside && scale != 0 ? 1.0f / scale : 0.0f, asymmetric ? 0u : 1u << (bits - 1),
          inside ? 0xFFu : 0u};
}

inline uint32_t code_of(float value, float zero, float inverse, uint32_t bias, uint32_t keep) {
  // The product of two binary32 is exact in binary64, and adding 1.5 * 2^52 rounds it to an integer
  // like rint, which the baseline instruction set has only as a call.
  const double rounded =
      static_cast<double>(value - zero) * static_cast<double>(inverse) + 0x1.8p52;
  uint64_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return (static_cast<uint32_t>(bits) + bias) & keep;
}

// How codes become elements: zero + scale * (code - bias).
struct Dequantizer {
  float zero;
  float scale;
  int32_t bias;
};

template <typename Element>
inline Dequantizer dequantizer_of(const Parameter& parameter, uint32_t bits, bool asymmetric) {
  // Adding -0 changes no number, -0 included: one expression serves both kinds.
  return {asymmetric ? Element::zero(parameter.zero) : -0.0f, float_of_bf16(parameter.scale),
          asymmetric ? 0 : 1 << (bits - 1)};
}

inline float decoded_value(uint32_t code, const Dequantizer& d) {
  return d.zero + d.scale * static_cast<float>(static_cast<int32_t>(code) - d.bias);
}

template <typename Element>
inline void store_clamped(uint8_t* target, float value) {
  value = value < -Element::kLargest ? -Element::kLargest : value;
  value = value > Element::kLargest ? Element::kLargest : value;
  Element::store(target, value);
}

}  // namespace
}  // namespace kvc
