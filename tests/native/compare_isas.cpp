// Compares every instruction set of this processor with the scalar kernels, byte for byte, on
// random sections: shapes, codecs, strides, alignments and contents. Prints the first difference
// and its seed.
//
//   compare_isas [rounds] [first seed]
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "kvcodec.h"

namespace {

using kvc::Kernels;
using kvc::Rows;
using kvc::SectionCodec;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 1) {}

  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ * 0x2545F4914F6CDD1Du >> 16;
  }
  uint32_t below(uint32_t end) { return static_cast<uint32_t>(next() % end); }
  bool once_in(uint32_t n) { return below(n) == 0; }
  template <size_t kSize>
  uint32_t one_of(const uint32_t (&values)[kSize]) {
    return values[below(kSize)];
  }

 private:
  uint64_t state_;
};

uint32_t element_bytes(uint32_t dtype) { return dtype == KVC_FP32 ? 4 : dtype <= KVC_FP16 ? 2 : 1; }

// Rotary pairs of any angles, and the room that their table needs.
struct Rotation {
  std::vector<float> table;
  kvc_rotary rotary;
};

// A section, and the memory that holds exactly its rows: a sanitizer sees every step beyond.
struct Case {
  SectionCodec codec;
  Rows rows;
  size_t memory_bytes;
  size_t base_offset;  // of row (0, 0)
  size_t stored_bytes;
  std::shared_ptr<Rotation> rotation;
};

SectionCodec random_codec(Random& random) {
  static const uint32_t kBits[] = {2, 4, 4, 4, 8, 8};
  static const uint32_t kTypes[] = {KVC_BF16, KVC_BF16, KVC_BF16, KVC_FP16, KVC_FP16, KVC_FP32};
  SectionCodec codec{};
  codec.dtype = static_cast<uint8_t>(random.one_of(kTypes));
  codec.kind = random.once_in(8) ? KVC_KIND_RAW : KVC_KIND_INT;
  if (codec.kind == KVC_KIND_RAW) {
    codec.dtype = static_cast<uint8_t>(1 + random.below(6));
    codec.bits = static_cast<uint8_t>(8 * element_bytes(codec.dtype));
    return codec;
  }
  if (random.once_in(8)) {
    codec.kind = KVC_KIND_FP8;
    codec.bits = 8;
    return codec;
  }
  codec.bits = static_cast<uint8_t>(random.one_of(kBits));
  codec.asymmetric = random.once_in(2);
  codec.channel = random.once_in(3);
  codec.hadamard = !codec.channel && random.once_in(4);
  return codec;
}

uint32_t random_group(Random& random, const SectionCodec& codec, const Rows& rows) {
  static const uint32_t kGroups[] = {32, 64, 64, 64, 128, 128, 192, 16, 24};
  const uint32_t axis = codec.channel ? rows.token_count : rows.head_size;
  if (random.once_in(4)) return axis;
  const uint32_t group = random.once_in(12) ? 1 + random.below(axis) : random.one_of(kGroups);
  return group < axis ? group : axis;
}

// Sets strides and says how many bytes the rows span.
void place_rows(Random& random, Rows& rows, uint32_t row_bytes, size_t* memory_bytes,
                size_t* base_offset) {
  static const uint32_t kGaps[] = {0, 0, 0, 64, 32, 2, 1, 448};
  const int64_t gap = random.one_of(kGaps);
  const uint32_t heads = rows.head_count;
  const uint32_t groups = (heads + rows.group_heads - 1) / rows.group_heads;
  const uint32_t in_group = rows.group_heads < heads ? rows.group_heads : heads;
  switch (random.below(3)) {
    case 0:  // [token][group][head], perhaps far apart
      rows.head_stride = row_bytes + gap;
      rows.group_stride = rows.head_stride * in_group;
      rows.token_stride =
          rows.group_stride * groups + (random.once_in(2) ? 4096 * random.below(3) : gap);
      break;
    case 1:  // canonical
      rows.token_stride = row_bytes + gap;
      rows.head_stride = rows.token_stride * rows.token_count;
      rows.group_stride = rows.head_stride * in_group;
      break;
    default:  // [group][token][head]
      rows.head_stride = row_bytes + gap;
      rows.token_stride = rows.head_stride * in_group;
      rows.group_stride = rows.token_stride * rows.token_count;
  }
  if (random.once_in(8)) rows.token_stride = -rows.token_stride;
  if (random.once_in(8)) rows.head_stride = -rows.head_stride;
  int64_t low = 0;
  int64_t high = 0;
  rows.base = nullptr;
  for (uint32_t head = 0; head < heads; ++head) {
    for (uint32_t token = 0; token < rows.token_count; ++token) {
      const int64_t at = head / rows.group_heads * rows.group_stride +
                         head % rows.group_heads * rows.head_stride + token * rows.token_stride;
      low = at < low ? at : low;
      high = at > high ? at : high;
    }
  }
  *base_offset = static_cast<size_t>(-low);
  *memory_bytes = static_cast<size_t>(high - low) + row_bytes;
}

