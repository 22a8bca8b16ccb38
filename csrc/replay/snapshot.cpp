// Buffer::save and Buffer::load: a directory with one index and many segment files.
//
//   replay.index             what there is: configuration, rings, generator, and every other file with its size and
//                            checksum. All numbers are little-endian u64, floats as their 64 bits:
//                            magic "PHYXRPLY", version, bytes of the header; header; checksum (XXH64) of all before
//   steps-*.bin              one stretch of one env's steps: per key, the steps in order
//   latents-*.bin            the same for the latents, which change later on
//   selector.*.bin           per env and stored step: priority, visits
//
// A save writes what changed under new names, links or keeps what did not, renames the new index over the old one, and
// only then removes what the new index does not name. So whenever it is cut off, one whole snapshot is there.
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <system_error>
#include <tuple>
#include <utility>

#include "replay/buffer.h"
#include "replay/checksum.h"

namespace phyx::replay {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "snapshots are written as they lie in memory");

constexpr char kMagic[] = "PHYXRPLY";
constexpr std::size_t kMagicBytes = sizeof kMagic - 1;
constexpr std::uint64_t kVersion = 2;
constexpr std::size_t kPreambleBytes = kMagicBytes + 2 * sizeof(std::uint64_t);
constexpr std::size_t kChunk = std::size_t(1) << 20;  // hashed and written while it is in the cache
constexpr char kIndex[] = "replay.index";

[[noreturn]] void fail(const std::string& what, int error) {
  throw SnapshotError(what + ": " + std::generic_category().message(error));
}

class File {
 public:
  explicit File(int descriptor) : descriptor_(descriptor) {}
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int descriptor() const { return descriptor_; }
  int release() { return std::exchange(descriptor_, -1); }
  // Some file systems report a full disk only here.
  void close(const std::string& name) {
    if (::close(release()) != 0) fail("could not close '" + name + "'", errno);
  }

 private:
  int descriptor_;
};

// A new file in a folder, hashed while it is written.
class Writer {
 public:
  Writer(int folder, std::string name)
      : name_(std::move(name)),
        file_(::openat(folder, name_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    if (file_.descriptor() < 0) fail("could not create '" + name_ + "'", errno);
  }

  void put(const void* data, std::size_t bytes) {
    auto* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const std::size_t chunk = std::min(bytes, kChunk);
      checksum_.update(next, chunk);
      write(next, chunk);
      next += chunk, bytes -= chunk;
    }
  }

  std::uint64_t checksum() const { return checksum_.value(); }
  std::uint64_t bytes() const { return bytes_; }

  void finish() {
    if (::fsync(file_.descriptor()) != 0) fail("could not flush '" + name_ + "' to the disk", errno);
    file_.close(name_);
  }

