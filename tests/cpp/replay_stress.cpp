// Many threads on one replay, each doing what it can to get in the way of the others:
//
//   replay_stress [seconds = 30] [seed = 0]
//
// 4 writers (partial batches, any order), 4 readers (samples, loaders, episodes, reads), 2 threads that write latents
// and priorities, one that saves, breaks saves off, and loads. All that comes out is verified (replay_world.h); ends
// with 1 and a message at the first difference.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <iostream>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "replay/buffer.h"
#include "replay/loader.h"
#include "replay_world.h"

namespace phyx::replay {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::size_t kWriters = 4, kReaders = 4, kUpdaters = 2;
constexpr double kForever = std::numeric_limits<double>::infinity();

std::vector<World> worlds() {
  using namespace std::chrono_literals;
  SelectorConfig mixture;
  mixture.uniform = 1, mixture.recency = 2, mixture.priority = 3, mixture.exponent = 0.8;
  SelectorConfig curious;
  curious.uniform = 0, curious.priority = 1, curious.curious = true, curious.initial = 1e5, curious.c = 1e4;
  curious.beta = 0.7, curious.exponent = 0.7, curious.epsilon = 0.01;
  SelectorConfig recent;
  recent.uniform = 0, recent.recency = 1;
  LimiterConfig patient, hasty;
  patient.samples_per_insert = 8, patient.min_size = 50, patient.lead = 500, patient.timeout = kForever;
  hasty.samples_per_insert = 2, hasty.min_size = 1, hasty.lead = 200, hasty.timeout = 0.1;
  return {
      {"tiny", 5, 5 * 24 + 3, 20, 8, true, true, false, 0us},
      {"mixture", 7, 2000, 30, 16, false, true, false, 0us, mixture},
      {"curious, readers wait at the end", 6, 1000, 16, 8, true, true, false, 0us, curious, patient,
       World::kReadersWait},
      {"recent, no latents, writers wait at the end", 3, 301, 12, 16, true, false, false, 0us, recent, hasty,
       World::kWritersWait},
      {"many segments, in a file", 2, 2 * 600 + 1, 16, 104, true, true, true, 8000us},
  };
}

struct Counts {
  std::atomic<u64> steps{0}, refused{0}, sequences{0}, batches{0}, episodes{0}, reads{0}, updates{0}, priorities{0};
  std::atomic<u64> saves{0}, broken_saves{0}, files_kept{0}, loads{0};
  std::atomic<u64> closed{0}, timed_out{0}, interrupted{0}, sampled{0};
};

class Interrupted : public std::exception {};

class Stress {
 public:
  Stress(const World& world, const std::string& folder, u64 seed, Counts& counts)
      : world_(world), layout_(world), verify_(world_, layout_), folder_(folder), seed_(seed), counts_(counts) {
    for (std::size_t env = 0; env < world.envs; ++env) envs_.push_back(std::make_unique<Env>());
    Config config;
    config.fields = layout_.fields;
    config.capacity = world.capacity;
    config.num_envs = world.envs;
    config.seed = seed;
    config.directory = world.mapped ? folder : "";
    config.selector = world.selector;
    config.limiter = world.limiter;
    buffer_ = std::make_shared<Buffer>(std::move(config));
  }

