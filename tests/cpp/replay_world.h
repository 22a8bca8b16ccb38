// Steps that can be told from each other: every stored byte is a function of its env and step, so whatever comes out of
// a replay is compared with what must have gone in.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "replay/buffer.h"

namespace phyx::replay {

using u64 = std::uint64_t;

// ------------------------------------------------------------------------------------------------- what is stored

enum Key { kImage, kNumber, kRatio, kStamp, kReward, kIsFirst, kIsLast, kDeter, kStoch };

inline u64 mix(u64 x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline u64 code_of(std::size_t env, u64 step) { return mix((u64(env + 1) << 40) + step); }

// Half of the envs begin in the middle of an episode, and a third of the episodes is abandoned.
inline bool begins(std::size_t env, u64 step) {
  return step == 0 ? env % 2 == 0 : mix(code_of(env, step) + 1) % 9 == 0;
}
inline bool ends(std::size_t env, u64 step) { return begins(env, step + 1) && mix(code_of(env, step) + 2) % 3 != 0; }

inline void put_words(std::byte* target, std::size_t bytes, u64 first) {
  for (; bytes > 0; target += 8, bytes -= 8, first += 0x9e3779b97f4a7c15u) std::memcpy(target, &first, 8);
}

template <typename T>
void put(std::byte* target, T value) {
  std::memcpy(target, &value, sizeof value);
}

// Latents carry a version. Both keys of a step, and all words of either, must tell of the same one.
inline void put_latent(Key key, std::size_t env, u64 step, u64 version, std::byte* target, std::size_t bytes) {
  std::memcpy(target, &version, 8);
  put_words(target + 8, bytes - 8, mix(code_of(env, step) + version) + u64(key));
}

// As stored; flags as `add` got them.
inline void put_item(Key key, std::size_t env, u64 step, std::byte* target, std::size_t bytes) {
  const u64 code = code_of(env, step);
  switch (key) {
    case kImage: return put_words(target, bytes, code);
    case kNumber: return put(target, std::int32_t(code));
    case kRatio:
      for (int i = 0; i < 3; ++i) put(target + 4 * i, float(std::uint16_t(code >> (16 * i))) / 64);
      return;
    case kStamp: return put(target, u64(env)), put(target + 8, step);
    case kReward: return put(target, float(code >> 44));
    case kIsFirst: return put(target, begins(env, step));
    case kIsLast: return put(target, ends(env, step));
    case kDeter:
    case kStoch: break;
  }
}

// ------------------------------------------------------------------------------------------------- how it is stored

struct World {
  enum AtClose { kNobodyWaits, kReadersWait, kWritersWait };
  const char* name;
  std::size_t envs, capacity, longest;  // longest sequence
  std::int64_t side;                    // of the picture
  bool has_last, has_latents, mapped;
  std::chrono::microseconds pause;  // of a writer, after each step
  SelectorConfig selector = {};
  LimiterConfig limiter = {};
  AtClose at_close = kNobodyWaits;

  std::size_t rows(std::size_t env) const { return capacity / envs + (env < capacity % envs); }
};

struct Layout {
  std::vector<Field> fields;
  std::vector<Key> keys;
  std::vector<std::size_t> latents;  // fields

  explicit Layout(const World& world) {
    const auto add = [&](Key key, const char* name, const char* dtype, std::vector<std::int64_t> shape, bool latent) {
      std::size_t code = 0;
      while (std::string(kDTypes[code].name) != dtype) ++code;
      if (latent) latents.push_back(fields.size());
      fields.push_back({name, code, std::move(shape), latent});
      keys.push_back(key);
    };
    if (world.has_latents) add(kStoch, "stoch", "bfloat16", {3, 4}, true);
    add(kImage, "image", "uint8", {3, world.side, world.side}, false);
    add(kNumber, "number", "int32", {}, false);
    add(kRatio, "ratio", "float32", {3}, false);
    add(kIsFirst, "is_first", "bool", {}, false);
    add(kStamp, "stamp", "int64", {2}, false);
    add(kReward, "reward", "float32", {}, false);
    if (world.has_last) add(kIsLast, "is_last", "bool", {}, false);
    if (world.has_latents) add(kDeter, "deter", "float32", {16}, true);
  }
};

// Memory of (length, size) items per key.
struct Batch {
  std::size_t size, length;
  std::vector<std::size_t> item_bytes;
  std::vector<std::vector<std::byte>> columns;
  std::vector<std::int64_t> step_ids;
  std::vector<double> probability;
  std::vector<std::uint8_t> mask;

  Batch(const Layout& layout, std::size_t size, std::size_t length)
      : size(size), length(length), step_ids(size * length, -7), probability(size, -7), mask(size * length, 7) {
    for (const Field& field : layout.fields) {
      item_bytes.push_back(field.item_bytes());
      columns.emplace_back(size * length * item_bytes.back(), std::byte{0xa5});
    }
  }
  Outputs outputs() {
    Outputs outputs{{}, step_ids.data(), probability.data(), mask.data()};
    for (auto& column : columns) outputs.columns.push_back(column.data());
    return outputs;
  }
  const std::byte* at(std::size_t field, std::size_t t, std::size_t b) const {
    return columns[field].data() + (t * size + b) * item_bytes[field];
  }
};

// ------------------------------------------------------------------------------------------------- what is right

// How far each env was: steps surely stored by then, or at most stored by then.
using Marks = std::vector<u64>;

class Verifier {
 public:
  Verifier(const World& world, const Layout& layout) : world_(world), layout_(layout) {}

  // One step as `read` gives it; latents: the version.
  u64 item(std::size_t f, std::size_t env, u64 step, const std::byte* at) const {
    const std::size_t bytes = layout_.fields[f].item_bytes();
    const Key key = layout_.keys[f];
    std::vector<std::byte>& wanted = scratch(bytes);
    u64 version = 0;
    if (layout_.fields[f].latent) {
      std::memcpy(&version, at, 8);
      if (version == 0)
        std::fill(wanted.begin(), wanted.end(), std::byte{0});
      else
        put_latent(key, env, step, version, wanted.data(), bytes);
    } else {
      put_item(key, env, step, wanted.data(), bytes);
    }
    EXPECT(std::memcmp(at, wanted.data(), bytes) == 0,
           name(env, step) << ", key " << layout_.fields[f].name << ", version " << version << ": wrong bytes");
    return version;
  }

  // Sequence `b`, drawn when the envs were between `before` and `after`.
  void sequence(const Batch& batch, std::size_t b, const SampleOptions& options, const Marks& before,
                const Marks& after) const {
    const std::size_t length = batch.length;
    const auto [env, first] = step_of(batch.step_ids[b]);
    stored_between(env, first, length, before, after);
    if (options.cross_episodes && !world_.selector.plain_uniform())
      EXPECT(batch.probability[b] >= 0 && batch.probability[b] <= 1 + 1e-9 &&
                 (options.online || batch.probability[b] > 0),
             name(env, first) << ": probability " << batch.probability[b]);
    for (std::size_t t = 0; t < length; ++t) {
      EXPECT(batch.step_ids[t * batch.size + b] == batch.step_ids[b] + std::int64_t(t),
             name(env, first) << ": at " << t << " step_id " << batch.step_ids[t * batch.size + b]);
      EXPECT(options.cross_episodes || t == 0 || !begins(env, first + t),
             name(env, first) << ": another episode begins at " << t);
      step(batch, t, b, env, first + t, t == 0 && options.force_is_first, t + 1 < length, before, after);
    }
  }

  void episode(const Batch& batch, std::size_t b, std::size_t length, const Marks& before, const Marks& after) const {
    const auto [env, first] = step_of(batch.step_ids[b]);
    stored_between(env, first, length, before, after);
    EXPECT(begins(env, first), name(env, first) << ": begins no episode");
    const u64 last = first + length - 1;
    EXPECT(begins(env, last + 1) && (after[env] > last + 1 || (world_.has_last && ends(env, last))),
           name(env, last) << ": ends no episode");
    for (std::size_t t = 0; t < batch.length; ++t) {
      const std::size_t at = t * batch.size + b;
      EXPECT(batch.mask[at] == (t < length), name(env, first) << ": mask " << int(batch.mask[at]) << " at " << t);
      if (t < length) {
        EXPECT(t == 0 || !begins(env, first + t), name(env, first) << ": another episode begins at " << t);
        EXPECT(batch.step_ids[at] == batch.step_ids[b] + std::int64_t(t), name(env, first) << ": step_id at " << t);
        step(batch, t, b, env, first + t, false, t + 1 < length, before, after);
      } else {
        EXPECT(batch.step_ids[at] == -1, name(env, first) << ": step_id " << batch.step_ids[at] << " at " << t);
        for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
          const std::byte* item = batch.at(f, t, b);
          for (std::size_t i = 0; i < batch.item_bytes[f]; ++i)
            EXPECT(item[i] == std::byte{0}, name(env, first) << ": key " << layout_.fields[f].name << " at " << t);
        }
      }
    }
  }

  // All that a buffer at rest holds. `before`, `after`: what its envs had when it was saved.
  void whole(Buffer& buffer, const Marks& before, const Marks& after) const {
    u64 total = 0;
    const std::vector<Span> spans = buffer.spans();
    EXPECT(spans.size() == world_.envs, spans.size() << " envs");
    for (std::size_t env = 0; env < world_.envs; ++env) {
      const auto [first, end] = spans[env];
      total += end;
      EXPECT(before[env] <= end && end <= after[env],
             "env " << env << " has " << end << " steps, had " << before[env] << " to " << after[env]);
      EXPECT(end - first == std::min<u64>(end, world_.rows(env)), "env " << env << " holds " << first << " to " << end);
      std::vector<u64> versions(end - first);
      bool other_latent = false;
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = layout_.fields[f].item_bytes();
        std::vector<std::byte> items((end - first) * bytes + 1);
        EXPECT(buffer.read(env, first, end - first, f, items.data()), name(env, first) << ": not there");
        for (u64 step = first; step < end; ++step) {
          const u64 version = item(f, env, step, items.data() + (step - first) * bytes);
          if (!layout_.fields[f].latent) continue;
          EXPECT(!other_latent || versions[step - first] == version,
                 name(env, step) << ": versions " << versions[step - first] << " and " << version);
          versions[step - first] = version;
        }
        other_latent |= layout_.fields[f].latent;
      }
    }
    EXPECT(buffer.total_added() == total, buffer.total_added() << " steps added, the envs have " << total);
  }

