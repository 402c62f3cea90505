// Sections of block exponents, proto/FORMAT.md 3.9: everything but the work on one block of 64
// elements. Included by the files of the instruction sets inside their target regions and
// namespaces, after `BlockWriter<Element>` and `BlockReader<Element>`.

// Where the parts of a section lie; bytes from its start.
struct BlockLayout {
  uint32_t blocks;  // of a row
  uint32_t tail;    // elements of the last block if it is shorter
  size_t row_planes;
  size_t low_bytes;
  size_t planes;
  size_t bases;
  size_t escapes;

  BlockLayout(const Rows& rows, uint32_t plane_count) {
    const size_t row_count = static_cast<size_t>(rows.head_count) * rows.token_count;
    blocks = (rows.head_size + kBlock - 1) / kBlock;
    tail = rows.head_size % kBlock;
    row_planes = size_t{plane_count} * ((rows.head_size + 7) / 8);
    low_bytes = pad64(kPreambleBytes + sizeof(uint32_t) * rows.head_count);
    planes = low_bytes + row_count * rows.head_size;
    bases = planes + row_count * row_planes;
    escapes = bases + row_count * blocks;
  }
};

// Fetches the rows that an encoder reads, some time before it does: token by token where
// `by_token`, else head by head.
class RowsFetcher {
 public:
  RowsFetcher(const Rows& rows, bool by_token)
      : rows_(&rows),
        row_bytes_(size_t{2} * rows.head_size),
        inner_count_(by_token ? rows.head_count : rows.token_count),
        outer_count_(by_token ? rows.token_count : rows.head_count),
        by_token_(by_token) {
    const size_t count = kAheadBytes / row_bytes_;
    outer_ = row_bytes_ > kAheadBytes ? outer_count_ : static_cast<uint32_t>(count / inner_count_);
    inner_ = static_cast<uint32_t>(count % inner_count_);
  }

  // One row more.
  KVC_INLINE void fetch() {
    if (outer_ >= outer_count_) return;
    const uint8_t* row = by_token_ ? rows_->row(inner_, outer_) : rows_->row(outer_, inner_);
    for (size_t at = 0; at < row_bytes_; at += 64) __builtin_prefetch(row + at, 0, 3);
    if (++inner_ < inner_count_) return;
    inner_ = 0;
    ++outer_;
  }

 private:
  const Rows* rows_;
  size_t row_bytes_;
  uint32_t inner_count_;
  uint32_t outer_count_;
  bool by_token_;
  uint32_t outer_;
  uint32_t inner_;
};

// Blocks of less than 64 elements take a way through memory.
template <typename Element>
KVC_OUTLINE uint8_t* encode_tail(const uint8_t* source, uint32_t count, uint8_t* low_bytes,
                                 uint8_t* planes, uint8_t* base, uint8_t* escapes) {
  alignas(64) uint8_t elements[2 * kBlock] = {};
  alignas(64) uint8_t low[kBlock];
  alignas(64) uint8_t words[Element::kPlanes * 8];
  memcpy(elements, source, 2 * count);
  escapes = BlockWriter<Element>::encode(elements, count, low, words, base, escapes);
  memcpy(low_bytes, low, count);
  const size_t plane_bytes = (count + 7) / 8;
  for (uint32_t k = 0; k < Element::kPlanes; ++k)
    memcpy(planes + k * plane_bytes, words + 8 * k, plane_bytes);
  return escapes;
}

// Returns the end of the row's escapes, or nullptr once they do not end before `limit`. A block
// writes less than a guard's length from `escapes` on.
template <typename Element>
KVC_INLINE uint8_t* encode_block_row(const BlockLayout& layout, const uint8_t* source, size_t row,
                                     uint32_t head_size, uint8_t* out, uint8_t* escapes,
                                     const uint8_t* limit) {
  uint8_t* low_bytes = out + layout.low_bytes + row * head_size;
  uint8_t* planes = out + layout.planes + row * layout.row_planes;
  uint8_t* bases = out + layout.bases + row * layout.blocks;
  const uint32_t whole = layout.blocks - (layout.tail != 0);
  for (uint32_t block = 0; block < whole; ++block) {
    if (escapes >= limit) return nullptr;
    escapes =
        BlockWriter<Element>::encode(source, kBlock, low_bytes, planes, bases + block, escapes);
    source += 2 * kBlock;
    low_bytes += kBlock;
    planes += 8 * Element::kPlanes;
  }
  if (layout.tail == 0) return escapes;
  if (escapes >= limit) return nullptr;
  return encode_tail<Element>(source, layout.tail, low_bytes, planes, bases + whole, escapes);
}

