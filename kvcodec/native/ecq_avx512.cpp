// Sections of kind ecq for processors with AVX-512 F, BW, VL, DQ, VBMI and VBMI2.
#include "ecq.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Everything that could define an inline function is included before the target region: such a
// function compiled for AVX-512 might become the one copy that the linker keeps for everybody.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ecq_choice.h"
#include "x86_rows.h"
#include "x86_token.h"

#if defined(__clang__)
#pragma clang attribute push(                                                     \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2," \
                          "avx2,fma,f16c,bmi,bmi2,popcnt"))),                          \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2")
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,popcnt")
#endif

namespace kvc {
namespace {

#include "avx512_token.h"
#include "coded_avx512.h"
#include "turn_avx512.h"
#include "ecq_avx512.h"
#include "coded_avx512_writer.h"
#include "ecq_avx512_search.h"
#include "ecq_avx512_measure.h"
#include "ecq_avx512_derotation.h"
#include "ecq_avx512_quantize.h"
#include "ecq_avx512_encode.h"

}  // namespace

size_t encode_ecq_avx512(const SectionCodec& codec, const Rows& rows, const Rows* next,
                         const kvc_rotary* rotary, uint8_t* scratch, uint8_t* out) {
  return encode_ecq_section(codec, rows, next, rotary, scratch, out);
}

bool decode_ecq_avx512(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                       const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  return decode_ecq_section(codec, in, stored_bytes, rows, rotary, scratch);
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
