/* libkvcodec: quantize and dequantize KV-cache pages straight from and into strided memory.
 *
 * The library knows sections, rows and kernels. It does not know the page header: a caller hands it a finished
 * header as a template, and the library fills in section checksums and the header checksum (encode) or
 * compares a page's header with the template (decode). Numerics and section layout: proto/FORMAT.md, section 3.
 *
 * Rules for callers:
 *  - The memory of a page that failed to decode may have been written in part, except after KVC_HEADER_DIFFERS,
 *    KVC_BAD_HEADER_CHECKSUM and KVC_BAD_LENGTH.
 *  - Structures are versioned by KVC_ABI_VERSION; check kvc_abi_version() once.
 *  - A submitted batch borrows plan, pages, buffers, the rotary table and host memory until kvc_batch_wait() returned KVC_DONE and
 *    kvc_batch_free() was called. Nothing is copied but the structures themselves.
 *  - No function throws, prints, or calls back. All functions are thread-safe; a batch belongs to one thread.
 *  - After fork() a pool of the parent starts its own workers again at its first use in the child.
 */
#ifndef KVCODEC_H
#define KVCODEC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The library is built with hidden visibility; only what is declared here leaves it. */
#if defined(__GNUC__)
#define KVC_EXPORT __attribute__((visibility("default")))
#else
#define KVC_EXPORT
#endif

#define KVC_ABI_VERSION 2u
#define KVC_MAX_STREAMS 4u

/* Element types, section kinds and options: the values of the page format. */
enum { KVC_BF16 = 1, KVC_FP16 = 2, KVC_FP32 = 3, KVC_FP8_E4M3 = 4, KVC_FP8_E5M2 = 5, KVC_U8 = 6 };
enum {
  KVC_KIND_RAW = 0,
  KVC_KIND_INT = 1,
  KVC_KIND_ECQ = 2,      /* 2 to 4 are coded: how long a section is depends on the data */
  KVC_KIND_LOSSLESS = 3,
  KVC_KIND_BLOCK = 4,
  KVC_KIND_FP8 = 5       /* e4m3fn without scales; bits 8, no options, no groups */
};
enum {
  KVC_OPTION_ASYMMETRIC = 1,
  KVC_OPTION_CHANNEL = 2,
  /* Of int sections, one of them at most (proto/FORMAT.md, 3.12). */
  KVC_OPTION_DEROTATED = 4, /* per channel; the plan has rotary pairs, the stream is rotated and holds them all */
  KVC_OPTION_HADAMARD = 8   /* per token, head_size a power of two */
};

/* Result of one page. */
enum {
  KVC_OK = 0,
  KVC_HEADER_DIFFERS = 1,      /* decode: the header is not the template; parse it and come back with its own plan */
  KVC_BAD_HEADER_CHECKSUM = 2,
  KVC_BAD_SECTION_CHECKSUM = 3, /* kvc_page.section tells which */
  KVC_BAD_LENGTH = 4,          /* encoded_bytes is not what the plan says */
  KVC_BAD_PADDING = 5,         /* a padding byte of a section is not zero */
  KVC_CANCELLED = 6,           /* the batch was cancelled before this page was done */
  KVC_OUT_OF_MEMORY = 7,       /* a worker found no memory for a section */
  KVC_BAD_STREAM = 8           /* decode: the sizes or the stream of a coded section contradict themselves */
};

/* Result of a call. */
enum { KVC_DONE = 0, KVC_PENDING = 1, KVC_BAD_ARGUMENT = -1, KVC_NO_MEMORY = -2, KVC_UNKNOWN_ISA = -3 };

enum { KVC_ENCODE = 0, KVC_DECODE = 1, KVC_VERIFY = 2 /* decode without writing: host memory is not touched */ };

/* One stream of the layout, and how its rows lie in host memory. Strides are in bytes and may be negative. */
typedef struct kvc_stream {
  uint32_t head_count;
  uint32_t head_size;    /* elements of a row; they are contiguous */
  uint32_t group_heads;  /* heads per head group; head_count or more: one group */
  uint32_t is_rotated;   /* 1: its rows hold the rotary pairs of the plan; else 0 */
  int64_t layer_stride;
  int64_t group_stride;
  int64_t head_stride;
  int64_t token_stride;
} kvc_stream;

/* One section, in canonical order (layer outer, stream inner). */
typedef struct kvc_section {
  uint8_t kind;
  uint8_t bits;
  uint8_t options;
  uint8_t reserved;        /* zero */
  uint32_t group_size;
  uint64_t offset;         /* from the start of the page, multiple of 64; if sections before it are coded: at most */
  uint64_t stored_bytes;   /* coded: at most, which is what it takes raw */
  uint64_t checksum_offset; /* where in the header its 8-byte checksum lies */
  uint64_t size_offset;    /* coded: where in the header its 4-byte stored_bytes lies; else 0 */
} kvc_section;

