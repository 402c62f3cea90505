// Random batches for the driver: a layout in host memory, codecs, values, and the plan that
// describes them.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kvcodec.h"

namespace driver {

using Random = std::mt19937_64;

// Heap memory of exactly this size, so that a sanitizer sees the first byte beyond it.
class Buffer {
 public:
  Buffer(size_t bytes, uint8_t fill);
  uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }
  bool operator==(const Buffer& other) const;

 private:
  std::unique_ptr<uint8_t[]> data_;
  size_t size_;
};

// The rows of one stream of all layers of one page: their strides, and where the first one lies in
// a buffer.
struct HostStream {
  kvc_stream stream;
  size_t buffer_bytes;
  size_t base_offset;
  size_t raw_bytes;  // of all rows; the rest of the buffer must stay as it is
};

struct Case {
  uint32_t dtype;
  uint32_t token_count;
  uint32_t layer_count;
  std::vector<HostStream> hosts;
  std::vector<kvc_stream> streams;
  std::vector<kvc_section> sections;
  std::vector<uint8_t> header;
  std::vector<float> table;  // of the rotary pairs, which stream 0 holds
  kvc_rotary rotary;
  kvc_plan plan;

  std::string text() const;
};

uint32_t pick(Random& random, uint32_t low, uint32_t high);
uint32_t element_bytes(uint32_t dtype);

// `large`: sections of the size that engines have; otherwise everything is small and odd.
std::unique_ptr<Case> make_case(Random& random, bool large);
// Elements of one stream: usual numbers, extreme ones, or any bits at all.
Buffer make_rows(Random& random, const Case& made, const HostStream& host);

// Coded sections on every instruction set (coded.cpp). Exits at the first difference.
void compare_coded(uint32_t cases);

}  // namespace driver
