// The replay buffer itself. Raw memory in, raw memory out; every public member may be called from any thread.
//
// One mutex guards all bookkeeping. Sequences are copied out without it: a draw notes in the rings what is being read,
// `add` waits before it overwrites such a step, and `update` waits until nobody copies.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "replay/ingest.h"
#include "replay/random.h"
#include "replay/ring.h"
#include "replay/selector.h"
#include "replay/storage.h"

namespace phyx::replay {

// Keeps the ratio of sampled to inserted steps: sampling waits for its budget,
// samples_per_insert * (added - min_size) - sampled, and adding waits while the budget is above `lead`, unless no env
// has yet as many steps as somebody wants to sample.
struct LimiterConfig {
  double samples_per_insert = 0;  // 0: no limiter
  std::uint64_t min_size = 1;
  double lead = 0;     // infinity: adding never waits
  double timeout = 0;  // seconds a thread waits at most, then TimeoutError; infinity: for ever
};

struct Config {
  std::vector<Field> fields;
  std::size_t capacity = 0;
  std::size_t num_envs = 0;
  std::uint64_t seed = 0;
  std::string directory;  // empty: RAM
  bool prefault = false;
  SelectorConfig selector;
  LimiterConfig limiter;
};

struct SampleOptions {
  bool online = false;          // first the sequences that were never handed out
  bool cross_episodes = true;   // a sequence may go on into the next episode
  bool force_is_first = false;  // every sequence begins with is_first
};

struct Sequence {
  std::size_t env;
  std::uint64_t first;
  std::size_t length;
  double probability;
  bool abandoned;  // the step after it begins an episode
};

// Sequences that were chosen and are safe from being overwritten until `finish`.
struct Draw {
  std::vector<Sequence> sequences;
  std::size_t length = 0;  // of the longest; shorter ones are filled up with zeros
  bool force_is_first = false;
};

// Memory for a batch: columns[f] is (length, batch, item), step_ids (length, batch); the others may be null.
struct Outputs {
  std::vector<std::byte*> columns;
  std::int64_t* step_ids = nullptr;
  double* probability = nullptr;  // (batch,)
  std::uint8_t* mask = nullptr;   // (length, batch)
};

// Called without the lock, now and then, by a thread that waits; may throw to end the wait.
using Poll = std::function<void()>;

class Buffer {
 public:
  // The first capacity % num_envs envs hold one step more than the others. Throws ReserveError.
  explicit Buffer(Config config);

  // Stores one step of each of the `count` envs named. Nothing is stored when it throws std::invalid_argument: an env
  // that is unknown or named twice, a reward that is not finite, a value that does not fit.
  void add(const std::int64_t* env_ids, std::size_t count, const std::vector<Source>& sources, const Poll& poll);

  // Chooses sequences. Throws std::invalid_argument when there are none such.
  Draw draw(std::size_t batch, std::size_t length, const SampleOptions& options, const Poll& poll);
  // The same if that needs no waiting, else nothing.
  std::optional<Draw> try_draw(std::size_t batch, std::size_t length, const SampleOptions& options);
  // Whole episodes, of all that are complete, with replacement.
  Draw draw_episodes(std::size_t batch, const Poll& poll);
  // Writes one sequence of a draw; needs no lock, so several threads may share the work.
  void copy(const Draw& draw, std::size_t index, const Outputs& outputs) const;
  void finish(const Draw& draw);
  // All of these in one.
  void sample(std::size_t batch, std::size_t length, const SampleOptions& options, const Outputs& outputs,
              const Poll& poll);

  // Overwrites latents: values[i] is (count, item) of field fields[i] in its stored dtype. Steps that are no longer
  // stored are passed over; returns how many were not.
  std::size_t update(const std::int64_t* step_ids, std::size_t count, const std::vector<std::size_t>& fields,
                     const std::vector<const std::byte*>& values);
  // `values` are finite and not negative. Returns as `update` does.
  std::size_t prioritize(const std::int64_t* step_ids, std::size_t count, const double* values);

