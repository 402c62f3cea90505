// What all instruction sets share of kind ecq: the order of a tile's sequences, classes and steps.
// proto/FORMAT.md 3.6 and 3.7.
#pragma once

#include <cstddef>
#include <cstdint>

#include "coded.h"
#include "numerics.h"

namespace kvc {

// Sections of this kind, the portable way.
size_t encode_ecq(const SectionCodec&, const Rows&, const kvc_rotary*, uint8_t* scratch,
                  uint8_t* out);
bool decode_ecq(const SectionCodec&, const uint8_t* in, size_t stored_bytes, const Rows&,
                const kvc_rotary*, uint8_t* scratch);
#if defined(__x86_64__)
// This one needs F16C as well.
bool decode_ecq_avx2(const SectionCodec&, const uint8_t* in, size_t stored_bytes, const Rows&,
                     const kvc_rotary*, uint8_t* scratch);
// These need VBMI and VBMI2 as well.
size_t encode_ecq_avx512(const SectionCodec&, const Rows&, const Rows* next, const kvc_rotary*,
                         uint8_t* scratch, uint8_t* out);
bool decode_ecq_avx512(const SectionCodec&, const uint8_t* in, size_t stored_bytes, const Rows&,
                       const kvc_rotary*, uint8_t* scratch);
#endif

namespace {

// The sequences of a tile: which channel (or token) each holds, and the group it belongs to.
struct EcqOrder {
  uint32_t count;
  uint32_t groups;
  uint16_t line[kTileChannels];
  uint16_t group[kTileChannels];

  // `rotary`: of a derotated section, else nullptr.
  void arrange(uint32_t lines, const kvc_rotary* rotary) {
    count = lines;
    const uint32_t pairs = rotary != nullptr ? rotary->size / 2 : 0;
    for (uint32_t pair = 0; pair < pairs; ++pair) {
      const bool interleaved = rotary->interleaved != 0;
      line[2 * pair] = static_cast<uint16_t>(interleaved ? 2 * pair : pair);
      line[2 * pair + 1] = static_cast<uint16_t>(interleaved ? 2 * pair + 1 : pair + pairs);
      group[2 * pair] = group[2 * pair + 1] = static_cast<uint16_t>(pair);
    }
    for (uint32_t i = 2 * pairs; i < lines; ++i) {
      line[i] = static_cast<uint16_t>(i);
      group[i] = static_cast<uint16_t>(i - pairs);
    }
    groups = lines - pairs;
  }
};

// Table `n` (0-16) of a family.
inline const CodingTable& ecq_table(uint32_t family, uint32_t n) {
  return kResidualTables[17 * family + n];
}

// Whether a section may be derotated.
inline bool can_derotate(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary) {
  return rotary != nullptr && codec.channel && rows.head_size <= kTileChannels &&
         rotary->size <= rows.head_size;
}

// A section at work, and the order of its present tile, whose lines are channels or tokens.
struct EcqSection {
  const SectionCodec& codec;
  const Rows& rows;
  const kvc_rotary* rotary;  // of a derotated section, else nullptr
  EcqOrder order;

  uint32_t pairs() const { return rotary != nullptr ? rotary->size / 2 : 0; }
  uint32_t lines(const Tile& tile) const { return codec.channel ? tile.channels : tile.tokens; }
  uint32_t line_elements(const Tile& tile) const {
    return codec.channel ? tile.tokens : tile.channels;
  }
  uint32_t line_stride() const { return codec.channel ? kTileTokens : kTileChannels; }
};

// How the scale `s` of a group becomes the class of its elements and their step.
struct EcqScale {
  int32_t nominal;  // S of the format
  int32_t reference;
  int32_t weight;  // how much of a group's deviation its step leaves to its class

  EcqScale(const SectionCodec& codec, int32_t r)
      : nominal(35 - static_cast<int32_t>(codec.bits)),
        reference(r),
        weight(codec.channel ? 2 : 1) {}

  // t of the format: sixteenths of an octave of steps in the group's deviation. Never so many that
  // a byte of half steps would not do.
  int32_t sharpness_of(int32_t s) const {
    const int32_t t = -weight * s - nominal;
    return t < 62 ? t : 62;
  }

  uint32_t class_of(int32_t s) const {
    const int32_t c = ((sharpness_of(s) + 2) >> 2) + 10;
    return static_cast<uint32_t>(c < 0 ? 0 : c);
  }

  bool per_token() const { return weight == 1; }

  // d of the format: the step is 2^(d/16).
  int32_t step_of(int32_t s) const { return 4 * (reference - s) - sharpness_of(s); }
};

constexpr int32_t kReferenceBias = 160;

constexpr float kSixteenths[16] = {
    0x1p0f,        0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fep0f,  0x1.3dea64p0f,
    0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f, 0x1.9c4918p0f,
    0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f};

// 2^(i/16); every exponent that a section can ask for is that of a normal number.
inline float power_of_sixteenths(int32_t i) {
  return float_of(bits_of(kSixteenths[i & 15]) + (static_cast<uint32_t>(i >> 4) << 23));
}

}  // namespace
}  // namespace kvc
