#include "benchmark.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t kMaxThreads = 64;
// Bytes of the longer side in one step: short, so that both sides stay busy as in a codec.
constexpr uint64_t kStepBytes = 4096;
constexpr uint64_t kLineBytes = 64;

// Where a result goes that nobody looks at, so that reading is not optimized away.
std::atomic<uint64_t> g_sink{0};

uint64_t now_ns(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

// The traffic of one range, cut into steps in which both sides move in proportion.
struct Steps {
  explicit Steps(const kvc_bench_range& whole) : range(whole) {
    const uint64_t longest =
        range.read_bytes > range.write_bytes ? range.read_bytes : range.write_bytes;
    count = (longest + kStepBytes - 1) / kStepBytes;
  }

  bool next() {
    source = range.source + read_bytes_before;
    target = range.target + write_bytes_before;
    if (done == count) return false;
    ++done;
    const uint64_t read_end = range.read_bytes / kLineBytes * done / count * kLineBytes;
    const uint64_t write_end = range.write_bytes / kLineBytes * done / count * kLineBytes;
    read_bytes = read_end - read_bytes_before;
    write_bytes = write_end - write_bytes_before;
    read_bytes_before = read_end;
    write_bytes_before = write_end;
    return true;
  }

  const kvc_bench_range& range;
  const uint8_t* source = nullptr;
  uint8_t* target = nullptr;
  uint64_t read_bytes = 0, write_bytes = 0;

 private:
  uint64_t count = 0, done = 0;
  uint64_t read_bytes_before = 0, write_bytes_before = 0;
};

#if defined(__x86_64__)

#define KVC_AVX512 __attribute__((target("avx512f")))
#define KVC_AVX2 __attribute__((target("avx2")))

KVC_AVX512 inline void read_avx512(const uint8_t* source, uint64_t bytes, __m512i (&sums)[4]) {
  __m512i a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  for (; bytes >= 4 * kLineBytes; bytes -= 4 * kLineBytes, source += 4 * kLineBytes) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(source));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(source + kLineBytes));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(source + 2 * kLineBytes));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(source + 3 * kLineBytes));
  }
  for (; bytes; bytes -= kLineBytes, source += kLineBytes) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(source));
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

KVC_AVX512 inline void write_avx512(uint8_t* target, uint64_t bytes, __m512i value) {
  for (; bytes; bytes -= kLineBytes, target += kLineBytes) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), value);
  }
}

KVC_AVX512 void stream_avx512(const kvc_bench_range& range) {
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(),
                     _mm512_setzero_si512()};
  for (Steps steps(range); steps.next();) {
    read_avx512(steps.source, steps.read_bytes, sums);
    write_avx512(steps.target, steps.write_bytes, sums[0]);
  }
  _mm_sfence();
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, _mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]),
                                             _mm512_xor_si512(sums[2], sums[3])));
  g_sink.store(words[0], std::memory_order_relaxed);
}

KVC_AVX2 inline void read_avx2(const uint8_t* source, uint64_t bytes, __m256i (&sums)[4]) {
  __m256i a = sums[0], b = sums[1], c = sums[2], d = sums[3];
  const auto* at = reinterpret_cast<const __m256i*>(source);
  for (; bytes >= 2 * kLineBytes; bytes -= 2 * kLineBytes, at += 4) {
    a = _mm256_xor_si256(a, _mm256_loadu_si256(at));
    b = _mm256_xor_si256(b, _mm256_loadu_si256(at + 1));
    c = _mm256_xor_si256(c, _mm256_loadu_si256(at + 2));
    d = _mm256_xor_si256(d, _mm256_loadu_si256(at + 3));
  }
  if (bytes) {
    a = _mm256_xor_si256(a, _mm256_loadu_si256(at));
    b = _mm256_xor_si256(b, _mm256_loadu_si256(at + 1));
  }
  sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
}

KVC_AVX2 inline void write_avx2(uint8_t* target, uint64_t bytes, __m256i value) {
  auto* at = reinterpret_cast<__m256i*>(target);
  for (; bytes; bytes -= kLineBytes, at += 2) {
    _mm256_stream_si256(at, value);
    _mm256_stream_si256(at + 1, value);
  }
}

