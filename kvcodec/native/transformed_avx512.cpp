// Transformed int sections for processors with AVX-512 F, BW, VL and DQ.
#include "transformed.h"

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

#include "numerics.h"
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

namespace kvc {
namespace {

#include "avx512_token.h"
#include "avx512_unpack.h"
#include "wide_avx512.h"
#include "derotated_avx512.h"
#include "hadamard_avx512.h"

using Encode = uint64_t (*)(const SectionCodec&, const Rows&, const Rows*, uint8_t*);
using Decode = void (*)(const SectionCodec&, const uint8_t*, const Rows&);

struct Choice {
  Encode encode;
  Decode decode;
};

template <typename Element, uint32_t kBits>
Choice choose_shape(const SectionCodec& codec, const Rows& rows) {
  if (!codec.hadamard)
    return {encode_derotated<Element, kBits>, decode_derotated<Element, kBits>};
  switch (rows.head_size) {
    case 64:
      return {encode_hadamard_rows<Element, kBits, 4>, decode_hadamard_rows<Element, kBits, 4>};
    case 128:
      return {encode_hadamard_rows<Element, kBits, 8>, decode_hadamard_rows<Element, kBits, 8>};
    case 256:
      return {encode_hadamard_rows<Element, kBits, 16>, decode_hadamard_rows<Element, kBits, 16>};
    default:
      return {encode_hadamard_rows<Element, kBits, 32>, decode_hadamard_rows<Element, kBits, 32>};
  }
}

template <typename Element>
Choice choose_bits(const SectionCodec& codec, const Rows& rows) {
  if (codec.bits == 8) return choose_shape<Element, 8>(codec, rows);
  if (codec.bits == 4) return choose_shape<Element, 4>(codec, rows);
  return choose_shape<Element, 2>(codec, rows);
}

bool covers(const SectionCodec& codec, const Rows& rows) {
  return codec.hadamard ? HadamardShape::covers(codec, rows) : DerotatedShape::covers(codec, rows);
}

Choice choose(const SectionCodec& codec, const Rows& rows) {
  return codec.dtype == KVC_BF16 ? choose_bits<Bf16>(codec, rows) : choose_bits<Fp16>(codec, rows);
}

}  // namespace

uint64_t encode_transformed_avx512(const SectionCodec& codec, const Rows& rows, const Rows* next,
                                   uint8_t* out) {
  if (!covers(codec, rows)) return kScalarKernels.encode_section(codec, rows, next, out);
  return choose(codec, rows).encode(codec, rows, next, out);
}

void decode_transformed_avx512(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (!covers(codec, rows)) return kScalarKernels.decode_section(codec, in, rows);
  choose(codec, rows).decode(codec, in, rows);
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
