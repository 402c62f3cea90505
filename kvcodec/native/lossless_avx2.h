// Streams of lossless sections with AVX2. Included by lossless_avx2.cpp inside its target region and
// namespace, after coded_avx2.h.

struct LosslessGatherTables {
  GatherTable table[kScaleTables + kExponentTables];
};

constexpr LosslessGatherTables lossless_gather_tables() {
  LosslessGatherTables result{};
  for (uint32_t number = 0; number < kScaleTables + kExponentTables; ++number)
    result.table[number] = gather_table(stream_table(number));
  return result;
}

constexpr LosslessGatherTables kGatherTables = lossless_gather_tables();

class TileReader : public ByteStream {
 public:
  // A step of up to 32 integers of a table, modulo 256; 32 bytes are written.
  bool read(uint32_t table, uint32_t shift, uint32_t count, uint8_t* out) {
    return ByteStream::read(kGatherTables.table[table], shift, count, out);
  }
};
