#include "replay/buffer.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

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
    case 4: return scatter<4>(source, target, stride, count);
    case 8: return scatter<8>(source, target, stride, count);
    default:
      for (std::size_t i = 0; i < count; ++i) std::memcpy(target + i * stride, source + i * bytes, bytes);
  }
}

// The index of the first float that is infinite or NaN (all exponent bits set), or `count`.
template <typename Word, Word Exponent>
std::size_t first_non_finite(const std::byte* data, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    Word bits;
    std::memcpy(&bits, data + i * sizeof bits, sizeof bits);
    if ((bits & Exponent) == Exponent) return i;
  }
  return count;
}

}  // namespace

Buffer::Buffer(std::vector<Field> fields, std::size_t capacity, std::size_t num_envs, std::uint64_t seed)
    : fields_(std::move(fields)),
      capacity_(capacity),
      storage_(fields_, capacity),
      rings_(num_envs),
      random_(seed),
      named_(num_envs, 0) {
  std::size_t row = 0;
  for (std::size_t env = 0; env < num_envs; ++env) {
    rings_[env].first_row = row;
    row += rings_[env].rows = capacity / num_envs + (env < capacity % num_envs);
  }
}

void Buffer::check_add(const std::int64_t* env_ids, std::size_t count, const std::byte* const* columns) {
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
  for (std::size_t f = 0; f < fields_.size(); ++f) {
    const DType& dtype = fields_[f].dtype();
    if (fields_[f].name != "reward" || dtype.kind != 'f') continue;
    const std::size_t values = count * storage_.item_bytes(f) / dtype.bytes;
    const std::size_t bad = dtype.bytes == 2 ? first_non_finite<std::uint16_t, 0x7c00>(columns[f], values)
                                             : first_non_finite<std::uint32_t, 0x7f800000>(columns[f], values);
    if (bad < values)
      throw std::invalid_argument("reward: the step of env " + std::to_string(env_ids[bad * count / values]) +
                                  " has a NaN or infinite reward, expected finite numbers");
  }
}

void Buffer::add(const std::int64_t* env_ids, std::size_t count, const std::byte* const* columns) {
  const std::lock_guard lock(mutex_);
  check_add(env_ids, count, columns);
  for (std::size_t f = 0; f < fields_.size(); ++f) {
    const std::size_t bytes = storage_.item_bytes(f);
    for (std::size_t i = 0; i < count; ++i) {
      const Ring& ring = rings_[env_ids[i]];
      std::memcpy(storage_.at(f, ring.row(ring.end)), columns[f] + i * bytes, bytes);
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    Ring& ring = rings_[env_ids[i]];
    ++ring.end;
    ring.size = std::min<std::uint64_t>(ring.size + 1, ring.rows);
  }
}

void Buffer::sample(std::size_t batch, std::size_t length, std::byte* const* outputs, std::int64_t* step_ids) {
  const std::lock_guard lock(mutex_);
  starts_.clear();
  for (const Ring& ring : rings_) starts_.push_back(ring.starts(length));
  selector_.assign(starts_);
  if (selector_.total() == 0) {
    std::uint64_t stored = 0, longest = 0, rows = rings_[0].rows;  // env 0 has the most room
    for (const Ring& ring : rings_) stored += ring.size, longest = std::max(longest, ring.size);
    throw std::invalid_argument("length: no env has " + std::to_string(length) + " steps yet; " +
                                std::to_string(stored) + " steps are stored in all, " + std::to_string(longest) +
                                " in the longest env, and an env has room for " + std::to_string(rows));
  }
  for (std::size_t b = 0; b < batch; ++b) {
    const Start start = selector_.draw(random_);
    const Ring& ring = rings_[start.env];
    const std::uint64_t step = ring.begin() + start.offset;
    for (std::size_t t = 0; t < length; ++t)
      step_ids[t * batch + b] = std::int64_t((std::uint64_t(start.env) << kStepBits) | (step + t));
    std::size_t done = 0;
    ring.for_each_run(step, length, [&](Run run) {
      for (std::size_t f = 0; f < fields_.size(); ++f) {
        const std::size_t bytes = storage_.item_bytes(f);
        std::byte* target = outputs[f] + (done * batch + b) * bytes;
        scatter(storage_.at(f, run.row), target, batch * bytes, run.count, bytes);
      }
      done += run.count;
    });
  }
}

std::uint64_t Buffer::size() {
  const std::lock_guard lock(mutex_);
  return std::accumulate(rings_.begin(), rings_.end(), std::uint64_t(0),
                         [](std::uint64_t sum, const Ring& ring) { return sum + ring.size; });
}

std::uint64_t Buffer::total_added() {
  const std::lock_guard lock(mutex_);
  return std::accumulate(rings_.begin(), rings_.end(), std::uint64_t(0),
                         [](std::uint64_t sum, const Ring& ring) { return sum + ring.end; });
}

std::uint64_t Buffer::num_sequences(std::size_t length) {
  const std::lock_guard lock(mutex_);
  return std::accumulate(rings_.begin(), rings_.end(), std::uint64_t(0),
                         [&](std::uint64_t sum, const Ring& ring) { return sum + ring.starts(length); });
}

}  // namespace phyx::replay