std::unique_ptr<Rotation> random_rotation(Random& random, const Rows& rows) {
  auto made = std::make_unique<Rotation>();
  const uint32_t most = rows.head_size / 2;
  const uint32_t pairs = random.once_in(3) ? 1 + random.below(most) : most;
  for (uint32_t i = 0; i < pairs * rows.token_count; ++i) {
    const double angle = random.below(1000) * 0.01;
    made->table.push_back(static_cast<float>(std::cos(angle)));
    made->table.push_back(static_cast<float>(std::sin(angle)));
  }
  made->rotary = {2 * pairs, random.below(2), made->table.data()};
  return made;
}

Case random_case(Random& random) {
  static const uint32_t kHeadSizes[] = {64, 128, 128, 128, 192, 256, 512, 576, 80,
                                        96, 112, 48,  32,  16,  72,  160, 1024};
  Case result{};
  result.codec = random_codec(random);
  Rows& rows = result.rows;
  rows.head_size = random.once_in(8) ? 1 + random.below(300) : random.one_of(kHeadSizes);
  if (result.codec.hadamard) rows.head_size = 1u << random.below(11);
  rows.head_count = 1 + random.below(random.once_in(4) ? 9 : 4);
  rows.token_count = random.once_in(3) ? 64 : 1 + random.below(random.once_in(4) ? 140 : 40);
  rows.group_heads = random.once_in(3) ? 1 + random.below(4) : rows.head_count;
  if (result.codec.kind == KVC_KIND_INT)
    result.codec.group_size = random_group(random, result.codec, rows);
  if (result.codec.channel && rows.head_size >= 2 && rows.head_size <= 256 && random.once_in(2)) {
    result.rotation = random_rotation(random, rows);
    result.codec.derotation = &result.rotation->rotary;
  }
  place_rows(random, rows, rows.head_size * element_bytes(result.codec.dtype), &result.memory_bytes,
             &result.base_offset);
  const uint32_t options = (result.codec.asymmetric ? KVC_OPTION_ASYMMETRIC : 0) |
                           (result.codec.channel ? KVC_OPTION_CHANNEL : 0) |
                           (result.codec.hadamard ? KVC_OPTION_HADAMARD : 0) |
                           (result.codec.derotation != nullptr ? KVC_OPTION_DEROTATED : 0);
  result.stored_bytes =
      kvc_section_bytes(result.codec.dtype, rows.head_count, rows.token_count, rows.head_size,
                        result.codec.kind, result.codec.bits, options, result.codec.group_size);
  return result;
}

// ---- contents

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

void store_element(uint32_t dtype, float value, uint8_t* target) {
  const uint32_t bits = bits_of(value);
  if (dtype == KVC_FP32) {
    std::memcpy(target, &bits, 4);
  } else if (dtype == KVC_BF16) {
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(target, &half, 2);
  } else {
    // Close enough: the exponent moved, the mantissa cut, the range left as it is.
    const uint32_t magnitude = bits & 0x7FFFFFFF;
    const uint32_t cut =
        magnitude < 0x38800000 ? magnitude >> 20 & 0x3FF : (magnitude - 0x38000000) >> 13;
    const uint16_t half = static_cast<uint16_t>(bits >> 16 & 0x8000) |
                          static_cast<uint16_t>(cut > 0x7BFF ? 0x7BFF : cut);
    std::memcpy(target, &half, 2);
  }
}

float random_number(Random& random, float scale, float offset) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += static_cast<float>(random.below(20001)) / 10000.0f - 1.0f;
  return sum * scale + offset;
}

