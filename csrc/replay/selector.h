// Which sequence comes next: uniform, recent or prioritised ones, or a mixture.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "replay/random.h"
#include "replay/ring.h"
#include "replay/sum_tree.h"

namespace phyx::replay {

struct SelectorConfig {
  // Shares of the mixture: at least one is positive; they need not add up to 1.
  double uniform = 1, recency = 0, priority = 0;
  double recency_exponent = 1;
  // Priority of a step. Plain: value^exponent. Curious Replay (Kauvar et al. 2023): c·beta^visits + (value + ε)^exponent.
  bool curious = false;
  double exponent = 1;
  double initial = 0;  // value (plain) or priority (curious) of a new step; 0: the largest value given so far
  double c = 0, beta = 0, epsilon = 0;

  bool plain_uniform() const { return recency == 0 && priority == 0; }
};

struct Start {
  std::size_t env;
  std::uint64_t step;
};

// All methods are called under the buffer's lock.
class Selector {
 public:
  Selector(const SelectorConfig& config, const std::vector<Ring>& rings);

  const SelectorConfig& config() const { return config_; }

  void added(std::size_t env, std::uint64_t step);
  // Throws nothing: `value` is finite and not negative.
  void prioritize(std::size_t env, std::uint64_t step, double value);

  // Looks at what is stored, O(envs); draws until the next call are of sequences of `length` steps.
  void assign(std::size_t length);
  std::uint64_t total() const { return total_; }

  // Needs total() > 0.
  Start draw(Random& random) const;
  // A sequence that lies in one episode; nothing when there is none.
  std::optional<Start> draw_within_episodes(Random& random) const;
  // How likely `draw` is to give this sequence.
  double probability(const Start& start) const;

  // For snapshots; empty without priorities.
  struct Priority {
    double priority;
    std::uint64_t visits;
  };
  bool has_priorities() const { return !trees_.empty(); }
  Priority get(std::size_t env, std::uint64_t step) const;
  void set(std::size_t env, std::uint64_t step, Priority priority);
  double largest() const { return largest_; }
  void set_largest(double value) { largest_ = value; }

 private:
  enum class Kind { kUniform, kRecency, kPriority };
  Kind pick_kind(Random& random) const;
  Start draw_uniform(Random& random) const;
  Start draw_recent(Random& random) const;
  Start draw_step(Random& random) const;
  std::optional<Start> draw_uniform_within_episodes(Random& random) const;
  std::uint64_t windows_of(const Ring& ring, std::uint64_t step) const;

  const SelectorConfig config_;
  const std::vector<Ring>& rings_;
  std::size_t length_ = 1;
  // One entry per env, each the running total up to and with this env.
  std::vector<std::uint64_t> starts_until_;
  std::vector<double> recency_until_, priority_until_;
  std::vector<std::size_t> guide_;  // first env of every slice of `slice_` starts
  std::uint64_t total_ = 0;
  std::uint64_t slice_ = 1;
  std::vector<double> harmonic_;  // harmonic_[n]: sum of age^-exponent over the ages 1 to n
  std::vector<SumTree> trees_;    // per env, a leaf per row
  std::vector<std::vector<std::uint32_t>> visits_;
  double largest_ = 0;
};

}  // namespace phyx::replay
