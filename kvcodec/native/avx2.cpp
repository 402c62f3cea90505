// Kernels for processors with AVX2, FMA and F16C.
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Everything that could define an inline function is included before the target region: such a
// function compiled for AVX2 might become the one copy that the linker keeps for everybody.
#include <cpuid.h>
#include <immintrin.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "kvcodec.h"
#include "ecq.h"
#include "lossless.h"
#include "numerics.h"
#include "x86_rows.h"
#include "x86_token.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#define XXH_INLINE_ALL
#define XXH_VECTOR 2  // XXH_AVX2
#include "xxhash.h"

namespace kvc {
namespace {

#include "avx2_token.h"
#include "avx2_pack.h"
#include "avx2_unpack.h"
#include "avx2_lanes.h"
#include "x86_channel.h"
#include "x86_raw.h"
#include "x86_choose.h"

uint64_t encode_section(const SectionCodec& codec, const Rows& rows, const Rows* next,
                        uint8_t* out) {
  if (codec.kind == KVC_KIND_RAW) {
    encode_raw(codec, rows, next, out);
    return 0;
  }
  if (TokenShape::covers(codec, rows)) {
    const ChooseTokenEncoder choose{TokenShape(codec, rows).halves};
    return encode_token_rows(with_codec(codec, choose), codec, rows, next, out);
  }
  if (ChannelShape::covers(codec, rows))
    return with_codec(codec, ChooseChannelEncoder{})(codec, rows, next, out);
  return kScalarKernels.encode_section(codec, rows, next, out);
}

void decode_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (codec.kind == KVC_KIND_RAW) return decode_raw(codec, in, rows);
  if (TokenShape::covers(codec, rows)) {
    const bool stream = rows_aligned(rows, rows.head_size * 2, 32);
    const ChooseTokenDecoder choose{TokenShape(codec, rows).halves, stream};
    decode_token_rows(with_codec(codec, choose), codec, in, rows);
    if (stream) _mm_sfence();
    return;
  }
  if (ChannelShape::covers(codec, rows)) {
    return with_codec(codec, ChooseChannelDecoder{rows_aligned(rows, rows.head_size * 2, 64)})(
        codec, in, rows);
  }
  kScalarKernels.decode_section(codec, in, rows);
}

uint64_t checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

size_t encode_coded(const SectionCodec& codec, const Rows& rows, const Rows* next,
                    const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
  switch (codec.kind) {
    case KVC_KIND_BLOCK:
      return encode_block_avx2(codec, rows, out);
    default:
      return kScalarKernels.encode_coded(codec, rows, next, rotary, scratch, out);
  }
}

bool decode_coded(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                  const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  switch (codec.kind) {
    case KVC_KIND_LOSSLESS:
      return decode_lossless_avx2(codec, in, stored_bytes, rows, scratch);
    case KVC_KIND_ECQ:
      return decode_ecq_avx2(codec, in, stored_bytes, rows, rotary, scratch);
    case KVC_KIND_BLOCK:
      return decode_block_avx2(codec, in, stored_bytes, rows);
    default:
      return kScalarKernels.decode_coded(codec, in, stored_bytes, rows, rotary, scratch);
  }
}

}  // namespace
}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace kvc {
namespace {

// __builtin_cpu_supports() of older compilers does not know it. AVX2 says already that the system
// saves the registers.
bool has_f16c() {
  unsigned int a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2",   encode_section, decode_section, copy_out,
                                  checksum, encode_coded,   decode_coded};
  const bool available = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                         has_f16c();
  return available ? &kernels : nullptr;
}

}  // namespace kvc

#else

namespace kvc {

const Kernels* avx2_kernels() { return nullptr; }

}  // namespace kvc

#endif