  void run(double seconds) {
    const auto writers = start("writer", kWriters, [this](Random& random, Worker& me) { write(random, me); });
    const auto readers = start("reader", kReaders, [this](Random& random, Worker& me) { read(random, me); });
    const auto others = start("updater", kUpdaters, [this](Random& random, Worker& me) { update(random, me); });
    const auto saver = start("saver", 1, [this](Random& random, Worker& me) { save(random, me); });
    for (const auto until = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < until;) {
      look_around();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    const u64 closed_before = counts_.closed;
    if (world_.at_close == World::kReadersWait) {
      stop_writers_ = true;
      end(writers);
    } else if (world_.at_close == World::kWritersWait) {
      stop_readers_ = true;
      end(readers);
    }
    stop_others_ = true;
    end(others);
    end(saver);
    if (world_.at_close != World::kNobodyWaits) {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));  // now nothing can go on
      closing_ = true;
      buffer_->close();
    }
    if (world_.at_close != World::kReadersWait) stop_writers_ = true;
    end(writers);
    stop_readers_ = true;
    end(readers);
    EXPECT(world_.at_close == World::kNobodyWaits || counts_.closed > closed_before, "nobody waited for the limiter");
    for (const auto& worker : workers_)
      EXPECT(worker->rounds > 0, worker->name << " never got its turn");
    at_rest();
    counts_.sampled += buffer_->total_sampled();
    std::cout << world_.name << ":";
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      const bool same_kind = i > 0 && workers_[i]->kind == workers_[i - 1]->kind;
      std::cout << (same_kind ? "/" : " " + workers_[i]->kind + "s ") << workers_[i]->rounds;
    }
    std::cout << " rounds; " << buffer_->total_added() << " steps added, " << buffer_->total_sampled() << " sampled"
              << std::endl;
  }

 private:
  struct Env {
    std::mutex owner;
    std::atomic<u64> begun{0}, done{0};  // steps whose `add` was called, and returned
  };
  struct Worker {
    std::string kind, name;
    std::atomic<u64> rounds{0};
    std::atomic<const char*> doing{"starting"};
    std::atomic<bool> ended{false};
    std::thread thread;
  };

  template <typename F>
  std::vector<Worker*> start(const char* kind, std::size_t count, F work) {
    std::vector<Worker*> started;
    for (std::size_t i = 0; i < count; ++i) {
      workers_.push_back(std::make_unique<Worker>());
      Worker* worker = workers_.back().get();
      worker->kind = kind;
      worker->name = worker->kind + " " + std::to_string(i);
      worker->thread = std::thread([this, work, worker, stream = workers_.size()] {
        Random random(mix(seed_ + stream));
        try {
          work(random, *worker);
        } catch (const std::exception& error) {
          EXPECT(false, worker->name << ", " << worker->doing << ": " << error.what());
        }
        worker->ended = true;
      });
      started.push_back(worker);
    }
    return started;
  }

  void end(const std::vector<Worker*>& workers) {
    const auto until = Clock::now() + std::chrono::seconds(60);
    for (Worker* worker : workers) {
      while (!worker->ended) {
        EXPECT(Clock::now() < until, worker->name << " does not end: " << worker->doing);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      if (worker->thread.joinable()) worker->thread.join();
    }
  }

  Marks done() const {
    Marks marks;
    for (const auto& env : envs_) marks.push_back(env->done);
    return marks;
  }
  Marks begun() const {
    Marks marks;
    for (const auto& env : envs_) marks.push_back(env->begun);
    return marks;
  }

  // Now and then, one that ends the wait.
  Poll impatience(Random& random) {
    if (random.below(4) > 0) return Poll();
    return [left = random.below(4)]() mutable {
      if (left-- == 0) throw Interrupted();
    };
  }

  // Calls what may have to wait for the limiter; true when it did not end by itself.
  template <typename F>
  bool waits(F&& call) {
    try {
      call();
      return false;
    } catch (const Interrupted&) {
      ++counts_.interrupted;
    } catch (const TimeoutError& error) {
      EXPECT(std::isfinite(world_.limiter.timeout), error.what());
      ++counts_.timed_out;
    } catch (const ClosedError& error) {
      EXPECT(closing_, error.what());
      ++counts_.closed;
    }
    return true;
  }

  // ----------------------------------------------------------------------------------------------- writers

  // One key of a vector step, as an environment may bring it.
  struct Column {
    std::vector<std::byte> memory;
    Source source;
  };

  void make_column(Random& random, std::size_t f, const std::vector<std::int64_t>& ids, bool bring_latents,
                   Column& column) {
    const Field& field = layout_.fields[f];
    const std::size_t bytes = field.item_bytes(), count = ids.size();
    column.source = Source();
    if (field.latent && !bring_latents) return;
    auto& strides = column.source.strides;
    strides[field.shape.size()] = std::ptrdiff_t(field.dtype().bytes);
    for (std::size_t axis = field.shape.size(); axis-- > 0;) strides[axis] = strides[axis + 1] * field.shape[axis];
    column.memory.resize(2 * count * bytes);
    std::byte* memory = column.memory.data();
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t env = std::size_t(ids[i]);
      const u64 step = envs_[env]->done;
      if (field.latent)
        put_latent(layout_.keys[f], env, step, step + 1, memory + i * bytes, bytes);
      else
        put_item(layout_.keys[f], env, step, memory + i * bytes, bytes);
    }
    const bool other = random.below(world_.pause.count() > 0 ? 16 : 3) == 0;  // conversions are slow
    if (other && (layout_.keys[f] == kNumber || layout_.keys[f] == kRatio)) {
      const bool integer = layout_.keys[f] == kNumber;
      for (std::size_t i = count * bytes / 4; i-- > 0;) {
        std::int32_t whole;
        float real;
        std::memcpy(&whole, memory + 4 * i, 4);
        std::memcpy(&real, memory + 4 * i, 4);
        integer ? put(memory + 8 * i, std::int64_t(whole)) : put(memory + 8 * i, double(real));
      }
      for (std::ptrdiff_t& stride : strides) stride *= 2;
      column.source.conversion = integer ? Conversion::kInt64ToInt32 : Conversion::kFloat64ToFloat32;
    } else if (other && layout_.keys[f] == kImage) {  // channels last
      const std::size_t pixels = bytes / 3;
      std::vector<std::byte> last(bytes);
      for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t pixel = 0; pixel < pixels; ++pixel)
          for (std::size_t c = 0; c < 3; ++c) last[pixel * 3 + c] = memory[i * bytes + c * pixels + pixel];
        std::memcpy(memory + i * bytes, last.data(), bytes);
      }
      strides = {std::ptrdiff_t(bytes), 1, 3 * std::ptrdiff_t(world_.side), 3};
    }
    column.source.data = memory;
  }

  void write(Random& random, Worker& me) {
    std::vector<Column> columns(layout_.fields.size());
    while (!stop_writers_) {
      // An asynchronous batch: whichever envs are free, in any order.
      std::vector<std::size_t> order(world_.envs);
      for (std::size_t i = 0; i < order.size(); ++i) {
        const std::size_t j = random.below(i + 1);
        order[i] = order[j];
        order[j] = i;
      }
      const std::size_t most = 1 + random.below(world_.envs);
      std::vector<std::unique_lock<std::mutex>> owned;
      std::vector<std::int64_t> ids;
      for (const std::size_t env : order) {
        if (ids.size() == most) break;
        std::unique_lock<std::mutex> lock(envs_[env]->owner, std::try_to_lock);
        if (!lock.owns_lock()) continue;
        owned.push_back(std::move(lock));
        ids.push_back(std::int64_t(env));
      }
      if (ids.empty()) {
        std::this_thread::yield();
        continue;
      }
      const bool bring_latents = random.below(2) == 0;
      std::vector<Source> sources;
      for (std::size_t f = 0; f < columns.size(); ++f) {
        make_column(random, f, ids, bring_latents, columns[f]);
        sources.push_back(columns[f].source);
      }
      if (random.below(64) == 0) refused(random, ids, sources);
      for (const std::int64_t env : ids) ++envs_[env]->begun;
      me.doing = "add";
      const bool ended = waits([&] { buffer_->add(ids.data(), ids.size(), sources, impatience(random)); });
      if (!ended) {
        ++me.rounds;
        counts_.steps += ids.size();
      }
      // An add that does not end by itself has stored nothing.
      for (const std::int64_t env : ids) ended ? --envs_[env]->begun : ++envs_[env]->done;
      owned.clear();
      if (ended && closing_) return;
      if (world_.pause.count() > 0) std::this_thread::sleep_for(world_.pause);
    }
  }

  // A step that is no good must leave no trace.
  void refused(Random& random, std::vector<std::int64_t> ids, std::vector<Source> sources) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> rewards(ids.size(), 0.0f);
    switch (random.below(3)) {
      case 0: ids[random.below(ids.size())] = std::int64_t(world_.envs); break;
      case 1: {
        if (ids.size() == 1) return;
        ids[0] = ids[1];
        break;
      }
      default:
        rewards[random.below(ids.size())] = nan;
        for (std::size_t f = 0; f < sources.size(); ++f) {
          if (layout_.keys[f] != kReward) continue;
          sources[f].data = reinterpret_cast<const std::byte*>(rewards.data());
          sources[f].strides = {sizeof(float)};
        }
    }
    bool threw = false;
    try {
      buffer_->add(ids.data(), ids.size(), sources, Poll());
    } catch (const std::invalid_argument&) {
      threw = true;
    }
    EXPECT(threw, "a bad step was taken");
    ++counts_.refused;
  }

  // ----------------------------------------------------------------------------------------------- readers

  SampleOptions options(Random& random) {
    SampleOptions options;
    options.online = random.below(3) == 0;
    options.cross_episodes = options.online || random.below(2) == 0;
    options.force_is_first = random.below(2) == 0;
    return options;
  }

  void may_be_refused(const SampleOptions& options, std::size_t length, const Marks& before,
                      const std::invalid_argument& error) {
    for (std::size_t env = 0; env < world_.envs; ++env)
      EXPECT(!options.cross_episodes || std::min<u64>(before[env], world_.rows(env)) < length, error.what());
    ++counts_.refused;
  }

  void read(Random& random, Worker& me) {
    while (!stop_readers_) {
      bool ended = false;
      switch (random.below(6)) {
        case 0:
        case 1: ended = sample(random, me); break;
        case 2:
        case 3: ended = load(random, me); break;
        case 4: ended = episodes(random, me); break;
        default:
          for (int i = 0; i < 20; ++i) read_some(random, me);
      }
      ++me.rounds;
      if (ended && closing_) return;
    }
  }

  bool sample(Random& random, Worker& me) {
    me.doing = "sample";
    const SampleOptions chosen = options(random);
    Batch batch(layout_, 1 + random.below(6), 1 + random.below(world_.longest));
    const Marks before = done();
    try {
      const Outputs outputs = batch.outputs();
      if (waits([&] { buffer_->sample(batch.size, batch.length, chosen, outputs, impatience(random)); })) return true;
    } catch (const std::invalid_argument& error) {
      may_be_refused(chosen, batch.length, before, error);
      return false;
    }
    const Marks after = begun();
    for (std::size_t b = 0; b < batch.size; ++b) verify_.sequence(batch, b, chosen, before, after);
    counts_.sequences += batch.size;
    ++counts_.batches;
    return false;
  }

  bool load(Random& random, Worker& me) {
    me.doing = "loader";
    const SampleOptions chosen = options(random);
    const std::size_t size = 1 + random.below(4), length = 1 + random.below(world_.longest);
    const std::size_t threads = random.below(3);
    const std::size_t prefetch = threads == 0 ? 0 : 1 + random.below(3);
    std::deque<Batch> batches;
    std::vector<Outputs> slots;
    for (std::size_t i = 0; i <= prefetch; ++i) slots.push_back(batches.emplace_back(layout_, size, length).outputs());
    Loader loader(buffer_, size, length, chosen, slots, threads);
    std::deque<Marks> before;  // a batch may have been drawn `prefetch` calls ago
    for (u64 i = random.below(20); i < 20; ++i) {
      before.push_back(done());
      if (before.size() > prefetch + 1) before.pop_front();
      std::size_t slot = 0;
      try {
        if (waits([&] { slot = loader.next(impatience(random)); })) return true;
      } catch (const std::invalid_argument& error) {
        may_be_refused(chosen, length, before.front(), error);
        return false;
      }
      const Marks after = begun();
      EXPECT(slot < batches.size(), "slot " << slot);
      for (std::size_t b = 0; b < size; ++b) verify_.sequence(batches[slot], b, chosen, before.front(), after);
      counts_.sequences += size;
      ++counts_.batches;
      loader.ready();
    }
    return false;
  }

  bool episodes(Random& random, Worker& me) {
    me.doing = "episodes";
    const std::size_t size = 1 + random.below(4);
    const Marks before = done();
    Draw draw;
    try {
      if (waits([&] { draw = buffer_->draw_episodes(size, impatience(random)); })) return true;
    } catch (const std::invalid_argument&) {
      ++counts_.refused;
      return false;
    }
    const Marks after = begun();
    Batch batch(layout_, size, draw.length);
    const Outputs outputs = batch.outputs();
    for (std::size_t b = 0; b < size; ++b) buffer_->copy(draw, b, outputs);
    buffer_->finish(draw);
    for (std::size_t b = 0; b < size; ++b) verify_.episode(batch, b, draw.sequences[b].length, before, after);
    counts_.episodes += size;
    return false;
  }

  // A step near what is stored, on either side of either end.
  u64 somewhere(Random& random, std::size_t env) {
    const u64 beyond = envs_[env]->done + 3;
    return beyond - std::min<u64>(random.below(world_.rows(env) + 8), beyond);
  }

  void read_some(Random& random, Worker& me) {
    me.doing = "read";
    const std::size_t env = random.below(world_.envs), f = random.below(layout_.fields.size());
    const std::size_t count = 1 + random.below(world_.longest), bytes = layout_.fields[f].item_bytes();
    const u64 first = somewhere(random, env);
    std::vector<std::byte> items(count * bytes);
    const u64 before = envs_[env]->done;
    const bool found = buffer_->read(env, first, count, f, items.data());
    const u64 after = envs_[env]->begun;
    const std::size_t rows = world_.rows(env);
    EXPECT(!found || (first + rows >= before && first + count <= after),
           "env " << env << ": read " << first << ", " << count << " steps");
    EXPECT(found || first + count > before || first + rows < after,
           "env " << env << ": did not find " << first << ", " << count << " steps");
    for (std::size_t t = 0; found && t < count; ++t) verify_.item(f, env, first + t, items.data() + t * bytes);
    ++counts_.reads;
  }

  // ----------------------------------------------------------------------------------------------- updaters

  void update(Random& random, Worker& me) {
    const u64 base = u64(me.name.back() - '0' + 1) << 48;
    for (u64 version = base + 1; !stop_others_; ++version) {
      if (world_.selector.priority > 0 && random.below(2) == 0) {
        me.doing = "prioritize";
        prioritize_some(random);
      } else if (world_.has_latents) {
        me.doing = "update";
        update_some(random, version);
      }
      ++me.rounds;
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(500)));
    }
  }

  std::vector<std::int64_t> some_ids(Random& random) {
    std::vector<std::int64_t> ids;
    for (u64 left = 1 + random.below(64); left-- > 0;) {
      const std::size_t env = random.below(world_.envs);
      const bool none = random.below(16) == 0;
      ids.push_back(none ? -1 : std::int64_t((u64(env) << Buffer::kStepBits) | somewhere(random, env)));
    }
    return ids;
  }

  void prioritize_some(Random& random) {
    const std::vector<std::int64_t> ids = some_ids(random);
    std::vector<double> values;
    for (std::size_t i = 0; i < ids.size(); ++i) values.push_back(random.below(4) == 0 ? 0 : 10 * random.unit());
    const Marks before = done();
    const std::size_t known = buffer_->prioritize(ids.data(), ids.size(), values.data());
    known_between(ids, known, before, begun());
    counts_.priorities += known;
  }

  void update_some(Random& random, u64 version) {
    const std::vector<std::int64_t> ids = some_ids(random);
    std::vector<std::vector<std::byte>> columns;
    std::vector<const std::byte*> values;
    for (const std::size_t f : layout_.latents) {
      const std::size_t bytes = layout_.fields[f].item_bytes();
      std::vector<std::byte>& column = columns.emplace_back(ids.size() * bytes);
      for (std::size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] < 0) continue;
        const auto [env, step] = verify_.step_of(ids[i]);
        put_latent(layout_.keys[f], env, step, version, column.data() + i * bytes, bytes);
      }
      values.push_back(column.data());
    }
    const Marks before = done();
    const std::size_t known = buffer_->update(ids.data(), ids.size(), layout_.latents, values);
    known_between(ids, known, before, begun());
    counts_.updates += known;
  }

  void known_between(const std::vector<std::int64_t>& ids, std::size_t known, const Marks& before, const Marks& after) {
    std::size_t surely = 0, perhaps = 0;
    for (const std::int64_t id : ids) {
      if (id < 0) continue;
      const auto [env, step] = verify_.step_of(id);
      const std::size_t rows = world_.rows(env);
      surely += step < before[env] && step + rows >= after[env];
      perhaps += step < after[env] && step + rows >= before[env];
    }
    EXPECT(surely <= known && known <= perhaps, known << " written, expected " << surely << " to " << perhaps);
  }

  // ----------------------------------------------------------------------------------------------- the saver

  void save(Random& random, Worker& me) {
    struct Saved {
      Marks before, after;
    };
    const std::string paths[] = {folder_ + "/one", folder_ + "/other"};
    std::optional<Saved> saved[2];
    std::set<std::string> known;  // files
    while (!stop_others_) {
      const std::size_t at = random.below(3) == 0;
      const bool broken = random.below(5) == 0;
      me.doing = "save";
      try {
        const Marks before = done();
        u64 left = random.below(2 * world_.envs);
        buffer_->save(paths[at], [&] {
          if (broken && left-- == 0) throw Interrupted();
        });
        saved[at] = Saved{before, begun()};
        ++counts_.saves;
        for (const auto& entry : std::filesystem::directory_iterator(paths[at]))
          if (entry.path().filename() != "replay.index")
            counts_.files_kept += !known.insert(entry.path().filename().string()).second;
      } catch (const Interrupted&) {
        ++counts_.broken_saves;
        EXPECT(saved[at] || !std::filesystem::exists(paths[at]), "a broken save left " << paths[at]);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        if (!saved[i] || random.below(broken && i == at ? 1 : 4) > 0) continue;
        me.doing = "load";
        const std::unique_ptr<Buffer> loaded = Buffer::load(paths[i], world_.mapped ? folder_ : "");
        verify_.whole(*loaded, saved[i]->before, saved[i]->after);
        ++counts_.loads;
        if (random.below(3) == 0) save_again(*loaded, folder_ + "/again", saved[i]->before, saved[i]->after, random);
      }
      ++me.rounds;
      std::this_thread::sleep_for(std::chrono::milliseconds(random.below(100)));
    }
  }

  void save_again(Buffer& buffer, const std::string& path, const Marks& before, const Marks& after, Random& random) {
    buffer.save(path, Poll());
    const std::unique_ptr<Buffer> again = Buffer::load(path, "");
    verify_.whole(*again, before, after);
    same_contents(buffer, *again);
    same_samples(buffer, *again, random, before, after);
  }

  // Latents too, which `whole` takes in any version.
  void same_contents(Buffer& one, Buffer& other) {
    const std::vector<Span> spans = one.spans();
    for (std::size_t env = 0; env < spans.size(); ++env) {
      const auto [first, end] = spans[env];
      for (std::size_t f = 0; f < layout_.fields.size(); ++f) {
        const std::size_t bytes = (end - first) * layout_.fields[f].item_bytes();
        std::vector<std::byte> items[] = {std::vector<std::byte>(bytes + 1), std::vector<std::byte>(bytes + 1)};
        EXPECT(one.read(env, first, end - first, f, items[0].data()) &&
                   other.read(env, first, end - first, f, items[1].data()) && items[0] == items[1],
               "env " << env << ", key " << layout_.fields[f].name << " is another after save and load");
      }
    }
  }

  // Two buffers in the same state go on in the same way.
  void same_samples(Buffer& one, Buffer& other, Random& random, const Marks& before, const Marks& after) {
    for (int i = 0; i < 10; ++i) {
      const SampleOptions chosen = options(random);
      const std::size_t size = 1 + random.below(6), length = 1 + random.below(world_.longest);
      Batch batches[] = {{layout_, size, length}, {layout_, size, length}};
      bool drawn[2] = {false, false};
      for (int k = 0; k < 2; ++k) {
        try {
          Buffer& buffer = k == 0 ? one : other;
          const auto draw = buffer.try_draw(size, length, chosen);
          if (!draw) continue;
          const Outputs outputs = batches[k].outputs();
          for (std::size_t b = 0; b < size; ++b) buffer.copy(*draw, b, outputs);
          buffer.finish(*draw);
          drawn[k] = true;
        } catch (const std::invalid_argument&) {  // no episode is long enough
        }
      }
      EXPECT(drawn[0] == drawn[1], "one could be sampled, the other not");
      EXPECT(batches[0].step_ids == batches[1].step_ids, "other steps");
      EXPECT(batches[0].columns == batches[1].columns, "other contents");
      for (std::size_t b = 0; b < size && drawn[0]; ++b) verify_.sequence(batches[0], b, chosen, before, after);
    }
  }

  // ----------------------------------------------------------------------------------------------- all of them

  void look_around() {
    const Marks before = done();
    const u64 added_before = buffer_->total_added(), sampled = buffer_->total_sampled(), added = buffer_->total_added();
    const u64 size = buffer_->size(), sequences = buffer_->num_sequences(3), whole = buffer_->num_episodes();
    buffer_->ready(1, 1);
    const Marks after = begun();
    u64 least = 0, most = 0, least_sequences = 0;
    for (std::size_t env = 0; env < world_.envs; ++env) {
      const u64 rows = world_.rows(env), least_here = std::min(before[env], rows);
      least += least_here, most += std::min(after[env], rows);
      least_sequences += least_here >= 3 ? least_here - 2 : 0;
    }
    EXPECT(least <= size && size <= most, "size " << size << ", expected " << least << " to " << most);
    EXPECT(least_sequences <= sequences && sequences <= most, sequences << " sequences");
    EXPECT(whole <= most, whole << " episodes");
    const LimiterConfig& limiter = world_.limiter;
    if (limiter.samples_per_insert == 0) return;
    const double ratio = limiter.samples_per_insert, min_size = double(limiter.min_size);
    // An episode may be longer than what is left to sample.
    EXPECT(double(sampled) <= ratio * std::max(0.0, double(added) - min_size) + 4.0 * double(world_.rows(0)),
           sampled << " sampled after " << added << " added");
    const double overdue = ratio * (double(added_before) - min_size) - double(buffer_->total_sampled());
    // The lead is passed while no env is as long as a sequence that somebody waits for.
    const double lead = std::max(limiter.lead, ratio * double(world_.envs * world_.longest));
    EXPECT(overdue <= lead + ratio * double(world_.envs), overdue << " left to sample: more than the lead");
  }

  void at_rest() {
    const Marks marks = done();
    EXPECT(marks == begun(), "a step was begun that is not done");
    verify_.whole(*buffer_, marks, marks);
    Random random(seed_);
    const std::string path = folder_ + "/last";
    buffer_->save(path, Poll());
    for (u64 segments = 0; segments < 3; ++segments) {
      if (world_.has_latents) update_some(random, 1 + segments);
      // A save that is broken off must not make the next one believe that it wrote anything.
      try {
        if (segments > 0)
          buffer_->save(path, [left = segments]() mutable {
            if (left-- == 0) throw Interrupted();
          });
      } catch (const Interrupted&) {
      }
      save_again(*buffer_, path, marks, marks, random);
    }
  }

  const World world_;
  const Layout layout_;
  const Verifier verify_;
  const std::string folder_;
  const u64 seed_;
  Counts& counts_;
  std::vector<std::unique_ptr<Env>> envs_;
  std::shared_ptr<Buffer> buffer_;
  std::atomic<bool> stop_writers_{false}, stop_readers_{false}, stop_others_{false}, closing_{false};
  std::vector<std::unique_ptr<Worker>> workers_;
};

