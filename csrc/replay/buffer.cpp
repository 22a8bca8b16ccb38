#include "replay/buffer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "parallel.h"

namespace phyx::replay {
namespace {

// Items that lie one after the other in `source` go to every `stride`-th byte of `target`.
template <std::size_t Bytes>
void scatter(const std::byte* source, std::byte* target, std::size_t stride, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) std::memcpy(target + i * stride, source + i * Bytes, Bytes);
}

void scatter(const std::byte* source, std::byte* target, std::size_t stride, std::size_t count, std::size_t bytes) {
  switch (bytes) {  // a size known to the compiler is one move instead of a call
    case 1: return scatter<1>(source, target, stride, count);
    case 2: return scatter<2>(source, target, stride, count);
    case 4: return scatter<4>(source, target, stride, count);
    case 8: return scatter<8>(source, target, stride, count);
    default:
      for (std::size_t i = 0; i < count; ++i) std::memcpy(target + i * stride, source + i * bytes, bytes);
  }
}

std::vector<Ring> make_rings(const Config& config) {
  std::vector<Ring> rings(config.num_envs);
  std::size_t row = 0;
  for (std::size_t env = 0; env < config.num_envs; ++env) {
    rings[env].first_row = row;
    row += rings[env].rows = config.capacity / config.num_envs + (env < config.capacity % config.num_envs);
  }
  return rings;
}

constexpr std::size_t kParallelBytes = std::size_t(4) << 20;  // below, waking a thread costs what it saves

// Whether a thread that waits is one of those that a counter tells of.
class Counted {
 public:
  explicit Counted(std::size_t& counter) : counter_(counter) {}
  ~Counted() { set(false); }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;

  bool is_set() const { return set_; }
  void set(bool now) {
    if (now && !set_) ++counter_;
    if (!now && set_) --counter_;
    set_ = now;
  }

 private:
  std::size_t& counter_;
  bool set_ = false;
};

// One thread cannot take all that the memory gives; more than a few cannot take more.
int copy_threads(std::size_t bytes) {
  static const int most = int(std::clamp(std::thread::hardware_concurrency(), 1u, 4u));
  return bytes >= kParallelBytes ? most : 1;
}

constexpr std::uint64_t kSegmentBytes = std::uint64_t(8) << 20;
constexpr auto kPollEvery = std::chrono::milliseconds(50);

}  // namespace

Buffer::Buffer(Config config)
    : config_(std::move(config)),
      storage_(config_.fields, config_.capacity, config_.directory, config_.prefault),
      rings_(make_rings(config_)),
      random_(config_.seed),
      selector_(config_.selector, rings_),
      named_(config_.num_envs, 0),
      segment_steps_(std::clamp<std::uint64_t>(kSegmentBytes / storage_.step_bytes(), 1, std::uint64_t(1) << 20)),
      saved_(config_.num_envs) {
  for (std::size_t f = 0; f < config_.fields.size(); ++f) {
    const Field& field = config_.fields[f];
    const bool flag = field.dtype().kind == 'b' && field.shape.empty();
    if (flag && field.name == "is_first") is_first_ = f;
    if (flag && field.name == "is_last") is_last_ = f;
  }
  for (const Ring& ring : rings_) dirty_.emplace_back(ring.rows / segment_steps_ + 2, 0);
}

void Buffer::wait_until(Lock& lock, const Poll& poll, bool limited, const std::function<bool()>& condition) {
  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  ++waiting_;
  struct Leave {
    std::size_t& waiting;
    ~Leave() { --waiting; }
  } leave{waiting_};  // the lock is held however it ends
  for (;;) {
    if (limited && closed_) throw ClosedError("the replay was closed");
    changed_.wait_for(lock, kPollEvery);
    if (condition()) break;
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    if (limited && seconds >= config_.limiter.timeout)
      throw TimeoutError("limiter: nothing came for " + std::to_string(seconds) + " s; " + std::to_string(added_) +
                         " steps were added, " + std::to_string(sampled_) + " sampled");
    if (!poll) continue;
    lock.unlock();
    try {
      poll();
    } catch (...) {
      lock.lock();
      throw;
    }
    lock.lock();
    if (condition()) break;
  }
}

