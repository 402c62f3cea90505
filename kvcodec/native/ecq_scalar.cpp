// Kind ecq, the portable way: what every other instruction set must equal byte for byte.
#include "ecq.h"

#include <algorithm>

namespace kvc {
namespace {

// A tile at work, in the worker's scratch.
struct EcqTile {
  int32_t scale[kTileChannels];          // of each group
  int32_t mean[kTileChannels];           // of each channel, in half steps
  int8_t units[kTileElements];           // line by line, kTileTokens or kTileChannels apart
  float pair[2][kTileTokens];
};
static_assert(sizeof(EcqTile) <= kCodedScratchBytes, "a worker's memory");

// Both bits of every lane of the trellis.
struct Trellis {
  uint32_t o = 0;
  uint32_t q = 0;

  // Half steps of `count` indices.
  void take(const int32_t* k, uint32_t count, int8_t* units) {
    uint32_t odd = 0;
    for (uint32_t i = 0; i < count; ++i) {
      units[i] = static_cast<int8_t>(2 * k[i] + static_cast<int32_t>(o >> i & 1));
      odd |= static_cast<uint32_t>(k[i] & 1) << i;
    }
    const uint32_t active = count < 32 ? (1u << count) - 1 : ~0u;
    const uint32_t next = q ^ odd;
    q = (q & ~active) | (o & active);
    o = (o & ~active) | (next & active);
  }
};

// A sequence of `count` integers of one class.
bool read_sequence(StreamReader& reader, uint32_t c, uint32_t family, uint32_t count,
                   int32_t* values) {
  const CodeClass coding = code_class(c);
  const CodingTable& table = ecq_table(family, coding.table);
  for (uint32_t at = 0; at < count; at += kStreamLanes) {
    if (!reader.read(table, coding.shift, std::min(count - at, kStreamLanes), values + at))
      return false;
  }
  return true;
}

bool read_tile(const EcqSection& section, const Tile& tile, const TileEntry& entry,
               const uint8_t* stream, EcqTile& work) {
  StreamReader reader;
  const EcqOrder& order = section.order;
  if (!reader.start(stream, stream + entry.stream_bytes) ||
      !read_sequence(reader, entry.scale_class, 0, order.groups, work.scale)) {
    return false;
  }
  if (section.codec.channel &&
      !read_sequence(reader, entry.mean_class, 0, tile.channels, work.mean)) {
    return false;
  }
  for (uint32_t i = 0; i < order.groups; ++i) work.scale[i] = static_cast<int8_t>(work.scale[i]);
  const EcqScale scale(section.codec, entry.reference - kReferenceBias);
  const uint32_t elements = section.line_elements(tile);
  Trellis trellis;
  for (uint32_t i = 0; i < order.count; ++i) {
    int8_t* units = work.units + order.line[i] * section.line_stride();
    const int32_t s = work.scale[order.group[i]];
    if (s == kEmptyGroup) {
      std::memset(units, 0, elements);
      continue;
    }
    const CodeClass coding = code_class(scale.class_of(s));
    const CodingTable& table = ecq_table(entry.family, coding.table);
    for (uint32_t at = 0; at < elements; at += kStreamLanes) {
      const uint32_t count = std::min(elements - at, kStreamLanes);
      int32_t k[kStreamLanes];
      if (!reader.read(table, coding.shift, count, k)) return false;
      trellis.take(k, count, units + at);
    }
  }
  return reader.finished();
}

template <typename Element>
void store_element(const Rows& rows, const Tile& tile, uint32_t token, uint32_t channel,
                   float value) {
  value = value < -Element::kLargest ? -Element::kLargest : value;
  value = value > Element::kLargest ? Element::kLargest : value;
  Element::store(
      rows.row(tile.head, tile.token + token) + (tile.channel + channel) * Element::kBytes, value);
}

// Channel `line`, before any rotation.
void channel_values(const EcqSection& section, const Tile& tile, const EcqScale& scale,
                    const EcqTile& work, uint32_t line, uint32_t group, float* values) {
  const float half = power_of_sixteenths(scale.step_of(work.scale[group]) - 16);
  const int32_t mean = static_cast<int16_t>(work.mean[line]);
  const int8_t* units = work.units + line * section.line_stride();
  for (uint32_t t = 0; t < tile.tokens; ++t)
    values[t] = static_cast<float>(mean + units[t]) * half;
}

template <typename Element>
void store_channels(const EcqSection& section, const Tile& tile, const TileEntry& entry,
                    EcqTile& work) {
  const EcqScale scale(section.codec, entry.reference - kReferenceBias);
  const EcqOrder& order = section.order;
  const uint32_t pairs = section.pairs();
  for (uint32_t i = 0; i < order.count; ++i) {
    const uint32_t line = order.line[i];
    float* values = work.pair[i % 2];
    channel_values(section, tile, scale, work, line, order.group[i], values);
    if (i >= 2 * pairs) {
      for (uint32_t t = 0; t < tile.tokens; ++t)
        store_element<Element>(section.rows, tile, t, line, values[t]);
    } else if (i % 2 == 1) {
      const float* table = section.rotary->table + (size_t{tile.token} * pairs + i / 2) * 2;
      for (uint32_t t = 0; t < tile.tokens; ++t, table += 2 * pairs) {
        const float a = work.pair[0][t];
        const float b = work.pair[1][t];
        store_element<Element>(section.rows, tile, t, order.line[i - 1],
                               a * table[0] - b * table[1]);
        store_element<Element>(section.rows, tile, t, line, b * table[0] + a * table[1]);
      }
    }
  }
}

template <typename Element>
void store_tokens(const EcqSection& section, const Tile& tile, const TileEntry& entry,
                  const EcqTile& work) {
  const EcqScale scale(section.codec, entry.reference - kReferenceBias);
  for (uint32_t t = 0; t < tile.tokens; ++t) {
    const float half = power_of_sixteenths(scale.step_of(work.scale[t]) - 16);
    const int8_t* units = work.units + t * section.line_stride();
    for (uint32_t c = 0; c < tile.channels; ++c)
      store_element<Element>(section.rows, tile, t, c, static_cast<float>(units[c]) * half);
  }
}

template <typename Element>
void store_tile(const EcqSection& section, const Tile& tile, const TileEntry& entry,
                EcqTile& work) {
  section.codec.channel ? store_channels<Element>(section, tile, entry, work)
                        : store_tokens<Element>(section, tile, entry, work);
}

#include "ecq_rows.h"

}  // namespace

bool decode_ecq(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes, const Rows& rows,
                const kvc_rotary* rotary, uint8_t* scratch) {
  EcqTile& work = *reinterpret_cast<EcqTile*>(scratch);
  return decode_section<BFloat16, Float16, Float32>(codec, in, stored_bytes, rows, rotary, work);
}

}  // namespace kvc
