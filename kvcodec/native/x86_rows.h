// Walking the rows of a section in the order of their memory. Plain code, shared by the x86 kernels; internal linkage,
// because every file that includes it is compiled for another instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

// For the parts of inner loops: what the compiler leaves out of line there costs more than all else.
#define KVC_INLINE inline __attribute__((always_inline))

namespace kvc {
namespace {

inline uint64_t magnitude_of(int64_t stride) {
  return stride < 0 ? 0 - static_cast<uint64_t>(stride) : static_cast<uint64_t>(stride);
}

// Token by token where the heads of a token are neighbours (runs of heads * row bytes), otherwise head by head.
inline bool heads_are_neighbours(const Rows& rows) {
  return rows.head_count > 1 && magnitude_of(rows.head_stride) < magnitude_of(rows.token_stride);
}

// The address of one row after the other, in runs of a constant step.
class RowWalk {
 public:
  explicit RowWalk(const Rows& rows) : rows_(&rows), heads_inner_(heads_are_neighbours(rows)) {
    step_ = heads_inner_ ? rows.head_stride : rows.token_stride;
    index_step_ = heads_inner_ ? rows.token_count : 1;
    start_run();
  }

  // Addresses and indices (head * token_count + token) of the next rows: how many there are, at most `count`.
  uint32_t take(const uint8_t** addresses, size_t* indices, uint32_t count) {
    uint32_t taken = 0;
    while (taken < count && left_ != 0) {
      const uint32_t some = left_ < count - taken ? left_ : count - taken;
      const uint8_t* address = address_;
      size_t index = index_;
      for (uint32_t i = taken; i < taken + some; ++i) {
        addresses[i] = address;
        indices[i] = index;
        address += step_;
        index += index_step_;
      }
      taken += some;
      leave(some);
    }
    return taken;
  }

  void skip(uint64_t count) {
    while (count != 0 && left_ != 0) {
      const uint32_t some = left_ < count ? left_ : static_cast<uint32_t>(count);
      count -= some;
      leave(some);
    }
  }

 private:
  const Rows* rows_;
  bool heads_inner_;
  uint32_t head_ = 0;   // of the first row of this run
  uint32_t token_ = 0;
  uint32_t left_ = 0;   // rows of this run; 0: no more rows
  const uint8_t* address_ = nullptr;
  size_t index_ = 0;
  int64_t step_;
  size_t index_step_;

  void start_run() {
    address_ = rows_->row(head_, token_);
    index_ = static_cast<size_t>(head_) * rows_->token_count + token_;
    left_ = rows_->token_count;
    if (heads_inner_) {
      const uint32_t after = rows_->head_count - head_;
      left_ = rows_->group_heads < after ? rows_->group_heads : after;
    }
  }

  void leave(uint32_t count) {
    left_ -= count;
    if (left_ != 0) {
      address_ += count * step_;
      index_ += count * index_step_;
      return;
    }
    if (heads_inner_) {
      head_ = rows_->group_heads < rows_->head_count - head_ ? head_ + rows_->group_heads : 0;
      token_ += head_ == 0;
    } else {
      ++head_;
    }
    if (head_ < rows_->head_count && token_ < rows_->token_count) start_run();
  }
};

// The rows that will be read some time after the current one, on into the section that the worker does next: the
// hardware prefetchers see neither the jumps of a strided section nor the start of the next one.
class RowsAhead {
 public:
  RowsAhead(const Rows& rows, const Rows* next, uint64_t distance) : walk_(rows), next_(next), last_(rows.base) {
    walk_.skip(distance);
  }

  // Always `count` addresses; the last one again and again where there are no more rows.
  void take(const uint8_t** addresses, size_t* indices, uint32_t count) {
    uint32_t taken = walk_.take(addresses, indices, count);
    if (taken < count && next_ != nullptr) {
      walk_ = RowWalk(*next_);
      next_ = nullptr;
      taken += walk_.take(addresses + taken, indices + taken, count - taken);
    }
    if (taken != 0) last_ = addresses[taken - 1];
    for (; taken < count; ++taken) addresses[taken] = last_;
  }

 private:
  RowWalk walk_;
  const Rows* next_;
  const uint8_t* last_;
};

// A page is decoded section by section, and the next one lies behind this one: fetched while this one is written, its
// checksum finds it in the second-level cache. (Behind the last section this reads some lines in vain.)
class BytesBehind {
 public:
  BytesBehind(const SectionCodec& codec, const uint8_t* in, const Rows& rows) {
    const size_t parameters = parameter_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
    const size_t codes = code_bytes(codec, rows.head_count, rows.token_count, rows.head_size);
    at_ = reinterpret_cast<uintptr_t>(in) + pad64(pad64(parameters) + codes);
    row_bytes_ = (at_ - reinterpret_cast<uintptr_t>(in)) / (static_cast<uint64_t>(rows.head_count) * rows.token_count);
  }

  // The share of `count` rows.
  void prefetch(uint64_t count) {
    owed_ += count * row_bytes_;
    for (; owed_ >= 64; owed_ -= 64, at_ += 64) __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 2);
  }

 private:
  uintptr_t at_;
  uint64_t row_bytes_;
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
