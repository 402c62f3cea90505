// Coded sections (kinds ecq and lossless): tiles, the directory, and streams symbol by symbol.
// proto/FORMAT.md 3.5. Portable and plain; what other instruction sets have to equal.
//
// Inline functions have internal linkage on purpose, as in numerics.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "tables.h"

namespace kvc {

constexpr uint32_t kTileTokens = 64;
constexpr uint32_t kTileChannels = 256;
constexpr uint32_t kTileElements = kTileTokens * kTileChannels;
constexpr uint32_t kStreamLanes = 32;
constexpr size_t kPreambleBytes = 8;
constexpr size_t kTileEntryBytes = 6;
constexpr size_t kStateBytes = kStreamLanes * 2;
// Zeros behind the last stream: a reader may fetch a vector at any place of any stream.
constexpr size_t kGuardBytes = 64;
constexpr uint32_t kMaxClass = 32;
constexpr uint32_t kMaxFamily = 1;
constexpr uint32_t kMaxShift = 4;
constexpr uint16_t kFirstState = 256;  // of an encoder, and where a decoder has to end
constexpr uint8_t kFlagDerotated = 1;
constexpr int32_t kEmptyGroup = 127;  // as a scale

// Steps of a tile at most: scales and means of 256 groups, and elements in sequences of 33 or more.
constexpr uint32_t kMaxTileSteps = 2 * kTileChannels / kStreamLanes + kTileElements / kStreamLanes;
// A step takes a byte per lane for the state, one for an escape, and the planes of raw bits.
constexpr size_t kMaxStepBytes = 2 * kStreamLanes + 4 * kMaxShift;
constexpr size_t kMaxStreamBytes = kStateBytes + kMaxTileSteps * kMaxStepBytes;
static_assert(kMaxStreamBytes <= UINT16_MAX, "the directory holds 16 bits");

// A class of integers: its table and how many raw bits follow the symbol.
struct CodeClass {
  uint32_t table;  // 0-16
  uint32_t shift;  // 0-4
};

// `c` is at most kMaxClass.
CodeClass code_class(uint32_t c);

// Consecutive tokens and channels of one head.
struct Tile {
  uint32_t head;
  uint32_t token;  // the first one
  uint32_t channel;
  uint32_t tokens;
  uint32_t channels;

  bool has_shape_of(const Tile& other) const {
    return tokens == other.tokens && channels == other.channels;
  }
};

// The tiles of a section in the order of its directory.
class TileWalk {
 public:
  explicit TileWalk(const Rows& rows) : rows_(rows) { settle(); }

  bool ended() const { return tile_.head == rows_.head_count; }
  const Tile& tile() const { return tile_; }
  void advance() {
    tile_.channel += tile_.channels;
    if (tile_.channel == rows_.head_size) {
      tile_.channel = 0;
      tile_.token += tile_.tokens;
    }
    if (tile_.token == rows_.token_count) {
      tile_.token = 0;
      ++tile_.head;
    }
    settle();
  }

 private:
  Rows rows_;
  Tile tile_{};

  void settle() {
    const uint32_t tokens = rows_.token_count - tile_.token;
    const uint32_t channels = rows_.head_size - tile_.channel;
    tile_.tokens = tokens < kTileTokens ? tokens : kTileTokens;
    tile_.channels = channels < kTileChannels ? channels : kTileChannels;
  }
};

uint64_t tile_count(const Rows& rows);

struct TileEntry {
  uint16_t stream_bytes;
  uint8_t reference;
  uint8_t scale_class;
  uint8_t mean_class;
  uint8_t family;
};

// The parts of a stored section. `plane_bytes` of a lossless section lie before the streams.
struct CodedParts {
  uint8_t flags;
  const uint8_t* directory;
  const uint8_t* plane;
  const uint8_t* streams;
  const uint8_t* end;  // of the streams; the guard follows

  TileEntry entry(uint64_t tile) const {
    const uint8_t* at = directory + tile * kTileEntryBytes;
    uint16_t bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    return {bytes, at[2], at[3], at[4], at[5]};
  }
};

// Where the plane (or the first stream) starts in a section.
size_t coded_head_bytes(uint64_t tiles);

// Finds the parts and looks at everything that is not in a stream: false if a reserved bit or a
// byte of padding is not zero, a class or family does not exist, or the parts do not fill the
// section. Then every stream lies before `end`.
bool open_coded(const uint8_t* in, size_t stored_bytes, uint64_t tiles, uint64_t plane_bytes,
                uint8_t known_flags, CodedParts* parts);

// Writes the parts of a section one after the other.
class CodedWriter {
 public:
  // `out` has room for `capacity` bytes, the raw size padded to 64.
  CodedWriter(uint8_t* out, size_t capacity, uint64_t tiles, uint64_t plane_bytes, uint8_t flags);

  bool fits() const { return fits_; }
  uint8_t* plane() const { return plane_; }
  // The next tile. False: the section would not be smaller than `limit`; give up.
  bool add(const TileEntry& entry, const uint8_t* stream);
  // stored_bytes, with guard and zeros up to a multiple of 64; 0 if that is not below `raw_bytes`.
  size_t finish(size_t raw_bytes);

