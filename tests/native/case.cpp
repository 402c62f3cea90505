#include "case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

namespace driver {

namespace {

constexpr uint32_t kKeyBytes = 13;
constexpr uint64_t pad64(uint64_t n) { return (n + 63) & ~uint64_t{63}; }

// Lays the axes of a stream out in a random order with random gaps, sometimes backwards and
// unaligned.
HostStream make_host(Random& random, uint32_t dtype, uint32_t layers, uint32_t tokens,
                     uint32_t heads, uint32_t head_size) {
  const uint32_t group_heads = pick(random, 0, 2) == 0 ? pick(random, 1, heads) : heads;
  const uint32_t groups = (heads + group_heads - 1) / group_heads;
  const bool tidy = pick(random, 0, 1) == 0;
  uint32_t counts[4] = {layers, groups, group_heads, tokens};
  int64_t strides[4];
  std::vector<int> order = {0, 1, 2, 3};
  std::shuffle(order.begin(), order.end(), random);
  const size_t row_bytes = size_t{head_size} * element_bytes(dtype);
  size_t bytes = row_bytes;
  for (const int axis : order) {
    bytes += tidy ? 0 : pick(random, 0, 3) * pick(random, 0, 70);
    strides[axis] = static_cast<int64_t>(bytes);
    bytes *= counts[axis];
  }
  HostStream host{};
  host.base_offset = tidy ? 0 : pick(random, 0, 67);
  host.buffer_bytes = bytes + host.base_offset;
  if (pick(random, 0, 7) == 0) {
    host.base_offset += static_cast<size_t>(strides[3]) * (tokens - 1);
    strides[3] = -strides[3];
  }
  host.stream = {heads, head_size, group_heads, 0, strides[0], strides[1], strides[2], strides[3]};
  host.raw_bytes = row_bytes * layers * heads * tokens;
  return host;
}

// Hadamard or derotated, where that may be and the dice say so.
uint8_t transform_of(Random& random, const kvc_section& section, const kvc_stream& stream,
                     uint32_t rotary_size) {
  const uint32_t size = stream.head_size;
  if (pick(random, 0, 1) == 0) return 0;
  if ((section.options & KVC_OPTION_CHANNEL) == 0)
    return (size & (size - 1)) == 0 ? KVC_OPTION_HADAMARD : 0;
  const bool rotated = stream.is_rotated != 0 && rotary_size <= size && size <= 256;
  return rotated ? KVC_OPTION_DEROTATED : 0;
}

// Angles of any kind: what they are does not matter to a kernel.
void make_rotary(Random& random, Case& made) {
  const uint32_t pairs = pick(random, 1, std::max(1u, made.streams[0].head_size / 2));
  made.streams[0].is_rotated = 1;
  made.table.resize(size_t{2} * pairs * made.token_count);
  for (size_t i = 0; i < made.table.size(); i += 2) {
    const float angle = static_cast<float>(pick(random, 0, 628)) / 100;
    made.table[i] = std::cos(angle);
    made.table[i + 1] = std::sin(angle);
  }
  made.rotary = {2 * pairs, pick(random, 0, 1), made.table.data()};
}

kvc_section make_section(Random& random, const Case& made, const kvc_stream& stream) {
  const uint32_t dtype = made.dtype;
  const uint32_t tokens = made.token_count;
  const uint32_t head_size = stream.head_size;
  kvc_section section{};
  if (dtype > KVC_FP32 || pick(random, 0, 7) == 0) {
    section.bits = static_cast<uint8_t>(8 * element_bytes(dtype));
    return section;
  }
  if (pick(random, 0, 7) == 0) {
    section.kind = KVC_KIND_FP8;
    section.bits = 8;
    return section;
  }
  section.kind = KVC_KIND_INT;
  section.bits = static_cast<uint8_t>(2u << pick(random, 0, 2));
  section.options = static_cast<uint8_t>(pick(random, 0, 3));
  const uint32_t axis = section.options & KVC_OPTION_CHANNEL ? tokens : head_size;
  const uint32_t usual[] = {16, 32, 64, 128, axis};
  section.group_size =
      pick(random, 0, 1) == 0 ? pick(random, 1, axis) : std::min(axis, usual[pick(random, 0, 4)]);
  section.options |= transform_of(random, section, stream, made.rotary.size);
  return section;
}

void finish_plan(Random& random, Case& made) {
  const size_t section_count = made.sections.size();
  const uint32_t key_offset = static_cast<uint32_t>(64 + 24 * section_count);
  const uint32_t header_bytes = static_cast<uint32_t>(pad64(key_offset + kKeyBytes + 8));
  uint64_t offset = header_bytes;
  for (size_t i = 0; i < section_count; ++i) {
    kvc_section& section = made.sections[i];
    const kvc_stream& stream = made.streams[i % made.streams.size()];
    section.stored_bytes =
        kvc_section_bytes(made.dtype, stream.head_count, made.token_count, stream.head_size,
                          section.kind, section.bits, section.options, section.group_size);
    section.offset = offset;
    section.checksum_offset = 64 + 24 * i + 16;
    offset += pad64(section.stored_bytes);
  }
  made.header.resize(header_bytes);
  for (uint8_t& byte : made.header) byte = static_cast<uint8_t>(random());
  made.plan = {KVC_ABI_VERSION,
               made.dtype,
               made.token_count,
               made.layer_count,
               static_cast<uint32_t>(made.streams.size()),
               static_cast<uint32_t>(section_count),
               header_bytes,
               key_offset,
               kKeyBytes,
               0,
               offset,
               made.header.data(),
               made.streams.data(),
               made.sections.data(),
               &made.rotary};
}

uint16_t fp16_near(float value) {
  // Truncation is good enough to make test data.
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF) - 112;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (exponent <= 0) return static_cast<uint16_t>(sign | (bits & 0x3FF));
  if (exponent >= 31) return static_cast<uint16_t>(sign | 0x7BFF);
  return static_cast<uint16_t>(sign | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3FF));
}

