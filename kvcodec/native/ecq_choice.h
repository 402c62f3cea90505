// What the encoders of kind ecq decide before the trellis, on every instruction set: scales of
// groups and classes of sequences. proto/FORMAT.md 3.10. Every operation on numbers is one of
// binary32.
#pragma once

#include "ecq.h"

namespace kvc {
namespace {

constexpr uint32_t kDomainEndEcq = 0x4F000000;  // 2^31; infinities and NaNs lie above
constexpr int32_t kNoEnergy = -252;
constexpr float kLargestNumber = 64 * 124.25f;  // 64ths of half steps
constexpr float kLargestMean = 2000.0f;
constexpr uint32_t kEscapeLength = 2048;  // an escape's byte in 1/256 bit
// Elements of how many steps decide about the family: every eighth of a tile.
constexpr uint32_t kFamilySteps = 8;

// 64ths of a half step, and what makes up for a search that prefers what is short, and so leans to
// zero: the fewer steps there are in a deviation, the more.
inline int32_t gain_of(uint32_t element_class) {
  const int32_t more = (17 - static_cast<int32_t>(element_class)) >> 1;
  return 64 + (more > 0 ? more : 0);
}

constexpr int32_t kOctave = 4;  // in exponents of groups

// The exponent that a token's step follows: within an octave of the reference half of the way.
inline int32_t levelled(int32_t exponent, int32_t reference) {
  const int32_t x = exponent - reference;
  return x < -kOctave ? exponent : exponent - ((x < kOctave ? x : kOctave) >> 1);
}

// Every so many tokens of a tile decide about derotation: of a whole one a quarter is enough.
inline uint32_t derotation_step(const Tile& tile) { return tile.tokens == kTileTokens ? 4 : 1; }

// The square of a distance in 1/4 half step; `place` are 64ths of the way through the four half
// steps around a point of the trellis.
constexpr uint8_t path_square(int place) {
  return static_cast<uint8_t>(((2 * place - 63) * (2 * place - 63) + 32) >> 6);
}

// What is known of each group of a tile before its scales are chosen.
struct EcqGroups {
  int32_t exponent[kTileChannels];  // round(4 * log2(rms)), or what the mean demands
  float largest[kTileChannels];     // deviation from the mean
  float top[kTileChannels];         // magnitude of a mean
  uint8_t sequences[kTileChannels];

  bool empty(uint32_t group) const { return largest[group] == 0 && top[group] == 0; }

  // Of `elements` squares that sum to `energy`.
  void measure(uint32_t group, float energy, uint32_t elements) {
    const uint32_t square = bits_of(energy / static_cast<float>(elements));
    const uint32_t mantissa = square & 0x7FFFFF;
    int32_t result = kNoEnergy;
    if (square >> 23 != 0) {
      result = 2 * (static_cast<int32_t>(square >> 23) - 127) + (mantissa >= 0x1837F0) +
               (mantissa >= 0x5744FD);
    }
    if (top[group] > 0) {
      const int32_t floor = 4 * (static_cast<int32_t>(bits_of(top[group]) >> 23) - 127) - 32;
      result = floor > result ? floor : result;
    }
    exponent[group] = result;
  }

  // What derotation is judged by: the smaller the better.
  int64_t cost(uint32_t groups) const {
    int64_t sum = 0;
    for (uint32_t g = 0; g < groups; ++g)
      sum += (empty(g) ? kNoEnergy : exponent[g]) * sequences[g];
    return sum;
  }

  int32_t reference(uint32_t groups) const {
    int32_t largest_exponent = INT32_MIN;
    int32_t count = 0;
    for (uint32_t g = 0; g < groups; ++g) {
      if (empty(g)) continue;
      count += sequences[g];
      largest_exponent = exponent[g] > largest_exponent ? exponent[g] : largest_exponent;
    }
    int32_t sum = 0;
    for (uint32_t g = 0; g < groups; ++g) {
      if (empty(g)) continue;
      const int32_t floor = largest_exponent - 48;
      sum += sequences[g] * (exponent[g] > floor ? exponent[g] : floor);
    }
    return mean_exponent(sum, count);
  }

  // Rounded; of `count` sequences.
  static int32_t mean_exponent(int32_t sum, int32_t count) {
    if (count == 0) return -kReferenceBias;
    const int32_t twice = 2 * sum + count;
    const int32_t r = twice / (2 * count) - (twice % (2 * count) < 0);
    return r < -kReferenceBias ? -kReferenceBias : r > 95 ? 95 : r;
  }

  // The scale of a group: as fine as its deviation and its mean allow.
  int32_t scale(uint32_t group, const EcqScale& steps) const {
    if (empty(group)) return kEmptyGroup;
    const int32_t floor = steps.reference - 126;
    int32_t e = exponent[group];
    if (steps.per_token()) e = levelled(e, steps.reference);
    for (e = e > floor ? e : floor;; ++e) {
      const int32_t s = steps.reference - e;
      const float inverse = power_of_sixteenths(16 - steps.step_of(s));
      const float factor = inverse * static_cast<float>(gain_of(steps.class_of(s)));
      if (largest[group] * factor <= kLargestNumber && top[group] * inverse <= kLargestMean)
        return s;
    }
  }
};

// Length of an integer in a class, in 1/256 bit; more than any other if the class cannot hold it.
inline uint32_t code_length(const CodingTable& table, uint32_t shift, int32_t value) {
  const int32_t upper = value >> shift;
  const int32_t j = upper - table.first;
  if (j >= 0 && j < table.escape) return table.cost[j] + 256 * shift;
  if (upper < -128 || upper > 127) return (1u << 20) + 256 * shift;
  return table.cost[table.escape] + kEscapeLength + 256 * shift;
}

// The class (0, 4, ... 32) that codes integers in the fewest bits.
template <typename Integer>
uint32_t cheapest_class(const Integer* values, uint32_t count) {
  uint32_t best = 0;
  uint64_t least = UINT64_MAX;
  for (uint32_t c = 0; c <= kMaxClass; c += 4) {
    const CodeClass coding = code_class(c);
    const CodingTable& table = ecq_table(0, coding.table);
    uint64_t length = 0;
    for (uint32_t i = 0; i < count; ++i) length += code_length(table, coding.shift, values[i]);
    if (length < least) {
      least = length;
      best = c;
    }
  }
  return best;
}

}  // namespace
}  // namespace kvc
