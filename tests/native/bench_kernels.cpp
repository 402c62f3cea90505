// Speed of the kernels of one instruction set on pages in memory, as a multiple of memcpy(page) of
// the same raw bytes.
//
//   bench_kernels [isa] [words that a case's name must hold, comma separated] [rounds]
//
// Pages of 28 layers, 4 heads of 128 elements, 64 tokens (3.67 MB); 128 of them are larger than the
// caches together. They are walked in chunks of 32, and inside one chunk every case runs once: a
// ratio compares neighbours in time, and time is the CPU time of the thread, so a busy machine
// disturbs it little. An encoder runs as the batch engine runs it, section by section into a
// scratch, checksum, copy_out; a decoder verifies the checksum of a section first.
#include <sys/mman.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"
#include "kvcodec.h"

namespace {

using kvc::Kernels;
using kvc::Rows;
using kvc::SectionCodec;

constexpr uint32_t kLayers = 28;
constexpr uint32_t kHeads = 4;
constexpr uint32_t kHeadSize = 128;
constexpr uint32_t kTokens = 64;
constexpr uint32_t kPages = 128;
constexpr uint32_t kChunk = 32;
constexpr size_t kRowBytes = kHeadSize * 2;
constexpr size_t kSectionBytes = kRowBytes * kHeads * kTokens;
constexpr size_t kPageBytes = kSectionBytes * kLayers * 2;

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Large pages, touched: first touch costs more than anything measured here.
uint8_t* allocate(size_t bytes) {
  constexpr size_t kHuge = size_t{1} << 21;
  void* memory =
      mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::exit(1);
  uint8_t* aligned =
      reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + kHuge - 1) & ~(kHuge - 1));
  madvise(aligned, bytes, MADV_HUGEPAGE);
  std::memset(aligned, 1, bytes);
  return aligned;
}

enum class Layout { kPageFirst, kPageFirstDirect, kLayerFirst };

// Rows of a section (layer, key or value) of a page in a pool of kPages pages.
Rows rows_of(Layout layout, uint8_t* pool, uint32_t page, uint32_t section) {
  Rows rows{pool, kHeads, kTokens, kHeadSize, kHeads, 0, kRowBytes, kRowBytes * kHeads};
  const size_t half =
      kPageBytes / 2;  // keys and values are pools of their own, but for page_first_direct
  switch (layout) {
    case Layout::kPageFirst:
      rows.token_stride = kRowBytes * kHeads * kLayers;
      rows.base += (section % 2) * half * kPages + page * half + section / 2 * kRowBytes * kHeads;
      break;
    case Layout::kPageFirstDirect:
      rows.base += page * kPageBytes + section * kSectionBytes;
      break;
    case Layout::kLayerFirst:
      rows.base += (static_cast<size_t>(section) * kPages + page) * kSectionBytes;
      break;
  }
  return rows;
}

// Normal numbers; channels differ in scale, some keys are outliers.
void fill(uint8_t* pool, uint32_t dtype) {
  std::vector<float> noise(1 << 16);
  uint64_t state = 88172645463325252u;
  for (float& value : noise) {
    value = 0;
    for (int i = 0; i < 6; ++i) {
      state ^= state << 13;
      state ^= state >> 7;
      state ^= state << 17;
      value += static_cast<float>(state % 20001) / 10000.0f - 1.0f;
    }
  }
  std::vector<uint16_t> page(kPageBytes / 2);
  for (size_t i = 0; i < page.size(); ++i) {
    const float value = noise[i * 7 % 65521] *
                        (i % 512 % 61 == 3 ? 4.0f : 0.5f + static_cast<float>(i % 13) / 13.0f);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    page[i] = static_cast<uint16_t>(bits >> 16);
    if (dtype == KVC_FP16)
      page[i] =
          static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits & 0x7FFFFFFF) - 0x38000000) >> 13);
    if (std::fabs(value) < 0.001f) page[i] = 0;
  }
  for (uint32_t p = 0; p < kPages; ++p) std::memcpy(pool + p * kPageBytes, page.data(), kPageBytes);
}

struct Case {
  std::string name;
  std::function<void(uint32_t page)> run;
  std::vector<double> seconds;
};

struct Memory {
  uint8_t* source;
  uint8_t* target;
  uint8_t* encoded;
  uint8_t* scratch;
  size_t encoded_stride;
};

size_t padded_section(const SectionCodec& codec) {
  const uint32_t options =
      (codec.asymmetric ? KVC_OPTION_ASYMMETRIC : 0) | (codec.channel ? KVC_OPTION_CHANNEL : 0);
  return kvc::pad64(kvc_section_bytes(codec.dtype, kHeads, kTokens, kHeadSize, codec.kind,
                                      codec.bits, options, codec.group_size));
}