  // Copies steps [first, first + count) of one env's field; false when they are not all stored.
  bool read(std::size_t env, std::uint64_t first, std::size_t count, std::size_t field, std::byte* target);

  // Writes a snapshot into the directory `path`. Throws SnapshotError; the snapshot that was there stays valid until
  // the new one is complete.
  void save(const std::string& path, const Poll& poll);
  static std::unique_ptr<Buffer> load(const std::string& path, const std::string& directory);

  // Everybody who waits, and whoever would have to wait from now on, gets a ClosedError.
  void close();

  const Config& config() const { return config_; }
  std::size_t step_bytes() const { return storage_.step_bytes(); }
  std::uint64_t size();
  std::uint64_t total_added();
  std::uint64_t total_sampled();
  std::uint64_t num_sequences(std::size_t length);
  std::uint64_t num_episodes();
  bool ready(std::size_t batch, std::size_t length);
  std::vector<Span> spans();  // per env, the steps that are stored

  // A step's name for all time: its env in the high bits, its number in that env in the low ones.
  static constexpr int kStepBits = 40;
  static constexpr std::size_t kMaxEnvs = std::size_t(1) << (63 - kStepBits);

 private:
  using Lock = std::unique_lock<std::mutex>;
  friend class Snapshot;

  // Returns when the condition holds. Only a thread that the limiter holds back (`limited`) can be closed or timed out:
  // everything else that is waited for comes by itself.
  template <typename Condition>
  void wait(Lock& lock, const Poll& poll, bool limited, const Condition& condition) {
    if (!condition()) wait_until(lock, poll, limited, condition);
  }
  void wait_until(Lock& lock, const Poll& poll, bool limited, const std::function<bool()>& condition);
  double budget() const;
  bool has_sequences(std::size_t length) const;
  bool may_add() const;
  bool may_sample(std::size_t steps) const;
  void check_add(const std::int64_t* env_ids, std::size_t count, const std::vector<Source>& sources);
  void check_draw(std::size_t batch, std::size_t length, const SampleOptions& options) const;
  Draw draw_now(std::size_t batch, std::size_t length, const SampleOptions& options);
  bool next_online(std::size_t length, Start& start);
  void begin_reading(Draw& draw);
  const Ring* ring_of(std::int64_t step_id, std::size_t& env, std::uint64_t& step) const;
  std::uint8_t& latents_dirty(std::size_t env, std::uint64_t step);

  const Config config_;
  Storage storage_;
  std::size_t is_first_ = 0, is_last_ = kNoField;  // fields
  static constexpr std::size_t kNoField = ~std::size_t(0);

  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::vector<Ring> rings_;
  Random random_;
  Selector selector_;
  std::vector<std::uint64_t> named_;  // per env, the last add call that named it
  std::uint64_t calls_ = 0;
  std::uint64_t added_ = 0, sampled_ = 0;
  std::size_t online_env_ = 0;  // whose turn it is in the online queue
  std::size_t copying_ = 0;     // draws that are not finished
  std::size_t updating_ = 0;    // updates that wait for them: new draws let them go first
  std::size_t overwriting_ = 0;  // the same for adds that wait for readers only
  std::multiset<std::size_t> starving_;  // lengths of the sequences that draws wait for: see may_add
  std::size_t waiting_ = 0;     // threads that wait for anything
  bool closed_ = false;

  // What the snapshot written last holds, so that the next one need not write it again. A segment is a fixed stretch
  // of an env's steps.
  struct SavedFile {
    std::string name;
    std::uint64_t first = 0, end = 0;  // steps
    std::uint64_t bytes = 0, checksum = 0;
  };
  struct Segment {
    SavedFile steps, latents;
  };
  std::uint64_t segment_steps_ = 1;
  std::vector<std::map<std::uint64_t, Segment>> saved_;  // per env
  std::shared_ptr<const int> saved_folder_;              // descriptor of its directory
  std::vector<std::vector<std::uint8_t>> dirty_;         // per env and segment: latents changed since then
  bool saving_ = false;
};

}  // namespace phyx::replay
