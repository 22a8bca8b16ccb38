// Batches made ahead of time, in memory that is used again and again.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "replay/buffer.h"

namespace phyx::replay {

// A ring of slots, each the memory of one batch. Which sequences a batch holds is decided in `next`, by the caller's
// thread and in order, so it does not depend on the workers; these only copy. A slot belongs to the caller from the
// `next` that returns it until the following one.
class Loader {
 public:
  // Without threads, `next` copies by itself and one slot is enough; else there are at least two.
  Loader(std::shared_ptr<Buffer> buffer, std::size_t batch, std::size_t length, SampleOptions options,
         std::vector<Outputs> slots, std::size_t threads);
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // The slot with the next batch. Throws what Buffer::draw throws, and ClosedError after `close`.
  std::size_t next(const Poll& poll);
  // Whether `next` would return without waiting for steps or for the limiter.
  bool ready();
  // Ends the workers. What was drawn and not yet taken is dropped.
  void close();

 private:
  struct Job {
    std::size_t slot;
    Draw draw;
    std::size_t taken = 0, done = 0;  // sequences
  };

  void work();
  void submit(std::size_t slot, Draw draw);

  const std::shared_ptr<Buffer> buffer_;
  const std::size_t batch_, length_;
  const SampleOptions options_;
  const std::vector<Outputs> slots_;

  std::mutex one_caller_;  // of next
  std::mutex one_closer_;
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_, done_;
  std::deque<std::shared_ptr<Job>> jobs_;  // in the order of their batches
  std::vector<std::size_t> free_;
  bool closed_ = false;
  std::size_t held_;  // the slot the caller has, or none: slots_.size()
  std::vector<std::thread> workers_;
};

}  // namespace phyx::replay