KVC_AVX2 void stream_avx2(const kvc_bench_range& range) {
  __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                     _mm256_setzero_si256()};
  for (Steps steps(range); steps.next();) {
    read_avx2(steps.source, steps.read_bytes, sums);
    write_avx2(steps.target, steps.write_bytes, sums[0]);
  }
  _mm_sfence();
  alignas(32) uint64_t words[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words),
                     _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]),
                                      _mm256_xor_si256(sums[2], sums[3])));
  g_sink.store(words[0], std::memory_order_relaxed);
}

#endif

void stream_portable(const kvc_bench_range& range) {
  uint64_t sums[8] = {};
  for (Steps steps(range); steps.next();) {
    for (uint64_t at = 0; at < steps.read_bytes; at += kLineBytes) {
      uint64_t words[8];
      std::memcpy(words, steps.source + at, sizeof words);
      for (int lane = 0; lane < 8; ++lane) sums[lane] ^= words[lane];
    }
    for (uint64_t at = 0; at < steps.write_bytes; at += kLineBytes) {
      std::memcpy(steps.target + at, sums, sizeof sums);
    }
  }
  g_sink.store(sums[0], std::memory_order_relaxed);
}

struct Stream {
  const char* name;
  void (*run)(const kvc_bench_range&);
};

Stream best_stream() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {"avx512", stream_avx512};
  if (__builtin_cpu_supports("avx2")) return {"avx2", stream_avx2};
#endif
  return {"portable", stream_portable};
}

void copy(const kvc_bench_range& range) {
  std::memcpy(range.target, range.source, range.read_bytes);
}

bool is_usable(int kind, const kvc_bench_range& range) {
  if (!range.source || !range.target) return false;
  if (kind == KVC_BENCH_MEMCPY) return range.read_bytes == range.write_bytes;
  const uint64_t all = reinterpret_cast<uintptr_t>(range.source) | range.read_bytes |
                       reinterpret_cast<uintptr_t>(range.target) | range.write_bytes;
  return all % kLineBytes == 0;
}

// What the threads of one run share. They start together, so that none works alone at first.
struct Run {
  void (*move)(const kvc_bench_range&);
  const kvc_bench_range* ranges;
  size_t count;
  std::atomic<size_t> next{0};
  std::atomic<uint32_t> missing;
  std::atomic<bool> abandoned{false};
  std::atomic<uint64_t> cpu_ns{0};

  void work() {
    missing.fetch_sub(1);
    while (missing.load() != 0) {
      if (abandoned.load()) return;
    }
    const uint64_t begin = now_ns(CLOCK_THREAD_CPUTIME_ID);
    for (size_t at; (at = next.fetch_add(1)) < count;) move(ranges[at]);
    cpu_ns.fetch_add(now_ns(CLOCK_THREAD_CPUTIME_ID) - begin);
  }
};

}  // namespace

const char* kvc_bench_stream_isa(void) { return best_stream().name; }

int kvc_bench_run(int kind, const kvc_bench_range* ranges, size_t count, uint32_t threads,
                  kvc_bench_time* time) {
  if (!ranges || !time || threads < 1 || threads > kMaxThreads) return KVC_BAD_ARGUMENT;
  if (kind != KVC_BENCH_MEMCPY && kind != KVC_BENCH_STREAM) return KVC_BAD_ARGUMENT;
  for (size_t at = 0; at < count; ++at) {
    if (!is_usable(kind, ranges[at])) return KVC_BAD_ARGUMENT;
  }
  Run run{};
  run.move = kind == KVC_BENCH_MEMCPY ? copy : best_stream().run;
  run.ranges = ranges;
  run.count = count;
  run.missing = threads;
  std::vector<std::thread> helpers;
  bool started = true;
  try {
    helpers.reserve(threads - 1);
    while (helpers.size() + 1 < threads) helpers.emplace_back([&run] { run.work(); });
  } catch (const std::exception&) {
    started = false;
    run.abandoned = true;
  }
  uint64_t begin = 0;
  if (started) {
    while (run.missing.load() != 1) {
    }
    begin = now_ns(CLOCK_MONOTONIC);
    run.work();
  }
  for (std::thread& helper : helpers) helper.join();
  if (!started) return KVC_NO_MEMORY;
  time->wall_ns = now_ns(CLOCK_MONOTONIC) - begin;
  time->cpu_ns = run.cpu_ns;
  return KVC_DONE;
}