// Steps that may be sampled now.
double Buffer::budget() const {
  return config_.limiter.samples_per_insert * (double(added_) - double(config_.limiter.min_size)) - double(sampled_);
}

bool Buffer::may_sample(std::size_t steps) const {
  return config_.limiter.samples_per_insert == 0 || budget() >= double(steps);
}

// Beyond the lead only while somebody waits for sequences that no env is long enough for.
bool Buffer::may_add() const {
  const LimiterConfig& limiter = config_.limiter;
  return limiter.samples_per_insert == 0 || budget() <= limiter.lead ||
         (!starving_.empty() && !has_sequences(*starving_.rbegin()));
}

bool Buffer::has_sequences(std::size_t length) const {
  return std::any_of(rings_.begin(), rings_.end(), [&](const Ring& ring) { return ring.size >= length; });
}

void Buffer::check_add(const std::int64_t* env_ids, std::size_t count, const std::vector<Source>& sources) {
  ++calls_;
  for (std::size_t i = 0; i < count; ++i) {
    if (env_ids[i] < 0 || std::size_t(env_ids[i]) >= rings_.size())
      throw std::invalid_argument("env_ids: got env " + std::to_string(env_ids[i]) + ", expected 0 to " +
                                  std::to_string(rings_.size() - 1));
    if (named_[env_ids[i]] == calls_)
      throw std::invalid_argument("env_ids: env " + std::to_string(env_ids[i]) +
                                  " is named twice, expected every env at most once");
    named_[env_ids[i]] = calls_;
  }
  for (std::size_t f = 0; f < config_.fields.size(); ++f) check(sources[f], config_.fields[f], count, env_ids);
}

