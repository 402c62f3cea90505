// Exercises libkvcodec without Python, for sanitizers and emulators: round trips on every
// instruction set, damage, plans that lie, and one pool under many threads.
//
//   driver compare [cases]   every instruction set gives the bytes of "scalar", and touches nothing
//                            else
//   driver coded [cases]     the same for coded sections, and the same verdict on damaged ones
//   driver damage [cases]    a flipped byte anywhere is found, a wrong length is refused
//   driver plans             a plan that contradicts itself is refused
//   driver threads [rounds]  submit, wait, cancel and free from eight threads, destroy under load
//   driver all               all of them, briefly
//
// Prints a line per mode; exit status 1 and the case at the first difference.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <sstream>
#include <thread>

#include "case.h"

namespace driver {
namespace {

constexpr uint8_t kFills[2] = {0xAA, 0x55};
constexpr size_t kMargin = 64;
const uint8_t kKey[] = "0123456789abc";

[[noreturn]] void fail(const std::string& what, const Case& made) {
  std::fprintf(stderr, "FAILED: %s\n  %s, isa %s\n", what.c_str(), made.text().c_str(),
               kvc_current_isa());
  std::exit(1);
}

// One page with its memory: encoded bytes between margins, and host memory per stream.
struct Page {
  Buffer encoded;
  size_t shift;  // how far the encoded page is from 64-byte alignment, roughly
  std::vector<Buffer> hosts;
  kvc_page page{};

  Page(const Case& made, uint8_t fill, size_t shift_bytes, std::vector<Buffer> rows)
      : encoded(made.plan.page_bytes + 2 * kMargin, fill),
        shift(shift_bytes),
        hosts(std::move(rows)) {
    page.encoded = encoded.data() + shift;
    page.encoded_bytes = made.plan.page_bytes;
    page.key = kKey;
    for (size_t i = 0; i < hosts.size(); ++i)
      page.base[i] = hosts[i].data() + made.hosts[i].base_offset;
  }
};

std::vector<Buffer> filled_hosts(const Case& made, uint8_t fill) {
  std::vector<Buffer> hosts;
  for (const HostStream& host : made.hosts) hosts.emplace_back(host.buffer_bytes, fill);
  return hosts;
}

std::vector<Buffer> random_hosts(Random& random, const Case& made) {
  std::vector<Buffer> hosts;
  for (const HostStream& host : made.hosts) hosts.push_back(make_rows(random, made, host));
  return hosts;
}

std::vector<Buffer> copied(const std::vector<Buffer>& hosts) {
  std::vector<Buffer> copies;
  for (const Buffer& host : hosts) {
    copies.emplace_back(host.size(), uint8_t{0});
    std::memcpy(copies.back().data(), host.data(), host.size());
  }
  return copies;
}

void run(kvc_pool* pool, int operation, const Case& made, Page& page) {
  kvc_batch* batch = nullptr;
  if (kvc_submit(pool, operation, &made.plan, &page.page, 1, &batch) != KVC_DONE)
    fail("submit", made);
  while (kvc_batch_wait(batch, 1000000) == KVC_PENDING) {
  }
  kvc_batch_free(batch);
}

// Two runs over different fills: what differs was not written, and must be exactly what was not to
// be written.
void check_untouched(const Case& made, const Buffer& a, const Buffer& b, size_t written,
                     const char* what) {
  size_t differing = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a.data()[i] == b.data()[i]) continue;
    if (a.data()[i] != kFills[0] || b.data()[i] != kFills[1])
      fail(std::string(what) + " depends on the target", made);
    ++differing;
  }
  if (differing != a.size() - written)
    fail(std::string(what) + " wrote too much or too little", made);
}

struct Result {
  Buffer encoded;
  std::vector<Buffer> decoded;
  uint64_t nonfinite_groups;
};

