// The parts of the replay against plain models of them, and `load` against snapshots that are not what was written:
//
//   replay_units [seconds of corrupting = 10] [seed = 0]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "replay/buffer.h"
#include "replay/checksum.h"

namespace phyx::replay {
namespace {

using u64 = std::uint64_t;
namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------- Checksum

u64 checksum(const std::string& text) {
  Checksum sum;
  sum.update(text.data(), text.size());
  return sum.value();
}

void test_checksum(Random& random) {
  // XXH64 with seed 0, as other programs compute it.
  EXPECT(checksum("") == 0xef46db3751d8e999u, std::hex << checksum(""));
  EXPECT(checksum("a") == 0xd24ec4f1a98c6e5bu, std::hex << checksum("a"));
  EXPECT(checksum("abc") == 0x44bc2cf5ad770999u, std::hex << checksum("abc"));
  const std::string sentence = "Nobody inspects the spammish repetition";
  EXPECT(checksum(sentence) == 0xfbcea83c8a378bf1u, std::hex << checksum(sentence));
  for (int i = 0; i < 200; ++i) {
    std::string text(random.below(300), '\0');
    for (char& letter : text) letter = char(random.next());
    Checksum pieces;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t piece = std::min<std::size_t>(text.size() - at, random.below(70));
      pieces.update(text.data() + at, piece);
      at += piece;
    }
    EXPECT(pieces.value() == checksum(text), text.size() << " bytes in pieces");
  }
}

// ------------------------------------------------------------------------------------------------- SumTree

void test_sum_tree(Random& random) {
  for (const std::size_t leaves : {1, 2, 7, 8, 9, 63, 64, 65, 500, 513}) {
    SumTree tree(leaves);
    std::vector<double> model(leaves, 0.0);
    EXPECT(tree.total() == 0, tree.total());
    for (int i = 0; i < 300; ++i) {
      const std::size_t leaf = random.below(leaves);
      // Whole numbers, so that every sum is exact; zeros, since those must never be found.
      model[leaf] = random.below(3) == 0 ? 0.0 : double(random.below(1 << 20));
      tree.set(leaf, model[leaf]);
      double total = 0;
      for (const double value : model) total += value;
      EXPECT(tree.total() == total, tree.total() << " of " << leaves << " leaves, the model has " << total);
      EXPECT(tree[leaf] == model[leaf], tree[leaf]);
      if (total == 0) continue;
      double at = double(random.below(u64(total)));
      const std::size_t found = tree.find(at);
      std::size_t wanted = 0;
      while (at >= model[wanted]) at -= model[wanted++];
      EXPECT(found == wanted, "leaf " << found << " of " << leaves << ", the model has " << wanted);
      // Rounding may lead beyond the last one.
      EXPECT(model[tree.find(total)] > 0 && model[tree.find(2 * total)] > 0, "a leaf of size zero");
    }
  }
}

// ------------------------------------------------------------------------------------------------- Episodes

void test_episodes(Random& random) {
  for (int round = 0; round < 300; ++round) {
    const u64 rows = 1 + random.below(20), often = 1 + random.below(8);
    Episodes episodes;
    std::vector<bool> firsts, lasts;
    EXPECT(episodes.complete() == 0, episodes.complete());
    for (u64 step = 0; step < 60; ++step) {
      firsts.push_back(random.below(often) == 0);
      lasts.push_back(random.below(often) == 0);
      episodes.add(step, firsts.back(), lasts.back());
      const u64 begin = step + 1 > rows ? step + 1 - rows : 0;
      episodes.evict(begin);
      std::vector<Span> complete;
      for (u64 at = begin; at <= step; ++at) {
        u64 first = at, end = at + 1;
        while (first > 0 && !firsts[first]) --first;
        while (end <= step && !firsts[end]) ++end;
        const Span found = episodes.around(at);
        EXPECT(std::max(found.first, begin) == std::max(first, begin) && found.end == end,
               "episode " << found.first << " to " << found.end << " around " << at << ", the model has " << first
                          << " to " << end);
        if (at == first && firsts[first] && (end <= step || lasts[step])) complete.push_back({first, end});
      }
      EXPECT(episodes.complete() == complete.size(), episodes.complete() << " complete, not " << complete.size());
      for (std::size_t i = 0; i < complete.size(); ++i)
        EXPECT(episodes.complete(i).first == complete[i].first && episodes.complete(i).end == complete[i].end,
               "complete episode " << i << " begins at " << episodes.complete(i).first);
    }
  }
}

// ------------------------------------------------------------------------------------------------- Selector

SelectorConfig random_selector(Random& random) {
  SelectorConfig config;
  config.uniform = double(random.below(3));
  config.recency = double(random.below(3));
  config.priority = double(random.below(3));
  if (config.recency + config.priority == 0) config.uniform = 1;
  config.recency_exponent = double(random.below(4)) / 2;
  config.curious = random.below(2) == 0;
  config.exponent = 0.7, config.c = 10, config.beta = 0.7, config.epsilon = 0.01;
  config.initial = config.curious ? 20 : double(random.below(3));
  return config;
}

// Sequences are drawn as often as `probability` says, and those of one episode stay in it.
void test_selector(Random& random) {
  for (int round = 0; round < 40; ++round) {
    std::vector<Ring> rings(1 + random.below(4));
    const SelectorConfig config = random_selector(random);
    const std::size_t rows = 8 + random.below(10);
    for (Ring& ring : rings) ring.rows = rows;
    Selector selector(config, rings);
    const std::size_t length = 1 + random.below(6);
    for (std::size_t env = 0; env < rings.size(); ++env) {
      Ring& ring = rings[env];
      for (u64 end = env == 0 ? rows + random.below(rows) : random.below(2 * rows); ring.end < end;) {
        const u64 step = ring.end++;
        ring.size = std::min<u64>(ring.size + 1, rows);
        ring.episodes.add(step, random.below(5) == 0, false);
        ring.episodes.evict(ring.begin());
        selector.added(env, step);
        const u64 other = ring.begin() + random.below(ring.size);
        if (config.priority > 0 && random.below(2) == 0) selector.prioritize(env, other, double(random.below(4)));
      }
    }
    selector.assign(length);
    std::map<std::pair<std::size_t, u64>, double> chances, drawn;
    double sum = 0;
    for (std::size_t env = 0; env < rings.size(); ++env) {
      for (u64 i = 0; i < rings[env].starts(length); ++i) {
        const Start start{env, rings[env].begin() + i};
        sum += chances[{env, start.step}] = selector.probability(start);
      }
    }
    EXPECT(chances.size() == selector.total(), selector.total() << " sequences, not " << chances.size());
    EXPECT(std::abs(sum - 1) < 1e-9, "the probabilities add up to " << sum);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) {
      const Start start = selector.draw(random);
      EXPECT(chances.count({start.env, start.step}) == 1, "drew " << start.step << " of env " << start.env);
      ++drawn[{start.env, start.step}];
      const auto within = selector.draw_within_episodes(random);
      if (!within) continue;
      EXPECT(chances.count({within->env, within->step}) == 1, "drew " << within->step << " of env " << within->env);
      EXPECT(rings[within->env].episodes.around(within->step).end >= within->step + length, "two episodes");
    }
    for (const auto& [start, chance] : chances) {
      const double expected = chance * kDraws, slack = 6 * std::sqrt(expected) + 1;  // six standard deviations
      EXPECT(std::abs(drawn[start] - expected) <= slack, drawn[start] << " times, expected " << expected);
    }
  }
}

