// Lines of bytes to columns with AVX-512. Included inside a target region and namespace.

constexpr uint32_t kTurnedLines = 16;
constexpr size_t kTurnedBytes = kTurnedLines * 64;

// 16 lines of 64 bytes -> 16 bytes for each column: column i at turned_place(i).
KVC_INLINE void turn_lines(const uint8_t* lines, uint8_t* turned) {
  __m512i v[16];
  for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(lines + i * 64);
  for (int round = 0; round < 4; ++round) {
    __m512i w[16];
    for (int i = 0; i < 8; ++i) {
      w[2 * i] = _mm512_unpacklo_epi8(v[i], v[i + 8]);
      w[2 * i + 1] = _mm512_unpackhi_epi8(v[i], v[i + 8]);
    }
    for (int i = 0; i < 16; ++i) v[i] = w[i];
  }
  for (int i = 0; i < 16; ++i) _mm512_store_si512(turned + i * 64, v[i]);
}

KVC_INLINE size_t turned_place(uint32_t column) { return (column & 15) * 64 + (column >> 4) * 16; }