void store_element(uint32_t dtype, float value, uint8_t* target) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (dtype == KVC_FP16) bits = fp16_near(value);
  if (dtype == KVC_BF16) bits >>= 16;
  std::memcpy(target, &bits, element_bytes(dtype));
}

// NaNs, infinities, the ends of the domain, denormals, both zeros.
void store_special(Random& random, uint32_t dtype, uint8_t* target) {
  static const uint32_t bf16[] = {0x7FC0, 0xFF81, 0x7F80, 0xFF80, 0x7EFF, 0xFEFF,
                                  0x7F00, 0xFF00, 1,      0x8001, 0x8000, 0};
  static const uint32_t fp16[] = {0x7E00, 0xFC01, 0x7C00, 0xFC00, 0x7BFF, 0xFBFF,
                                  0x03FF, 0x83FF, 1,      0x8001, 0x8000, 0};
  static const uint32_t fp32[] = {0x7FC00000, 0xFF800001, 0x7F800000, 0xFF800000,
                                  0x7EFFFFFF, 0xFEFFFFFF, 0x7F000000, 0xFF000000,
                                  1,          0x80000001, 0x80000000, 0};
  const uint32_t which = pick(random, 0, 11);
  const uint32_t bits = dtype == KVC_BF16   ? bf16[which]
                        : dtype == KVC_FP16 ? fp16[which]
                                            : fp32[which];
  std::memcpy(target, &bits, element_bytes(dtype));
}

}  // namespace

Buffer::Buffer(size_t bytes, uint8_t fill) : data_(new uint8_t[bytes]), size_(bytes) {
  std::memset(data_.get(), fill, bytes);
}

bool Buffer::operator==(const Buffer& other) const {
  return size_ == other.size_ && std::memcmp(data(), other.data(), size_) == 0;
}

uint32_t pick(Random& random, uint32_t low, uint32_t high) {
  return low + static_cast<uint32_t>(random() % (uint64_t{high} - low + 1));
}

uint32_t element_bytes(uint32_t dtype) { return dtype == KVC_FP32 ? 4 : dtype <= KVC_FP16 ? 2 : 1; }

std::unique_ptr<Case> make_case(Random& random, bool large) {
  auto made = std::make_unique<Case>();
  made->dtype = large ? pick(random, 1, 2) : pick(random, 1, 6);
  made->token_count = large ? 64 : pick(random, 1, 40);
  made->layer_count = large ? pick(random, 4, 12) : pick(random, 1, 3);
  const uint32_t stream_count = pick(random, 1, large ? 2 : 4);
  const uint32_t sizes[] = {1, 3, 16, 31, 63, 64, 65, 80, 96, 127, 128, 130, 192, 256};
  for (uint32_t i = 0; i < stream_count; ++i) {
    const uint32_t heads = large ? pick(random, 1, 8) : pick(random, 1, 5);
    // Half of the rows are whole blocks, which the vector kernels are made for.
    const bool whole = large || pick(random, 0, 1) == 0;
    const uint32_t head_size = whole ? 64 * pick(random, 1, 3) : sizes[pick(random, 0, 13)];
    made->hosts.push_back(
        make_host(random, made->dtype, made->layer_count, made->token_count, heads, head_size));
    made->streams.push_back(made->hosts.back().stream);
  }
  make_rotary(random, *made);
  for (uint32_t i = 0; i < made->layer_count * stream_count; ++i) {
    made->sections.push_back(make_section(random, *made, made->streams[i % stream_count]));
  }
  finish_plan(random, *made);
  return made;
}

Buffer make_rows(Random& random, const Case& made, const HostStream& host) {
  Buffer buffer(host.buffer_bytes, 0);
  const uint32_t bytes = element_bytes(made.dtype);
  const uint32_t mode = pick(random, 0, 4);
  const float scale = mode == 1 ? std::ldexp(1.0f, static_cast<int>(pick(random, 0, 250)) - 130)
                                : (mode == 2 ? 2e4f : 1.0f);
  const float offset = pick(random, 0, 3) == 0 ? 3 * scale : 0;
  // Every aligned element of the buffer gets a value; rows may start between them, which makes
  // other values.
  const size_t first = host.base_offset % bytes;
  for (size_t at = first; at + bytes <= buffer.size(); at += bytes) {
    uint8_t* target = buffer.data() + at;
    if (mode == 0 || made.dtype > KVC_FP32) {
      const uint64_t bits = random();
      std::memcpy(target, &bits, bytes);
    } else if (mode >= 3 && random() % 97 == 0) {
      store_special(random, made.dtype, target);
    } else {
      const float unit = static_cast<float>(static_cast<double>(random() >> 11) * 0x1p-52 - 1);
      store_element(made.dtype, mode == 4 && random() % 3 != 0 ? 0.0f : offset + scale * unit,
                    target);
    }
  }
  return buffer;
}

std::string Case::text() const {
  std::string text = "dtype " + std::to_string(dtype) + ", " + std::to_string(token_count) +
                     " tokens, " + std::to_string(layer_count) + " layers";
  for (const kvc_stream& stream : streams) {
    text +=
        ", stream " + std::to_string(stream.head_count) + " x " + std::to_string(stream.head_size);
  }
  return text;
}

}  // namespace driver