void fill_memory(Random& random, const Case& section, std::vector<uint8_t>& memory) {
  static const float kScales[] = {1, 1, 1, 0.01f, 100, 3e4f, 1e-38f, 1e-40f, 3e37f, 0};
  const uint32_t bytes = element_bytes(section.codec.dtype);
  for (uint8_t& byte : memory) byte = static_cast<uint8_t>(random.next());
  if (section.codec.kind == KVC_KIND_RAW) return;
  const bool wild = random.once_in(6);  // any bits: NaN, infinities, denormals
  const bool spotted = random.once_in(3);
  float scale = 1;
  float offset = 0;
  for (uint32_t head = 0; head < section.rows.head_count; ++head) {
    for (uint32_t token = 0; token < section.rows.token_count; ++token) {
      Rows rows = section.rows;
      rows.base = memory.data() + section.base_offset;
      uint8_t* row = rows.row(head, token);
      if (random.once_in(4)) {
        scale = kScales[random.below(10)];
        offset = random.once_in(3)   ? scale * random_number(random, 8, 0)
                 : random.once_in(9) ? 6e4f
                                     : 0;
      }
      for (uint32_t i = 0; i < rows.head_size && !wild; ++i) {
        store_element(section.codec.dtype, random_number(random, scale, offset), row + i * bytes);
      }
      static const uint32_t kSpots[] = {0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80, 0x7F00,
                                        0xFF00, 0x7EFF, 0xFEFF, 0x8000, 0x0000, 0x0001,
                                        0x8001, 0x7C00, 0xFC00, 0x7BFF, 0x7C01, 0x0080};
      for (uint32_t n = spotted && random.once_in(4) ? random.below(4) : 0; n != 0; --n) {
        const uint16_t spot = static_cast<uint16_t>(random.one_of(kSpots));
        if (bytes >= 2)
          std::memcpy(row + random.below(rows.head_size) * bytes + bytes - 2, &spot, 2);
      }
    }
  }
}

// Bytes that no encoder wrote.
void disturb_section(Random& random, const SectionCodec& codec, size_t parameter_bytes,
                     std::vector<uint8_t>& section) {
  static const uint32_t kParameters[] = {0x7FC0, 0xFFC1, 0x7F81, 0x7F80, 0xFF80, 0x0000,
                                         0x8000, 0x0001, 0x0080, 0x7F7F, 0xFF7F, 0x7E80,
                                         0x4780, 0x3F80, 0xBF80, 0x7BFF, 0x7C00, 0x4300};
  for (size_t i = kvc::pad64(parameter_bytes); i < section.size(); ++i) {
    if (random.once_in(2)) section[i] = static_cast<uint8_t>(random.next());
  }
  for (size_t i = 0; codec.kind == KVC_KIND_INT && i + 1 < parameter_bytes; i += 2) {
    if (!random.once_in(3)) continue;
    const uint16_t value =
        static_cast<uint16_t>(random.once_in(2) ? random.one_of(kParameters) : random.next());
    std::memcpy(section.data() + i, &value, 2);
  }
}

// ---- comparison

std::string describe(const Case& section) {
  const SectionCodec& c = section.codec;
  const Rows& r = section.rows;
  char text[400];
  std::snprintf(text, sizeof text,
                "dtype %d kind %d bits %d asymmetric %d channel %d group %u hadamard %d rotated %u | heads %u (groups of "
                "%u) tokens %u "
                "head size %u | strides %lld %lld %lld",
                c.dtype, c.kind, c.bits, c.asymmetric, c.channel, c.group_size, c.hadamard,
                c.derotation != nullptr ? c.derotation->size : 0, r.head_count,
                r.group_heads, r.token_count, r.head_size, static_cast<long long>(r.group_stride),
                static_cast<long long>(r.head_stride), static_cast<long long>(r.token_stride));
  return text;
}

bool same(const char* what, const char* name, uint64_t seed, const Case& section,
          const std::vector<uint8_t>& expected, const std::vector<uint8_t>& found) {
  if (expected == found) return true;
  size_t at = 0;
  while (expected[at] == found[at]) ++at;
  size_t count = 0;
  for (size_t i = at; i < expected.size(); ++i) count += expected[i] != found[i];
  std::printf(
      "seed %llu: %s %s differs in %zu of %zu bytes, first at %zu: scalar %02x, found %02x\n  %s\n",
      static_cast<unsigned long long>(seed), name, what, count, expected.size(), at, expected[at],
      found[at], describe(section).c_str());
  return false;
}

// A vector whose data lies `skew` bytes behind a 64-byte boundary and ends where the allocation
// ends.
struct Buffer {
  std::vector<uint8_t> memory;
  size_t start;