// ------------------------------------------------------------------------------------------------- snapshots

class Impatient : public std::exception {};

Config random_config(Random& random) {
  Config config;
  const auto add = [&](const char* name, const char* dtype, std::vector<std::int64_t> shape, bool latent) {
    std::size_t code = 0;
    while (std::string(kDTypes[code].name) != dtype) ++code;
    config.fields.push_back({name, code, std::move(shape), latent});
  };
  add("image", "uint8", {3, 4, 4}, false);
  add("is_first", "bool", {}, false);
  if (random.below(2) == 0) add("is_last", "bool", {}, false);
  if (random.below(2) == 0) add("deter", "float32", {6}, true);
  add("reward", "float32", {}, false);
  config.num_envs = 1 + random.below(4);
  config.capacity = config.num_envs * (4 + random.below(20)) + random.below(config.num_envs);
  config.seed = random.next();
  config.selector = random_selector(random);
  return config;
}

void add_steps(Buffer& buffer, Random& random, std::size_t calls) {
  const std::vector<Field>& fields = buffer.config().fields;
  const std::size_t envs = buffer.config().num_envs;
  for (std::size_t call = 0; call < calls; ++call) {
    std::vector<std::int64_t> ids;
    for (std::size_t env = 0; env < envs; ++env)
      if (random.below(3) > 0) ids.push_back(std::int64_t(env));
    std::vector<std::vector<std::byte>> memory(fields.size());
    std::vector<Source> sources(fields.size());
    for (std::size_t f = 0; f < fields.size(); ++f) {
      const std::size_t bytes = fields[f].item_bytes();
      memory[f].resize((ids.size() + 1) * bytes);
      for (std::byte& byte : memory[f]) byte = std::byte(random.below(2));  // flags, and small finite floats
      sources[f].data = memory[f].data();
      auto& strides = sources[f].strides;
      strides[fields[f].shape.size()] = std::ptrdiff_t(fields[f].dtype().bytes);
      for (std::size_t axis = fields[f].shape.size(); axis-- > 0;)
        strides[axis] = strides[axis + 1] * fields[f].shape[axis];
    }
    buffer.add(ids.data(), ids.size(), sources, [] { throw Impatient(); });
  }
}

