// Coded sections on every instruction set, kernel by kernel: the same bytes, the same rows, the
// same verdict on damaged ones. Memory is as long as what may be touched, for the sanitizers to
// watch.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "case.h"
#include "kernels.h"

namespace driver {
namespace {

using kvc::Kernels;
using kvc::Rows;
using kvc::SectionCodec;

struct FreeDeleter {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, FreeDeleter>;

Memory aligned_memory(size_t bytes) {
  return Memory(static_cast<uint8_t*>(std::aligned_alloc(64, kvc::pad64(bytes + 1))));
}

// A section: rows, a codec, and a rotation or none.
struct CodedCase {
  SectionCodec codec{};
  uint32_t heads = 0;
  uint32_t tokens = 0;
  uint32_t size = 0;
  size_t stride = 0;  // bytes from row to row
  std::vector<float> table;
  kvc_rotary rotary{};

  const kvc_rotary* turn() const { return table.empty() ? nullptr : &rotary; }
  size_t bytes() const { return stride * heads * tokens; }
  size_t raw_bytes() const { return size_t{heads} * tokens * size * element_bytes(codec.dtype); }
  Rows rows(uint8_t* base) const {
    return {base,
            heads,
            tokens,
            size,
            heads,
            0,
            static_cast<int64_t>(stride * tokens),
            static_cast<int64_t>(stride)};
  }
};

CodedCase make_coded(Random& random) {
  CodedCase made;
  const uint8_t kinds[] = {KVC_KIND_ECQ, KVC_KIND_ECQ, KVC_KIND_LOSSLESS, KVC_KIND_BLOCK};
  made.codec.kind = kinds[pick(random, 0, 3)];
  const bool ecq = made.codec.kind == KVC_KIND_ECQ;
  made.codec.dtype = static_cast<uint8_t>(pick(random, 1, ecq ? 3 : 2));
  made.codec.bits = static_cast<uint8_t>(ecq ? pick(random, 24, 112) : 16);
  made.codec.channel = pick(random, 0, 1) == 1;
  made.heads = pick(random, 1, 6);
  made.tokens = pick(random, 0, 1) == 0 ? 64 : pick(random, 1, 140);
  made.size = pick(random, 0, 1) == 0 ? 64 * pick(random, 1, 2) : pick(random, 1, 290);
  const size_t row_bytes = size_t{made.size} * element_bytes(made.codec.dtype);
  made.stride = pick(random, 0, 1) == 0 ? kvc::pad64(row_bytes) + 64 * pick(random, 0, 2)
                                        : row_bytes + pick(random, 0, 7);
  if (ecq && made.codec.channel && made.size >= 2 && pick(random, 0, 2) != 0) {
    const uint32_t pairs = pick(random, 0, 1) == 0 ? made.size / 2 : pick(random, 1, made.size / 2);
    for (uint32_t i = 0; i < made.tokens * pairs; ++i) {
      const double angle = i / pairs * std::pow(1e4, -1.0 * (i % pairs) / pairs);
      made.table.push_back(static_cast<float>(std::cos(angle)));
      made.table.push_back(static_cast<float>(std::sin(angle)));
    }
    made.rotary = {2 * pairs, pick(random, 0, 1), made.table.data()};
  }
  return made;
}

// Bell-shaped values, channels of their own size and middle; some odd ones.
void fill_rows(Random& random, const CodedCase& made, uint8_t* base) {
  const uint32_t mode = pick(random, 0, 5);
  const float odd = mode == 1 ? 300.0f : 1.0f;
  std::vector<float> scale(made.size);
  std::vector<float> middle(made.size);
  for (uint32_t c = 0; c < made.size; ++c) {
    scale[c] = std::ldexp(1.0f, static_cast<int>(pick(random, 0, 4)) - (mode == 2 ? 20 : 2));
    middle[c] = pick(random, 0, 3) == 0 ? scale[c] * static_cast<float>(pick(random, 0, 40)) : 0;
  }
  const uint32_t bytes = element_bytes(made.codec.dtype);
  for (uint32_t row = 0; row < made.heads * made.tokens; ++row) {
    for (uint32_t c = 0; c < made.size; ++c) {
      float value = -6;
      for (int i = 0; i < 12; ++i) value += static_cast<float>(random() % 4096) / 4096.0f;
      value = value * scale[c] * (random() % 128 == 0 ? odd : 1.0f) + middle[c];
      if (mode == 3 && random() % 3 != 0) value = 0;
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      if (made.codec.dtype == KVC_BF16) bits >>= 16;
      if (made.codec.dtype == KVC_FP16) {
        const uint32_t magnitude = bits & 0x7FFFFFFF;
        const bool small = magnitude < 0x38800000;
        bits = (bits >> 16 & 0x8000) |
               (small ? magnitude >> 20 & 0xFF : (magnitude - 0x38000000) >> 13);
      }
      if (mode == 4 && random() % 5000 == 0) bits = 0xFFFFFFFF;
      std::memcpy(base + row * made.stride + c * bytes, &bits, bytes);
    }
  }
}

std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> found{&kvc::kScalarKernels};
#if defined(__x86_64__)
  if (kvc::avx2_kernels() != nullptr) found.push_back(kvc::avx2_kernels());
  if (kvc::avx512_kernels() != nullptr) found.push_back(kvc::avx512_kernels());
#elif defined(__aarch64__)
  if (kvc::neon_kernels() != nullptr) found.push_back(kvc::neon_kernels());
#endif
  return found;
}

[[noreturn]] void fail(const char* what, uint32_t seed, const CodedCase& made, const char* isa) {
  std::fprintf(stderr,
               "FAILED: %s\n  seed %u, isa %s, kind %u, dtype %u, bits %u, channel %d, "
               "%u x %u x %u, %u rotated\n",
               what, seed, isa, made.codec.kind, made.codec.dtype, made.codec.bits,
               made.codec.channel, made.heads, made.tokens, made.size,
               made.table.empty() ? 0 : made.rotary.size);
  std::exit(1);
}

// What becomes of one stored section: the verdict, and the rows if it is sound.
bool decode(const Kernels& kernels, const CodedCase& made, const std::vector<uint8_t>& stored,
            uint8_t* scratch, std::vector<uint8_t>* rows) {
  // To the byte, and not aligned.
  const std::unique_ptr<uint8_t[]> in(new uint8_t[stored.size()]);
  std::memcpy(in.get(), stored.data(), stored.size());
  std::fill(rows->begin(), rows->end(), uint8_t{0xA5});
  const Memory target = aligned_memory(made.bytes());
  std::memset(target.get(), 0xA5, made.bytes());
  const bool sound = kernels.decode_coded(made.codec, in.get(), stored.size(),
                                          made.rows(target.get()), made.turn(), scratch);
  const bool looked = kernels.decode_coded(made.codec, in.get(), stored.size(), made.rows(nullptr),
                                           made.turn(), scratch);
  if (looked != sound) return !sound;
  if (sound) std::memcpy(rows->data(), target.get(), made.bytes());
  return sound;
}

void disturb(Random& random, const CodedCase& made, std::vector<uint8_t>& stored) {
  const size_t size = stored.size();
  switch (pick(random, 0, 4)) {
    case 0:
      for (int i = 0; i < 3; ++i)
        stored[random() % size] ^= static_cast<uint8_t>(1u << pick(random, 0, 7));
      break;
    case 1:
      for (size_t i = size / 8; i < size - 64; ++i) {
        if (random() % 3 == 0) stored[i] = static_cast<uint8_t>(random());
      }
      break;
    case 2:
      stored[pick(random, 0, 31) % size] = static_cast<uint8_t>(random());
      break;
    case 3:
      stored.resize(pick(random, 1, static_cast<uint32_t>(size)));
      break;
    default:
      stored.resize(std::min(size + pick(random, 1, 200), made.raw_bytes() - 1));
  }
}

}  // namespace

void compare_coded(uint32_t cases) {
  const Memory scratch = aligned_memory(kvc::kCodedScratchBytes);
  uint32_t coded = 0;
  uint32_t refused = 0;
  for (uint32_t seed = 0; seed < cases; ++seed) {
    Random random(5000 + seed);
    const CodedCase made = make_coded(random);
    const Memory rows = aligned_memory(made.bytes());
    std::memset(rows.get(), 0, made.bytes());
    fill_rows(random, made, rows.get());
    std::vector<uint8_t> expected;
    std::vector<uint8_t> expected_rows(made.bytes());
    for (const Kernels* kernels : tables()) {
      const Memory out = aligned_memory(made.raw_bytes());
      const size_t stored = kernels->encode_coded(made.codec, made.rows(rows.get()), nullptr, made.turn(),
                                                  scratch.get(), out.get());
      if (stored >= made.raw_bytes()) fail("longer than raw", seed, made, kernels->name);
      const std::vector<uint8_t> bytes(out.get(), out.get() + stored);
      if (kernels == &kvc::kScalarKernels) expected = bytes;
      if (bytes != expected) fail("encoded bytes differ", seed, made, kernels->name);
      if (stored == 0) continue;
      std::vector<uint8_t> decoded(made.bytes());
      if (!decode(*kernels, made, bytes, scratch.get(), &decoded))
        fail("refused its own section", seed, made, kernels->name);
      if (kernels == &kvc::kScalarKernels) expected_rows = decoded;
      if (decoded != expected_rows) fail("decoded rows differ", seed, made, kernels->name);
    }
    if (expected.empty()) continue;
    ++coded;
    for (uint32_t turn = 0; turn < 8; ++turn) {
      std::vector<uint8_t> damaged = expected;
      disturb(random, made, damaged);
      if (damaged.empty()) continue;
      bool sound = false;
      for (const Kernels* kernels : tables()) {
        std::vector<uint8_t> decoded(made.bytes());
        const bool verdict = decode(*kernels, made, damaged, scratch.get(), &decoded);
        if (kernels == &kvc::kScalarKernels) {
          sound = verdict;
          expected_rows = decoded;
        }
        if (verdict != sound) fail("another verdict on damage", seed, made, kernels->name);
        if (decoded != expected_rows) fail("another decoding of damage", seed, made, kernels->name);
      }
      refused += !sound;
    }
  }
  std::printf("coded: %u sections, %u coded, %u of %u damaged ones refused\n", cases, coded,
              refused, 8 * coded);
}

}  // namespace driver