void Buffer::add(const std::int64_t* env_ids, std::size_t count, const std::vector<Source>& sources,
                 const Poll& poll) {
  Lock lock(mutex_);
  check_add(env_ids, count, sources);
  const bool limited = config_.limiter.samples_per_insert > 0;
  Counted turn(overwriting_);  // readers that overlap would never let it through, so new draws let it go first
  wait(lock, poll, limited, [&] {
    const auto any = [&](bool (Ring::*awaits)() const) {
      return std::any_of(env_ids, env_ids + count, [&](std::int64_t env) { return (rings_[env].*awaits)(); });
    };
    const bool may = may_add() && !any(&Ring::awaits_save);
    turn.set(may && any(&Ring::awaits_readers));
    return may && !turn.is_set();
  });
  for (std::size_t f = 0; f < config_.fields.size(); ++f) {
    const Source& source = sources[f];
    const std::size_t bytes = storage_.item_bytes(f);
    const bool plain = is_plain(source, config_.fields[f]);
    for (std::size_t i = 0; i < count; ++i) {
      const Ring& ring = rings_[env_ids[i]];
      std::byte* target = storage_.at(f, ring.row(ring.end));
      if (plain)
        std::memcpy(target, source.data + std::ptrdiff_t(i) * source.strides[0], bytes);
      else
        store(source, config_.fields[f], bytes, i, target);
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t env = std::size_t(env_ids[i]);
    Ring& ring = rings_[env];
    const std::uint64_t step = ring.end++;
    ring.size = std::min<std::uint64_t>(ring.size + 1, ring.rows);
    const auto flag = [&](std::size_t f) { return *storage_.at(f, ring.row(step)) != std::byte{0}; };
    ring.episodes.add(step, flag(is_first_), is_last_ != kNoField && flag(is_last_));
    ring.episodes.evict(ring.begin());
    selector_.added(env, step);
  }
  added_ += count;
  if (waiting_ > 0) changed_.notify_all();
}

void Buffer::check_draw(std::size_t batch, std::size_t length, const SampleOptions& options) const {
  if (options.online && !options.cross_episodes)
    throw std::invalid_argument("online: fresh sequences cross episodes, expected cross_episodes=True");
  const LimiterConfig& limiter = config_.limiter;
  if (limiter.samples_per_insert > 0 && double(batch) * double(length) > limiter.lead)
    throw std::invalid_argument("batch_size: " + std::to_string(batch) + " sequences of " + std::to_string(length) +
                                " steps are more than the limiter's lead of " +
                                std::to_string(std::uint64_t(limiter.lead)) + " sampled steps, which would never end");
  std::uint64_t stored = 0, longest = 0;
  for (const Ring& ring : rings_) stored += ring.size, longest = std::max(longest, ring.size);
  const std::uint64_t rows = rings_[0].rows;  // env 0 has the most room
  if (longest < length && (limiter.samples_per_insert == 0 || rows < length))
    throw std::invalid_argument("length: no env has " + std::to_string(length) + " steps yet; " +
                                std::to_string(stored) + " steps are stored in all, " + std::to_string(longest) +
                                " in the longest env, and an env has room for " + std::to_string(rows));
}

Draw Buffer::draw(std::size_t batch, std::size_t length, const SampleOptions& options, const Poll& poll) {
  Lock lock(mutex_);
  check_draw(batch, length, options);
  const bool limited = config_.limiter.samples_per_insert > 0;
  const struct Starving {
    std::multiset<std::size_t>& lengths;
    const std::multiset<std::size_t>::iterator mine;
    ~Starving() { lengths.erase(mine); }
  } starving{starving_, starving_.insert(length)};
  if (limited && !has_sequences(length)) changed_.notify_all();  // who waits to add may go on
  wait(lock, poll, limited, [&] {
    return has_sequences(length) && updating_ == 0 && overwriting_ == 0 && may_sample(batch * length);
  });
  return draw_now(batch, length, options);
}

std::optional<Draw> Buffer::try_draw(std::size_t batch, std::size_t length, const SampleOptions& options) {
  Lock lock(mutex_);
  if (updating_ > 0 || overwriting_ > 0 || !has_sequences(length) || !may_sample(batch * length)) return std::nullopt;
  return draw_now(batch, length, options);
}

Draw Buffer::draw_now(std::size_t batch, std::size_t length, const SampleOptions& options) {
  Draw draw;
  draw.length = length;
  draw.force_is_first = options.force_is_first;
  selector_.assign(length);
  for (std::size_t b = 0; b < batch; ++b) {
    Start start{};
    if (!options.cross_episodes) {
      const auto found = selector_.draw_within_episodes(random_);
      if (!found)
        throw std::invalid_argument("length: no stored episode has " + std::to_string(length) + " steps");
      start = *found;
    } else if (!(options.online && next_online(length, start))) {
      start = selector_.draw(random_);
    }
    const bool known = options.cross_episodes && !config_.selector.plain_uniform();
    draw.sequences.push_back({start.env, start.step, length, known ? selector_.probability(start) : 0.0, false});
  }
  begin_reading(draw);
  return draw;
}

// The envs take turns; each gives its steps in order, in pieces that do not overlap.
bool Buffer::next_online(std::size_t length, Start& start) {
  for (std::size_t tried = 0; tried < rings_.size(); ++tried) {
    const std::size_t env = online_env_;
    online_env_ = (online_env_ + 1) % rings_.size();
    Ring& ring = rings_[env];
    ring.fresh = std::max(ring.fresh, ring.begin());
    if (ring.end - ring.fresh < length) continue;
    start = {env, ring.fresh};
    ring.fresh += length;
    return true;
  }
  return false;
}

Draw Buffer::draw_episodes(std::size_t batch, const Poll& poll) {
  Lock lock(mutex_);
  const bool limited = config_.limiter.samples_per_insert > 0;
  wait(lock, poll, limited, [&] { return updating_ == 0 && overwriting_ == 0 && may_sample(1); });
  std::vector<std::uint64_t> until;
  std::uint64_t total = 0;
  for (const Ring& ring : rings_) until.push_back(total += ring.episodes.complete());
  if (total == 0) throw std::invalid_argument("batch_size: no episode is stored from its first step to its last");
  Draw draw;
  for (std::size_t b = 0; b < batch; ++b) {
    const std::uint64_t pick = random_.below(total);
    const std::size_t env = std::size_t(std::upper_bound(until.begin(), until.end(), pick) - until.begin());
    const Span episode = rings_[env].episodes.complete(pick - (env == 0 ? 0 : until[env - 1]));
    const std::size_t length = episode.end - episode.first;
    draw.length = std::max(draw.length, length);
    draw.sequences.push_back({env, episode.first, length, 0.0, false});
  }
  begin_reading(draw);
  return draw;
}

void Buffer::begin_reading(Draw& draw) {
  for (Sequence& sequence : draw.sequences) {
    Ring& ring = rings_[sequence.env];
    const std::uint64_t next = sequence.first + sequence.length;
    sequence.abandoned = next < ring.end && *storage_.at(is_first_, ring.row(next)) != std::byte{0};
    ring.readings.push_back(sequence.first);
    sampled_ += sequence.length;
  }
  ++copying_;
  if (waiting_ > 0) changed_.notify_all();
}

void Buffer::copy(const Draw& draw, std::size_t b, const Outputs& outputs) const {
  const Sequence& sequence = draw.sequences[b];
  const std::size_t batch = draw.sequences.size(), length = sequence.length;
  const Ring& ring = rings_[sequence.env];  // only what never changes is looked at
  for (std::size_t f = 0; f < config_.fields.size(); ++f) {
    const std::size_t bytes = storage_.item_bytes(f), stride = batch * bytes;
    std::byte* target = outputs.columns[f] + b * bytes;
    for_each_run(ring.first_row, ring.rows, sequence.first, length, [&](Run run) {
      scatter(storage_.at(f, run.row), target, stride, run.count, bytes);
      target += run.count * stride;
    });
    for (std::size_t t = length; t < draw.length; ++t, target += stride) std::memset(target, 0, bytes);
  }
  std::byte* first = outputs.columns[is_first_] + b;
  if (is_last_ != kNoField) {
    // An episode whose env was reset or lost before its end: its last step here is the last one there is.
    std::byte* last = outputs.columns[is_last_] + b;
    for (std::size_t t = 0; t + 1 < length; ++t) last[t * batch] |= first[(t + 1) * batch];
    last[(length - 1) * batch] |= std::byte{sequence.abandoned};
  }
  if (draw.force_is_first) *first = std::byte{1};
  const std::uint64_t id = (std::uint64_t(sequence.env) << kStepBits) | sequence.first;
  for (std::size_t t = 0; t < draw.length; ++t) {
    outputs.step_ids[t * batch + b] = t < length ? std::int64_t(id + t) : -1;
    if (outputs.mask) outputs.mask[t * batch + b] = t < length;
  }
  if (outputs.probability) outputs.probability[b] = sequence.probability;
}

void Buffer::finish(const Draw& draw) {
  const Lock lock(mutex_);
  for (const Sequence& sequence : draw.sequences) {
    auto& readings = rings_[sequence.env].readings;
    *std::find(readings.begin(), readings.end(), sequence.first) = readings.back();
    readings.pop_back();
  }
  --copying_;
  if (waiting_ > 0) changed_.notify_all();
}

void Buffer::sample(std::size_t batch, std::size_t length, const SampleOptions& options, const Outputs& outputs,
                    const Poll& poll) {
  const Draw drawn = draw(batch, length, options, poll);
  parallel_for(std::int64_t(batch), 1, copy_threads(batch * length * storage_.step_bytes()),
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t b = begin; b < end; ++b) copy(drawn, std::size_t(b), outputs);
               });
  finish(drawn);
}

