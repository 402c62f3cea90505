// From the streams of an ecq section to rows, tile by tile. Included by the files of instruction sets
// that read one tile at a time, inside their target regions and namespaces, after their read_tile()
// and store_tile<Element>().

// Decodes into elements of one of these three types. False: damage.
template <typename Bf16Element, typename Fp16Element, typename Fp32Element, typename Work>
bool decode_section(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                    const Rows& rows, const kvc_rotary* rotary, Work& work) {
  CodedParts parts;
  const bool derotatable = can_derotate(codec, rows, rotary);
  if (!open_coded(in, stored_bytes, tile_count(rows), 0, derotatable ? kFlagDerotated : 0, &parts))
    return false;
  EcqSection section{codec, rows, parts.flags & kFlagDerotated ? rotary : nullptr, {}};
  const uint8_t* stream = parts.streams;
  uint64_t index = 0;
  for (TileWalk walk(rows); !walk.ended(); walk.advance(), ++index) {
    const Tile& tile = walk.tile();
    const TileEntry entry = parts.entry(index);
    section.order.arrange(section.lines(tile), section.rotary);
    if (!read_tile(section, tile, entry, stream, work)) return false;
    stream += entry.stream_bytes;
    if (rows.base == nullptr) continue;
    switch (codec.dtype) {
      case KVC_BF16:
        store_tile<Bf16Element>(section, tile, entry, work);
        break;
      case KVC_FP16:
        store_tile<Fp16Element>(section, tile, entry, work);
        break;
      default:
        store_tile<Fp32Element>(section, tile, entry, work);
    }
  }
  return true;
}