// Whatever the snapshot said: a buffer that could be loaded can be used.
void use(Buffer& buffer, Random& random, const std::string& path) {
  const std::vector<Field>& fields = buffer.config().fields;
  std::size_t item_bytes = 0;
  std::vector<std::size_t> latents;
  for (std::size_t f = 0; f < fields.size(); ++f) {
    item_bytes = std::max(item_bytes, fields[f].item_bytes());
    if (fields[f].latent) latents.push_back(f);
  }
  const auto impatient = [] { throw Impatient(); };
  std::vector<std::int64_t> ids{-1};
  const auto take = [&](const Draw& draw) {
    const std::size_t size = draw.sequences.size();
    std::vector<std::vector<std::byte>> columns(fields.size(), std::vector<std::byte>(size * draw.length * item_bytes));
    std::vector<std::int64_t> step_ids(size * draw.length);
    std::vector<double> probability(size);
    Outputs outputs{{}, step_ids.data(), probability.data(), nullptr};
    for (auto& column : columns) outputs.columns.push_back(column.data());
    for (std::size_t b = 0; b < size; ++b) buffer.copy(draw, b, outputs);
    buffer.finish(draw);
    ids.insert(ids.end(), step_ids.begin(), step_ids.end());
  };
  for (int i = 0; i < 6; ++i) {
    SampleOptions options;
    options.online = i == 1;
    options.cross_episodes = i != 2;
    try {
      if (const auto draw = buffer.try_draw(1 + random.below(4), 1 + random.below(8), options)) take(*draw);
    } catch (const std::invalid_argument&) {  // no episode is that long
    }
  }
  try {
    take(buffer.draw_episodes(2, impatient));
  } catch (const std::invalid_argument&) {  // there is none
  } catch (const Impatient&) {
  } catch (const TimeoutError&) {
  }
  const std::vector<std::byte> zeros(ids.size() * item_bytes);
  buffer.update(ids.data(), ids.size(), latents, std::vector<const std::byte*>(latents.size(), zeros.data()));
  if (buffer.config().selector.priority > 0)
    buffer.prioritize(ids.data(), ids.size(), std::vector<double>(ids.size(), 0.5).data());
  try {
    add_steps(buffer, random, 30);
  } catch (const Impatient&) {
  } catch (const TimeoutError&) {
  }
  buffer.num_episodes(), buffer.num_sequences(3), buffer.size();
  if (random.below(20) > 0) return;
  buffer.save(path, Poll());
  Buffer::load(path, "");
  fs::remove_all(path);
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), std::streamsize(bytes.size()));
}