// The ring that still holds this step, or null.
const Ring* Buffer::ring_of(std::int64_t step_id, std::size_t& env, std::uint64_t& step) const {
  if (step_id < 0) return nullptr;
  env = std::size_t(std::uint64_t(step_id) >> kStepBits);
  step = std::uint64_t(step_id) & ((std::uint64_t(1) << kStepBits) - 1);
  return env < rings_.size() && rings_[env].holds(step) ? &rings_[env] : nullptr;
}

std::uint8_t& Buffer::latents_dirty(std::size_t env, std::uint64_t step) {
  return dirty_[env][step / segment_steps_ % dirty_[env].size()];
}

std::size_t Buffer::update(const std::int64_t* step_ids, std::size_t count, const std::vector<std::size_t>& fields,
                           const std::vector<const std::byte*>& values) {
  Lock lock(mutex_);
  ++updating_;
  wait(lock, Poll(), false, [&] { return copying_ == 0; });
  std::vector<std::pair<std::size_t, std::size_t>> rows;  // entry, and where it goes
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t env;
    std::uint64_t step;
    const Ring* ring = ring_of(step_ids[i], env, step);
    if (ring == nullptr) continue;
    rows.emplace_back(i, ring->row(step));
    latents_dirty(env, step) = 1;
  }
  for (std::size_t k = 0; k < fields.size(); ++k) {
    const std::size_t bytes = storage_.item_bytes(fields[k]);
    // Every thread takes a part of each entry, so that of two for one step the later one stays.
    const int threads = copy_threads(rows.size() * bytes);
    const std::size_t part = (bytes + std::size_t(threads) - 1) / std::size_t(threads);
    parallel_for(std::int64_t(bytes), std::int64_t(part), threads, [&](std::int64_t begin, std::int64_t end) {
      for (const auto& [entry, row] : rows)
        std::memcpy(storage_.at(fields[k], row) + begin, values[k] + entry * bytes + begin, std::size_t(end - begin));
    });
  }
  --updating_;
  if (waiting_ > 0) changed_.notify_all();
  return rows.size();
}

