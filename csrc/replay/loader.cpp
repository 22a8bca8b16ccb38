#include "replay/loader.h"

#include <algorithm>
#include <chrono>

namespace phyx::replay {

Loader::Loader(std::shared_ptr<Buffer> buffer, std::size_t batch, std::size_t length, SampleOptions options,
               std::vector<Outputs> slots, std::size_t threads)
    : buffer_(std::move(buffer)),
      batch_(batch),
      length_(length),
      options_(options),
      slots_(std::move(slots)),
      held_(slots_.size()) {
  for (std::size_t slot = slots_.size(); slot-- > 0;) free_.push_back(slot);
  for (std::size_t i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Loader::~Loader() { close(); }

void Loader::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    const auto unfinished = [&] {
      return std::find_if(jobs_.begin(), jobs_.end(), [&](const auto& job) { return job->taken < batch_; });
    };
    wake_.wait(lock, [&] { return closed_ || unfinished() != jobs_.end(); });
    const auto found = unfinished();
    if (found == jobs_.end()) return;  // closed, and nothing is left to copy
    const std::shared_ptr<Job> job = *found;
    const std::size_t index = job->taken++;
    lock.unlock();
    buffer_->copy(job->draw, index, slots_[job->slot]);
    lock.lock();
    if (++job->done < batch_) continue;
    lock.unlock();
    buffer_->finish(job->draw);
    lock.lock();
    job->done = batch_ + 1;
    done_.notify_all();
  }
}

void Loader::submit(std::size_t slot, Draw draw) {
  const std::lock_guard lock(mutex_);
  if (closed_) {
    buffer_->finish(draw);
    throw ClosedError("the loader was closed");
  }
  free_.erase(std::find(free_.begin(), free_.end(), slot));
  jobs_.push_back(std::make_shared<Job>(Job{slot, std::move(draw)}));
  wake_.notify_all();
}

std::size_t Loader::next(const Poll& caller_poll) {
  const std::lock_guard one(one_caller_);
  const auto check_open = [&] {
    const std::lock_guard lock(mutex_);
    if (closed_) throw ClosedError("the loader was closed");
  };
  const Poll poll = [&] {
    check_open();
    if (caller_poll) caller_poll();
  };
  check_open();
  {
    const std::lock_guard lock(mutex_);
    if (held_ < slots_.size()) free_.push_back(held_);
    held_ = slots_.size();
  }
  if (workers_.empty()) {
    buffer_->sample(batch_, length_, options_, slots_[0], poll);
    return 0;
  }
  for (;;) {
    std::size_t slot;
    bool none;
    {
      const std::lock_guard lock(mutex_);
      if (free_.empty()) break;
      slot = free_.back();
      none = jobs_.empty();
    }
    if (none) {
      submit(slot, buffer_->draw(batch_, length_, options_, poll));
    } else if (auto draw = buffer_->try_draw(batch_, length_, options_)) {
      submit(slot, std::move(*draw));
    } else {
      break;
    }
  }
  std::unique_lock lock(mutex_);
  const std::shared_ptr<Job> job = jobs_.front();
  done_.wait(lock, [&] { return job->done > batch_; });
  jobs_.pop_front();
  return held_ = job->slot;
}

bool Loader::ready() {
  {
    const std::lock_guard lock(mutex_);
    if (!jobs_.empty()) return true;
  }
  return buffer_->ready(batch_, length_);
}

void Loader::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    wake_.notify_all();
  }
  const std::lock_guard one(one_closer_);
  for (std::thread& worker : workers_)
    if (worker.joinable()) worker.join();
}

}  // namespace phyx::replay