void set_number(std::string& bytes, std::size_t at, u64 value) { std::memcpy(bytes.data() + at, &value, 8); }
u64 number(const std::string& bytes, std::size_t at) {
  u64 value;
  std::memcpy(&value, bytes.data() + at, 8);
  return value;
}

constexpr std::size_t kHeaderAt = 24;  // after magic, version, and the header's own size

// An index that says what this one says, and is whole.
std::string sealed(std::string index) {
  index.resize(index.size() - 8);
  set_number(index, 16, index.size() - kHeaderAt);
  const u64 sum = checksum(index);
  index.append(8, '\0');
  set_number(index, index.size() - 8, sum);
  return index;
}

struct Tries {
  u64 refused = 0, loaded = 0;
};

// Null when it was refused as it should be; anything else that is thrown ends the program.
std::unique_ptr<Buffer> load(const std::string& path, const std::string& directory, Tries& tries) {
  try {
    auto buffer = Buffer::load(path, directory);
    ++tries.loaded;
    return buffer;
  } catch (const SnapshotError&) {
  } catch (const ReserveError&) {
  }
  ++tries.refused;
  return nullptr;
}

// Damage that the checksums cannot miss.
void test_damaged(Random& random, const std::string& path, Tries& tries) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path)) names.push_back(entry.path().filename().string());
  for (int i = 0; i < 40; ++i) {
    const std::string name = names[random.below(names.size())], file = path + "/" + name;
    const std::string original = contents(file);
    std::string damaged = original;
    switch (random.below(6)) {
      case 0: damaged.resize(random.below(damaged.size())); break;
      case 1: damaged.append(1 + random.below(40), char(random.next())); break;
      case 2: damaged.clear(); break;
      default:
        for (u64 flips = 1 + random.below(3); flips-- > 0;)
          damaged[random.below(damaged.size())] ^= char(1 << random.below(8));
    }
    if (damaged == original) continue;
    const u64 kind = random.below(8);
    fs::remove(file);
    if (kind == 0) fs::create_directory(file);
    if (kind == 1) fs::create_symlink(name, file);
    if (kind > 2) write(file, damaged);
    EXPECT(load(path, "", tries) == nullptr, name << " was damaged, and it was loaded");
    fs::remove(file);
    write(file, original);
  }
}

// An index that was made up, with a checksum that is right: no promise but that nothing goes wrong.
void test_made_up(Random& random, const std::string& path, const std::string& scratch, Tries& tries) {
  const std::string file = path + "/replay.index", original = contents(file);
  const std::size_t numbers = (original.size() - kHeaderAt) / 8;
  for (int i = 0; i < 300; ++i) {
    std::string index = original;
    for (u64 changes = 1 + random.below(2); changes-- > 0;) {
      // Mostly where a number begins: texts move what follows, by their length.
      const std::size_t at = kHeaderAt + (random.below(4) > 0 ? random.below(original.size() - kHeaderAt - 8)
                                                              : 8 * random.below(numbers - 1));
      const u64 value = number(index, at);
      // No flips in the middle: they could ask for memory that a machine may well have.
      const u64 bit = random.below(2) == 0 ? random.below(10) : 44 + random.below(20);
      const u64 values[] = {0,         1,         value + 1,           value - 1,          ~u64(0), u64(1) << 63,
                            value * 2, value / 2, u64(1) << 40,        u64(1) << 62,       value ^ (u64(1) << bit),
                            number(index, kHeaderAt + 8 * random.below(numbers - 1)),       0x7ff0000000000000u,
                            0x7ff8000000000000u};
      set_number(index, at, values[random.below(std::size(values))]);
    }
    if (random.below(8) == 0) index.resize(kHeaderAt + 8 + random.below(original.size() - kHeaderAt - 8));
    if (random.below(16) == 0) index.append(1 + random.below(64), char(random.next()));
    write(file, sealed(index));
    if (const auto buffer = load(path, random.below(4) == 0 ? scratch : "", tries))
      use(*buffer, random, scratch + "/made-up");
  }
  write(file, original);
}

