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

}  // namespace

bool decode_ecq_avx2(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                     const Rows& rows, const kvc_rotary* rotary, uint8_t* scratch) {
  CodedParts parts;
  const bool derotatable = can_derotate(codec, rows, rotary);
  if (!open_coded(in, stored_bytes, tile_count(rows), 0, derotatable ? kFlagDerotated : 0, &parts))
    return false;
  EcqWork& work = *reinterpret_cast<EcqWork*>(scratch);
  EcqSection section{codec, rows, parts.flags & kFlagDerotated ? rotary : nullptr, {}};
  const uint8_t* stream = parts.streams;
  uint64_t index = 0;
  for (TileWalk walk(rows); !walk.ended(); walk.advance(), ++index) {
    const Tile& tile = walk.tile();
    const TileEntry entry = parts.entry(index);
    section.order.arrange(codec.channel ? tile.channels : tile.tokens, section.rotary);
    if (!read_tile(section, tile, entry, stream, work)) return false;
    stream += entry.stream_bytes;
    if (rows.base == nullptr) continue;
    switch (codec.dtype) {
      case KVC_BF16:
        store_tile<Bf16Eight>(section, tile, work);
        break;
      case KVC_FP16:
        store_tile<Fp16Eight>(section, tile, work);
        break;
      default:
        store_tile<Fp32Eight>(section, tile, work);
    }
  }
  return true;
}

}  // namespace kvc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
