// Runs one codec over one section a number of times, for a simulator that counts instructions.
//
//   count_instructions encode|decode <bits> <options> <group_size> <repetitions>
//
// The difference of two runs is the cost of the repetitions alone, checksum and header included.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kvcodec.h"

namespace {

constexpr uint32_t kHeads = 4, kTokens = 64, kHeadSize = 128, kHeaderBytes = 128;
constexpr size_t kElements = size_t{kHeads} * kTokens * kHeadSize;

int run(kvc_pool* pool, int operation, const kvc_plan& plan, kvc_page* page) {
  kvc_batch* batch = nullptr;
  if (kvc_submit(pool, operation, &plan, page, 1, &batch) != KVC_DONE) return 1;
  while (kvc_batch_wait(batch, 1000000) == KVC_PENDING) {
  }
  kvc_batch_free(batch);
  return page->status;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const bool encode = std::strcmp(argv[1], "encode") == 0;
  const uint32_t bits = std::atoi(argv[2]), options = std::atoi(argv[3]), group = std::atoi(argv[4]);
  const uint64_t stored =
      kvc_section_bytes(KVC_BF16, kHeads, kTokens, kHeadSize, KVC_KIND_INT, bits, options, group);
  if (stored == 0) return 2;

  // Sums of small pseudo-random numbers as bf16: both signs, no denormals.
  auto* rows = static_cast<uint16_t*>(std::aligned_alloc(64, kElements * 2));
  uint32_t state = 1;
  for (size_t i = 0; i < kElements; ++i) {
    float value = 0;
    for (int k = 0; k < 4; ++k) {
      state = state * 1664525u + 1013904223u;
      value += static_cast<int32_t>(state) * 0x1p-31f;
    }
    uint32_t pattern;
    std::memcpy(&pattern, &value, sizeof pattern);
    rows[i] = static_cast<uint16_t>(pattern >> 16);
  }
  const uint64_t page_bytes = kHeaderBytes + (stored + 63) / 64 * 64;
  auto* encoded = static_cast<uint8_t*>(std::aligned_alloc(64, page_bytes));
  const std::vector<uint8_t> header(kHeaderBytes, 0);
  const kvc_stream stream{kHeads, kHeadSize, kHeads, 0, 0, 0, int64_t{kHeadSize} * 2,
                          int64_t{kHeads} * kHeadSize * 2};
  const kvc_section section{KVC_KIND_INT, static_cast<uint8_t>(bits), static_cast<uint8_t>(options),
                            0, group, kHeaderBytes, stored, 96};
  const kvc_plan plan{KVC_ABI_VERSION, KVC_BF16, kTokens, 1, 1, 1, kHeaderBytes, 64, 8, 0,
                      page_bytes, header.data(), &stream, &section};
  const uint8_t key[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  kvc_page page{encoded, page_bytes, key, {reinterpret_cast<uint8_t*>(rows)}, 0, 0, 0};

  kvc_pool* pool = kvc_pool_create(1);
  if (pool == nullptr || run(pool, KVC_ENCODE, plan, &page) != KVC_OK) return 1;
  for (int i = std::atoi(argv[5]); i > 0; --i) {
    if (run(pool, encode ? KVC_ENCODE : KVC_DECODE, plan, &page) != KVC_OK) return 1;
  }
  kvc_pool_destroy(pool);
  std::printf("%s %zu\n", kvc_current_isa(), kElements);
  return 0;
}
