// Where the episodes of one env begin.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>

namespace phyx::replay {

struct Span {
  std::uint64_t first;
  std::uint64_t end;  // one past the last step
};

class Episodes {
 public:
  // The step that follows all added before; `step` counts from 0 in its env.
  void add(std::uint64_t step, bool is_first, bool is_last) {
    if (is_first || begins_.empty()) {
      if (begins_.empty()) headless_ = !is_first;
      begins_.push_back(step);
    }
    end_ = step + 1;
    ended_ = is_last;
  }

  // Steps before `begin` are gone.
  void evict(std::uint64_t begin) {
    while (begins_.size() > 1 && begins_[1] <= begin) {
      begins_.pop_front();
      headless_ = false;
    }
    if (begins_.front() < begin) headless_ = true;
  }

  // Episodes of which every step is there.
  std::size_t complete() const {
    const std::size_t missing = std::size_t(headless_) + std::size_t(!ended_);
    return begins_.size() > missing ? begins_.size() - missing : 0;
  }
  Span complete(std::size_t index) const { return span(index + std::size_t(headless_)); }

  // All of them, those that lost their beginning or still go on included.
  std::size_t count() const { return begins_.size(); }
  Span span(std::size_t index) const {
    return {begins_[index], index + 1 < begins_.size() ? begins_[index + 1] : end_};
  }

  // The episode that holds `step`.
  Span around(std::uint64_t step) const {
    const auto after = std::upper_bound(begins_.begin(), begins_.end(), step);
    return span(std::size_t(after - begins_.begin()) - 1);
  }

 private:
  std::deque<std::uint64_t> begins_;
  std::uint64_t end_ = 0;
  bool headless_ = false;  // the front one began before the steps that are there
  bool ended_ = false;     // the newest step is the last of its episode
};

}  // namespace phyx::replay
