// Chooses one table of kernels at run time.
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "dispatch.h"
#include "kvcodec.h"

namespace kvc {
namespace {

constexpr size_t kMaxTables = 4;

// Best first.
size_t list_tables(const Kernels** tables) {
  size_t count = 0;
#if defined(__x86_64__)
  if (const Kernels* kernels = avx512_kernels()) tables[count++] = kernels;
  if (const Kernels* kernels = avx2_kernels()) tables[count++] = kernels;
#elif defined(__aarch64__)
  if (const Kernels* kernels = neon_kernels()) tables[count++] = kernels;
#endif
  tables[count++] = &kScalarKernels;
  return count;
}

const Kernels* find_table(const char* name) {
  const Kernels* tables[kMaxTables];
  const size_t count = list_tables(tables);
  for (size_t i = 0; i < count; ++i) {
    if (std::strcmp(tables[i]->name, name) == 0) return tables[i];
  }
  return nullptr;
}

// Stands for "the environment names an instruction set that is not there". It is not replaced by
// another one in silence: whoever forces a path wants to know that it is not the one that ran.
constexpr Kernels kNoKernels{"", nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};

std::atomic<const Kernels*> current{nullptr};

const Kernels* first_choice() {
  const char* forced = std::getenv("KVCODEC_FORCE_ISA");
  if (forced != nullptr && *forced != '\0') {
    const Kernels* kernels = find_table(forced);
    return kernels != nullptr ? kernels : &kNoKernels;
  }
  const Kernels* tables[kMaxTables];
  list_tables(tables);
  return tables[0];
}

const Kernels* current_table() {
  const Kernels* kernels = current.load(std::memory_order_acquire);
  if (kernels != nullptr) return kernels;
  // Threads that meet here find the same answer; one that called kvc_set_isa meanwhile keeps its
  // own.
  const Kernels* choice = first_choice();
  return current.compare_exchange_strong(kernels, choice) ? choice : kernels;
}

std::array<char, 64> join_names() {
  const Kernels* tables[kMaxTables];
  const size_t count = list_tables(tables);
  std::array<char, 64> names{};
  for (size_t i = 0; i < count; ++i) {
    if (i > 0) std::strncat(names.data(), ",", names.size() - std::strlen(names.data()) - 1);
    std::strncat(names.data(), tables[i]->name, names.size() - std::strlen(names.data()) - 1);
  }
  return names;
}

}  // namespace

const Kernels* current_kernels() {
  const Kernels* kernels = current_table();
  return kernels == &kNoKernels ? nullptr : kernels;
}

}  // namespace kvc

extern "C" {

uint32_t kvc_abi_version(void) { return KVC_ABI_VERSION; }

const char* kvc_available_isas(void) {
  static const std::array<char, 64> names = kvc::join_names();
  return names.data();
}

const char* kvc_current_isa(void) { return kvc::current_table()->name; }

int kvc_set_isa(const char* name) {
  const kvc::Kernels* kernels = name != nullptr ? kvc::find_table(name) : nullptr;
  if (kernels == nullptr) return KVC_UNKNOWN_ISA;
  kvc::current.store(kernels, std::memory_order_release);
  return KVC_DONE;
}

uint64_t kvc_checksum(const void* data, size_t bytes) {
  const kvc::Kernels* kernels = kvc::current_kernels();
  return (kernels != nullptr ? kernels : &kvc::kScalarKernels)->checksum(data, bytes);
}

}  // extern "C"