// Steps or priorities that were made up, with checksums that are right all the way.
void test_made_up_contents(Random& random, const std::string& path, const std::string& scratch, Tries& tries) {
  const std::string index_file = path + "/replay.index", index = contents(index_file);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().filename() != "replay.index") names.push_back(entry.path().string());
  if (names.empty()) return;  // nothing was ever added
  for (int i = 0; i < 30; ++i) {
    const std::string file = names[random.below(names.size())], original = contents(file);
    std::string changed = original;
    if (random.below(2) == 0) {
      for (char& byte : changed) byte = char(random.next());
    } else {
      const u64 special[] = {0x7ff0000000000000u, 0xfff0000000000000u, 0x7ff8000000000000u, u64(1) << 63, 0, ~u64(0)};
      for (std::size_t at = 0; at + 8 <= changed.size(); at += 8)
        if (random.below(3) == 0) set_number(changed, at, special[random.below(std::size(special))]);
    }
    std::string wanted(8, '\0'), patched = index;
    set_number(wanted, 0, checksum(original));
    const std::size_t at = patched.find(wanted, kHeaderAt);
    EXPECT(at != std::string::npos, "the index does not hold the checksum of " << file);
    set_number(patched, at, checksum(changed));
    write(file, changed);
    write(index_file, sealed(patched));
    const auto buffer = load(path, "", tries);
    EXPECT(buffer != nullptr, "contents are not looked at, and it was refused");
    use(*buffer, random, scratch + "/made-up");
    write(file, original);
  }
  write(index_file, index);
}

void test_snapshots(Random& random, double seconds, Tries& tries) {
  std::string scratch = (fs::temp_directory_path() / "replay-units-XXXXXX").string();
  EXPECT(::mkdtemp(scratch.data()) != nullptr, "could not make " << scratch);
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  do {
    const std::string path = scratch + "/snapshot";
    {
      Buffer buffer(random_config(random));
      add_steps(buffer, random, random.below(60));
      buffer.save(path, Poll());
      if (random.below(2) == 0) {
        add_steps(buffer, random, random.below(20));
        buffer.save(path, Poll());
      }
    }
    use(*Buffer::load(path, ""), random, scratch + "/again");
    test_damaged(random, path, tries);
    test_made_up(random, path, scratch, tries);
    test_made_up_contents(random, path, scratch, tries);
    fs::remove_all(path);
  } while (std::chrono::steady_clock::now() < until);
  fs::remove_all(scratch);
}

int run(double seconds, u64 seed) {
  Random random(seed);
  test_checksum(random);
  test_sum_tree(random);
  test_episodes(random);
  test_selector(random);
  Tries tries;
  test_snapshots(random, seconds, tries);
  std::cout << "replay_units: checksum, sum tree, episodes, selector; " << tries.refused
            << " damaged snapshots refused, " << tries.loaded << " loaded and used\n";
  return 0;
}

}  // namespace
}  // namespace phyx::replay

int main(int count, char** arguments) {
  const double seconds = count > 1 ? std::atof(arguments[1]) : 10;
  const std::uint64_t seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  if (count > 3 || !(seconds > 0)) {
    std::cerr << "usage: " << arguments[0] << " [seconds] [seed]\n";
    return 2;
  }
  return phyx::replay::run(seconds, seed);
}
