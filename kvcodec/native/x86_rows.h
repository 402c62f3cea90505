// Walking the rows of a section in the order of their memory. Plain code, shared by the x86
// kernels; internal linkage, because every file that includes it is compiled for another
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

// For the parts of inner loops: what the compiler leaves out of line there costs more than all
// else.
#define KVC_INLINE inline __attribute__((always_inline))
// And for what is rare there: inlined, it takes registers from the rest.
#define KVC_OUTLINE __attribute__((noinline))

namespace kvc {
namespace {

// Into the second-level cache. There need not be anything.
KVC_INLINE void prefetch(uintptr_t address) {
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

KVC_INLINE void prefetch(const uint8_t* base, int64_t offset) {
  prefetch(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(offset));
}

inline uint64_t magnitude_of(int64_t stride) {
  return stride < 0 ? 0 - static_cast<uint64_t>(stride) : static_cast<uint64_t>(stride);
}

// Token by token where the heads of a token are neighbours (runs of heads * row bytes), otherwise
// head by head.
inline bool heads_are_neighbours(const Rows& rows) {
  return rows.head_count > 1 && magnitude_of(rows.head_stride) < magnitude_of(rows.token_stride);
}

// The address of one row after the other, in runs of a constant step: the heads of a token (of one
// head group), or the tokens of a head.
class RowWalk {
 public:
  explicit RowWalk(const Rows& rows) : rows_(&rows), heads_inner_(heads_are_neighbours(rows)) {
    regular_ = rows.group_heads >= rows.head_count;
    step_ = heads_inner_ ? rows.head_stride : rows.token_stride;
    index_step_ = heads_inner_ ? rows.token_count : 1;
    run_step_ = heads_inner_ ? rows.token_stride : rows.head_stride;
    run_index_step_ = heads_inner_ ? 1 : rows.token_count;
    run_rows_ = heads_inner_ ? rows.head_count : rows.token_count;
    runs_left_ = heads_inner_ ? rows.token_count : rows.head_count;
    if (!regular_) start_irregular_run();
    left_ = run_rows_;
    address_ = run_ = rows.base;
  }

  bool ended() const { return left_ == 0; }
  const uint8_t* address() const { return address_; }

  // Addresses and indices (head * token_count + token) of the next rows: how many there are, at
  // most `count`.
  uint32_t take(const uint8_t** addresses, size_t* indices, uint32_t count) {
    const uint8_t* address = address_;
    size_t index = index_;
    uint32_t left = left_;
    uint32_t taken = 0;
    while (taken < count && left != 0) {
      addresses[taken] = address;
      indices[taken] = index;
      ++taken;
      address += step_;
      index += index_step_;
      if (--left == 0) {
        next_runs(1);
        address = run_;
        index = run_index_;
        left = left_;
      }
    }
    address_ = address;
    index_ = index;
    left_ = left;
    return taken;
  }

  void skip(uint64_t count) {
    while (count >= left_ && left_ != 0) {
      const uint64_t beyond = count - left_;
      const uint64_t whole = regular_ ? beyond / run_rows_ : 0;
      count = beyond - whole * run_rows_;
      next_runs(1 + whole);
    }
    if (left_ == 0) return;
    left_ -= static_cast<uint32_t>(count);
    address_ += static_cast<int64_t>(count) * step_;
    index_ += count * index_step_;
  }

 private:
  const Rows* rows_;
  bool heads_inner_;
  bool regular_;       // one head group: from run to run it is one step
  uint32_t head_ = 0;  // of the first row of the run; kept if not regular
  uint32_t token_ = 0;
  uint32_t left_;  // rows of this run; 0: no more rows
  uint32_t run_rows_;
  uint64_t runs_left_;  // this one included
  const uint8_t* address_;
  const uint8_t* run_;
  size_t index_ = 0;
  size_t run_index_ = 0;
  int64_t step_;
  int64_t run_step_;
  size_t index_step_;
  size_t run_index_step_;

  void next_runs(uint64_t count) {
    if (!regular_) return next_irregular_run();
    runs_left_ = count < runs_left_ ? runs_left_ - count : 0;
    left_ = runs_left_ == 0 ? 0 : run_rows_;
    address_ = run_ += static_cast<int64_t>(count) * run_step_;
    index_ = run_index_ += count * run_index_step_;
  }

  void start_irregular_run() {
    if (heads_inner_) {
      const uint32_t after = rows_->head_count - head_;
      run_rows_ = rows_->group_heads < after ? rows_->group_heads : after;
    }
    left_ = run_rows_;
    address_ = run_ = rows_->row(head_, token_);
    index_ = run_index_ = static_cast<size_t>(head_) * rows_->token_count + token_;
  }

  void next_irregular_run() {
    left_ = 0;
    if (heads_inner_) {
      head_ = rows_->group_heads < rows_->head_count - head_ ? head_ + rows_->group_heads : 0;
      token_ += head_ == 0;
    } else {
      ++head_;
    }
    if (head_ < rows_->head_count && token_ < rows_->token_count) start_irregular_run();
  }
};

// How far in memory the rows lie that will be read some time after the current ones, be it in the
// section that the worker does next: the hardware prefetchers see neither the jumps of a strided
// section nor the start of the next one.
class RowsAhead {
 public:
  RowsAhead(const Rows& rows, const Rows* next, uint64_t distance) : walk_(rows), next_(next) {
    // Whole tokens where heads are neighbours: the distance then holds for all heads of a token.
    const uint64_t unit = heads_are_neighbours(rows) ? rows.head_count : 1;
    skip((distance + unit - 1) / unit * unit);
  }

  // For the `count` rows from `address` on. Their distance is taken for that of the first one.
  int64_t offset(const uint8_t* address, uint32_t count) {
    if (walk_.ended()) return 0;
    const auto from = reinterpret_cast<intptr_t>(address);
    const int64_t result = reinterpret_cast<intptr_t>(walk_.address()) - from;
    skip(count);
    return result;
  }

 private:
  RowWalk walk_;
  const Rows* next_;

  void skip(uint64_t count) {
    walk_.skip(count);
    if (!walk_.ended() || next_ == nullptr) return;
    walk_ = RowWalk(*next_);
    next_ = nullptr;
  }
};

// A page is decoded section by section, and the next one lies behind this one: fetched while this
// one is written, its checksum finds it in the second-level cache. (Behind the last section this
// reads some lines in vain.)
class BytesBehind {
 public:
  BytesBehind(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
    const size_t parameters =
        parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
    const size_t codes = code_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
    at_ = reinterpret_cast<uintptr_t>(in) + pad64(pad64(parameters) + codes);
    row_bytes_ = (at_ - reinterpret_cast<uintptr_t>(in)) /
                 (static_cast<uint64_t>(rows.head_count) * rows.token_count);
  }

  // The share of `count` rows.
  void fetch(uint64_t count) {
    owed_ += count * row_bytes_;
    for (; owed_ >= 64; owed_ -= 64, at_ += 64) prefetch(at_);
  }

 private:
  uintptr_t at_;
  uint64_t row_bytes_;
  uint64_t owed_ = 0;
};

// The same behind a section whose length depends on the data.
class SectionBehind {
 public:
  SectionBehind(const uint8_t* in, size_t stored_bytes, uint64_t elements)
      : at_(reinterpret_cast<uintptr_t>(in) + pad64(stored_bytes)),
        share_(static_cast<uint32_t>(1024 * stored_bytes / elements) + 1) {}

  // The share of so many elements.
  KVC_INLINE void fetch(uint32_t elements) {
    owed_ += uint64_t{elements} * share_;
    for (; owed_ >= 64 * 1024; owed_ -= 64 * 1024, at_ += 64) prefetch(at_);
  }

 private:
  uintptr_t at_;
  uint32_t share_;  // bytes of an element, 1024ths
  uint64_t owed_ = 0;
};

// Whether every row starts at a multiple of `alignment` and fills it.
inline bool rows_aligned(const Rows& rows, size_t row_bytes, size_t alignment) {
  uint64_t bits = reinterpret_cast<uintptr_t>(rows.base) | row_bytes;
  if (rows.token_count > 1) bits |= magnitude_of(rows.token_stride);
  if (rows.head_count > 1) bits |= magnitude_of(rows.head_stride) | magnitude_of(rows.group_stride);
  return (bits & (alignment - 1)) == 0;
}

}  // namespace
}  // namespace kvc
