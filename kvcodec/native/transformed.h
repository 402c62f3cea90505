// Int sections whose rows are derotated or went through a Hadamard transform: proto/FORMAT.md 3.12.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace kvc {

constexpr uint32_t kMaxDerotatedSize = 256;
constexpr uint32_t kMaxHadamardSize = 4096;

// The portable way; these do not touch the padding of a section.
uint64_t encode_transformed(const SectionCodec&, const Rows&, uint8_t* out);
void decode_transformed(const SectionCodec&, const uint8_t* in, const Rows&);
#if defined(__x86_64__)
// Whole sections, of any shape.
uint64_t encode_transformed_avx512(const SectionCodec&, const Rows&, const Rows* next, uint8_t* out);
void decode_transformed_avx512(const SectionCodec&, const uint8_t* in, const Rows&);
#endif

}  // namespace kvc