void encode_page(const Kernels& kernels, const SectionCodec& codec, Layout layout,
                 const Memory& memory, uint32_t page) {
  const size_t bytes = padded_section(codec);
  volatile uint64_t sum;
  for (uint32_t section = 0; section < kLayers * 2; ++section) {
    const Rows rows = rows_of(layout, memory.source, page, section);
    const bool last = section + 1 == kLayers * 2;
    const Rows next =
        rows_of(layout, memory.source, last ? (page + 1) % kPages : page, last ? 0 : section + 1);
    kernels.encode_section(codec, rows, &next, memory.scratch);
    sum = kernels.checksum(memory.scratch, bytes);
    kernels.copy_out(memory.encoded + page * memory.encoded_stride + section * bytes,
                     memory.scratch, bytes);
  }
  (void)sum;
}

void decode_page(const Kernels& kernels, const SectionCodec& codec, Layout layout,
                 const Memory& memory, uint32_t page) {
  const size_t bytes = padded_section(codec);
  volatile uint64_t sum;
  for (uint32_t section = 0; section < kLayers * 2; ++section) {
    const uint8_t* in = memory.encoded + page * memory.encoded_stride + section * bytes;
    sum = kernels.checksum(in, bytes);
    kernels.decode_section(codec, in, rows_of(layout, memory.target, page, section));
  }
  (void)sum;
}

struct Named {
  const char* name;
  SectionCodec codec;
};

const Named kCodecs[] = {
    {"int4-g64", {KVC_BF16, KVC_KIND_INT, 4, false, false, 64}},
    {"int4-g64-asym", {KVC_BF16, KVC_KIND_INT, 4, true, false, 64}},
    {"int4-g128", {KVC_BF16, KVC_KIND_INT, 4, false, false, 128}},
    {"int4-g32", {KVC_BF16, KVC_KIND_INT, 4, false, false, 32}},
    {"int8-g128", {KVC_BF16, KVC_KIND_INT, 8, false, false, 128}},
    {"int8-g64-asym", {KVC_BF16, KVC_KIND_INT, 8, true, false, 64}},
    {"int2-g64-asym", {KVC_BF16, KVC_KIND_INT, 2, true, false, 64}},
    {"int4-c64", {KVC_BF16, KVC_KIND_INT, 4, false, true, 64}},
    {"int4-c64-asym", {KVC_BF16, KVC_KIND_INT, 4, true, true, 64}},
    {"int8-c64", {KVC_BF16, KVC_KIND_INT, 8, false, true, 64}},
    {"int2-c64-asym", {KVC_BF16, KVC_KIND_INT, 2, true, true, 64}},
    {"raw", {KVC_BF16, KVC_KIND_RAW, 16, false, false, 0}},
    {"fp16-int4-g64", {KVC_FP16, KVC_KIND_INT, 4, false, false, 64}},
    {"fp16-int4-g64-asym", {KVC_FP16, KVC_KIND_INT, 4, true, false, 64}},
    {"fp16-int8-g128", {KVC_FP16, KVC_KIND_INT, 8, false, false, 128}},
    {"fp16-int4-c64", {KVC_FP16, KVC_KIND_INT, 4, false, true, 64}},
};

const struct {
  const char* name;
  Layout layout;
} kLayouts[] = {{"page_first_direct", Layout::kPageFirstDirect},
                {"page_first", Layout::kPageFirst},
                {"layer_first", Layout::kLayerFirst}};

bool wanted(const std::string& name, const std::string& words) {
  size_t start = 0;
  while (start < words.size()) {
    const size_t end = std::min(words.find(',', start), words.size());
    if (name.find(" " + words.substr(start, end - start) + " ") == std::string::npos) return false;
    start = end + 1;
  }
  return true;
}

// ---- the same traffic without arithmetic: what memory allows

#if defined(__SSE2__)

uint64_t read_stream(const uint8_t* source, size_t bytes) {
  __m128i sums[4] = {};
  for (size_t i = 0; i < bytes; i += 64) {
    for (int k = 0; k < 4; ++k) {
      sums[k] = _mm_add_epi32(
          sums[k], _mm_load_si128(reinterpret_cast<const __m128i*>(source + i + 16 * k)));
    }
  }
  const __m128i all =
      _mm_add_epi32(_mm_add_epi32(sums[0], sums[1]), _mm_add_epi32(sums[2], sums[3]));
  return static_cast<uint64_t>(_mm_cvtsi128_si32(all));
}

void write_stream(uint8_t* target, size_t bytes, uint64_t value) {
  const __m128i v = _mm_set1_epi64x(static_cast<long long>(value));
  for (size_t i = 0; i < bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i), v);
}

