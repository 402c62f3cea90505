// Kind ecq for processors with AVX2: decoding.
#include "ecq.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Before the target region: see avx2.cpp.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kvcodec.h"
#include "x86_rows.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c,bmi,bmi2,popcnt")
#endif

namespace kvc {
namespace {

#include "coded_avx2.h"

#include "ecq_avx2.h"
#include "ecq_rows.h"

}  // namespace

bool decode_ecq_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                     const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  EcqWork& work = *reinterpret_cast<EcqWork*>(scratch);
  return decode_section<Bf16Eight, Fp16Eight, Fp32Eight>(codec, in, stored_bytes, rows, rotary,
                                                         work);
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
