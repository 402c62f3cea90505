// Transformed int sections, the portable way: what every other instruction set must equal byte for
// byte. Every product and every sum is rounded.
#include "transformed.h"

#include <limits>

#include "scalar_int.h"

namespace kvc {
namespace {

// The numbers of a transformed section: those of fp32, before they are clamped.
struct Wide : Float32 {
  static constexpr float kLargest = std::numeric_limits<float>::infinity();
};

// Turns the pairs of a row by the angles of a token; kBack: by their inverse.
template <bool kBack>
void turn_row(const kvc_rotary& rotary, uint32_t token, float* values) {
  const uint32_t pairs = rotary.size / 2;
  const float* table = rotary.table + size_t{token} * pairs * 2;
  const uint32_t step = rotary.interleaved != 0 ? 2 : 1;
  float* first = values;
  float* second = values + (rotary.interleaved != 0 ? 1 : pairs);
  for (uint32_t i = 0; i < pairs; ++i, table += 2, first += step, second += step) {
    const float a = *first;
    const float b = *second;
    if (kBack) {
      *first = a * table[0] + b * table[1];
      *second = b * table[0] - a * table[1];
    } else {
      *first = a * table[0] - b * table[1];
      *second = b * table[0] + a * table[1];
    }
  }
}

template <typename Element>
struct DerotatedRows {
  using Number = Float32;
  static constexpr uint32_t kColumns = kMaxDerotatedSize;
  const Rows& rows;
  const kvc_rotary& rotary;

  // A whole row at a time: `channel` is 0.
  void load(uint32_t head, uint32_t token, uint32_t, uint32_t count, float* values) const {
    load_values<Element>(rows.row(head, token), count, values);
    turn_row<true>(rotary, token, values);
  }
  void store(uint32_t head, uint32_t token, uint32_t, uint32_t count, float* values) const {
    turn_row<false>(rotary, token, values);
    store_row<Element>(values, count, rows.row(head, token));
  }
};

void hadamard(uint32_t size, float* values) {
  for (uint32_t step = 1; step < size; step *= 2) {
    for (uint32_t block = 0; block < size; block += 2 * step) {
      for (uint32_t i = block; i < block + step; ++i) {
        const float a = values[i];
        const float b = values[i + step];
        values[i] = a + b;
        values[i + step] = a - b;
      }
    }
  }
}

template <typename Element>
uint64_t encode_hadamard(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  float values[kMaxHadamardSize];
  const uint8_t* row = reinterpret_cast<const uint8_t*>(values);
  uint64_t outside = 0;
  for_token_rows(TokenLayout(codec, rows), rows,
                 [&](uint32_t head, uint32_t token, size_t parameters, size_t codes) {
                   load_values<Element>(rows.row(head, token), rows.head_size, values);
                   hadamard(rows.head_size, values);
                   outside += store_row_parameters<Float32>(codec, row, rows.head_size,
                                                            out + parameters);
                   encode_row<Float32>(codec, row, rows.head_size, out + parameters, out + codes);
                 });
  return outside;
}

template <typename Element>
void decode_hadamard(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  const float unit = 1.0f / static_cast<float>(rows.head_size);  // a power of two
  float values[kMaxHadamardSize];
  for_token_rows(TokenLayout(codec, rows), rows,
                 [&](uint32_t head, uint32_t token, size_t parameters, size_t codes) {
                   decode_row<Wide>(codec, in + codes, in + parameters, rows.head_size,
                                    reinterpret_cast<uint8_t*>(values));
                   hadamard(rows.head_size, values);
                   for (uint32_t i = 0; i < rows.head_size; ++i) values[i] *= unit;
                   store_row<Element>(values, rows.head_size, rows.row(head, token));
                 });
}

template <typename Element>
uint64_t encode_elements(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  if (codec.hadamard) return encode_hadamard<Element>(codec, rows, out);
  return encode_channels(codec, rows, DerotatedRows<Element>{rows, *codec.derotation}, out);
}

template <typename Element>
void decode_elements(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (codec.hadamard) return decode_hadamard<Element>(codec, in, rows);
  decode_channels(codec, in, rows, DerotatedRows<Element>{rows, *codec.derotation});
}

}  // namespace

uint64_t encode_transformed(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  switch (codec.dtype) {
    case KVC_BF16:
      return encode_elements<BFloat16>(codec, rows, out);
    case KVC_FP16:
      return encode_elements<Float16>(codec, rows, out);
    default:
      return encode_elements<Float32>(codec, rows, out);
  }
}

void decode_transformed(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  switch (codec.dtype) {
    case KVC_BF16:
      return decode_elements<BFloat16>(codec, in, rows);
    case KVC_FP16:
      return decode_elements<Float16>(codec, in, rows);
    default:
      return decode_elements<Float32>(codec, in, rows);
  }
}

}  // namespace kvc
