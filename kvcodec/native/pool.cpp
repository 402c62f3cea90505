// A small bounded pool of its own: OpenMP's is not fork-safe, spins on the engine's cores, and is
// shared with whoever else uses it in the process.
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <new>
#include <vector>

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "batch.h"
#include "kvcodec.h"

namespace kvc {
namespace {

constexpr uint32_t kMaxThreads = 64;

// A thread inherits the floating-point mode of its creator, and torch.set_flush_denormal(True) is a
// thing: the kernels need denormals, and rounding to nearest.
void set_default_float_mode() {
#if defined(__x86_64__)
  _mm_setcsr(0x1F80);
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
#endif
}

// Workers and their queue. They belong to the process that made them: after a fork the child leaves
// them as they are, locks included, and makes its own.
class Workers {
 public:
  explicit Workers(uint32_t limit) : process_(getpid()), limit_(limit) { threads_.reserve(limit); }
  ~Workers();

  bool belong_here() const { return process_ == getpid(); }
  // Takes over one reference to the batch if there is a worker to do it.
  bool add(kvc_batch* batch);

 private:
  static void* run(void* self);
  void work();
  kvc_batch* wait_for_batch();
  void retire(kvc_batch* batch);
  bool start_worker();

  const pid_t process_;
  const uint32_t limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<pthread_t> threads_;
  kvc_batch* first_ = nullptr;
  kvc_batch* last_ = nullptr;
  bool ending_ = false;
};

Workers::~Workers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
}

bool Workers::add(kvc_batch* batch) {
  const size_t items = batch->item_count();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (threads_.size() < limit_ && threads_.size() < items && start_worker()) {
    }
    if (threads_.empty()) return false;
    (last_ != nullptr ? last_->next : first_) = batch;
    last_ = batch;
  }
  items == 1 ? changed_.notify_one() : changed_.notify_all();
  return true;
}

bool Workers::start_worker() {
  // A handler of the host process must never run on a worker: Python's, for one, expects a thread
  // it knows.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pthread_t thread;
  const bool started = pthread_create(&thread, nullptr, run, this) == 0;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (!started) return false;
  char name[16];
  std::snprintf(name, sizeof name, "kvcodec-%zu", threads_.size());
  pthread_setname_np(thread, name);
  threads_.push_back(thread);
  return true;
}

void* Workers::run(void* self) {
  set_default_float_mode();
  static_cast<Workers*>(self)->work();
  return nullptr;
}

void Workers::work() {
  Scratch scratch;
  while (kvc_batch* batch = wait_for_batch()) {
    while (batch->run_next(scratch)) {
    }
    retire(batch);
    batch->release();
  }
}

// The oldest batch that may have items left, with a reference; nullptr: go home.
kvc_batch* Workers::wait_for_batch() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (first_ == nullptr && !ending_) changed_.wait(lock);
  if (first_ != nullptr) first_->retain();
  return first_;
}

void Workers::retire(kvc_batch* batch) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (first_ != batch) return;  // another worker was here before
    first_ = batch->next;
    if (first_ == nullptr) last_ = nullptr;
  }
  batch->release();
}

}  // namespace
}  // namespace kvc

struct kvc_pool {
  explicit kvc_pool(uint32_t threads) : limit(threads) {}

  // Makes the workers of this process if there are none; nullptr: no memory.
  kvc::Workers* workers_here();

  const uint32_t limit;
  std::atomic<kvc::Workers*> workers{nullptr};
};

kvc::Workers* kvc_pool::workers_here() {
  kvc::Workers* known = workers.load(std::memory_order_acquire);
  if (known != nullptr && known->belong_here()) return known;
  kvc::Workers* made = nullptr;
  try {
    made = new kvc::Workers(limit);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  // What a parent left is not freed: a lock that one of its threads held can be neither taken nor
  // destroyed.
  if (workers.compare_exchange_strong(known, made, std::memory_order_acq_rel)) return made;
  delete made;
  return known;
}

extern "C" {

kvc_pool* kvc_pool_create(uint32_t threads) {
  if (threads == 0 || threads > kvc::kMaxThreads) return nullptr;
  return new (std::nothrow) kvc_pool(threads);
}

void kvc_pool_destroy(kvc_pool* pool) {
  if (pool == nullptr) return;
  kvc::Workers* workers = pool->workers.load(std::memory_order_acquire);
  if (workers != nullptr && workers->belong_here()) delete workers;
  delete pool;
}

int kvc_submit(kvc_pool* pool, int operation, const kvc_plan* plan, kvc_page* pages,
               size_t page_count, kvc_batch** batch) {
  if (pool == nullptr || plan == nullptr || batch == nullptr) return KVC_BAD_ARGUMENT;
  kvc_batch* made;
  const int result = kvc_batch::make(operation, *plan, pages, page_count, &made);
  if (result != KVC_DONE) return result;
  if (!made->is_done()) {
    kvc::Workers* workers = pool->workers_here();
    made->retain();
    if (workers == nullptr || !workers->add(made)) {
      made->release();
      made->release();
      return KVC_NO_MEMORY;
    }
  }
  *batch = made;
  return KVC_DONE;
}

int kvc_batch_wait(kvc_batch* batch, uint64_t timeout_us) {
  return batch != nullptr ? batch->wait(timeout_us) : KVC_BAD_ARGUMENT;
}

void kvc_batch_cancel(kvc_batch* batch) {
  if (batch != nullptr) batch->cancel();
}

void kvc_batch_free(kvc_batch* batch) {
  if (batch == nullptr) return;
  while (batch->wait(UINT64_MAX) == KVC_PENDING) {
  }
  // A parent's unfinished batch is left alone like its workers.
  if (batch->is_done()) batch->release();
}

}  // extern "C"
