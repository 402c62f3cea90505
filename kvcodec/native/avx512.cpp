// Kernels for processors with AVX-512 F, BW, VL and DQ.
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Everything that could define an inline function is included before the target region: such a
// function compiled for AVX-512 might become the one copy that the linker keeps for everybody.
#include <immintrin.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "ecq.h"
#include "fp8.h"
#include "kvcodec.h"
#include "lossless.h"
#include "numerics.h"
#include "transformed.h"
#include "x86_rows.h"
#include "x86_token.h"

#if defined(__clang__)
#pragma clang attribute push(                                                         \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#endif

#define XXH_INLINE_ALL
#define XXH_VECTOR 3  // XXH_AVX512
#include "xxhash.h"

namespace kvc {
namespace {

#include "avx512_token.h"
#include "avx512_pack.h"
#include "avx512_unpack.h"
#include "avx512_lanes.h"
#include "x86_channel.h"
#include "x86_raw.h"
#include "x86_choose.h"
#include "fp8_avx512.h"

uint64_t encode_section(const SectionCodec& codec, const Rows& rows, const Rows* next,
                        uint8_t* out) {
  if (codec.kind == KVC_KIND_RAW) {
    encode_raw(codec, rows, next, out);
    return 0;
  }
  if (fp8_covers(codec)) {
    return codec.dtype == KVC_BF16 ? encode_fp8_rows<Bf16>(codec, rows, next, out)
                                   : encode_fp8_rows<Fp16>(codec, rows, next, out);
  }
  if (is_transformed(codec)) return encode_transformed_avx512(codec, rows, next, out);
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
  if (fp8_covers(codec)) {
    return codec.dtype == KVC_BF16 ? decode_fp8_elements<Bf16>(codec, in, rows)
                                   : decode_fp8_elements<Fp16>(codec, in, rows);
  }
  if (is_transformed(codec)) return decode_transformed_avx512(codec, in, rows);
  if (TokenShape::covers(codec, rows)) {
    const bool stream = rows_aligned(rows, rows.head_size * 2, 64);
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
    case KVC_KIND_ECQ:
      return encode_ecq_avx512(codec, rows, next, rotary, scratch, out);
    case KVC_KIND_LOSSLESS:
      return encode_lossless_avx512(codec, rows, scratch, out);
    case KVC_KIND_BLOCK:
      return encode_block_avx512(codec, rows, out);
    default:
      return kScalarKernels.encode_coded(codec, rows, next, rotary, scratch, out);
  }
}

bool decode_coded(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                  const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  switch (codec.kind) {
    case KVC_KIND_ECQ:
      return decode_ecq_avx512(codec, in, stored_bytes, rows, rotary, scratch);
    case KVC_KIND_LOSSLESS:
      return decode_lossless_avx512(codec, in, stored_bytes, rows, scratch);
    case KVC_KIND_BLOCK:
      return decode_block_avx512(codec, in, stored_bytes, rows);
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

const Kernels* avx512_kernels() {
  // Coded sections need VBMI and VBMI2, which the first processors with AVX-512 lack.
  const bool vbmi = __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("bmi2");
  const Kernels& others = avx2_kernels() != nullptr ? *avx2_kernels() : kScalarKernels;
  static const Kernels kernels = {"avx512",
                                  encode_section,
                                  decode_section,
                                  copy_out,
                                  checksum,
                                  vbmi ? encode_coded : others.encode_coded,
                                  vbmi ? decode_coded : others.decode_coded};
  const bool available = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return available ? &kernels : nullptr;
}

}  // namespace kvc

#else

namespace kvc {

const Kernels* avx512_kernels() { return nullptr; }

}  // namespace kvc

#endif
