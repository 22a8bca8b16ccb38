#include "replay/selector.h"

#include <algorithm>
#include <cmath>

namespace phyx::replay {
namespace {

// The env whose stretch of the running totals holds `at`.
std::size_t stretch(const std::vector<double>& until, double at) {
  std::size_t env = std::size_t(std::upper_bound(until.begin(), until.end(), at) - until.begin());
  // Rounding can bring `at` to the very end, behind the last env that has anything.
  if (env == until.size()) env = std::size_t(std::lower_bound(until.begin(), until.end(), until.back()) - until.begin());
  return env;
}

double before(const std::vector<double>& until, std::size_t env) { return env == 0 ? 0.0 : until[env - 1]; }

}  // namespace

Selector::Selector(const SelectorConfig& config, const std::vector<Ring>& rings) : config_(config), rings_(rings) {
  if (config.recency > 0) {
    harmonic_.push_back(0);
    const std::size_t most = rings[0].rows;  // env 0 has the most room
    for (std::size_t age = 1; age <= most; ++age)
      harmonic_.push_back(harmonic_.back() + std::pow(double(age), -config.recency_exponent));
  }
  if (config.priority > 0) {
    for (const Ring& ring : rings) {
      trees_.emplace_back(ring.rows);
      if (config.curious) visits_.emplace_back(ring.rows, 0);
    }
  }
}

void Selector::added(std::size_t env, std::uint64_t step) {
  if (trees_.empty()) return;
  const std::size_t row = step % rings_[env].rows;
  if (config_.curious) {
    visits_[env][row] = 0;
    trees_[env].set(row, config_.initial);
  } else {
    const double value = config_.initial > 0 ? config_.initial : largest_ > 0 ? largest_ : 1;
    trees_[env].set(row, std::pow(value, config_.exponent));
  }
}

void Selector::prioritize(std::size_t env, std::uint64_t step, double value) {
  const std::size_t row = step % rings_[env].rows;
  if (config_.curious) {
    const double visits = double(++visits_[env][row]);
    trees_[env].set(row, config_.c * std::pow(config_.beta, visits) + std::pow(value + config_.epsilon, config_.exponent));
  } else {
    largest_ = std::max(largest_, value);
    trees_[env].set(row, std::pow(value, config_.exponent));
  }
}

void Selector::assign(std::size_t length) {
  length_ = length;
  starts_until_.clear();
  recency_until_.clear();
  priority_until_.clear();
  total_ = 0;
  double recency = 0, priority = 0;
  for (std::size_t env = 0; env < rings_.size(); ++env) {
    const std::uint64_t count = rings_[env].starts(length);
    starts_until_.push_back(total_ += count);
    if (!harmonic_.empty()) recency_until_.push_back(recency += harmonic_[count]);
    if (!trees_.empty()) priority_until_.push_back(priority += count > 0 ? trees_[env].total() : 0);
  }
  slice_ = std::max<std::uint64_t>(1, (total_ + rings_.size() - 1) / rings_.size());
  guide_.clear();
  std::size_t env = 0;
  for (std::uint64_t first = 0; first < total_; first += slice_) {
    while (starts_until_[env] <= first) ++env;
    guide_.push_back(env);
  }
}

Selector::Kind Selector::pick_kind(Random& random) const {
  const bool has_mass = !priority_until_.empty() && priority_until_.back() > 0;
  if (config_.plain_uniform()) return Kind::kUniform;
  double at = (config_.uniform + config_.recency + config_.priority) * random.unit();
  if ((at -= config_.uniform) < 0) return Kind::kUniform;
  if ((at -= config_.recency) < 0 || config_.priority == 0) return config_.recency > 0 ? Kind::kRecency : Kind::kUniform;
  return has_mass ? Kind::kPriority : Kind::kUniform;
}

Start Selector::draw(Random& random) const {
  switch (pick_kind(random)) {
    case Kind::kRecency: return draw_recent(random);
    case Kind::kPriority: {
      const Start at = draw_step(random);
      // Any of the sequences that hold this step.
      const Ring& ring = rings_[at.env];
      const std::uint64_t highest = std::min<std::uint64_t>(at.step, ring.end - length_);
      return {at.env, highest - random.below(windows_of(ring, at.step))};
    }
    default: return draw_uniform(random);
  }
}

// O(1) expected, however uneven the envs: there are as many slices as envs, so on average a slice meets at most two.
Start Selector::draw_uniform(Random& random) const {
  const std::uint64_t pick = random.below(total_);
  std::size_t env = guide_[pick / slice_];
  while (starts_until_[env] <= pick) ++env;
  return {env, rings_[env].begin() + pick - (env == 0 ? 0 : starts_until_[env - 1])};
}

Start Selector::draw_recent(Random& random) const {
  const double at = random.unit() * recency_until_.back();
  const std::size_t env = stretch(recency_until_, at);
  const std::uint64_t count = rings_[env].starts(length_);
  const auto first = harmonic_.begin() + 1;
  const auto found = std::upper_bound(first, first + std::ptrdiff_t(count), at - before(recency_until_, env));
  const std::uint64_t newer = std::min<std::uint64_t>(std::uint64_t(found - first), count - 1);
  return {env, rings_[env].begin() + (count - 1 - newer)};
}

Start Selector::draw_step(Random& random) const {
  const double at = random.unit() * priority_until_.back();
  const std::size_t env = stretch(priority_until_, at);
  const Ring& ring = rings_[env];
  const std::uint64_t row = trees_[env].find(at - before(priority_until_, env));
  // The stored step that lies in this row.
  const std::uint64_t newest = ring.end - 1;
  return {env, newest - (newest % ring.rows + ring.rows - row) % ring.rows};
}

// How many sequences hold this step of an env that has `length_` steps.
std::uint64_t Selector::windows_of(const Ring& ring, std::uint64_t step) const {
  const std::uint64_t lowest = std::max<std::uint64_t>(ring.begin(), step + 1 >= length_ ? step + 1 - length_ : 0);
  return std::min<std::uint64_t>(step, ring.end - length_) - lowest + 1;
}

double Selector::probability(const Start& start) const {
  const Ring& ring = rings_[start.env];
  const double shares = config_.uniform + config_.recency + config_.priority;
  const bool has_mass = !priority_until_.empty() && priority_until_.back() > 0;
  const double uniform = config_.uniform + (has_mass ? 0 : config_.priority);
  double chance = uniform / shares / double(total_);
  if (config_.recency > 0) {
    const double age = double(ring.end - length_ - start.step + 1);
    chance += config_.recency / shares * std::pow(age, -config_.recency_exponent) / recency_until_.back();
  }
  if (has_mass) {
    double mass = 0;
    for (std::uint64_t step = start.step; step < start.step + length_; ++step)
      mass += trees_[start.env][step % ring.rows] / double(windows_of(ring, step));
    chance += config_.priority / shares * mass / priority_until_.back();
  }
  return chance;
}

std::optional<Start> Selector::draw_within_episodes(Random& random) const {
  constexpr int kTries = 32;  // then the episodes are few or short, and looking at all of them is the surer way
  for (int attempt = 0; attempt < kTries; ++attempt) {
    Start start{};
    switch (pick_kind(random)) {
      case Kind::kUniform: return draw_uniform_within_episodes(random);
      case Kind::kRecency: {
        start = draw_recent(random);
        if (rings_[start.env].episodes.around(start.step).end >= start.step + length_) return start;
        break;
      }
      case Kind::kPriority: {
        start = draw_step(random);
        const Ring& ring = rings_[start.env];
        const Span episode = ring.episodes.around(start.step);
        const std::uint64_t first = std::max(episode.first, ring.begin());
        if (episode.end - first < length_) break;
        const std::uint64_t lowest = std::max<std::uint64_t>(first, start.step + 1 >= length_ ? start.step + 1 - length_ : 0);
        const std::uint64_t highest = std::min<std::uint64_t>(start.step, episode.end - length_);
        return Start{start.env, highest - random.below(highest - lowest + 1)};
      }
    }
  }
  return draw_uniform_within_episodes(random);
}

std::optional<Start> Selector::draw_uniform_within_episodes(Random& random) const {
  constexpr int kTries = 16;
  for (int attempt = 0; attempt < kTries; ++attempt) {
    const Start start = draw_uniform(random);
    if (rings_[start.env].episodes.around(start.step).end >= start.step + length_) return start;
  }
  // Rare: most episodes are about as short as the sequence, or shorter.
  const auto for_each_span = [&](auto&& visit) {
    for (std::size_t env = 0; env < rings_.size(); ++env) {
      const Ring& ring = rings_[env];
      for (std::size_t i = 0; i < ring.episodes.count() && ring.size > 0; ++i) {
        const Span episode = ring.episodes.span(i);
        const std::uint64_t first = std::max(episode.first, ring.begin());
        if (episode.end - first >= length_ && visit(env, first, episode.end - first - length_ + 1)) return;
      }
    }
  };
  std::uint64_t windows = 0;
  for_each_span([&](std::size_t, std::uint64_t, std::uint64_t count) {
    windows += count;
    return false;
  });
  if (windows == 0) return std::nullopt;
  std::uint64_t pick = random.below(windows);
  Start found{};
  for_each_span([&](std::size_t env, std::uint64_t first, std::uint64_t count) {
    found = {env, first + pick};
    if (pick < count) return true;
    pick -= count;
    return false;
  });
  return found;
}

Selector::Priority Selector::get(std::size_t env, std::uint64_t step) const {
  const std::size_t row = step % rings_[env].rows;
  return {trees_[env][row], config_.curious ? visits_[env][row] : 0u};
}

void Selector::set(std::size_t env, std::uint64_t step, Priority priority) {
  const std::size_t row = step % rings_[env].rows;
  trees_[env].set(row, priority.priority);
  if (config_.curious) visits_[env][row] = std::uint32_t(priority.visits);
}

}  // namespace phyx::replay
