// Which sequence comes next. A selector is told how many valid starts each env has, then draws.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "replay/random.h"

namespace phyx::replay {

struct Start {
  std::size_t env;
  std::uint64_t offset;  // steps after the oldest one the env still has
};

// Every valid start of every env with the same probability.
class UniformSelector {
 public:
  // O(envs).
  void assign(const std::vector<std::uint64_t>& starts) {
    starts_until_.clear();
    total_ = 0;
    for (const std::uint64_t count : starts) starts_until_.push_back(total_ += count);
    slice_ = (total_ + starts.size() - 1) / starts.size();
    guide_.clear();
    std::size_t env = 0;
    for (std::uint64_t first = 0; first < total_; first += slice_) {
      while (starts_until_[env] <= first) ++env;
      guide_.push_back(env);
    }
  }

  std::uint64_t total() const { return total_; }

  // O(1) expected, however uneven the envs: there are as many slices as envs, so on average a slice meets at most two.
  Start draw(Random& random) const {
    const std::uint64_t pick = random.below(total_);
    std::size_t env = guide_[pick / slice_];
    while (starts_until_[env] <= pick) ++env;
    return {env, pick - (env == 0 ? 0 : starts_until_[env - 1])};
  }

 private:
  std::vector<std::uint64_t> starts_until_;  // running total, this env included
  std::vector<std::size_t> guide_;           // first env of every slice of `slice_` starts
  std::uint64_t total_ = 0;
  std::uint64_t slice_ = 0;
};

}  // namespace phyx::replay