/* Rotary pairs of the keys of a page, for codecs that take the rotation out (proto/FORMAT.md, 3.7). */
typedef struct kvc_rotary {
  uint32_t size;         /* rotated elements of a row: even */
  uint32_t interleaved;  /* 0: element i is paired with i + size/2; 1: 2i with 2i + 1 */
  const float* table;    /* token_count x size/2 x (cosine, sine) */
} kvc_rotary;

/* Everything the pages of a batch have in common. */
typedef struct kvc_plan {
  uint32_t abi_version;    /* KVC_ABI_VERSION */
  uint32_t dtype;
  uint32_t token_count;
  uint32_t layer_count;
  uint32_t stream_count;
  uint32_t section_count;  /* layer_count * stream_count */
  uint32_t header_bytes;   /* multiple of 64; the header checksum is its last 8 bytes */
  uint32_t key_offset;     /* where in the header the key lies */
  uint32_t key_bytes;
  uint32_t size_offset;    /* a section is coded: where in the header the 8-byte page_bytes lies; else 0 */
  uint64_t page_bytes;     /* a section is coded: at most */
  const uint8_t* header;   /* header_bytes bytes: key, checksums, and the sizes of what is coded as zeros */
  const kvc_stream* streams;
  const kvc_section* sections;
  const kvc_rotary* rotary; /* NULL: unknown */
} kvc_plan;

/* One page of a batch. */
typedef struct kvc_page {
  uint8_t* encoded;         /* encode: written; decode: read. 64-byte alignment is faster, not required */
  uint64_t encoded_bytes;   /* encode: capacity, afterwards length; decode: length */
  const uint8_t* key;       /* key_bytes bytes */
  uint8_t* base[KVC_MAX_STREAMS]; /* address of row (layer 0, head 0, token 0) of each stream */
  int32_t status;           /* out */
  uint32_t section;         /* out: first failing section */
  uint64_t nonfinite_groups; /* out, encode: groups outside the codec's domain (they decode to NaN); of fp8, rows with
                                a NaN or with a number beyond 464, which saturates */
} kvc_page;

typedef struct kvc_pool kvc_pool;
typedef struct kvc_batch kvc_batch;

KVC_EXPORT uint32_t kvc_abi_version(void);

/* Names of the instruction sets this library can use here, best first, comma separated; static storage. */
KVC_EXPORT const char* kvc_available_isas(void);
/* The one in use. KVCODEC_FORCE_ISA is read at the first call; an unknown or unavailable name gives "". */
KVC_EXPORT const char* kvc_current_isa(void);
/* Use another one from now on: KVC_DONE or KVC_UNKNOWN_ISA. For tests and benchmarks. */
KVC_EXPORT int kvc_set_isa(const char* name);

/* XXH3-64, seed 0. */
KVC_EXPORT uint64_t kvc_checksum(const void* data, size_t bytes);

/* Exact stored bytes of one section, for a coded one the most it may take; 0 if the combination is not valid. */
KVC_EXPORT uint64_t kvc_section_bytes(uint32_t dtype, uint32_t head_count, uint32_t token_count, uint32_t head_size,
                                      uint32_t kind, uint32_t bits, uint32_t options, uint32_t group_size);

/* A pool of at most `threads` workers (1-64), started at first use. NULL: no memory or bad number. */
KVC_EXPORT kvc_pool* kvc_pool_create(uint32_t threads);
/* Waits for running batches, ends the workers. Nobody may submit meanwhile; batches may be freed afterwards. */
KVC_EXPORT void kvc_pool_destroy(kvc_pool* pool);

/* Hands a batch to the workers and returns at once; batches are begun in the order of their arrival.
 * KVC_DONE; KVC_BAD_ARGUMENT: the plan contradicts itself, a pointer is NULL, or the forced instruction set is not there;
 * KVC_NO_MEMORY: neither memory nor a single thread. */
KVC_EXPORT int kvc_submit(kvc_pool* pool, int operation, const kvc_plan* plan, kvc_page* pages, size_t page_count,
                          kvc_batch** batch);
/* KVC_DONE when every page has its status, KVC_PENDING after timeout_us microseconds (0: just look).
 * KVC_BAD_ARGUMENT in a forked child, for a batch that the parent had not finished: nobody works on it there. */
KVC_EXPORT int kvc_batch_wait(kvc_batch* batch, uint64_t timeout_us);
/* Pages not begun yet end as KVC_CANCELLED; wait afterwards as usual. */
KVC_EXPORT void kvc_batch_cancel(kvc_batch* batch);
/* Waits for the batch if it still runs, unless that happens in another process (see kvc_batch_wait). */
KVC_EXPORT void kvc_batch_free(kvc_batch* batch);

#ifdef __cplusplus
}
#endif
#endif
