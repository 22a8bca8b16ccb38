#include "parallel.h"

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace phyx {
namespace {

constexpr auto kLinger = std::chrono::microseconds(100);

struct Job {
  void (*body)(void*, int64_t);
  void* context;
  int64_t items;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
  }
};

class Pool {
 public:
  std::mutex one_caller;

  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; workers_ < helpers; ++workers_) std::thread([this] { loop(); }).detach();
      } catch (const std::system_error&) {
        // No more threads to be had: the work is shared by fewer.
      }
      job_ = &job;
      seats_ = helpers;
    }
    helpers == 1 ? wake_.notify_one() : wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;  // whoever wakes from here on goes back to sleep
      seats_ = 0;
    }
    while (busy_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
    for (;;) {
      linger();
      lock.lock();
      wake_.wait(lock, [this] { return job_ != nullptr && seats_ > 0; });
      Job* job = job_;
      --seats_;
      busy_.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  // A thread that sleeps takes tens of microseconds to wake: stay up for a moment, since the steps of a scan follow
  // each other closely. Yielding leaves the core to whoever else wants it.
  void linger() const {
    const auto until = std::chrono::steady_clock::now() + kLinger;
    while (seats_.load(std::memory_order_relaxed) == 0 && std::chrono::steady_clock::now() < until)
      std::this_thread::yield();
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  int workers_ = 0;
  std::atomic<int> seats_{0};  // how many more workers may join the job; written under the mutex
  Job* job_ = nullptr;
  std::atomic<int> busy_{0};
};

// Never destroyed: detached workers sleep in it until the process ends. A forked child has none, so it starts anew.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  auto* made = new Pool;
  if (!pool.compare_exchange_strong(found, made)) {
    delete made;
    return *found;
  }
#if !defined(_WIN32)
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); }); });
#endif
  return *made;
}

}  // namespace

void run_parallel(int64_t items, int threads, void (*body)(void*, int64_t), void* context) {
  Job job{body, context, items};
  Pool& shared = the_pool();
  std::unique_lock<std::mutex> turn(shared.one_caller, std::try_to_lock);
  if (!turn) return job.work();
  shared.run(job, static_cast<int>(std::min<int64_t>(threads, items)) - 1);
}

}  // namespace phyx
