// The replay buffer itself. Raw memory in, raw memory out; every public member may be called from any thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "replay/random.h"
#include "replay/selector.h"
#include "replay/storage.h"

namespace phyx::replay {

class Buffer {
 public:
  // The first capacity % num_envs envs hold one step more than the others. Throws ReserveError.
  Buffer(std::vector<Field> fields, std::size_t capacity, std::size_t num_envs, std::uint64_t seed);

  // Stores one step of each of the `count` envs named; columns[f] is contiguous (count, item). Nothing is stored when
  // it throws std::invalid_argument: an env that is unknown or named twice, a reward that is not finite.
  void add(const std::int64_t* env_ids, std::size_t count, const std::byte* const* columns);

  // Fills outputs[f] (length, batch, item) and step_ids (length, batch) with sequences drawn uniformly. Throws
  // std::invalid_argument when no env has `length` steps.
  void sample(std::size_t batch, std::size_t length, std::byte* const* outputs, std::int64_t* step_ids);

  // Writes beside `path`, then renames, so that `path` is the old file or the new one. Throws SnapshotError.
  void save(const std::string& path);
  static std::unique_ptr<Buffer> load(const std::string& path);

  const std::vector<Field>& fields() const { return fields_; }
  std::size_t capacity() const { return capacity_; }
  std::size_t num_envs() const { return rings_.size(); }
  std::size_t step_bytes() const { return storage_.step_bytes(); }
  std::uint64_t size();
  std::uint64_t total_added();
  std::uint64_t num_sequences(std::size_t length);

  // A step's name for all time: its env in the high bits, its number in that env in the low ones.
  static constexpr int kStepBits = 40;
  static constexpr std::size_t kMaxEnvs = std::size_t(1) << (63 - kStepBits);

 private:
  void check_add(const std::int64_t* env_ids, std::size_t count, const std::byte* const* columns);

  const std::vector<Field> fields_;
  const std::size_t capacity_;
  Storage storage_;

  std::mutex mutex_;  // guards all below, and the contents of storage_
  std::vector<Ring> rings_;
  Random random_;
  UniformSelector selector_;
  std::vector<std::uint64_t> starts_;  // scratch of sample
  std::vector<std::uint64_t> named_;   // per env, the last add call that named it
  std::uint64_t calls_ = 0;
};

}  // namespace phyx::replay