  Buffer(size_t skew, size_t bytes) : memory(bytes + skew + 64) {
    start = (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 + skew;
    memory.resize(start + bytes);
  }
  uint8_t* data() { return memory.data() + start; }
};

bool compare_decode(const Kernels& kernels, Random& random, uint64_t seed, Case section,
                    const std::vector<uint8_t>& encoded, size_t memory_skew) {
  Buffer in(random.once_in(2) ? 0 : random.below(64), encoded.size());
  std::memcpy(in.data(), encoded.data(), encoded.size());
  Buffer expected(memory_skew, section.memory_bytes);
  Buffer found(memory_skew, section.memory_bytes);
  for (size_t i = 0; i < section.memory_bytes; ++i)
    expected.data()[i] = found.data()[i] = static_cast<uint8_t>(i * 7);
  section.rows.base = expected.data() + section.base_offset;
  kvc::kScalarKernels.decode_section(section.codec, in.data(), section.rows);
  section.rows.base = found.data() + section.base_offset;
  kernels.decode_section(section.codec, in.data(), section.rows);
  const std::vector<uint8_t> a(expected.data(), expected.data() + section.memory_bytes);
  const std::vector<uint8_t> b(found.data(), found.data() + section.memory_bytes);
  return same("decode", kernels.name, seed, section, a, b);
}

bool compare_section(const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  Case section = random_case(random);
  if (section.stored_bytes == 0) return true;
  static const uint32_t kSkews[] = {0, 0, 0, 32, 16, 2, 1, 62};
  const size_t skew = random.one_of(kSkews);
  std::vector<uint8_t> contents(section.memory_bytes);
  fill_memory(random, section, contents);
  Buffer memory(skew, section.memory_bytes);
  std::memcpy(memory.data(), contents.data(), contents.size());
  section.rows.base = memory.data() + section.base_offset;

  const size_t padded = kvc::pad64(section.stored_bytes);
  Buffer expected(0, padded);
  Buffer found(0, padded);
  std::memset(expected.data(), 0xA5, padded);
  std::memset(found.data(), 0x5A, padded);
  const Rows next = section.rows;
  const uint64_t outside =
      kvc::kScalarKernels.encode_section(section.codec, section.rows, nullptr, expected.data());
  const uint64_t outside_found = kernels.encode_section(
      section.codec, section.rows, random.once_in(2) ? &next : nullptr, found.data());
  std::vector<uint8_t> encoded(expected.data(), expected.data() + padded);
  const std::vector<uint8_t> other(found.data(), found.data() + padded);
  if (!same("encode", kernels.name, seed, section, encoded, other)) return false;
  if (outside != outside_found) {
    std::printf("seed %llu: %s counts %llu groups outside the domain, scalar %llu\n  %s\n",
                static_cast<unsigned long long>(seed), kernels.name,
                static_cast<unsigned long long>(outside_found),
                static_cast<unsigned long long>(outside), describe(section).c_str());
    return false;
  }
  if (!compare_decode(kernels, random, seed, section, encoded, skew)) return false;
  const size_t parameters = kvc::parameter_bytes(section.codec, section.rows.head_count,
                                                 section.rows.token_count, section.rows.head_size);
  disturb_section(random, section.codec, parameters, encoded);
  return compare_decode(kernels, random, seed, section, encoded, skew);
}

bool compare_bytes(const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const size_t bytes = random.once_in(3) ? random.below(100000) : random.below(700);
  Buffer source(random.below(64), bytes);
  for (size_t i = 0; i < bytes; ++i) source.data()[i] = static_cast<uint8_t>(random.next());
  Buffer target(random.below(64), bytes + 32);
  std::memset(target.data(), 0xC3, bytes + 32);
  kernels.copy_out(target.data() + 16, source.data(), bytes);
  bool right = std::memcmp(target.data() + 16, source.data(), bytes) == 0;
  for (size_t i = 0; i < 16; ++i)
    right &= target.data()[i] == 0xC3 && target.data()[bytes + 16 + i] == 0xC3;
  if (!right)
    std::printf("seed %llu: %s copy_out of %zu bytes\n", static_cast<unsigned long long>(seed),
                kernels.name, bytes);
  if (kernels.checksum(source.data(), bytes) == kvc::kScalarKernels.checksum(source.data(), bytes))
    return right;
  std::printf("seed %llu: %s checksum of %zu bytes\n", static_cast<unsigned long long>(seed),
              kernels.name, bytes);
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t rounds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 2000;
  const uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const char* only = argc > 3 ? argv[3] : nullptr;
  int compared = 0;
  uint64_t failures = 0;
  for (const Kernels* kernels : {kvc::avx512_kernels(), kvc::avx2_kernels(), kvc::neon_kernels()}) {
    if (kernels == nullptr || (only != nullptr && std::strcmp(only, kernels->name) != 0)) continue;
    ++compared;
    for (uint64_t seed = first; seed < first + rounds && failures < 5; ++seed) {
      failures += !compare_section(*kernels, seed);
      failures += seed % 8 == 0 && !compare_bytes(*kernels, seed);
    }
    std::printf("%s: %llu rounds, %llu failures\n", kernels->name,
                static_cast<unsigned long long>(rounds), static_cast<unsigned long long>(failures));
  }
  if (compared == 0) std::printf("nothing to compare\n");
  return failures == 0 ? 0 : 1;
}
