// Kind ecq, encoding the portable way: proto/FORMAT.md 3.9, step by step.
#include "ecq_choice.h"

#include <algorithm>
#include <cmath>

namespace kvc {
namespace {

// A tile at work, in the worker's scratch.
struct EncodedTile {
  float values[kTileElements];  // line by line
  float mean[kTileChannels];    // of each line
  float energy[kTileChannels];
  float largest[kTileChannels];
  EcqGroups groups;
  int32_t scale[kTileChannels];
  int32_t mean_steps[kTileChannels];  // of each channel
  // Of each step of the elements: class, lanes, and integers, which the search turns from
  // 64ths of half steps into indices.
  uint32_t step_count;
  uint8_t step_class[kMaxTileSteps];
  uint8_t step_lanes[kMaxTileSteps];
  int16_t step[kMaxTileSteps][kStreamLanes];
  uint8_t before[kMaxTileSteps][kStreamLanes];  // of each state, a bit
  uint8_t stream[kMaxStreamBytes];
};
static_assert(sizeof(EncodedTile) <= kCodedScratchBytes, "a worker's memory");

// Its rotary is set while tiles are derotated.
struct EcqEncoder : EcqSection {
  EncodedTile& work;
  uint32_t token_step = 1;  // every so many tokens of a tile are taken