  std::pair<std::size_t, u64> step_of(std::int64_t id) const {
    const std::size_t env = std::size_t(id >> Buffer::kStepBits);
    EXPECT(id >= 0 && env < world_.envs, "step_id " << id);
    return {env, u64(id) & ((u64(1) << Buffer::kStepBits) - 1)};
  }

 private:
  void stored_between(std::size_t env, u64 first, std::size_t length, const Marks& before, const Marks& after) const {
    EXPECT(first + world_.rows(env) >= before[env] && first + length <= after[env],
           name(env, first) << ": " << length << " steps, when the env had " << before[env] << " to " << after[env]
                            << " and room for " << world_.rows(env));
  }

  void step(const Batch& batch, std::size_t t, std::size_t b, std::size_t env, u64 step, bool forced, bool followed,
            const Marks& before, const Marks& after) const {
    u64 version = 0;
    bool other_latent = false;
    for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
      const std::byte* at = batch.at(f, t, b);
      if (layout_.keys[f] == kIsFirst) {
        EXPECT(int(*at) == int(forced || begins(env, step)), name(env, step) << ": is_first " << int(*at));
      } else if (layout_.keys[f] == kIsLast) {
        // Of the last step only the buffer knows whether the next one was there already.
        const bool next_begins = begins(env, step + 1);
        const bool known = followed || step + 1 < before[env];
        const bool unknown = !known && step + 1 < after[env] && next_begins;
        const bool wanted = ends(env, step) || (known && next_begins);
        EXPECT(int(*at) == int(wanted) || (unknown && int(*at) == 1), name(env, step) << ": is_last " << int(*at));
      } else {
        const u64 found = item(f, env, step, at);
        if (!layout_.fields[f].latent) continue;
        EXPECT(!other_latent || version == found, name(env, step) << ": versions " << version << " and " << found);
        version = found, other_latent = true;
      }
    }
  }

  static std::vector<std::byte>& scratch(std::size_t bytes) {
    static thread_local std::vector<std::byte> memory;
    memory.resize(bytes);
    return memory;
  }

  static std::string name(std::size_t env, u64 step) {
    return "env " + std::to_string(env) + " step " + std::to_string(step);
  }

  const World& world_;
  const Layout& layout_;
};

}  // namespace phyx::replay