std::size_t Buffer::prioritize(const std::int64_t* step_ids, std::size_t count, const double* values) {
  const Lock lock(mutex_);
  std::size_t known = 0;
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t env;
    std::uint64_t step;
    if (ring_of(step_ids[i], env, step) == nullptr) continue;
    ++known;
    selector_.prioritize(env, step, values[i]);
  }
  return known;
}

bool Buffer::read(std::size_t env, std::uint64_t first, std::size_t count, std::size_t field, std::byte* target) {
  const Lock lock(mutex_);
  const Ring& ring = rings_.at(env);
  if (first < ring.begin() || first > ring.end || count > ring.end - first) return false;
  const std::size_t bytes = storage_.item_bytes(field);
  for_each_run(ring.first_row, ring.rows, first, count, [&](Run run) {
    std::memcpy(target, storage_.at(field, run.row), run.count * bytes);
    target += run.count * bytes;
  });
  return true;
}

void Buffer::close() {
  const Lock lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

std::uint64_t Buffer::size() {
  const Lock lock(mutex_);
  std::uint64_t size = 0;
  for (const Ring& ring : rings_) size += ring.size;
  return size;
}

std::uint64_t Buffer::total_added() {
  const Lock lock(mutex_);
  return added_;
}

std::uint64_t Buffer::total_sampled() {
  const Lock lock(mutex_);
  return sampled_;
}

std::uint64_t Buffer::num_sequences(std::size_t length) {
  const Lock lock(mutex_);
  std::uint64_t count = 0;
  for (const Ring& ring : rings_) count += ring.starts(length);
  return count;
}

std::uint64_t Buffer::num_episodes() {
  const Lock lock(mutex_);
  std::uint64_t count = 0;
  for (const Ring& ring : rings_) count += ring.episodes.complete();
  return count;
}

bool Buffer::ready(std::size_t batch, std::size_t length) {
  const Lock lock(mutex_);
  return may_sample(batch * length) && has_sequences(length);
}

std::vector<Span> Buffer::spans() {
  const Lock lock(mutex_);
  std::vector<Span> spans;
  for (const Ring& ring : rings_) spans.push_back({ring.begin(), ring.end});
  return spans;
}

}  // namespace phyx::replay