Result round_trip(kvc_pool* pool, const Case& made, const std::vector<Buffer>& rows, size_t shift) {
  Page first(made, kFills[0], shift, copied(rows));
  Page second(made, kFills[1], shift, copied(rows));
  run(pool, KVC_ENCODE, made, first);
  run(pool, KVC_ENCODE, made, second);
  if (first.page.status != KVC_OK || second.page.status != KVC_OK) fail("encode", made);
  check_untouched(made, first.encoded, second.encoded, made.plan.page_bytes, "encode");
  for (size_t i = 0; i < rows.size(); ++i) {
    if (!(first.hosts[i] == rows[i])) fail("encode wrote to its input", made);
  }
  const uint64_t nonfinite_groups = first.page.nonfinite_groups;
  Page outs[2] = {Page(made, 0, shift, filled_hosts(made, kFills[0])),
                  Page(made, 0, shift, filled_hosts(made, kFills[1]))};
  for (Page& out : outs) {
    std::memcpy(out.page.encoded, first.page.encoded, made.plan.page_bytes);
    run(pool, KVC_DECODE, made, out);
    if (out.page.status != KVC_OK) fail("decode: status " + std::to_string(out.page.status), made);
  }
  for (size_t i = 0; i < made.hosts.size(); ++i) {
    check_untouched(made, outs[0].hosts[i], outs[1].hosts[i], made.hosts[i].raw_bytes, "decode");
  }
  return {std::move(first.encoded), std::move(outs[0].hosts), nonfinite_groups};
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  std::stringstream list(kvc_available_isas());
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

// Any bytes at all as sections, under checksums that are right: what a hostile writer can send.
void decode_any_bytes(kvc_pool* pool, Random& random, const Case& made) {
  Page page(made, 0, 0, filled_hosts(made, kFills[0]));
  run(pool, KVC_ENCODE, made, page);
  uint8_t* bytes = page.page.encoded;
  for (const kvc_section& section : made.sections) {
    // Many bytes near the largest exponents: where products overflow and parameters are not finite.
    for (uint64_t i = 0; i < section.stored_bytes; ++i) {
      const uint64_t bits = random();
      const uint8_t extreme = bits & 0x80 ? 0xFF : 0x7F;
      bytes[section.offset + i] = bits >> 8 & 3 ? static_cast<uint8_t>(bits) : extreme;
    }
    const uint64_t checksum =
        kvc_checksum(bytes + section.offset, (section.stored_bytes + 63) / 64 * 64);
    std::memcpy(bytes + section.checksum_offset, &checksum, 8);
  }
  const uint64_t checksum = kvc_checksum(bytes, made.plan.header_bytes - 8);
  std::memcpy(bytes + made.plan.header_bytes - 8, &checksum, 8);
  std::vector<Buffer> expected;
  for (const std::string& isa : isas()) {
    kvc_set_isa(isa.c_str());
    Page out(made, 0, 0, filled_hosts(made, kFills[0]));
    std::memcpy(out.page.encoded, bytes, made.plan.page_bytes);
    run(pool, KVC_DECODE, made, out);
    if (out.page.status != KVC_OK) fail("decode of any bytes", made);
    if (expected.empty())
      expected = std::move(out.hosts);
    else if (!(expected == out.hosts))
      fail("decode of any bytes differs from " + isas()[0], made);
  }
}

void compare(uint32_t cases) {
  kvc_pool* pool = kvc_pool_create(2);
  for (uint32_t seed = 0; seed < cases; ++seed) {
    Random random(seed);
    const auto made = make_case(random, seed % 16 == 15);
    const std::vector<Buffer> rows = random_hosts(random, *made);
    const size_t shift = pick(random, 0, 1) == 0 ? pick(random, 0, kMargin) : kMargin;
    kvc_set_isa("scalar");
    const Result expected = round_trip(pool, *made, rows, shift);
    for (const std::string& isa : isas()) {
      if (isa == "scalar") continue;
      kvc_set_isa(isa.c_str());
      const Result result = round_trip(pool, *made, rows, shift);
      if (!(result.encoded == expected.encoded))
        fail("encoded bytes differ, seed " + std::to_string(seed), *made);
      if (!(result.decoded == expected.decoded))
        fail("decoded bytes differ, seed " + std::to_string(seed), *made);
      if (result.nonfinite_groups != expected.nonfinite_groups)
        fail("groups outside the domain differ", *made);
    }
    decode_any_bytes(pool, random, *made);
  }
  kvc_pool_destroy(pool);
  std::printf("compare: %u cases on %s\n", cases, kvc_available_isas());
}

void damage(uint32_t cases) {
  kvc_pool* pool = kvc_pool_create(2);
  for (uint32_t seed = 0; seed < cases; ++seed) {
    Random random(1000 + seed);
    const auto made = make_case(random, false);
    Page page(*made, 0, 0, random_hosts(random, *made));
    run(pool, KVC_ENCODE, *made, page);
    for (uint32_t i = 0; i < 20; ++i) {
      uint8_t& byte = page.page.encoded[random() % made->plan.page_bytes];
      const uint8_t flip = static_cast<uint8_t>(1u << pick(random, 0, 7));
      byte ^= flip;
      for (const int operation : {KVC_DECODE, KVC_VERIFY}) {
        run(pool, operation, *made, page);
        if (page.page.status == KVC_OK) fail("a flipped bit was not found", *made);
      }
      byte ^= flip;
    }
    for (const uint64_t length :
         {uint64_t{0}, made->plan.page_bytes - 1, made->plan.page_bytes + 1}) {
      page.page.encoded_bytes = length;
      run(pool, KVC_DECODE, *made, page);
      if (page.page.status != KVC_BAD_LENGTH) fail("a wrong length was accepted", *made);
    }
    page.page.encoded_bytes = made->plan.page_bytes;
    run(pool, KVC_VERIFY, *made, page);
    if (page.page.status != KVC_OK) fail("a sound page was refused", *made);
  }
  kvc_pool_destroy(pool);
  std::printf("damage: %u pages\n", cases);
}

using Lie = std::function<void(Case&)>;

void plans() {
  const Lie lies[] = {
      [](Case& c) { c.plan.abi_version++; },
      [](Case& c) { c.plan.dtype = 0; },
      [](Case& c) { c.plan.dtype = 7; },
      [](Case& c) { c.plan.token_count++; },
      [](Case& c) { c.plan.token_count = 0; },
      [](Case& c) { c.plan.layer_count = 0; },
      [](Case& c) { c.plan.layer_count = 2000; },
      [](Case& c) { c.plan.stream_count = 0; },
      [](Case& c) { c.plan.stream_count = 5; },
      [](Case& c) { c.plan.section_count++; },
      [](Case& c) { c.plan.header_bytes++; },
      [](Case& c) { c.plan.header_bytes = 0; },
      [](Case& c) { c.plan.header_bytes = 1u << 20; },
      [](Case& c) { c.plan.key_bytes = 0; },
      [](Case& c) { c.plan.key_offset = UINT32_MAX; },
      [](Case& c) { c.plan.key_offset = c.plan.header_bytes - 8; },
      [](Case& c) { c.plan.key_offset = 70; },
      [](Case& c) { c.plan.size_offset = 16; },
      [](Case& c) { c.sections[0].size_offset = 76; },
      [](Case& c) { c.plan.page_bytes += 64; },
      [](Case& c) { c.plan.header = nullptr; },
      [](Case& c) { c.plan.streams = nullptr; },
      [](Case& c) { c.plan.sections = nullptr; },
      [](Case& c) { c.streams[0].head_count = 0; },
      [](Case& c) { c.streams[0].head_size = UINT32_MAX; },
      [](Case& c) { c.streams[0].group_heads = 0; },
      [](Case& c) { c.streams[0].is_rotated = 2; },
      [](Case& c) { c.streams[0].layer_stride = INT64_MAX; },
      [](Case& c) { c.streams[0].token_stride = INT64_MIN; },
      [](Case& c) { c.sections[0].kind = 5; },
      [](Case& c) { c.sections[0].bits = 3; },
      [](Case& c) { c.sections[0].options = 4; },
      [](Case& c) { c.sections[0].reserved = 1; },
      [](Case& c) { c.sections[0].group_size = UINT32_MAX; },
      [](Case& c) { c.sections[0].offset += 64; },
      [](Case& c) { c.sections[0].stored_bytes++; },
      [](Case& c) { c.sections[0].stored_bytes = UINT64_MAX; },
      [](Case& c) { c.sections[0].checksum_offset = c.plan.header_bytes - 8; },
      [](Case& c) { c.sections[0].checksum_offset = UINT64_MAX; },
      [](Case& c) { c.sections[0].checksum_offset = c.plan.key_offset; },
  };
  kvc_pool* pool = kvc_pool_create(1);
  for (size_t i = 0; i < sizeof lies / sizeof *lies; ++i) {
    Random random(7);
    auto made = make_case(random, true);
    Page page(*made, 0, 0, random_hosts(random, *made));
    lies[i](*made);
    kvc_batch* batch = nullptr;
    const int result = kvc_submit(pool, KVC_ENCODE, &made->plan, &page.page, 1, &batch);
    if (result != KVC_BAD_ARGUMENT || batch != nullptr)
      fail("lie " + std::to_string(i) + " was believed", *made);
  }
  Random random(7);
  auto made = make_case(random, true);
  Page page(*made, 0, 0, random_hosts(random, *made));
  kvc_batch* batch = nullptr;
  const kvc_page sound = page.page;
  const std::function<void(kvc_page&)> page_lies[] = {[](kvc_page& p) { p.encoded = nullptr; },
                                                      [](kvc_page& p) { p.key = nullptr; },
                                                      [](kvc_page& p) { p.base[0] = nullptr; }};
  for (const auto& lie : page_lies) {
    kvc_page wrong = sound;
    lie(wrong);
    if (kvc_submit(pool, KVC_ENCODE, &made->plan, &wrong, 1, &batch) != KVC_BAD_ARGUMENT)
      fail("a null page", *made);
  }
  if (kvc_submit(pool, 3, &made->plan, &page.page, 1, &batch) != KVC_BAD_ARGUMENT ||
      kvc_submit(nullptr, KVC_ENCODE, &made->plan, &page.page, 1, &batch) != KVC_BAD_ARGUMENT ||
      kvc_pool_create(0) != nullptr || kvc_pool_create(65) != nullptr) {
    fail("a wrong argument was believed", *made);
  }
  kvc_pool_destroy(pool);
  std::printf("plans: %zu lies refused\n", sizeof lies / sizeof *lies + 7);
}

// One thread's part: batches of several pages, some cancelled, some not waited for.
void submit_and_check(kvc_pool* pool, const Case& made, uint32_t rounds, uint32_t seed) {
  Random random(seed);
  std::vector<Page> pages;
  for (int i = 0; i < 3; ++i)
    pages.emplace_back(made, uint8_t{0}, size_t{0}, random_hosts(random, made));
  for (uint32_t round = 0; round < rounds; ++round) {
    std::vector<kvc_page> list;
    for (const Page& page : pages) list.push_back(page.page);
    kvc_batch* batch = nullptr;
    if (kvc_submit(pool, KVC_ENCODE, &made.plan, list.data(), list.size(), &batch) != KVC_DONE)
      fail("submit", made);
    kvc_batch_free(batch);
    for (const kvc_page& page : list) {
      if (page.status != KVC_OK) fail("encode in a crowd", made);
    }
    if (kvc_submit(pool, KVC_DECODE, &made.plan, list.data(), list.size(), &batch) != KVC_DONE)
      fail("submit", made);
    const bool cancel = pick(random, 0, 2) == 0;
    if (cancel) kvc_batch_cancel(batch);
    while (kvc_batch_wait(batch, pick(random, 0, 1) * 50) == KVC_PENDING) {
    }
    kvc_batch_free(batch);
    for (const kvc_page& page : list) {
      if (page.status != KVC_OK && !(cancel && page.status == KVC_CANCELLED))
        fail("decode in a crowd", made);
    }
  }
}

void threads(uint32_t rounds) {
  for (uint32_t turn = 0; turn < 3; ++turn) {
    kvc_pool* pool = kvc_pool_create(4);
    std::vector<std::unique_ptr<Case>> cases;
    std::vector<std::thread> crowd;
    for (uint32_t i = 0; i < 8; ++i) {
      Random random(100 * turn + i);
      cases.push_back(make_case(random, i % 4 == 0));
    }
    for (uint32_t i = 0; i < 8; ++i) {
      crowd.emplace_back([&, i] { submit_and_check(pool, *cases[i], rounds, i); });
    }
    for (std::thread& thread : crowd) thread.join();
    // Destroying the pool finishes what is queued; the batch outlives it.
    Random random(turn);
    Page page(*cases[0], 0, 0, random_hosts(random, *cases[0]));
    kvc_batch* batch = nullptr;
    if (kvc_submit(pool, KVC_ENCODE, &cases[0]->plan, &page.page, 1, &batch) != KVC_DONE)
      fail("submit", *cases[0]);
    kvc_pool_destroy(pool);
    if (kvc_batch_wait(batch, 0) != KVC_DONE || page.page.status != KVC_OK)
      fail("destroy left work", *cases[0]);
    kvc_batch_free(batch);
  }
  std::printf("threads: 3 pools of 4, 8 threads each, %u rounds\n", rounds);
}

int main_of(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "all";
  const uint32_t number =
      count > 2 ? static_cast<uint32_t>(std::strtoul(arguments[2], nullptr, 10)) : 0;
  const bool all = mode == "all";
  if (!all && mode != "compare" && mode != "coded" && mode != "damage" && mode != "plans" &&
      mode != "threads") {
    std::fprintf(stderr,
                 "usage: driver all | compare [cases] | coded [cases] | damage [cases] | plans | "
                 "threads [rounds]\n");
    return 2;
  }
  if (all || mode == "compare") compare(number ? number : 300);
  if (all || mode == "coded") compare_coded(number ? number : 60);
  if (all || mode == "damage") damage(number ? number : 60);
  if (all || mode == "plans") plans();
  if (all || mode == "threads") threads(number ? number : 20);
  return 0;
}

}  // namespace
}  // namespace driver

int main(int count, char** arguments) { return driver::main_of(count, arguments); }
