// One submitted batch: what the workers of a pool share, and the work on one of its items.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include <sys/types.h>

#include "kernels.h"
#include "kvcodec.h"

namespace kvc {

// Cache-line aligned memory of one worker; grows, and is kept from one batch to the next.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  // nullptr: no memory.
  uint8_t* at_least(size_t bytes);

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// A section with everything that does not depend on the page worked out.
struct PlannedSection {
  SectionCodec codec;
  uint32_t stream;
  int64_t layer_offset;  // from the stream's base to this layer
  uint64_t offset;        // behind coded sections: at most
  uint64_t stored_bytes;  // coded: at most
  uint64_t checksum_offset;
  uint64_t size_offset;
};

// Where a section lies in one page.
struct Place {
  uint64_t offset;
  uint64_t stored_bytes;
};

// Bytes of the header that every page of a batch has in common with the template.
struct Span {
  uint32_t start;
  uint32_t bytes;
};

// Progress of one page, shared by the workers that have an item of it.
struct PageState {
  std::atomic<uint32_t> items_left{0};
  std::atomic<bool> header_verified{false};
  std::atomic<uint64_t> failure{UINT64_MAX};  // section << 8 | status; the lowest one wins
  std::atomic<uint64_t> nonfinite_groups{0};
};

}  // namespace kvc

struct kvc_batch {
  // Validates and copies the plan; KVC_DONE, KVC_BAD_ARGUMENT or KVC_NO_MEMORY. The caller holds
  // one reference.
  static int make(int operation, const kvc_plan& plan, kvc_page* pages, size_t page_count,
                  kvc_batch** batch);

  size_t item_count() const { return page_count_ * (chunk_starts_.size() - 1); }
  // Works on one item that nobody else has; false: none is left.
  bool run_next(kvc::Scratch& scratch);

  void retain() { references_.fetch_add(1, std::memory_order_relaxed); }
  void release();
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  int wait(uint64_t timeout_us);
  // Whether another process began this batch: its workers do not exist here, and its lock may be
  // held for ever.
  bool is_foreign() const;
  bool is_done() const { return done_.load(std::memory_order_acquire); }

  kvc_batch* next = nullptr;  // in the pool's queue

 private:
  kvc_batch() = default;
  ~kvc_batch() = default;

  bool take_plan(const kvc_plan& plan);
  bool take_sections(const kvc_plan& plan);
  bool take_spans();
  bool take_pages(kvc_page* pages, size_t page_count);

  void run_chunk(size_t page_index, size_t chunk, kvc::Scratch& scratch);
  int begin_page(const kvc_page& page, kvc::PageState& state) const;
  int compare_header(const kvc_page& page) const;
  bool find(const kvc_page& page, uint32_t section, uint64_t offset, kvc::Place* place) const;
  bool find_from_start(const kvc_page& page, uint32_t section, uint64_t* offset) const;
  int encode(const kvc_page& page, kvc::PageState& state, uint32_t section, uint32_t end,
             uint64_t* offset, kvc::Scratch& scratch) const;
  int decode(const kvc_page& page, uint32_t section, uint64_t* offset, kvc::Scratch& scratch) const;
  size_t encode_rows(const kvc_page& page, kvc::PageState& state, uint32_t section, uint32_t end,
                     kvc::Scratch& scratch, uint8_t** out) const;
  kvc::Rows rows_of(const kvc_page& page, const kvc::PlannedSection& section) const;
  const kvc_rotary* rotary_of(const kvc::PlannedSection& section) const;
  void finish_header(const kvc_page& page) const;
  void finish_page(size_t page_index);

  int operation_ = 0;
  const kvc::Kernels* kernels_ = nullptr;
  kvc_plan plan_{};
  kvc_rotary rotary_{};
  kvc_page* pages_ = nullptr;
  size_t page_count_ = 0;
  std::vector<kvc_stream> streams_;
  std::vector<kvc::PlannedSection> sections_;
  std::vector<kvc::Span> spans_;
  std::vector<uint32_t> chunk_starts_;  // first section of each chunk, then section_count
  std::unique_ptr<kvc::PageState[]> states_;
  pid_t process_ = 0;

  std::atomic<size_t> next_item_{0};
  std::atomic<size_t> pages_left_{0};
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> done_{false};
  std::atomic<uint32_t> references_{1};
  std::mutex mutex_;
  std::condition_variable finished_;
};
