#include "batch.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "dispatch.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the page format is little-endian, and so are the kernels");
static_assert(sizeof(kvc_stream) == 48 && sizeof(kvc_section) == 40, "part of the ABI");
static_assert(sizeof(kvc_plan) == 80 && sizeof(kvc_page) == 72, "part of the ABI");
static_assert(sizeof(kvc_rotary) == 16, "part of the ABI");

namespace kvc {
namespace {

constexpr uint32_t kMaxLayers = 1024;
constexpr uint32_t kMaxHeaderBytes = 1u << 18;
constexpr uint64_t kChecksumBytes = 8;
constexpr uint64_t kPageSizeBytes = 8;
constexpr uint64_t kSectionSizeBytes = 4;
constexpr size_t kMaxPages = size_t{1} << 32;
// Raw bytes of one item: long enough that handing it out costs nothing, short enough that a few
// pages keep every worker busy.
constexpr uint64_t kChunkBytes = 512 * 1024;
constexpr uint64_t kNoFailure = UINT64_MAX;

uint64_t load64(const uint8_t* source) {
  uint64_t value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

void store64(uint8_t* target, uint64_t value) { std::memcpy(target, &value, sizeof value); }

uint32_t load32(const uint8_t* source) {
  uint32_t value;
  std::memcpy(&value, source, sizeof value);
  return value;
}

void store32(uint8_t* target, uint32_t value) { std::memcpy(target, &value, sizeof value); }

// How a coded section that gains nothing is stored.
SectionCodec raw_codec(const SectionCodec& codec) {
  const uint8_t bits = codec.dtype == KVC_FP32 ? 32 : 16;
  return {codec.dtype, KVC_KIND_RAW, bits, false, false, 0};
}

// Adds |stride| * (count - 1) to `*extent`; false if that leaves the range of addresses.
bool add_extent(int64_t stride, uint64_t count, uint64_t* extent) {
  const uint64_t magnitude =
      stride < 0 ? -static_cast<uint64_t>(stride) : static_cast<uint64_t>(stride);
  uint64_t length;
  return !__builtin_mul_overflow(magnitude, count - 1, &length) &&
         !__builtin_add_overflow(*extent, length, extent) && *extent <= INT64_MAX;
}

bool strides_fit(const kvc_stream& stream, uint32_t layer_count, uint32_t token_count) {
  const uint32_t group_heads = std::min(stream.group_heads, stream.head_count);
  const uint32_t groups = (stream.head_count + group_heads - 1) / group_heads;
  uint64_t extent = uint64_t{stream.head_size} * sizeof(float);
  return add_extent(stream.layer_stride, layer_count, &extent) &&
         add_extent(stream.group_stride, groups, &extent) &&
         add_extent(stream.head_stride, group_heads, &extent) &&
         add_extent(stream.token_stride, token_count, &extent);
}

// Stores that went past the caches must be visible before another thread hears that the page is
// done.
void finish_streaming_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

void record_failure(PageState& state, uint32_t section, int status) {
  const uint64_t failure = uint64_t{section} << 8 | static_cast<uint64_t>(status);
  uint64_t known = state.failure.load(std::memory_order_relaxed);
  while (failure < known &&
         !state.failure.compare_exchange_weak(known, failure, std::memory_order_relaxed)) {
  }
}

// Sections below the lowest failing one are still looked at, so that the section reported does not
// depend on chance.
bool failed_before(const PageState& state, uint32_t section) {
  return state.failure.load(std::memory_order_relaxed) >> 8 < section;
}

bool all_zero(const uint8_t* data, uint64_t bytes) {
  return std::all_of(data, data + bytes, [](uint8_t byte) { return byte == 0; });
}

}  // namespace

Scratch::~Scratch() { std::free(data_); }

uint8_t* Scratch::at_least(size_t bytes) {
  if (bytes > bytes_) {
    std::free(data_);
    data_ = static_cast<uint8_t*>(std::aligned_alloc(64, pad64(bytes)));
    bytes_ = data_ != nullptr ? bytes : 0;
  }
  return data_;
}

}  // namespace kvc

using namespace kvc;

int kvc_batch::make(int operation, const kvc_plan& plan, kvc_page* pages, size_t page_count,
                    kvc_batch** batch) {
  kvc_batch* made = nullptr;
  try {
    made = new kvc_batch;
    made->operation_ = operation;
    made->kernels_ = current_kernels();
    made->process_ = getpid();
    if (made->kernels_ == nullptr || operation < KVC_ENCODE || operation > KVC_VERIFY ||
        !made->take_plan(plan) || !made->take_sections(plan) || !made->take_spans() ||
        !made->take_pages(pages, page_count)) {
      made->release();
      return KVC_BAD_ARGUMENT;
    }
  } catch (const std::bad_alloc&) {
    if (made != nullptr) made->release();
    return KVC_NO_MEMORY;
  }
  *batch = made;
  return KVC_DONE;
}

bool kvc_batch::take_plan(const kvc_plan& plan) {
  if (plan.abi_version != KVC_ABI_VERSION || plan.header == nullptr ||
      plan.streams == nullptr || plan.sections == nullptr) {
    return false;
  }
  if (plan.layer_count == 0 || plan.layer_count > kMaxLayers || plan.stream_count == 0 ||
      plan.stream_count > KVC_MAX_STREAMS ||
      plan.section_count != plan.layer_count * plan.stream_count) {
    return false;
  }
  if (plan.header_bytes < 64 || plan.header_bytes % 64 != 0 ||
      plan.header_bytes > kMaxHeaderBytes || plan.key_bytes == 0 ||
      uint64_t{plan.key_offset} + plan.key_bytes > plan.header_bytes - kChecksumBytes) {
    return false;
  }
  plan_ = plan;
  if (plan.rotary != nullptr) {
    rotary_ = *plan.rotary;
    plan_.rotary = &rotary_;
    if (rotary_.size == 0 || rotary_.size % 2 != 0 || rotary_.interleaved > 1 ||
        rotary_.table == nullptr) {
      return false;
    }
  }
  streams_.assign(plan.streams, plan.streams + plan.stream_count);
  for (kvc_stream& stream : streams_) {
    // The limits of head_count, head_size and token_count are those of kvc_section_bytes.
    if (stream.is_rotated > 1 || stream.group_heads == 0 || stream.head_count == 0 ||
        !strides_fit(stream, plan.layer_count, plan.token_count)) {
      return false;
    }
    stream.group_heads = std::min(stream.group_heads, stream.head_count);
  }
  return true;
}

bool kvc_batch::take_sections(const kvc_plan& plan) {
  sections_.reserve(plan.section_count);
  uint64_t offset = plan.header_bytes;
  uint64_t chunk_bytes = 0;
  bool any_coded = false;
  for (uint32_t index = 0; index < plan.section_count; ++index) {
    const kvc_section& section = plan.sections[index];
    const uint32_t stream_index = index % plan.stream_count;
    const kvc_stream& stream = streams_[stream_index];
    const uint64_t stored =
        kvc_section_bytes(plan.dtype, stream.head_count, plan.token_count, stream.head_size,
                          section.kind, section.bits, section.options, section.group_size);
    const bool coded = is_coded(section.kind);
    if (section.reserved != 0 || stored == 0 || section.stored_bytes != stored ||
        section.offset != offset ||
        section.checksum_offset > plan.header_bytes - 2 * kChecksumBytes ||
        (section.size_offset != 0) != coded ||
        section.size_offset > plan.header_bytes - kChecksumBytes - kSectionSizeBytes) {
      return false;
    }
    any_coded |= coded;
    const bool derotated = (section.options & KVC_OPTION_DEROTATED) != 0;
    if (derotated && (stream.is_rotated == 0 || plan_.rotary == nullptr ||
                      rotary_.size > stream.head_size)) {
      return false;
    }
    const SectionCodec codec{static_cast<uint8_t>(plan.dtype),
                             section.kind,
                             section.bits,
                             (section.options & KVC_OPTION_ASYMMETRIC) != 0,
                             (section.options & KVC_OPTION_CHANNEL) != 0,
                             section.group_size,
                             (section.options & KVC_OPTION_HADAMARD) != 0,
                             derotated ? &rotary_ : nullptr};
    sections_.push_back({codec, stream_index, stream.layer_stride * (index / plan.stream_count),
                         offset, stored, section.checksum_offset, section.size_offset});
    offset += pad64(stored);
    // Where a section begins is known when those before it are encoded: one worker does them all.
    if (index == 0 || (chunk_bytes >= kChunkBytes && !(any_coded && operation_ == KVC_ENCODE))) {
      chunk_starts_.push_back(index);
      chunk_bytes = 0;
    }
    chunk_bytes +=
        uint64_t{stream.head_count} * plan.token_count * stream.head_size * sizeof(uint16_t);
  }
  chunk_starts_.push_back(plan.section_count);
  return offset == plan.page_bytes && (plan.size_offset != 0) == any_coded &&
         plan.size_offset <= plan.header_bytes - kChecksumBytes - kPageSizeBytes;
}

// The header without the key, the checksums and the sizes that differ. They may not overlap: each is
// written by another hand.
bool kvc_batch::take_spans() {
  std::vector<Span> holes;
  holes.reserve(2 * sections_.size() + 3);
  for (const PlannedSection& section : sections_) {
    holes.push_back({static_cast<uint32_t>(section.checksum_offset), kChecksumBytes});
    if (section.size_offset != 0)
      holes.push_back({static_cast<uint32_t>(section.size_offset), kSectionSizeBytes});
  }
  if (plan_.size_offset != 0) holes.push_back({plan_.size_offset, kPageSizeBytes});
  holes.push_back({plan_.key_offset, plan_.key_bytes});
  holes.push_back({static_cast<uint32_t>(plan_.header_bytes - kChecksumBytes), kChecksumBytes});
  std::sort(holes.begin(), holes.end(),
            [](const Span& a, const Span& b) { return a.start < b.start; });
  uint32_t end = 0;
  for (const Span& hole : holes) {
    if (hole.start < end) return false;
    if (hole.start > end) spans_.push_back({end, hole.start - end});
    end = hole.start + hole.bytes;
  }
  return true;
}

bool kvc_batch::take_pages(kvc_page* pages, size_t page_count) {
  if (page_count > kMaxPages || (pages == nullptr && page_count != 0)) return false;
  for (size_t i = 0; i < page_count; ++i) {
    if (pages[i].encoded == nullptr || pages[i].key == nullptr) return false;
    for (uint32_t stream = 0; operation_ != KVC_VERIFY && stream < plan_.stream_count; ++stream) {
      if (pages[i].base[stream] == nullptr) return false;
    }
  }
  pages_ = pages;
  page_count_ = page_count;
  states_.reset(new PageState[page_count]);
  const uint32_t chunks = static_cast<uint32_t>(chunk_starts_.size() - 1);
  for (size_t i = 0; i < page_count; ++i)
    states_[i].items_left.store(chunks, std::memory_order_relaxed);
  pages_left_.store(page_count, std::memory_order_relaxed);
  done_.store(page_count == 0, std::memory_order_relaxed);
  return true;
}

void kvc_batch::release() {
  if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
}

bool kvc_batch::is_foreign() const { return process_ != getpid(); }

int kvc_batch::wait(uint64_t timeout_us) {
  constexpr uint64_t kForever = uint64_t{1000000} * 60 * 60 * 24 * 365;
  if (is_done()) return KVC_DONE;
  if (is_foreign()) return KVC_BAD_ARGUMENT;
  if (timeout_us == 0) return KVC_PENDING;
  std::unique_lock<std::mutex> lock(mutex_);
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::microseconds(std::min(timeout_us, kForever));
  while (!is_done()) {
    if (finished_.wait_until(lock, deadline) == std::cv_status::timeout && !is_done())
      return KVC_PENDING;
  }
  return KVC_DONE;
}

bool kvc_batch::run_next(Scratch& scratch) {
  const size_t chunks = chunk_starts_.size() - 1;
  const size_t items = page_count_ * chunks;
  // Workers look at a batch again after its last item; the counter must not run away meanwhile.
  if (next_item_.load(std::memory_order_relaxed) >= items) return false;
  const size_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
  if (item >= items) return false;
  run_chunk(item / chunks, item % chunks, scratch);
  finish_streaming_stores();
  if (states_[item / chunks].items_left.fetch_sub(1, std::memory_order_acq_rel) == 1)
    finish_page(item / chunks);
  return true;
}

void kvc_batch::run_chunk(size_t page_index, size_t chunk, Scratch& scratch) {
  const kvc_page& page = pages_[page_index];
  PageState& state = states_[page_index];
  const uint32_t first = chunk_starts_[chunk];
  const uint32_t end = chunk_starts_[chunk + 1];
  if (cancelled_.load(std::memory_order_relaxed))
    return record_failure(state, first, KVC_CANCELLED);
  if (const int status = begin_page(page, state)) return record_failure(state, 0, status);
  uint64_t offset = plan_.header_bytes;
  if (operation_ != KVC_ENCODE && !find_from_start(page, first, &offset))
    return record_failure(state, first, KVC_BAD_STREAM);
  for (uint32_t section = first; section < end && !failed_before(state, section); ++section) {
    const int status = operation_ == KVC_ENCODE
                           ? encode(page, state, section, end, &offset, scratch)
                           : decode(page, section, &offset, scratch);
    if (status != KVC_OK) return record_failure(state, section, status);
  }
  if (operation_ == KVC_ENCODE && plan_.size_offset != 0)
    store64(page.encoded + plan_.size_offset, offset);
}

// What has to hold before a section of the page is touched.
int kvc_batch::begin_page(const kvc_page& page, PageState& state) const {
  if (operation_ == KVC_ENCODE)
    return page.encoded_bytes < plan_.page_bytes ? KVC_BAD_LENGTH : KVC_OK;
  if (plan_.size_offset == 0) {
    if (page.encoded_bytes != plan_.page_bytes) return KVC_BAD_LENGTH;
  } else if (page.encoded_bytes < plan_.header_bytes ||
             page.encoded_bytes != load64(page.encoded + plan_.size_offset)) {
    return KVC_BAD_LENGTH;
  }
  // Workers that begin a page at the same time each look for themselves, and find the same.
  if (state.header_verified.load(std::memory_order_relaxed)) return KVC_OK;
  const int status = compare_header(page);
  if (status == KVC_OK) state.header_verified.store(true, std::memory_order_relaxed);
  return status;
}

int kvc_batch::compare_header(const kvc_page& page) const {
  for (const Span& span : spans_) {
    if (std::memcmp(page.encoded + span.start, plan_.header + span.start, span.bytes) != 0)
      return KVC_HEADER_DIFFERS;
  }
  if (std::memcmp(page.encoded + plan_.key_offset, page.key, plan_.key_bytes) != 0)
    return KVC_HEADER_DIFFERS;
  const size_t covered = plan_.header_bytes - kChecksumBytes;
  if (kernels_->checksum(page.encoded, covered) != load64(page.encoded + covered))
    return KVC_BAD_HEADER_CHECKSUM;
  if (plan_.size_offset == 0) return KVC_OK;
  uint64_t end;
  const bool fits =
      find_from_start(page, plan_.section_count, &end) && end == page.encoded_bytes;
  return fits ? KVC_OK : KVC_BAD_LENGTH;
}

// A section of a page that is read, given where it begins; false: it leaves the page. The sizes are
// read from the page each time, and whoever shares its memory may change them meanwhile.
bool kvc_batch::find(const kvc_page& page, uint32_t index, uint64_t offset, Place* place) const {
  const PlannedSection& section = sections_[index];
  const uint64_t stored = section.size_offset != 0 ? load32(page.encoded + section.size_offset)
                                                   : section.stored_bytes;
  *place = {offset, stored};
  return stored != 0 && stored <= section.stored_bytes &&
         offset + pad64(stored) <= page.encoded_bytes;
}

bool kvc_batch::find_from_start(const kvc_page& page, uint32_t section, uint64_t* offset) const {
  if (plan_.size_offset == 0) {
    *offset = section < plan_.section_count ? sections_[section].offset : plan_.page_bytes;
    return true;
  }
  *offset = plan_.header_bytes;
  for (uint32_t index = 0; index < section; ++index) {
    Place place;
    if (!find(page, index, *offset, &place)) return false;
    *offset += pad64(place.stored_bytes);
  }
  return true;
}

Rows kvc_batch::rows_of(const kvc_page& page, const PlannedSection& section) const {
  const kvc_stream& stream = streams_[section.stream];
  uint8_t* base = page.base[section.stream];
  return {operation_ == KVC_VERIFY ? nullptr : base + section.layer_offset,
          stream.head_count,
          plan_.token_count,
          stream.head_size,
          stream.group_heads,
          stream.group_stride,
          stream.head_stride,
          stream.token_stride};
}

const kvc_rotary* kvc_batch::rotary_of(const PlannedSection& section) const {
  return streams_[section.stream].is_rotated != 0 ? plan_.rotary : nullptr;
}

// Encodes a section into scratch, padded; its stored bytes, or 0 without memory.
size_t kvc_batch::encode_rows(const kvc_page& page, PageState& state, uint32_t index, uint32_t end,
                              Scratch& scratch, uint8_t** out) const {
  const PlannedSection& section = sections_[index];
  const size_t room = pad64(section.stored_bytes);
  const bool coded = section.size_offset != 0;
  *out = scratch.at_least(room + (coded ? kCodedScratchBytes : 0));
  if (*out == nullptr) return 0;
  const Rows rows = rows_of(page, section);
  const bool last = index + 1 == end;
  const Rows after = last ? rows : rows_of(page, sections_[index + 1]);
  const Rows* next = last ? nullptr : &after;
  if (coded) {
    const size_t stored =
        kernels_->encode_coded(section.codec, rows, next, rotary_of(section), *out + room, *out);
    if (stored != 0) return stored;
    kernels_->encode_section(raw_codec(section.codec), rows, next, *out);
    return section.stored_bytes;
  }
  const uint64_t outside = kernels_->encode_section(section.codec, rows, next, *out);
  if (outside != 0) state.nonfinite_groups.fetch_add(outside, std::memory_order_relaxed);
  return section.stored_bytes;
}

int kvc_batch::encode(const kvc_page& page, PageState& state, uint32_t index, uint32_t end,
                      uint64_t* offset, Scratch& scratch) const {
  const PlannedSection& section = sections_[index];
  uint8_t* out;
  const size_t stored = encode_rows(page, state, index, end, scratch, &out);
  if (stored == 0) return KVC_OUT_OF_MEMORY;
  if (plan_.size_offset == 0) *offset = section.offset;
  if (section.size_offset != 0)
    store32(page.encoded + section.size_offset, static_cast<uint32_t>(stored));
  store64(page.encoded + section.checksum_offset, kernels_->checksum(out, pad64(stored)));
  kernels_->copy_out(page.encoded + *offset, out, pad64(stored));
  *offset += pad64(stored);
  return KVC_OK;
}

int kvc_batch::decode(const kvc_page& page, uint32_t index, uint64_t* offset,
                      Scratch& scratch) const {
  const PlannedSection& section = sections_[index];
  Place place;
  if (!find(page, index, *offset, &place)) return KVC_BAD_STREAM;
  const uint8_t* in = page.encoded + place.offset;
  const size_t bytes = pad64(place.stored_bytes);
  *offset += bytes;
  if (kernels_->checksum(in, bytes) != load64(page.encoded + section.checksum_offset))
    return KVC_BAD_SECTION_CHECKSUM;
  if (!all_zero(in + place.stored_bytes, bytes - place.stored_bytes)) return KVC_BAD_PADDING;
  const Rows rows = rows_of(page, section);
  if (section.size_offset != 0 && place.stored_bytes < section.stored_bytes) {
    uint8_t* work = scratch.at_least(kCodedScratchBytes);
    if (work == nullptr) return KVC_OUT_OF_MEMORY;
    const bool sound = kernels_->decode_coded(section.codec, in, place.stored_bytes, rows,
                                              rotary_of(section), work);
    return sound ? KVC_OK : KVC_BAD_STREAM;
  }
  if (operation_ != KVC_DECODE) return KVC_OK;
  const bool raw = section.size_offset != 0;
  kernels_->decode_section(raw ? raw_codec(section.codec) : section.codec, in, rows);
  return KVC_OK;
}

// The section checksums are in their places already; everything around them is the same for all
// pages.
void kvc_batch::finish_header(const kvc_page& page) const {
  for (const Span& span : spans_)
    std::memcpy(page.encoded + span.start, plan_.header + span.start, span.bytes);
  std::memcpy(page.encoded + plan_.key_offset, page.key, plan_.key_bytes);
  const size_t covered = plan_.header_bytes - kChecksumBytes;
  store64(page.encoded + covered, kernels_->checksum(page.encoded, covered));
}

void kvc_batch::finish_page(size_t page_index) {
  kvc_page& page = pages_[page_index];
  const PageState& state = states_[page_index];
  const uint64_t failure = state.failure.load(std::memory_order_relaxed);
  if (operation_ == KVC_ENCODE && failure == kNoFailure) {
    finish_header(page);
    page.encoded_bytes = plan_.size_offset != 0 ? load64(page.encoded + plan_.size_offset)
                                                : plan_.page_bytes;
  }
  page.status = failure == kNoFailure ? KVC_OK : static_cast<int32_t>(failure & 0xFF);
  page.section = failure == kNoFailure ? 0 : static_cast<uint32_t>(failure >> 8);
  page.nonfinite_groups = state.nonfinite_groups.load(std::memory_order_relaxed);
  if (pages_left_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  // Under the lock, or a thread between its look at the flag and its sleep would never wake.
  const std::lock_guard<std::mutex> lock(mutex_);
  done_.store(true, std::memory_order_release);
  finished_.notify_all();
}