 private:
  void write(const char* next, std::size_t bytes) {
    bytes_ += bytes;
    while (bytes > 0) {
      const ssize_t written = ::write(file_.descriptor(), next, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("could not write '" + name_ + "'", errno);
      next += written, bytes -= std::size_t(written);
    }
  }

  const std::string name_;
  File file_;
  Checksum checksum_;
  std::uint64_t bytes_ = 0;
};

// A file of a folder with a size that is known, hashed while it is read.
class Reader {
 public:
  Reader(int folder, std::string name)
      : name_(std::move(name)), file_(::openat(folder, name_.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (file_.descriptor() < 0)
      fail(errno == ENOENT ? "'" + name_ + "' is missing" : "could not open '" + name_ + "'", errno);
    struct stat info;
    if (::fstat(file_.descriptor(), &info) != 0) fail("could not look at '" + name_ + "'", errno);
    if (!S_ISREG(info.st_mode)) throw SnapshotError("'" + name_ + "' is no file");
    bytes_ = std::uint64_t(info.st_size);
  }

  std::uint64_t bytes() const { return bytes_; }

  void get(void* data, std::size_t bytes) {
    auto* next = static_cast<char*>(data);
    while (bytes > 0) {
      const std::size_t chunk = std::min(bytes, kChunk);
      get_unhashed(next, chunk);
      checksum_.update(next, chunk);
      next += chunk, bytes -= chunk;
    }
  }

  void get_unhashed(void* data, std::size_t bytes) {
    auto* next = static_cast<char*>(data);
    while (bytes > 0) {
      const ssize_t got = ::read(file_.descriptor(), next, bytes);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail("could not read '" + name_ + "'", errno);
      if (got == 0) throw SnapshotError("'" + name_ + "' was truncated while it was read");
      next += got, bytes -= std::size_t(got);
    }
  }

  void skip(std::uint64_t bytes) {
    std::string scratch(std::min<std::uint64_t>(bytes, kChunk), '\0');
    for (; bytes > 0; bytes -= std::min<std::uint64_t>(bytes, kChunk))
      get(scratch.data(), std::min<std::uint64_t>(bytes, kChunk));
  }

  void expect(std::uint64_t checksum) const {
    if (checksum != checksum_.value()) throw SnapshotError("'" + name_ + "' is corrupted: it does not match its checksum");
  }

 private:
  const std::string name_;
  File file_;
  Checksum checksum_;
  std::uint64_t bytes_ = 0;
};

class HeaderWriter {
 public:
  void number(std::uint64_t value) { header_.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void real(double value) { header_.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void text(const std::string& value) {
    number(value.size());
    header_ += value;
  }
  const std::string& header() const { return header_; }

 private:
  std::string header_;
};

// Takes a header apart; one that does not hold what it promises is refused.
class HeaderParser {
 public:
  explicit HeaderParser(const std::string& header) : header_(header) {}

  std::uint64_t number() {
    std::uint64_t value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }
  std::uint64_t number(std::uint64_t lowest, std::uint64_t highest) {
    const std::uint64_t value = number();
    require(lowest <= value && value <= highest);
    return value;
  }
  // Not negative; infinity is fine.
  double real() {
    double value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    require(value >= 0);
    return value;
  }
  std::string text() {
    const std::uint64_t bytes = number(1, header_.size());
    return std::string(take(bytes), bytes);
  }
  void require(bool condition) const {
    if (!condition) throw SnapshotError(std::string("'") + kIndex + "' is corrupted: it contradicts itself");
  }
  void finish() const { require(at_ == header_.size()); }

 private:
  const char* take(std::uint64_t bytes) {
    require(bytes <= header_.size() - at_);
    return header_.data() + std::exchange(at_, at_ + bytes);
  }

  const std::string& header_;
  std::size_t at_ = 0;
};

bool starts_with(const std::string& text, const std::string& start) { return text.compare(0, start.size(), start) == 0; }

bool of_a_snapshot(const std::string& name) {
  return name == kIndex || starts_with(name, "steps-") || starts_with(name, "latents-") ||
         starts_with(name, "selector-") || starts_with(name, "index-");
}

std::vector<std::string> entries(int folder) {
  // A fresh descriptor, since reading a directory moves the position of the one it is read by.
  DIR* directory = ::fdopendir(::openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (directory == nullptr) fail("could not list it", errno);
  std::vector<std::string> names;
  while (const dirent* entry = ::readdir(directory))
    if (std::strcmp(entry->d_name, ".") != 0 && std::strcmp(entry->d_name, "..") != 0) names.push_back(entry->d_name);
  ::closedir(directory);
  return names;
}

// Its size, if it is a regular file in that folder.
std::optional<std::uint64_t> size_of(int folder, const std::string& name) {
  struct stat info;
  if (::fstatat(folder, name.c_str(), &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(info.st_mode)) return std::nullopt;
  return std::uint64_t(info.st_size);
}

bool same_folder(int a, int b) {
  struct stat first, second;
  return ::fstat(a, &first) == 0 && ::fstat(b, &second) == 0 && first.st_dev == second.st_dev &&
         first.st_ino == second.st_ino;
}

std::string fresh_name(const std::string& kind, std::size_t env, std::uint64_t segment) {
  static thread_local std::random_device entropy;
  char name[96];
  std::snprintf(name, sizeof name, "%s-%05zu-%09llu-%08x%08x.bin", kind.c_str(), env,
                static_cast<unsigned long long>(segment), unsigned(entropy()), unsigned(entropy()));
  return name;
}

// The folder a snapshot is written into. What this attempt put there is taken away again unless it succeeds.
class TargetFolder {
 public:
  explicit TargetFolder(const std::string& path) : path_(path), file_(open()) {
    if (::flock(file_.descriptor(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
      throw SnapshotError("another save into it is going on");
    for (const std::string& name : entries(file_.descriptor()))
      if (!of_a_snapshot(name))
        throw SnapshotError("it holds '" + name + "', which is no part of a snapshot; expected a folder of its own");
  }
  ~TargetFolder() {
    if (committed_) return;
    for (const std::string& name : mine_) ::unlinkat(file_.descriptor(), name.c_str(), 0);
    if (made_) ::rmdir(path_.c_str());
  }

  int descriptor() const { return file_.descriptor(); }
  void adopt(const std::string& name) { mine_.push_back(name); }

  void commit(const std::string& index, const std::set<std::string>& keep) {
    sync(file_.descriptor());  // the index must not be on the disk before what it names
    if (::renameat(descriptor(), index.c_str(), descriptor(), kIndex) != 0)
      fail("could not move the new index into place", errno);
    committed_ = true;
    sync(file_.descriptor());
    if (made_) {
      const std::size_t slash = path_.find_last_of('/', path_.find_last_not_of('/'));
      const File parent(::open(slash == std::string::npos ? "." : path_.substr(0, slash + 1).c_str(),
                               O_RDONLY | O_DIRECTORY | O_CLOEXEC));
      sync(parent.descriptor());
    }
    for (const std::string& name : entries(file_.descriptor()))
      if (name != kIndex && keep.count(name) == 0) ::unlinkat(file_.descriptor(), name.c_str(), 0);
    ::flock(file_.descriptor(), LOCK_UN);
  }

  std::shared_ptr<const int> share() {
    return {new int(file_.release()), [](const int* descriptor) {
              ::close(*descriptor);
              delete descriptor;
            }};
  }

 private:
  int open() {
    made_ = ::mkdir(path_.c_str(), 0777) == 0;
    if (!made_ && errno != EEXIST) fail("could not make the folder", errno);
    const int descriptor = ::open(path_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor < 0) fail("could not open it as a folder", errno);
    return descriptor;
  }
  // A folder that cannot be flushed (some network file systems) is no failure: the files themselves are safe.
  static void sync(int folder) {
    if (folder >= 0) ::fsync(folder);
  }

  const std::string path_;
  bool made_ = false, committed_ = false;
  File file_;
  std::vector<std::string> mine_;
};

}  // namespace

// Has the private parts of Buffer in its hands; nothing of it outlives a call.
class Snapshot {
 public:
  static void save(Buffer& buffer, const std::string& path, const Poll& poll);
  static std::unique_ptr<Buffer> load(const std::string& path, const std::string& directory);

 private:
  using SavedFile = Buffer::SavedFile;
  using Segment = Buffer::Segment;

  // The bookkeeping at the moment the snapshot is of.
  struct Cut {
    std::vector<Span> spans;
    std::vector<std::uint64_t> fresh;
    Random::State random;
    std::uint64_t added, sampled;
    std::size_t online_env;
    double largest;
    std::vector<Selector::Priority> priorities;
  };
  struct Index {
    std::vector<std::map<std::uint64_t, Segment>> segments;
    SavedFile selector;
  };

  static Cut take_cut(Buffer& buffer);
  static bool has_latents(const Buffer& buffer);
  static std::uint64_t item_bytes(const Buffer& buffer, bool latents);
  template <typename F>
  static void for_each_piece(const Buffer& buffer, std::size_t env, bool latents, Span span, F&& visit);
  static std::string copy_latents(Buffer& buffer, std::size_t env, Span span);
  static SavedFile put_file(Buffer& buffer, TargetFolder& folder, std::size_t env, std::uint64_t segment, bool latents,
                            Span span);
  static bool keep_file(Buffer& buffer, TargetFolder& folder, const SavedFile& file, Span span);
  static SavedFile put_selector(TargetFolder& folder, const Cut& cut);
  static std::string put_index(const Buffer& buffer, TargetFolder& folder, const Cut& cut, const Index& index);
  static std::set<std::string> names(const Index& index);

  static void write_file(HeaderWriter& header, const SavedFile& file);
  static SavedFile read_file(HeaderParser& parse);
  static void get_file(Buffer& buffer, int folder, std::size_t env, bool latents, const SavedFile& file);
};

Snapshot::Cut Snapshot::take_cut(Buffer& b) {
  Cut cut{{}, {}, b.random_.state(), b.added_, b.sampled_, b.online_env_, b.selector_.largest(), {}};
  for (std::size_t env = 0; env < b.rings_.size(); ++env) {
    Ring& ring = b.rings_[env];
    cut.spans.push_back({ring.begin(), ring.end});
    cut.fresh.push_back(ring.fresh);
    ring.unsaved = ring.begin();
    if (b.selector_.has_priorities())
      for (std::uint64_t step = ring.begin(); step < ring.end; ++step)
        cut.priorities.push_back(b.selector_.get(env, step));
  }
  return cut;
}

bool Snapshot::has_latents(const Buffer& b) {
  return std::any_of(b.config_.fields.begin(), b.config_.fields.end(), [](const Field& f) { return f.latent; });
}

std::uint64_t Snapshot::item_bytes(const Buffer& b, bool latents) {
  std::uint64_t bytes = 0;
  for (std::size_t f = 0; f < b.config_.fields.size(); ++f)
    if (b.config_.fields[f].latent == latents) bytes += b.storage_.item_bytes(f);
  return bytes;
}

// The memory of these steps, key by key. Of the ring only what never changes is looked at.
template <typename F>
void Snapshot::for_each_piece(const Buffer& b, std::size_t env, bool latents, Span span, F&& visit) {
  const Ring& ring = b.rings_[env];
  for (std::size_t f = 0; f < b.config_.fields.size(); ++f) {
    if (b.config_.fields[f].latent != latents) continue;
    for_each_run(ring.first_row, ring.rows, span.first, span.end - span.first,
                 [&](Run run) { visit(b.storage_.at(f, run.row), run.count * b.storage_.item_bytes(f)); });
  }
}

// Updates wait for this copy, so that they need not wait for the disk.
std::string Snapshot::copy_latents(Buffer& b, std::size_t env, Span span) {
  std::string copy;
  copy.reserve((span.end - span.first) * item_bytes(b, true));
  Buffer::Lock lock(b.mutex_);
  b.wait(lock, Poll(), false, [&] { return b.updating_ == 0; });
  ++b.copying_;
  lock.unlock();
  for_each_piece(b, env, true, span, [&](const std::byte* data, std::size_t bytes) {
    copy.append(reinterpret_cast<const char*>(data), bytes);
  });
  lock.lock();
  --b.copying_;
  if (b.waiting_ > 0) b.changed_.notify_all();
  return copy;
}

Snapshot::SavedFile Snapshot::put_file(Buffer& b, TargetFolder& folder, std::size_t env, std::uint64_t segment,
                                       bool latents, Span span) {
  SavedFile file{fresh_name(latents ? "latents" : "steps", env, segment), span.first, span.end};
  Writer writer(folder.descriptor(), file.name);
  folder.adopt(file.name);
  if (latents) {
    const std::string copy = copy_latents(b, env, span);
    writer.put(copy.data(), copy.size());
  } else {
    for_each_piece(b, env, false, span, [&](const std::byte* data, std::size_t bytes) { writer.put(data, bytes); });
  }
  writer.finish();
  file.bytes = writer.bytes();
  file.checksum = writer.checksum();
  return file;
}

// Whether the file of an earlier snapshot serves; then it is in the folder.
bool Snapshot::keep_file(Buffer& b, TargetFolder& folder, const SavedFile& file, Span span) {
  if (file.name.empty() || file.first > span.first || file.end != span.end || !b.saved_folder_) return false;
  if (size_of(*b.saved_folder_, file.name) != file.bytes) return false;
  if (same_folder(*b.saved_folder_, folder.descriptor())) return true;
  if (::linkat(*b.saved_folder_, file.name.c_str(), folder.descriptor(), file.name.c_str(), 0) != 0) return false;
  folder.adopt(file.name);
  return true;
}

Snapshot::SavedFile Snapshot::put_selector(TargetFolder& folder, const Cut& cut) {
  SavedFile file{fresh_name("selector", 0, 0), 0, cut.priorities.size()};
  Writer writer(folder.descriptor(), file.name);
  folder.adopt(file.name);
  writer.put(cut.priorities.data(), cut.priorities.size() * sizeof(Selector::Priority));
  writer.finish();
  file.bytes = writer.bytes();
  file.checksum = writer.checksum();
  return file;
}

void Snapshot::write_file(HeaderWriter& header, const SavedFile& file) {
  header.text(file.name);
  for (const std::uint64_t value : {file.first, file.end, file.bytes, file.checksum}) header.number(value);
}

Snapshot::SavedFile Snapshot::read_file(HeaderParser& parse) {
  SavedFile file{parse.text()};
  parse.require(file.name != kIndex && of_a_snapshot(file.name) && file.name.find('/') == std::string::npos &&
                file.name.find('\0') == std::string::npos);
  file.first = parse.number();
  file.end = parse.number(file.first, std::numeric_limits<std::uint64_t>::max());
  file.bytes = parse.number();
  file.checksum = parse.number();
  return file;
}

std::string Snapshot::put_index(const Buffer& b, TargetFolder& folder, const Cut& cut, const Index& index) {
  HeaderWriter header;
  for (const std::uint64_t value : {std::uint64_t(b.config_.capacity), std::uint64_t(b.config_.num_envs),
                                    b.segment_steps_, cut.added, cut.sampled, std::uint64_t(cut.online_env)})
    header.number(value);
  for (const std::uint64_t word : cut.random) header.number(word);
  const SelectorConfig& s = b.config_.selector;
  header.number(s.curious);
  for (const double value : {s.uniform, s.recency, s.priority, s.recency_exponent, s.exponent, s.initial, s.c, s.beta,
                             s.epsilon, cut.largest})
    header.real(value);
  const LimiterConfig& l = b.config_.limiter;
  header.number(l.min_size);
  for (const double value : {l.samples_per_insert, l.lead, l.timeout}) header.real(value);
  header.number(b.config_.fields.size());
  for (const Field& field : b.config_.fields) {
    header.text(field.name);
    header.number(field.dtype_code);
    header.number(field.latent);
    header.number(field.shape.size());
    for (const std::int64_t side : field.shape) header.number(std::uint64_t(side));
  }
  for (std::size_t env = 0; env < cut.spans.size(); ++env) {
    header.number(cut.spans[env].end);
    header.number(cut.spans[env].end - cut.spans[env].first);
    header.number(cut.fresh[env]);
    for (const auto& [number, segment] : index.segments[env]) {
      write_file(header, segment.steps);
      if (has_latents(b)) write_file(header, segment.latents);
    }
  }
  if (b.selector_.has_priorities()) write_file(header, index.selector);

  const std::string name = fresh_name("index", 0, 0);
  Writer writer(folder.descriptor(), name);
  folder.adopt(name);
  HeaderWriter preamble;
  preamble.number(kVersion);
  preamble.number(header.header().size());
  writer.put(kMagic, kMagicBytes);
  writer.put(preamble.header().data(), preamble.header().size());
  writer.put(header.header().data(), header.header().size());
  const std::uint64_t checksum = writer.checksum();
  writer.put(&checksum, sizeof checksum);
  writer.finish();
  return name;
}

std::set<std::string> Snapshot::names(const Index& index) {
  std::set<std::string> found{index.selector.name};
  for (const auto& segments : index.segments)
    for (const auto& [number, segment] : segments) found.insert({segment.steps.name, segment.latents.name});
  return found;
}

void Snapshot::save(Buffer& b, const std::string& path, const Poll& poll) {
  Buffer::Lock lock(b.mutex_);
  b.wait(lock, poll, false, [&] { return !b.saving_; });
  b.saving_ = true;
  struct End {  // however it ends
    Buffer& b;
    Buffer::Lock& lock;
    bool saved = false;
    ~End() {
      if (!lock.owns_lock()) lock.lock();
      b.saving_ = false;
      for (Ring& ring : b.rings_) ring.unsaved = Ring::kNone;
      if (!saved)  // what was noted as written may be gone again
        for (auto& flags : b.dirty_) std::fill(flags.begin(), flags.end(), 1);
      b.changed_.notify_all();
    }
  } end{b, lock};
  const Cut cut = take_cut(b);
  lock.unlock();

  TargetFolder folder(path);
  const std::uint64_t length = b.segment_steps_;
  const bool latents = has_latents(b);
  Index index;
  index.segments.resize(cut.spans.size());
  // The oldest steps of all envs first: those are what `add` will want to overwrite.
  bool any = true;
  for (std::uint64_t round = 0; any; ++round) {
    any = false;
    for (std::size_t env = 0; env < cut.spans.size(); ++env) {
      const auto [begin, stop] = cut.spans[env];
      const std::uint64_t number = begin / length + round;
      const Span span{std::max(begin, number * length), std::min(stop, (number + 1) * length)};
      if (span.first >= span.end) continue;
      any = true;
      if (poll) poll();
      const auto known = b.saved_[env].find(number);
      const Segment old = known == b.saved_[env].end() ? Segment{} : known->second;
      Segment& now = index.segments[env][number];
      now.steps = keep_file(b, folder, old.steps, span) ? old.steps : put_file(b, folder, env, number, false, span);
      if (latents) {
        lock.lock();
        const bool changed = std::exchange(b.latents_dirty(env, span.first), 0) != 0;
        lock.unlock();
        now.latents = !changed && keep_file(b, folder, old.latents, span) ? old.latents
                                                                          : put_file(b, folder, env, number, true, span);
      }
      lock.lock();
      b.rings_[env].unsaved = span.end == stop ? Ring::kNone : span.end;
      if (b.waiting_ > 0) b.changed_.notify_all();
      lock.unlock();
    }
  }
  if (b.selector_.has_priorities()) index.selector = put_selector(folder, cut);
  folder.commit(put_index(b, folder, cut, index), names(index));
  lock.lock();
  b.saved_ = std::move(index.segments);
  b.saved_folder_ = folder.share();
  end.saved = true;
}

void Snapshot::get_file(Buffer& b, int folder, std::size_t env, bool latents, const SavedFile& file) {
  const Ring& ring = b.rings_[env];
  Reader reader(folder, file.name);
  const std::uint64_t first = std::max(file.first, ring.begin());  // the steps before have made room since
  for (std::size_t f = 0; f < b.config_.fields.size(); ++f) {
    if (b.config_.fields[f].latent != latents) continue;
    const std::size_t bytes = b.storage_.item_bytes(f);
    reader.skip((first - file.first) * bytes);
    for_each_run(ring.first_row, ring.rows, first, file.end - first,
                 [&](Run run) { reader.get(b.storage_.at(f, run.row), run.count * bytes); });
  }
  reader.expect(file.checksum);
}

std::unique_ptr<Buffer> Snapshot::load(const std::string& path, const std::string& directory) {
  File folder(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (folder.descriptor() < 0)
    fail(errno == ENOTDIR ? "expected the folder of a replay snapshot" : "could not open it", errno);
  if (!size_of(folder.descriptor(), kIndex))
    throw SnapshotError(std::string("not a replay snapshot: it has no '") + kIndex + "'");
  Reader reader(folder.descriptor(), kIndex);
  const std::string index = std::string("'") + kIndex + "' ";
  std::string preamble(std::min<std::uint64_t>(reader.bytes(), kPreambleBytes), '\0');
  reader.get(preamble.data(), preamble.size());
  if (preamble.empty() || preamble.compare(0, kMagicBytes, kMagic, std::min(preamble.size(), kMagicBytes)) != 0)
    throw SnapshotError(index + "is of something else: expected it to begin with '" + kMagic + "'");
  if (preamble.size() < kPreambleBytes) throw SnapshotError(index + "is truncated");
  std::uint64_t version, header_bytes, checksum;
  std::memcpy(&version, preamble.data() + kMagicBytes, sizeof version);
  std::memcpy(&header_bytes, preamble.data() + kMagicBytes + sizeof version, sizeof header_bytes);
  if (version != kVersion)
    throw SnapshotError(index + "has format version " + std::to_string(version) + ", expected " +
                        std::to_string(kVersion));
  const std::uint64_t rest = reader.bytes() - kPreambleBytes;
  if (rest < sizeof checksum || header_bytes != rest - sizeof checksum)
    throw SnapshotError(index + "is truncated or corrupted: it has " + std::to_string(reader.bytes()) +
                        " bytes, expected a header of " + std::to_string(header_bytes) + " and 32 more");
  std::string header(header_bytes, '\0');
  reader.get(header.data(), header.size());
  reader.get_unhashed(&checksum, sizeof checksum);
  reader.expect(checksum);

  HeaderParser parse(header);
  constexpr std::uint64_t kMost = std::uint64_t(1) << 62;
  Config config;
  config.directory = directory;
  config.capacity = parse.number(1, kMost);
  config.num_envs = parse.number(1, std::min<std::uint64_t>(config.capacity, Buffer::kMaxEnvs));
  const std::uint64_t segment_steps = parse.number(1, kMost);
  const std::uint64_t added = parse.number(), sampled = parse.number();
  const std::uint64_t online_env = parse.number(0, config.num_envs - 1);
  Random::State state;
  for (std::uint64_t& word : state) word = parse.number();
  parse.require(state != Random::State{});  // the one state the generator would never leave
  SelectorConfig& s = config.selector;
  double largest = 0;
  s.curious = parse.number(0, 1) != 0;
  for (double* value : {&s.uniform, &s.recency, &s.priority, &s.recency_exponent, &s.exponent, &s.initial, &s.c, &s.beta,
                        &s.epsilon, &largest})
    *value = parse.real();
  parse.require(s.uniform + s.recency + s.priority > 0);
  LimiterConfig& l = config.limiter;
  l.min_size = parse.number();
  for (double* value : {&l.samples_per_insert, &l.lead, &l.timeout}) *value = parse.real();
  config.fields.resize(parse.number(1, header_bytes));
  for (Field& field : config.fields) {
    field.name = parse.text();
    parse.require(std::none_of(config.fields.data(), &field, [&](const Field& f) { return f.name == field.name; }));
    field.dtype_code = parse.number(0, kNumDTypes - 1);
    field.latent = parse.number(0, 1) != 0;
    field.shape.resize(parse.number(0, kMaxAxes));
    for (std::int64_t& side : field.shape) side = std::int64_t(parse.number(1, kMost));
  }
  const bool has_is_first = std::any_of(config.fields.begin(), config.fields.end(), [](const Field& f) {
    return f.name == "is_first" && f.shape.empty() && f.dtype().kind == 'b' && !f.latent;
  });
  parse.require(has_is_first);
  auto buffer = std::make_unique<Buffer>(std::move(config));
  Buffer& b = *buffer;
  parse.require(segment_steps == b.segment_steps_);
  b.random_.restore(state);
  b.added_ = added, b.sampled_ = sampled, b.online_env_ = online_env;
  b.selector_.set_largest(largest);
  const bool latents = has_latents(b);
  std::vector<std::pair<std::size_t, std::pair<bool, SavedFile>>> files;
  std::uint64_t total_steps = 0;
  for (std::size_t env = 0; env < b.rings_.size(); ++env) {
    Ring& ring = b.rings_[env];
    ring.end = parse.number(0, std::uint64_t(1) << Buffer::kStepBits);
    ring.size = parse.number(0, std::min<std::uint64_t>(ring.end, ring.rows));
    ring.fresh = parse.number(0, ring.end);
    total_steps += ring.size;
    for (std::uint64_t step = ring.begin(); step < ring.end;) {
      const std::uint64_t number = step / segment_steps, stop = std::min(ring.end, (number + 1) * segment_steps);
      Segment& segment = b.saved_[env][number];
      for (const bool latent : {false, true}) {
        if (latent && !latents) continue;
        SavedFile& file = latent ? segment.latents : segment.steps;
        file = read_file(parse);
        parse.require(file.first <= step && file.first >= number * segment_steps && file.end == stop &&
                      file.bytes == (file.end - file.first) * item_bytes(b, latent));
        files.push_back({env, {latent, file}});
      }
      step = stop;
    }
  }
  SavedFile selector;
  if (b.selector_.has_priorities()) {
    selector = read_file(parse);
    parse.require(selector.bytes == total_steps * sizeof(Selector::Priority));
    files.push_back({0, {false, selector}});
  }
  parse.finish();
  for (const auto& [env, entry] : files) {
    const auto size = size_of(folder.descriptor(), entry.second.name);
    if (!size) throw SnapshotError("'" + entry.second.name + "' is missing");
    if (*size != entry.second.bytes)
      throw SnapshotError("'" + entry.second.name + "' is " + (*size < entry.second.bytes ? "truncated" : "corrupted") +
                          ": it has " + std::to_string(*size) + " bytes, expected " +
                          std::to_string(entry.second.bytes));
  }
  if (b.selector_.has_priorities()) files.pop_back();

  for (const auto& [env, entry] : files) get_file(b, folder.descriptor(), env, entry.first, entry.second);
  for (Ring& ring : b.rings_) {
    for (std::uint64_t step = ring.begin(); step < ring.end; ++step) {
      const auto flag = [&](std::size_t f) { return *b.storage_.at(f, ring.row(step)) != std::byte{0}; };
      ring.episodes.add(step, flag(b.is_first_), b.is_last_ != Buffer::kNoField && flag(b.is_last_));
    }
  }
  if (b.selector_.has_priorities()) {
    Reader priorities(folder.descriptor(), selector.name);
    for (std::size_t env = 0; env < b.rings_.size(); ++env) {
      for (std::uint64_t step = b.rings_[env].begin(); step < b.rings_[env].end; ++step) {
        Selector::Priority priority;
        priorities.get(&priority, sizeof priority);
        b.selector_.set(env, step, priority);
      }
    }
    priorities.expect(selector.checksum);
  }
  b.saved_folder_ = std::shared_ptr<const int>(new int(folder.release()), [](const int* descriptor) {
    ::close(*descriptor);
    delete descriptor;
  });
  return buffer;
}

void Buffer::save(const std::string& path, const Poll& poll) { Snapshot::save(*this, path, poll); }

std::unique_ptr<Buffer> Buffer::load(const std::string& path, const std::string& directory) {
  const auto index = [&] {
    struct stat info {};
    ::stat((path + "/" + kIndex).c_str(), &info);
    return std::make_tuple(info.st_ino, info.st_ctim.tv_sec, info.st_ctim.tv_nsec);
  };
  for (int tries = 20;; --tries) {
    const auto before = index();
    try {
      return Snapshot::load(path, directory);
    } catch (const SnapshotError&) {
      if (tries == 0 || index() == before) throw;  // else another process has saved there meanwhile
    }
  }
}

}  // namespace phyx::replay