  uint32_t elements(const Tile& tile) const {
    return codec.channel ? tile.tokens / token_step : tile.channels;
  }
  float* line(uint32_t index) const { return work.values + index * line_stride(); }
};

// False: a value outside the domain.
template <typename Element>
bool load_tile(const EcqEncoder& encoder, const Tile& tile) {
  const uint32_t token_step = encoder.codec.channel ? 1 : kTileChannels;
  const uint32_t channel_step = encoder.codec.channel ? kTileTokens : 1;
  uint32_t largest = 0;
  for (uint32_t t = 0; t < tile.tokens / encoder.token_step; ++t) {
    const uint8_t* row = encoder.rows.row(tile.head, tile.token + t * encoder.token_step) +
                         tile.channel * Element::kBytes;
    for (uint32_t c = 0; c < tile.channels; ++c) {
      const float value = Element::load(row + c * Element::kBytes);
      largest = std::max(largest, bits_of(value) & 0x7FFFFFFF);
      encoder.work.values[t * token_step + c * channel_step] = value;
    }
  }
  return largest < kDomainEndEcq;
}

void derotate_tile(const EcqEncoder& encoder, const Tile& tile) {
  const uint32_t pairs = encoder.pairs();
  const uint32_t step = encoder.token_step;
  for (uint32_t pair = 0; pair < pairs; ++pair) {
    float* a = encoder.line(encoder.order.line[2 * pair]);
    float* b = encoder.line(encoder.order.line[2 * pair + 1]);
    const float* table = encoder.rotary->table + (size_t{tile.token} * pairs + pair) * 2;
    for (uint32_t t = 0; t < tile.tokens; t += step, ++a, ++b, table += 2 * pairs * step) {
      const float x = *a;
      const float y = *b;
      *a = x * table[0] + y * table[1];
      *b = y * table[0] - x * table[1];
    }
  }
}

void measure_channel(EncodedTile& work, uint32_t line, const float* values, uint32_t count) {
  float sum = 0;
  for (uint32_t i = 0; i < count; ++i) sum = sum + values[i];
  const float mean = sum / static_cast<float>(count);
  float energy = 0;
  float largest = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const float deviation = values[i] - mean;
    energy = energy + deviation * deviation;
    largest = std::max(largest, std::fabs(deviation));
  }
  work.mean[line] = mean;
  work.energy[line] = energy;
  work.largest[line] = largest;
}

void measure_token(EncodedTile& work, uint32_t line, const float* values, uint32_t count) {
  float sums[16] = {};
  float largest = 0;
  for (uint32_t i = 0; i < count; ++i) {
    float& sum = sums[i / 2 % 16];
    sum = sum + values[i] * values[i];
    largest = std::max(largest, std::fabs(values[i]));
  }
  for (uint32_t half = 8; half != 0; half /= 2) {
    for (uint32_t i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  work.mean[line] = 0;
  work.energy[line] = sums[0];
  work.largest[line] = largest;
}

void measure_tile(const EcqEncoder& encoder, const Tile& tile) {
  EncodedTile& work = encoder.work;
  const EcqOrder& order = encoder.order;
  const uint32_t elements = encoder.elements(tile);
  for (uint32_t i = 0; i < order.count; ++i) {
    encoder.codec.channel ? measure_channel(work, i, encoder.line(i), elements)
                          : measure_token(work, i, encoder.line(i), elements);
  }
  EcqGroups& groups = work.groups;
  for (uint32_t i = 0; i < order.count;) {
    const uint32_t g = order.group[i];
    uint32_t line = order.line[i];
    float energy = work.energy[line];
    groups.largest[g] = work.largest[line];
    groups.top[g] = std::fabs(work.mean[line]);
    groups.sequences[g] = 1;
    if (++i < order.count && order.group[i] == g) {
      line = order.line[i++];
      energy = energy + work.energy[line];
      groups.largest[g] = std::max(groups.largest[g], work.largest[line]);
      groups.top[g] = std::max(groups.top[g], std::fabs(work.mean[line]));
      groups.sequences[g] = 2;
    }
    groups.measure(g, energy, groups.sequences[g] * elements);
  }
}

// Loads a tile and measures it. False: a value outside the domain.
template <typename Element>
bool take_tile(EcqEncoder& encoder, const Tile& tile) {
  encoder.order.arrange(encoder.lines(tile), encoder.rotary);
  if (!load_tile<Element>(encoder, tile)) return false;
  if (encoder.rotary != nullptr) derotate_tile(encoder, tile);
  measure_tile(encoder, tile);
  return true;
}

// Steps of all elements in 64ths of half steps, with their classes.
void quantize_tile(const EcqEncoder& encoder, const Tile& tile, const EcqScale& steps) {
  EncodedTile& work = encoder.work;
  const EcqOrder& order = encoder.order;
  const uint32_t elements = encoder.elements(tile);
  work.step_count = 0;
  for (uint32_t i = 0; i < order.count; ++i) {
    const uint32_t line = order.line[i];
    const int32_t s = work.scale[order.group[i]];
    work.mean_steps[line] = 0;
    if (s == kEmptyGroup) continue;
    const float inverse = power_of_sixteenths(16 - steps.step_of(s));
    const float gain = static_cast<float>(gain_of(steps.class_of(s)));
    const float factor = inverse * gain;
    const float mean = std::nearbyintf(work.mean[line] * inverse);
    work.mean_steps[line] = static_cast<int32_t>(mean);
    for (uint32_t at = 0; at < elements; at += kStreamLanes) {
      const uint32_t count = std::min(elements - at, kStreamLanes);
      const uint32_t step = work.step_count++;
      work.step_class[step] = static_cast<uint8_t>(steps.class_of(s));
      work.step_lanes[step] = static_cast<uint8_t>(count);
      for (uint32_t lane = 0; lane < count; ++lane) {
        // In binary64 nothing is rounded before the end.
        const double number = encoder.line(line)[at + lane] * factor;
        work.step[step][lane] = static_cast<int16_t>(std::nearbyint(number - gain * mean));
      }
    }
  }
}

constexpr int32_t kDearest = 127;

// The point of a coset next to `v` 64ths of half steps.
struct Candidate {
  int32_t k;
  int32_t price;

  Candidate(int32_t v, int32_t coset, const uint8_t* path_cost) {
    const int32_t way = v - 64 * coset + 128;
    k = 2 * (way >> 8) + (coset >> 1);
    price = path_square((way & 255) >> 2);
    if (path_cost != nullptr) price += path_cost[std::min(std::max(k, -32), 31) + 32];
    price = std::min(price, kDearest);
  }
};

const uint8_t* path_cost_of(uint32_t c) { return c <= 16 ? kPathCost[c] : nullptr; }

// The cheapest path of one lane: its integers become indices. States are 2 * o + q; totals are kept
// relative to that of state 0.
void search_lane(EncodedTile& work, uint32_t lane) {
  int32_t total[4] = {0, kDearest, kDearest, kDearest};
  bool first = true;
  for (uint32_t step = 0; step < work.step_count; ++step) {
    if (lane >= work.step_lanes[step]) continue;
    const int32_t v = work.step[step][lane];
    const uint8_t* path_cost = path_cost_of(work.step_class[step]);
    int32_t price[4];
    for (int32_t coset = 0; coset < 4; ++coset) price[coset] = Candidate(v, coset, path_cost).price;
    int32_t after[4];
    uint32_t before = 0;
    for (uint32_t state = 0; state < 4; ++state) {
      const uint32_t o = state >> 1;
      const uint32_t q = state & 1;
      const int32_t low = std::min(total[2 * q] + price[q + 2 * o], kDearest);
      const int32_t high = std::min(total[2 * q + 1] + price[q + 2 * (1 - o)], kDearest);
      before |= static_cast<uint32_t>(high < low) << state;
      after[state] = std::min(low, high);
    }
    work.before[step][lane] = static_cast<uint8_t>(before);
    for (uint32_t state = 1; state < 4; ++state)
      total[state] = std::min(std::max(after[state] - after[0], -128), kDearest);
    // No path of one step leads to these.
    if (first) total[1] = total[3] = kDearest;
    first = false;
  }
  uint32_t state = static_cast<uint32_t>(std::min_element(total, total + 4) - total);
  for (uint32_t step = work.step_count; step-- != 0;) {
    if (lane >= work.step_lanes[step]) continue;
    const uint32_t o = state >> 1;
    const uint32_t q = state & 1;
    const uint32_t taken = work.before[step][lane] >> state & 1;
    const int32_t coset = static_cast<int32_t>(q + 2 * (o ^ taken));
    int16_t& value = work.step[step][lane];
    value = static_cast<int16_t>(Candidate(value, coset, nullptr).k);
    state = 2 * q + taken;
  }
}

uint8_t cheapest_family(const EncodedTile& work) {
  uint64_t length[2] = {};
  for (uint32_t step = 0; step < work.step_count; step += kFamilySteps) {
    const CodeClass coding = code_class(work.step_class[step]);
    for (uint32_t family = 0; family < 2; ++family) {
      const CodingTable& table = ecq_table(family, coding.table);
      for (uint32_t lane = 0; lane < work.step_lanes[step]; ++lane)
        length[family] += code_length(table, coding.shift, work.step[step][lane]);
    }
  }
  return length[1] < length[0];
}

// A sequence, from its last step to its first.
void write_sequence(StreamWriter& writer, uint32_t c, const int32_t* values, uint32_t count) {
  const CodeClass coding = code_class(c);
  const CodingTable& table = ecq_table(0, coding.table);
  for (uint32_t end = count; end != 0;) {
    const uint32_t start = (end - 1) / kStreamLanes * kStreamLanes;
    writer.write(table, coding.shift, end - start, values + start);
    end = start;
  }
}

bool write_tile(const EcqEncoder& encoder, const Tile& tile, int32_t reference, CodedWriter& out) {
  EncodedTile& work = encoder.work;
  const bool channel = encoder.codec.channel;
  TileEntry entry{};
  entry.reference = static_cast<uint8_t>(reference + kReferenceBias);
  entry.family = cheapest_family(work);
  entry.scale_class =
      static_cast<uint8_t>(cheapest_class(work.scale, encoder.order.groups));
  if (channel)
    entry.mean_class = static_cast<uint8_t>(cheapest_class(work.mean_steps, tile.channels));
  StreamWriter writer(work.stream + sizeof work.stream);
  for (uint32_t step = work.step_count; step-- != 0;) {
    const CodeClass coding = code_class(work.step_class[step]);
    int32_t values[kStreamLanes];
    std::copy(work.step[step], work.step[step] + kStreamLanes, values);
    writer.write(ecq_table(entry.family, coding.table), coding.shift, work.step_lanes[step],
                 values);
  }
  if (channel) write_sequence(writer, entry.mean_class, work.mean_steps, tile.channels);
  write_sequence(writer, entry.scale_class, work.scale, encoder.order.groups);
  const uint8_t* stream = writer.finish();
  entry.stream_bytes = static_cast<uint16_t>(writer.bytes());
  return out.add(entry, stream);
}

// Whether the groups of a section are narrower without the rotation.
template <typename Element>
bool choose_derotation(EcqEncoder& encoder, const kvc_rotary* rotary) {
  int64_t gain = 0;
  for (TileWalk walk(encoder.rows); !walk.ended(); walk.advance()) {
    encoder.token_step = derotation_step(walk.tile());
    encoder.rotary = nullptr;
    if (!take_tile<Element>(encoder, walk.tile())) break;  // it will be raw
    // Pairs also save scales: a quarter of the elements' bits is weighed against it.
    gain += 4 * encoder.work.groups.cost(encoder.order.groups) + walk.tile().channels;
    encoder.rotary = rotary;
    take_tile<Element>(encoder, walk.tile());
    gain -= 4 * encoder.work.groups.cost(encoder.order.groups);
  }
  encoder.token_step = 1;
  return gain > 0;
}

template <typename Element>
size_t encode_section(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary,
                      uint8_t* scratch, uint8_t* out) {
  EcqEncoder encoder{{codec, rows, nullptr, {}}, *reinterpret_cast<EncodedTile*>(scratch)};
  EncodedTile& work = encoder.work;
  if (can_derotate(codec, rows, rotary)) {
    const bool derotated = choose_derotation<Element>(encoder, rotary);
    encoder.rotary = derotated ? rotary : nullptr;
  }
  const size_t raw_bytes =
      size_t{rows.head_count} * rows.token_count * rows.head_size * Element::kBytes;
  CodedWriter writer(out, pad64(raw_bytes), tile_count(rows), 0,
                     encoder.rotary != nullptr ? kFlagDerotated : 0);
  for (TileWalk walk(rows); !walk.ended() && writer.fits(); walk.advance()) {
    const Tile& tile = walk.tile();
    if (!take_tile<Element>(encoder, tile)) return 0;
    const EcqScale steps(codec, work.groups.reference(encoder.order.groups));
    for (uint32_t g = 0; g < encoder.order.groups; ++g)
      work.scale[g] = work.groups.scale(g, steps);
    quantize_tile(encoder, tile, steps);
    for (uint32_t lane = 0; lane < kStreamLanes; ++lane) search_lane(work, lane);
    write_tile(encoder, tile, steps.reference, writer);
  }
  return writer.finish(raw_bytes);
}

}  // namespace

size_t encode_ecq(const SectionCodec& codec, const Rows& rows, const kvc_rotary* rotary,
                  uint8_t* scratch, uint8_t* out) {
  switch (codec.dtype) {
    case KVC_BF16:
      return encode_section<BFloat16>(codec, rows, rotary, scratch, out);
    case KVC_FP16:
      return encode_section<Float16>(codec, rows, rotary, scratch, out);
    default:
      return encode_section<Float32>(codec, rows, rotary, scratch, out);
  }
}

}  // namespace kvc
