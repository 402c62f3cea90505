// Raw sections and plain copies. Included by avx2.cpp and avx512.cpp inside their target regions
// and namespaces, after kVectorBytes, copy_vector<stream>(target, source) and copy_rest(target,
// source, bytes).

// Whole lines of the target go past the caches: they are not read first, which makes such a copy
// faster than memcpy. The ends are stored as usual, for a line must not be written both ways. Needs
// a store fence afterwards.
inline void stream_bytes(uint8_t* target, const uint8_t* source, size_t bytes) {
  const size_t skew = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64;
  if (bytes < 256 && (skew | bytes % 64) != 0) {
    memcpy(target, source, bytes);
    return;
  }
  memcpy(target, source, skew);
  size_t i = skew;
  for (; i + 64 <= bytes; i += 64) {
    for (size_t k = 0; k < 64; k += kVectorBytes) copy_vector<true>(target + i + k, source + i + k);
  }
  memcpy(target + i, source + i, bytes - i);
}

void copy_out(uint8_t* target, const uint8_t* source, size_t bytes) {
  stream_bytes(target, source, bytes);
  _mm_sfence();
}

inline void copy_bytes(uint8_t* target, const uint8_t* source, size_t bytes) {
  size_t i = 0;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) copy_vector<false>(target + i, source + i);
  copy_rest(target + i, source + i, bytes - i);
}

inline size_t raw_row_bytes(const SectionCodec& codec, const Rows& rows) {
  return static_cast<size_t>(rows.head_size) * codec.bits / 8;
}

// Rows that follow each other in memory as they do in the section are one row.
inline Rows merge_rows(const Rows& rows, size_t* row_bytes) {
  Rows merged = rows;
  if (rows.token_stride == static_cast<int64_t>(*row_bytes) || rows.token_count == 1) {
    *row_bytes *= rows.token_count;
    merged.token_count = 1;
  }
  return merged;
}

void encode_raw(const SectionCodec& codec, const Rows& rows, const Rows* next, uint8_t* out) {
  size_t row_bytes = raw_row_bytes(codec, rows);
  const Rows merged = merge_rows(rows, &row_bytes);
  const size_t prefetched = row_bytes < 4096 ? row_bytes : 0;  // the hardware follows long rows
  RowWalk walk(merged);
  RowsAhead ahead(merged, next, kPrefetchBytes / row_bytes + 1);
  const uint8_t* source[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  for (;;) {
    const int64_t offset = ahead.offset(walk.address(), kMaxChunkRows);
    const uint32_t count = walk.take(source, index, kMaxChunkRows);
    if (count == 0) break;
    for (uint32_t r = 0; r < count; ++r) {
      for (size_t i = 0; i < prefetched; i += 64)
        prefetch(source[r], offset + static_cast<int64_t>(i));
      copy_bytes(out + index[r] * row_bytes, source[r], row_bytes);
    }
  }
  clear_padding(codec, rows, out);
}

void decode_raw(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
  size_t row_bytes = raw_row_bytes(codec, rows);
  const Rows merged = merge_rows(rows, &row_bytes);
  RowWalk walk(merged);
  BytesBehind behind(codec, in, rows);
  const uint32_t merged_tokens = rows.token_count / merged.token_count;
  const uint8_t* target[kMaxChunkRows];
  size_t index[kMaxChunkRows];
  while (const uint32_t count = walk.take(target, index, kMaxChunkRows)) {
    for (uint32_t r = 0; r < count; ++r) {
      behind.fetch(merged_tokens);
      stream_bytes(const_cast<uint8_t*>(target[r]), in + index[r] * row_bytes, row_bytes);
    }
  }
  _mm_sfence();
}
