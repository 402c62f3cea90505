// What one instruction set offers to the batch engine. One table per ISA; all tables give the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kvcodec.h"

namespace kvc {

// The rows of one section in host memory; see kvc_stream.
struct Rows {
  uint8_t* base;  // row (head 0, token 0) of this layer and stream
  uint32_t head_count;
  uint32_t token_count;
  uint32_t head_size;
  uint32_t group_heads;
  int64_t group_stride;
  int64_t head_stride;
  int64_t token_stride;

  uint8_t* row(uint32_t head, uint32_t token) const {
    return base + (head / group_heads) * group_stride + (head % group_heads) * head_stride + token * token_stride;
  }
};

// How one section is encoded. `group_size` is resolved: 1 ... length of the grouped axis.
struct SectionCodec {
  uint8_t dtype;
  uint8_t kind;
  uint8_t bits;
  bool asymmetric;
  bool channel;
  uint32_t group_size;
  bool hadamard = false;
  const kvc_rotary* derotation = nullptr;  // of derotated rows
};

inline bool is_transformed(const SectionCodec& codec) {
  return codec.hadamard || codec.derotation != nullptr;
}

// Encodes one section: exactly stored_bytes, then zeros up to a multiple of 64. `out` is 64-byte aligned scratch or page
// memory of that padded size. `next`: the rows the same worker will encode afterwards (for prefetching; never written or
// relied on), or nullptr. Returns the number of groups outside the codec's domain.
using EncodeSection = uint64_t (*)(const SectionCodec&, const Rows&, const Rows* next, uint8_t* out);

// Decodes one verified section into its rows. `in` may be unaligned.
using DecodeSection = void (*)(const SectionCodec&, const uint8_t* in, const Rows&);

// Memory of a worker's own that a coded section may use, 64-byte aligned.
constexpr size_t kCodedScratchBytes = 512 * 1024;

// Encodes one coded section into `out` (64-byte aligned, as long as the raw section padded). `next` as in EncodeSection.
// Returns its stored_bytes, with the padding behind them zeroed, or 0 where it would not be smaller than raw or holds values
// outside the codec's domain.
using EncodeCoded = size_t (*)(const SectionCodec&, const Rows&, const Rows* next, const kvc_rotary*, uint8_t* scratch,
                               uint8_t* out);

// Decodes one coded section, which is not one stored raw. `in` may be unaligned; not a byte outside of `stored_bytes` is
// read, whatever they say. Without a base the rows are not written: the section is only looked through. False: damage.
using DecodeCoded = bool (*)(const SectionCodec&, const uint8_t* in, size_t stored_bytes, const Rows&,
                             const kvc_rotary*, uint8_t* scratch);

struct Kernels {
  const char* name;
  EncodeSection encode_section;
  DecodeSection decode_section;
  void (*copy_out)(uint8_t* target, const uint8_t* source, size_t bytes);  // scratch -> page, past the caches
  uint64_t (*checksum)(const void* data, size_t bytes);                    // XXH3-64
  EncodeCoded encode_coded;
  DecodeCoded decode_coded;
};

extern const Kernels kScalarKernels;
// nullptr where the compiler target or the processor lacks it.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// Sizes of section parts, shared by all ISAs (scalar.cpp). Bytes.
size_t parameter_bytes(const SectionCodec&, uint32_t head_count, uint32_t token_count, uint32_t head_size);
size_t code_bytes(const SectionCodec&, uint32_t head_count, uint32_t token_count, uint32_t head_size);
inline size_t pad64(size_t n) { return (n + 63) & ~size_t{63}; }
inline bool is_coded(uint8_t kind) { return kind >= KVC_KIND_ECQ && kind <= KVC_KIND_BLOCK; }

}  // namespace kvc
