// Coded sections: classes and the parts of a section, the same for every instruction set.
#include "coded.h"

#include <algorithm>

namespace kvc {
namespace {

bool all_zero(const uint8_t* from, const uint8_t* end) {
  return std::all_of(from, end, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

CodeClass code_class(uint32_t c) {
  if (c <= 16) return {c, 0};
  const uint32_t shift = (c - 16 + 3) / 4;
  return {c - 4 * shift, shift};
}

uint64_t tile_count(const Rows& rows) {
  const uint64_t tokens = (uint64_t{rows.token_count} + kTileTokens - 1) / kTileTokens;
  const uint64_t channels = (uint64_t{rows.head_size} + kTileChannels - 1) / kTileChannels;
  return rows.head_count * tokens * channels;
}

size_t coded_head_bytes(uint64_t tiles) { return pad64(kPreambleBytes + tiles * kTileEntryBytes); }

bool open_coded(const uint8_t* in, size_t stored_bytes, uint64_t tiles, uint64_t plane_bytes,
                uint8_t known_flags, CodedParts* parts) {
  // A section has fewer tiles than bytes: the product cannot overflow.
  if (tiles > stored_bytes / kTileEntryBytes) return false;
  const size_t head = coded_head_bytes(tiles);
  if (plane_bytes > stored_bytes || stored_bytes - plane_bytes < head + kGuardBytes) return false;
  const uint8_t* entries_end = in + kPreambleBytes + tiles * kTileEntryBytes;
  const uint8_t* end = in + stored_bytes - kGuardBytes;
  *parts = {in[0], in + kPreambleBytes, in + head, in + head + plane_bytes, end};
  bool sound = (in[0] & ~known_flags) == 0 && all_zero(in + 1, in + kPreambleBytes) &&
               all_zero(entries_end, in + head) && all_zero(end, end + kGuardBytes);
  uint64_t bytes = 0;
  for (uint64_t tile = 0; tile < tiles; ++tile) {
    const TileEntry entry = parts->entry(tile);
    bytes += entry.stream_bytes;
    sound &= entry.scale_class <= kMaxClass && entry.mean_class <= kMaxClass &&
             entry.family <= kMaxFamily;
  }
  return sound && bytes == static_cast<uint64_t>(end - parts->streams);
}

CodedWriter::CodedWriter(uint8_t* out, size_t capacity, uint64_t tiles, uint64_t plane_bytes,
                         uint8_t flags)
    : out_(out), entry_(out + kPreambleBytes), end_(out + capacity) {
  const uint64_t head = coded_head_bytes(tiles);
  fits_ = head + plane_bytes + kGuardBytes <= capacity;
  if (!fits_) return;
  plane_ = out + head;
  at_ = plane_ + plane_bytes;
  std::memset(out, 0, head);
  out[0] = flags;
}

bool CodedWriter::add(const TileEntry& entry, const uint8_t* stream) {
  if (static_cast<size_t>(end_ - at_) < entry.stream_bytes + kGuardBytes) fits_ = false;
  if (!fits_) return false;
  std::memcpy(entry_, &entry.stream_bytes, sizeof entry.stream_bytes);
  entry_[2] = entry.reference;
  entry_[3] = entry.scale_class;
  entry_[4] = entry.mean_class;
  entry_[5] = entry.family;
  entry_ += kTileEntryBytes;
  std::memcpy(at_, stream, entry.stream_bytes);
  at_ += entry.stream_bytes;
  return true;
}

size_t CodedWriter::finish(size_t raw_bytes) {
  if (!fits_) return 0;
  const size_t stored = static_cast<size_t>(at_ - out_) + kGuardBytes;
  if (stored >= raw_bytes) return 0;
  std::memset(at_, 0, pad64(stored) - (stored - kGuardBytes));
  return stored;
}

}  // namespace kvc