int run(double seconds, u64 seed) {
  const std::vector<World> all = worlds();
  Counts counts;
  const auto begin = Clock::now();
  for (std::size_t i = 0; i < all.size(); ++i) {
    std::string folder = (std::filesystem::temp_directory_path() / "replay-stress-XXXXXX").string();
    EXPECT(::mkdtemp(folder.data()) != nullptr, "could not make " << folder);
    Stress(all[i], folder, mix(seed) + i, counts).run(seconds / double(all.size()));
    std::filesystem::remove_all(folder);
  }
  const auto took = std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - begin);
  std::cout << "replay_stress: " << took.count() << " s; " << counts.steps << " steps added, " << counts.sampled
            << " sampled; verified " << counts.sequences << " sequences in " << counts.batches << " batches, "
            << counts.episodes << " episodes, " << counts.reads << " reads; wrote " << counts.updates << " latents, "
            << counts.priorities << " priorities; " << counts.saves << " saves (" << counts.files_kept
            << " files kept), " << counts.broken_saves << " broken off, " << counts.loads << " loads; "
            << counts.refused << " calls refused, " << counts.timed_out << " timed out, " << counts.interrupted
            << " interrupted, " << counts.closed << " closed\n";
  return 0;
}

}  // namespace
}  // namespace phyx::replay

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 30;
  const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  if (count > 3 || !(seconds > 0)) {
    std::cerr << "usage: " << arguments[0] << " [seconds] [seed]\n";
    return 2;
  }
  return phyx::replay::run(seconds, seed);
}
