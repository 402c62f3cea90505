// Kernels for processors with AVX-512 F, BW, VL and DQ.
#include "kernels.h"

#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// Everything that could define an inline function is included before the target region: such a function compiled for
// AVX-512 might become the one copy that the linker keeps for everybody.
#include <immintrin.h>
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "kvcodec.h"
#include "numerics.h"
#include "x86_rows.h"
#include "x86_token.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), \
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

template <typename Element, uint32_t kBits, bool kAsymmetric>
TokenEncoder token_encoder(bool halves) {
  using Extremes = typename std::conditional<kAsymmetric, SmallestLargest, Magnitude>::type;
  return {find_extremes<Extremes>, find_parameters<Element, kBits, kAsymmetric>,
          halves ? quantise_rows<Element, kBits, kAsymmetric, true>
                 : quantise_rows<Element, kBits, kAsymmetric, false>};
}

template <typename Element, uint32_t kBits, bool kAsymmetric>
TokenDecoder token_decoder(bool halves, bool stream) {
  if (halves) {
    return stream ? decode_rows<Element, kBits, kAsymmetric, true, true>
                  : decode_rows<Element, kBits, kAsymmetric, true, false>;
  }
  return stream ? decode_rows<Element, kBits, kAsymmetric, false, true>
                : decode_rows<Element, kBits, kAsymmetric, false, false>;
}

// Calls use.template call<Element, bits, asymmetric>() for the codec.
template <typename Element, uint32_t kBits, typename Use>
auto with_symmetry(const SectionCodec& codec, Use use) {
  return codec.asymmetric ? use.template call<Element, kBits, true>() : use.template call<Element, kBits, false>();
}

template <typename Element, typename Use>
auto with_bits(const SectionCodec& codec, Use use) {
  if (codec.bits == 8) return with_symmetry<Element, 8>(codec, use);
  if (codec.bits == 4) return with_symmetry<Element, 4>(codec, use);
  return with_symmetry<Element, 2>(codec, use);
}

template <typename Use>
auto with_codec(const SectionCodec& codec, Use use) {
  return codec.dtype == KVC_BF16 ? with_bits<Bf16>(codec, use) : with_bits<Fp16>(codec, use);
}

struct ChooseTokenEncoder {
  bool halves;
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  TokenEncoder call() const {
    return token_encoder<Element, kBits, kAsymmetric>(halves);
  }
};

struct ChooseTokenDecoder {
  bool halves;
  bool stream;
  template <typename Element, uint32_t kBits, bool kAsymmetric>
  TokenDecoder call() const {
    return token_decoder<Element, kBits, kAsymmetric>(halves, stream);
  }
};

uint64_t encode_section(const SectionCodec& codec, const Rows& rows, const Rows* next, uint8_t* out) {
  if (TokenShape::covers(codec, rows)) {
    const ChooseTokenEncoder choose{TokenShape(codec, rows).halves};
    return encode_token_rows(with_codec(codec, choose), codec, rows, next, out);
  }
  return kScalarKernels.encode_section(codec, rows, next, out);
}

void decode_section(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  if (TokenShape::covers(codec, rows)) {
    const bool stream = rows_aligned(rows, rows.head_size * 2, 64);
    const ChooseTokenDecoder choose{TokenShape(codec, rows).halves, stream};
    decode_token_rows(with_codec(codec, choose), codec, in, rows);
    if (stream) _mm_sfence();
    return;
  }
  kScalarKernels.decode_section(codec, in, rows);
}

void copy_out(uint8_t* target, const uint8_t* source, size_t bytes) {
  const size_t skew = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64;
  if (bytes < 256) {
    memcpy(target, source, bytes);
    return;
  }
  memcpy(target, source, skew);
  size_t i = skew;
  for (; i + 64 <= bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
  memcpy(target + i, source + i, bytes - i);
  _mm_sfence();
}

uint64_t checksum(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

}  // namespace
}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace kvc {

const Kernels* avx512_kernels() {
  static const Kernels kernels = {"avx512", encode_section, decode_section, copy_out, checksum};
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