// Both at once, in pieces that a prefetcher can follow.
void mixed_stream(uint8_t* target, size_t write_bytes, const uint8_t* source, size_t read_bytes) {
  constexpr size_t kPieces = 512;
  const size_t write_piece = write_bytes / kPieces / 64 * 64;
  const size_t read_piece = read_bytes / kPieces / 64 * 64;
  for (size_t i = 0; i < kPieces; ++i) {
    const uint64_t sum = read_stream(source + i * read_piece, read_piece);
    write_stream(target + i * write_piece, write_piece, sum);
  }
  _mm_sfence();
}

void add_streams(const Memory& memory, size_t encoded_bytes, std::vector<Case>& cases) {
  cases.push_back({"stream of an encoder",
                   [=](uint32_t page) {
                     mixed_stream(memory.target + page * kPageBytes, encoded_bytes,
                                  memory.source + page * kPageBytes, kPageBytes);
                   },
                   {}});
  cases.push_back({"stream of a decoder",
                   [=](uint32_t page) {
                     mixed_stream(memory.target + page * kPageBytes, kPageBytes,
                                  memory.encoded + page * memory.encoded_stride, encoded_bytes);
                   },
                   {}});
}

#else

void add_streams(const Memory&, size_t, std::vector<Case>&) {}

#endif

double quantile(std::vector<double> values, double q) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(q * static_cast<double>(values.size())))];
}

void report(const std::vector<Case>& cases) {
  const std::vector<double>& reference = cases[0].seconds;
  std::printf("%-48s %8s %8s %8s %8s\n", "case", "GB/s", "x memcpy", "q25", "q75");
  for (const Case& c : cases) {
    std::vector<double> rates;
    std::vector<double> ratios;
    for (size_t i = 0; i < c.seconds.size(); ++i) {
      rates.push_back(static_cast<double>(kPageBytes * kChunk) / c.seconds[i] / 1e9);
      ratios.push_back(reference[i] / c.seconds[i]);
    }
    std::printf("%-48s %8.2f %8.2f %8.2f %8.2f\n", c.name.c_str(), quantile(rates, 0.5),
                quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75));
  }
}

void measure(std::vector<Case>& cases, uint32_t rounds) {
  for (uint32_t round = 0; round <= rounds; ++round) {
    for (uint32_t chunk = 0; chunk < kPages / kChunk; ++chunk) {
      for (size_t k = 0; k < cases.size(); ++k) {
        Case& c = cases[(k + round * 3 + chunk) % cases.size()];
        const double start = thread_seconds();
        for (uint32_t page = chunk * kChunk; page < (chunk + 1) * kChunk; ++page) c.run(page);
        const double seconds = thread_seconds() - start;
        if (round != 0) c.seconds.push_back(seconds);
      }
    }
  }
  report(cases);
}

const Kernels* kernels_named(const std::string& name) {
  for (const Kernels* kernels :
       {kvc::avx512_kernels(), kvc::avx2_kernels(), kvc::neon_kernels(), &kvc::kScalarKernels}) {
    if (kernels != nullptr && (name.empty() || name == kernels->name)) return kernels;
  }
  return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  const Kernels* kernels = kernels_named(argc > 1 ? argv[1] : "");
  const std::string words = argc > 2 ? argv[2] : "";
  const uint32_t rounds = argc > 3 ? static_cast<uint32_t>(std::atoi(argv[3])) : 4;
  if (kernels == nullptr) return std::printf("not available here\n"), 2;
  Memory memory{};
  memory.encoded_stride = kPageBytes;
  memory.source = allocate(kPageBytes * kPages);
  memory.target = allocate(kPageBytes * kPages);
  memory.encoded = allocate(kPageBytes * kPages);
  memory.scratch = allocate(kSectionBytes * 2);

  uint32_t filled = 0;
  for (const Named& named : kCodecs) {
    std::vector<Case> cases;
    cases.push_back({"memcpy(page)",
                     [&](uint32_t page) {
                       std::memcpy(memory.target + page * kPageBytes,
                                   memory.source + page * kPageBytes, kPageBytes);
                     },
                     {}});
    for (const auto& layout : kLayouts) {
      const std::string name = std::string(" ") + named.name + " " + layout.name + " ";
      const auto add = [&](const char* what, auto work) {
        if (!wanted(name + what + " ", words)) return;
        cases.push_back({name + what,
                         [&, work, l = layout.layout](uint32_t page) {
                           work(*kernels, named.codec, l, memory, page);
                         },
                         {}});
      };
      add("encode", encode_page);
      add("decode", decode_page);
    }
    if (cases.size() == 1) continue;
    add_streams(memory, padded_section(named.codec) * kLayers * 2, cases);
    if (filled != named.codec.dtype) fill(memory.source, named.codec.dtype);
    filled = named.codec.dtype;
    for (uint32_t page = 0; page < kPages; ++page) {
      encode_page(*kernels, named.codec, Layout::kPageFirstDirect, memory, page);
    }
    measure(cases, rounds);
  }
  return 0;
}