KVC_INLINE void store_escape_count(uint8_t* out, uint32_t head, size_t count) {
  const auto stored = static_cast<uint32_t>(count);
  memcpy(out + kPreambleBytes + sizeof stored * head, &stored, sizeof stored);
}

// The ends of all escapes, or nullptr if there is no room for them.
template <typename Element>
uint8_t* encode_by_head(const BlockLayout& layout, const Rows& rows, uint8_t* out,
                        const uint8_t* limit) {
  uint8_t* escapes = out + layout.escapes;
  RowsFetcher ahead(rows, false);
  size_t row = 0;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    uint8_t* const first = escapes;
    for (uint32_t token = 0; token < rows.token_count; ++token, ++row) {
      ahead.fetch();
      escapes = encode_block_row<Element>(layout, rows.row(head, token), row, rows.head_size, out,
                                          escapes, limit);
      if (escapes == nullptr) return nullptr;
    }
    store_escape_count(out, head, static_cast<size_t>(escapes - first));
  }
  return escapes;
}

// The same where the heads of a token are neighbours in memory: in its order, each head with an
// equal share of the room for escapes. nullptr also if a share is too small.
template <typename Element>
uint8_t* encode_by_token(const BlockLayout& layout, const Rows& rows, uint8_t* out,
                         const uint8_t* limit) {
  uint8_t* escapes[kMaxNeighbours];
  const size_t share = static_cast<size_t>(limit - (out + layout.escapes)) / rows.head_count;
  if (share <= kGuardBytes) return nullptr;
  for (uint32_t head = 0; head < rows.head_count; ++head)
    escapes[head] = out + layout.escapes + share * head;
  RowsFetcher ahead(rows, true);
  for (uint32_t token = 0; token < rows.token_count; ++token) {
    for (uint32_t head = 0; head < rows.head_count; ++head) {
      ahead.fetch();
      const size_t row = size_t{head} * rows.token_count + token;
      const uint8_t* const end = out + layout.escapes + share * (head + 1) - kGuardBytes;
      escapes[head] = encode_block_row<Element>(layout, rows.row(head, token), row, rows.head_size,
                                                out, escapes[head], end);
      if (escapes[head] == nullptr) return nullptr;
    }
  }
  uint8_t* end = out + layout.escapes;
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    const uint8_t* const first = out + layout.escapes + share * head;
    const size_t count = static_cast<size_t>(escapes[head] - first);
    memmove(end, first, count);
    store_escape_count(out, head, count);
    end += count;
  }
  return end;
}

template <typename Element>
size_t encode_block_rows(const Rows& rows, uint8_t* out) {
  const BlockLayout layout(rows, Element::kPlanes);
  const size_t raw_bytes = size_t{2} * rows.head_count * rows.token_count * rows.head_size;
  if (layout.escapes + kGuardBytes >= raw_bytes) return 0;
  memset(out, 0, layout.low_bytes);
  const uint8_t* const limit = out + raw_bytes - kGuardBytes;
  uint8_t* end = nullptr;
  if (heads_are_neighbours(rows) && rows.head_count <= kMaxNeighbours)
    end = encode_by_token<Element>(layout, rows, out, limit);
  if (end == nullptr) end = encode_by_head<Element>(layout, rows, out, limit);
  if (end == nullptr || end >= limit) return 0;
  const size_t stored = static_cast<size_t>(end - out) + kGuardBytes;
  memset(end, 0, pad64(stored) - static_cast<size_t>(end - out));
  return stored;
}

// How many escapes the planes of a head speak of.
inline uint64_t count_escapes(const uint8_t* planes, const BlockLayout& layout, uint32_t row_count,
                              uint32_t plane_count) {
  const uint32_t whole = layout.blocks - (layout.tail != 0);
  const uint32_t tail_bytes = (layout.tail + 7) / 8;
  uint64_t count = 0;
  for (uint32_t row = 0; row < row_count; ++row) {
    for (uint32_t block = 0; block < whole; ++block, planes += 8 * plane_count)
      count += static_cast<uint64_t>(__builtin_popcountll(load_plane(planes, kBlock) &
                                                          load_plane(planes + 8, kBlock) &
                                                          load_plane(planes + 16, kBlock)));
    if (layout.tail == 0) continue;
    count += static_cast<uint64_t>(
        __builtin_popcountll(load_plane(planes, layout.tail) &
                             load_plane(planes + tail_bytes, layout.tail) &
                             load_plane(planes + 2 * tail_bytes, layout.tail)));
    planes += tail_bytes * plane_count;
  }
  return count;
}

inline bool bytes_are_zero(const uint8_t* from, const uint8_t* end) {
  uint8_t any = 0;
  for (; from < end; ++from) any |= *from;
  return any == 0;
}

