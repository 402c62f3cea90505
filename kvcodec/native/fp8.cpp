// Kind fp8, the portable way: what every other instruction set must equal byte for byte.
#include "fp8.h"

#include <algorithm>

namespace kvc {
namespace {

constexpr uint32_t kBlock = 64;

// Writes `count` bytes; the largest of them before it saturated.
template <typename Element>
uint32_t encode_block(const uint8_t* source, uint32_t count, uint8_t* target) {
  uint32_t bits[kBlock];
  uint32_t code[kBlock];
  uint32_t largest = 0;
  for (uint32_t i = 0; i < count; ++i) bits[i] = bits_of(Element::load(source + i * Element::kBytes));
  for (uint32_t i = 0; i < count; ++i) {
    code[i] = e4m3_magnitude(bits[i] & 0x7FFFFFFF);
    largest = code[i] > largest ? code[i] : largest;
  }
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t within = code[i] < kE4M3Largest ? code[i] : kE4M3Largest;
    const bool nan = (bits[i] & 0x7FFFFFFF) > 0x7F800000;
    target[i] = static_cast<uint8_t>((nan ? kE4M3NaN : within) | bits[i] >> 31 << 7);
  }
  return largest;
}

template <typename Element>
uint64_t encode_rows(const Rows& rows, uint8_t* out) {
  uint64_t outside = 0;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t token = 0; token < rows.token_count; ++token, out += rows.head_size) {
      const uint8_t* row = rows.row(head, token);
      uint32_t largest = 0;
      for (uint32_t at = 0; at < rows.head_size; at += kBlock) {
        const uint32_t count = std::min(kBlock, rows.head_size - at);
        largest = std::max(largest, encode_block<Element>(row + at * Element::kBytes, count, out + at));
      }
      outside += largest > kE4M3Largest;
    }
  }
  return outside;
}

template <typename Element>
void decode_rows(const uint8_t* in, const Rows& rows) {
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    for (uint32_t token = 0; token < rows.token_count; ++token, in += rows.head_size) {
      uint8_t* row = rows.row(head, token);
      for (uint32_t i = 0; i < rows.head_size; ++i)
        Element::store(row + i * Element::kBytes, float_of_e4m3(in[i]));
    }
  }
}

}  // namespace

uint64_t encode_fp8(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  switch (codec.dtype) {
    case KVC_BF16:
      return encode_rows<BFloat16>(rows, out);
    case KVC_FP16:
      return encode_rows<Float16>(rows, out);
    default:
      return encode_rows<Float32>(rows, out);
  }
}

void decode_fp8(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  switch (codec.dtype) {
    case KVC_BF16:
      return decode_rows<BFloat16>(in, rows);
    case KVC_FP16:
      return decode_rows<Float16>(in, rows);
    default:
      return decode_rows<Float32>(in, rows);
  }
}

}  // namespace kvc
