/* What the codec is measured against: moving bytes without doing anything to them.
 *
 * No part of the ABI: these functions serve `kvcodec bench` and may change in any release.
 */
#ifndef KVCODEC_BENCHMARK_H
#define KVCODEC_BENCHMARK_H

#include <stddef.h>
#include <stdint.h>

#include "kvcodec.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  KVC_BENCH_MEMCPY = 0, /* the C library's memcpy of read_bytes; write_bytes must be the same */
  KVC_BENCH_STREAM = 1  /* read read_bytes and write write_bytes past the caches, both evenly */
};

/* The traffic of one page. Addresses and sizes of a stream are multiples of 64. */
typedef struct kvc_bench_range {
  const uint8_t* source;
  uint64_t read_bytes;
  uint8_t* target;
  uint64_t write_bytes;
} kvc_bench_range;

typedef struct kvc_bench_time {
  uint64_t wall_ns; /* from the moment every thread is ready to the end of the last one */
  uint64_t cpu_ns;  /* CPU time of all threads together */
} kvc_bench_time;

/* Runs the ranges on `threads` threads (1-64), each taking the next range that is left.
 * KVC_DONE, KVC_BAD_ARGUMENT or KVC_NO_MEMORY (no thread). */
KVC_EXPORT int kvc_bench_run(int kind, const kvc_bench_range* ranges, size_t count,
                             uint32_t threads, kvc_bench_time* time);

/* Instruction set of the stream: "avx512", "avx2" or "portable"; the last has ordinary stores. */
KVC_EXPORT const char* kvc_bench_stream_isa(void);

#ifdef __cplusplus
}
#endif
#endif