// Whether everything but planes and bytes says what the section's length says.
inline bool parts_fit(const BlockLayout& layout, const uint8_t* in, size_t stored_bytes,
                      uint32_t head_count) {
  if (stored_bytes < layout.escapes + kGuardBytes) return false;
  const uint8_t* directory = in + kPreambleBytes;
  uint64_t escapes = 0;
  for (uint32_t head = 0; head < head_count; ++head)
    escapes += load32(directory + sizeof(uint32_t) * head);
  return escapes == stored_bytes - layout.escapes - kGuardBytes && bytes_are_zero(in, directory) &&
         bytes_are_zero(directory + sizeof(uint32_t) * head_count, in + layout.low_bytes) &&
         bytes_are_zero(in + stored_bytes - kGuardBytes, in + stored_bytes);
}

template <typename Element>
KVC_OUTLINE const uint8_t* decode_tail(uint8_t* target, uint32_t count, const uint8_t* low_bytes,
                                       const uint8_t* planes, uint8_t base,
                                       const uint8_t* escapes) {
  alignas(64) uint8_t elements[2 * kBlock];
  alignas(64) uint8_t low[kBlock] = {};
  alignas(64) uint8_t words[Element::kPlanes * 8];
  memcpy(low, low_bytes, count);
  for (uint32_t k = 0; k < Element::kPlanes; ++k) {
    const uint64_t plane = load_plane(planes + k * ((count + 7) / 8), count);
    memcpy(words + 8 * k, &plane, 8);
  }
  escapes = BlockReader<Element>::template decode<false>(elements, low, words, base, escapes);
  memcpy(target, elements, 2 * count);
  return escapes;
}

template <typename Element, bool kStream>
bool decode_block_rows(const uint8_t* in, size_t stored_bytes, const Rows& rows) {
  const BlockLayout layout(rows, Element::kPlanes);
  if (!parts_fit(layout, in, stored_bytes, rows.head_count)) return false;
  const uint8_t* low_bytes = in + layout.low_bytes;
  const uint8_t* planes = in + layout.planes;
  const uint8_t* bases = in + layout.bases;
  const uint8_t* escapes = in + layout.escapes;
  const uint32_t whole = layout.blocks - (layout.tail != 0);
  SectionBehind behind(in, stored_bytes,
                       uint64_t{rows.head_count} * rows.token_count * rows.head_size);
  for (uint32_t head = 0; head < rows.head_count; ++head) {
    const uint32_t count = load32(in + kPreambleBytes + sizeof count * head);
    if (rows.base == nullptr) {
      if (count_escapes(planes, layout, rows.token_count, Element::kPlanes) != count) return false;
      planes += layout.row_planes * rows.token_count;
      continue;
    }
    // A block reads at most a guard's length from `escapes` on.
    const uint8_t* const end = escapes + count;
    for (uint32_t token = 0; token < rows.token_count; ++token) {
      uint8_t* target = rows.row(head, token);
      behind.fetch(rows.head_size);
      for (uint32_t block = 0; block < whole; ++block) {
        if (escapes > end) return false;
        escapes = BlockReader<Element>::template decode<kStream>(target, low_bytes, planes, *bases,
                                                                 escapes);
        target += 2 * kBlock;
        low_bytes += kBlock;
        planes += 8 * Element::kPlanes;
        ++bases;
      }
      if (layout.tail == 0) continue;
      if (escapes > end) return false;
      escapes = decode_tail<Element>(target, layout.tail, low_bytes, planes, *bases, escapes);
      low_bytes += layout.tail;
      planes += Element::kPlanes * ((layout.tail + 7) / 8);
      ++bases;
    }
    if (escapes != end) return false;
  }
  return true;
}

inline size_t encode_block_section(const SectionCodec& codec, const Rows& rows, uint8_t* out) {
  return codec.dtype == KVC_BF16 ? encode_block_rows<Bf16Bytes>(rows, out)
                                 : encode_block_rows<Fp16Bytes>(rows, out);
}

// `stream`: rows are whole aligned vectors and may go past the caches.
inline bool decode_block_section(const SectionCodec& codec, const uint8_t* in, size_t stored_bytes,
                                 const Rows& rows, bool stream) {
  if (codec.dtype == KVC_BF16)
    return stream ? decode_block_rows<Bf16Bytes, true>(in, stored_bytes, rows)
                  : decode_block_rows<Bf16Bytes, false>(in, stored_bytes, rows);
  return stream ? decode_block_rows<Fp16Bytes, true>(in, stored_bytes, rows)
                : decode_block_rows<Fp16Bytes, false>(in, stored_bytes, rows);
}
