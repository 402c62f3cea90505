// Sections that give back every bit: block exponents (FORMAT.md 3.9) and coded exponents (3.8). The
// functions of all instruction sets give the same bytes and accept the same sections; what they
// take and return is that of kernels.h.
#pragma once

#include "kernels.h"

namespace kvc {

size_t encode_block_scalar(const SectionCodec& codec, const Rows& rows, uint8_t* out);
bool decode_block_scalar(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                         const Rows& rows);
size_t encode_lossless_scalar(const SectionCodec& codec, const Rows& rows, uint8_t* scratch,
                              uint8_t* out);
bool decode_lossless_scalar(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                            const Rows& rows, uint8_t* scratch);
#if defined(__x86_64__)
size_t encode_block_avx2(const SectionCodec& codec, const Rows& rows, uint8_t* out);
bool decode_block_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                       const Rows& rows);
bool decode_lossless_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                          const Rows& rows, uint8_t* scratch);
// These need VBMI and VBMI2 as well.
size_t encode_block_avx512(const SectionCodec& codec, const Rows& rows, uint8_t* out);
bool decode_block_avx512(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                         const Rows& rows);
size_t encode_lossless_avx512(const SectionCodec& codec, const Rows& rows, uint8_t* scratch,
                              uint8_t* out);
bool decode_lossless_avx512(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                            const Rows& rows, uint8_t* scratch);
#endif

}  // namespace kvc