 private:
  uint8_t* out_;
  uint8_t* entry_;
  uint8_t* plane_ = nullptr;
  uint8_t* at_ = nullptr;
  uint8_t* end_;
  bool fits_;
};

namespace {

inline uint32_t load32(const uint8_t* source) {
  uint32_t value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

// Decodes a stream step by step. Every read is checked: nothing outside [begin, end) is touched.
class StreamReader {
 public:
  // False: too short, or a state that no writer leaves.
  bool start(const uint8_t* begin, const uint8_t* end) {
    at_ = begin;
    end_ = end;
    if (static_cast<size_t>(end - begin) < kStateBytes) return false;
    bool sound = true;
    for (uint32_t lane = 0; lane < kStreamLanes; ++lane, at_ += 2) {
      state_[lane] = static_cast<uint32_t>(at_[0] | at_[1] << 8);
      sound &= state_[lane] >= kFirstState;
    }
    return sound;
  }

  // One step of `count` (1-32) symbols. False: the stream ended too early.
  bool read(const CodingTable& table, uint32_t shift, uint32_t count, int32_t* values) {
    uint32_t symbol[kStreamLanes];
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t slot = state_[i] & 255;
      const uint32_t j = table.slots[slot];
      symbol[i] = j;
      state_[i] = table.freq[j] * (state_[i] >> 8) + slot - table.cum[j];
    }
    if (static_cast<size_t>(end_ - at_) > kStreamLanes) {
      // Nobody foresees which states are small: no branch.
      for (uint32_t i = 0; i < count; ++i) {
        const uint32_t small = state_[i] < kFirstState;
        state_[i] = state_[i] << 8 * small | (*at_ & (0 - small));
        at_ += small;
      }
    } else {
      for (uint32_t i = 0; i < count; ++i) {
        if (state_[i] >= kFirstState) continue;
        if (at_ == end_) return false;
        state_[i] = state_[i] << 8 | *at_++;
      }
    }
    uint32_t escapes = 0;
    for (uint32_t i = 0; i < count; ++i) {
      values[i] = table.first + static_cast<int32_t>(symbol[i]);
      escapes |= symbol[i] == table.escape;
    }
    for (uint32_t i = 0; i < count && escapes != 0; ++i) {
      if (symbol[i] != table.escape) continue;
      if (at_ == end_) return false;
      values[i] = static_cast<int8_t>(*at_++);
    }
    if (shift == 0) return true;
    if (static_cast<size_t>(end_ - at_) < 4 * shift) return false;
    for (uint32_t i = 0; i < count; ++i) values[i] = static_cast<int32_t>(values[i] * (1 << shift));
    for (uint32_t plane = 0; plane < shift; ++plane, at_ += 4) {
      uint32_t bits;
      std::memcpy(&bits, at_, sizeof bits);
      for (uint32_t i = 0; i < count; ++i)
        values[i] |= static_cast<int32_t>((bits >> i & 1) << plane);
    }
    return true;
  }

  // Whether the stream ended where it has to.
  bool finished() const {
    bool sound = at_ == end_;
    for (const uint32_t state : state_) sound &= state == kFirstState;
    return sound;
  }

 private:
  uint32_t state_[kStreamLanes];
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
};

// Encodes a stream from its last step to its first, backwards in memory.
class StreamWriter {
 public:
  // `end`: behind a buffer of kMaxStreamBytes.
  explicit StreamWriter(uint8_t* end) : at_(end), end_(end) {
    for (uint32_t& state : state_) state = kFirstState;
  }

  // One step of `count` (1-32) values, whose upper parts (value >> shift) lie in -128...127.
  void write(const CodingTable& table, uint32_t shift, uint32_t count, const int32_t* values) {
    for (uint32_t plane = shift; plane-- != 0;) {
      uint32_t bits = 0;
      for (uint32_t i = 0; i < count; ++i)
        bits |= (static_cast<uint32_t>(values[i]) >> plane & 1) << i;
      at_ -= 4;
      std::memcpy(at_, &bits, sizeof bits);
    }
    uint32_t symbol[kStreamLanes];
    for (uint32_t i = count; i-- != 0;) {
      const int32_t upper = values[i] >> shift;
      const int32_t j = upper - table.first;
      const bool known = j >= 0 && j < table.escape;
      symbol[i] = known ? static_cast<uint32_t>(j) : table.escape;
      if (!known) *--at_ = static_cast<uint8_t>(upper);
    }
    for (uint32_t i = count; i-- != 0;) {
      const uint32_t frequency = table.freq[symbol[i]];
      uint32_t x = state_[i];
      // Nobody foresees which states are full: no branch.
      const uint32_t full = x >= frequency << 8;
      at_[-1] = static_cast<uint8_t>(x);
      at_ -= full;
      x >>= 8 * full;
      state_[i] = (x / frequency << 8) + x % frequency + table.cum[symbol[i]];
    }
  }

  // Puts the states in front: where the stream begins. It ends where the writer began.
  const uint8_t* finish() {
    for (uint32_t lane = kStreamLanes; lane-- != 0;) {
      *--at_ = static_cast<uint8_t>(state_[lane] >> 8);
      *--at_ = static_cast<uint8_t>(state_[lane]);
    }
    return at_;
  }

  size_t bytes() const { return static_cast<size_t>(end_ - at_); }

 private:
  uint32_t state_[kStreamLanes];
  uint8_t* at_;
  uint8_t* end_;
};

}  // namespace
}  // namespace kvc
