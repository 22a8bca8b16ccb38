// Buffer::save and Buffer::load: the whole buffer in one file. All numbers are little-endian u64.
//
//   magic "PHYXRPLY", version, bytes of the header
//   header: capacity, envs, 4 words of the generator, keys;
//           per key: bytes of the name, the name, dtype code, dimensions, each dimension;
//           per env: steps ever added, steps stored
//   checksum (XXH64) of everything so far
//   per env, per key: the stored steps, oldest first; checksum of these bytes
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <system_error>
#include <utility>

#include "replay/buffer.h"
#include "replay/checksum.h"

namespace phyx::replay {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "snapshots are written as they lie in memory");

constexpr char kMagic[] = "PHYXRPLY";
constexpr std::size_t kMagicBytes = sizeof kMagic - 1;
constexpr std::uint64_t kVersion = 1;
constexpr std::size_t kPreambleBytes = kMagicBytes + 2 * sizeof(std::uint64_t);
constexpr std::size_t kChunk = std::size_t(1) << 20;  // hashed and written while it is in the cache

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
  // Some file systems report a full disk only here.
  void close() {
    if (::close(std::exchange(descriptor_, -1)) != 0) fail("could not close the file", errno);
  }

 private:
  int descriptor_;
};

class Writer {
 public:
  explicit Writer(int descriptor) : descriptor_(descriptor) {}

  void put(const void* data, std::size_t bytes) {
    auto* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const std::size_t chunk = std::min(bytes, kChunk);
      checksum_.update(next, chunk);
      write(next, chunk);
      next += chunk, bytes -= chunk;
    }
  }

  void put_checksum() {
    const std::uint64_t value = std::exchange(checksum_, Checksum()).value();
    write(&value, sizeof value);
  }

 private:
  void write(const void* data, std::size_t bytes) {
    auto* next = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(descriptor_, next, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail("could not write", errno);
      next += written, bytes -= std::size_t(written);
    }
  }

  int descriptor_;
  Checksum checksum_;
};

class Reader {
 public:
  explicit Reader(int descriptor) : descriptor_(descriptor) {}

  void get(void* data, std::size_t bytes) {
    auto* next = static_cast<char*>(data);
    while (bytes > 0) {
      const std::size_t chunk = std::min(bytes, kChunk);
      read(next, chunk);
      checksum_.update(next, chunk);
      next += chunk, bytes -= chunk;
    }
  }

  // Whether what was read since the last call is what was written.
  bool checksum_matches() {
    std::uint64_t stored;
    read(&stored, sizeof stored);
    return stored == std::exchange(checksum_, Checksum()).value();
  }

 private:
  void read(void* data, std::size_t bytes) {
    auto* next = static_cast<char*>(data);
    while (bytes > 0) {
      const ssize_t got = ::read(descriptor_, next, bytes);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail("could not read", errno);
      if (got == 0) throw SnapshotError("truncated while it was read");
      next += got, bytes -= std::size_t(got);
    }
  }

  int descriptor_;
  Checksum checksum_;
};

void append(std::string& header, std::uint64_t value) {
  header.append(reinterpret_cast<const char*>(&value), sizeof value);
}

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
  std::string text() {
    const std::uint64_t bytes = number(1, header_.size());
    return std::string(take(bytes), bytes);
  }
  void require(bool condition) const {
    if (!condition) throw SnapshotError("corrupted: its header contradicts itself");
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

// A new file beside `path`; gone again unless it is moved onto `path`.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& path) : target_(path), file_(create()) {}
  ~TemporaryFile() {
    if (!path_.empty()) ::unlink(path_.c_str());
  }

  int descriptor() const { return file_.descriptor(); }

  void replace_target() {
    if (::fsync(file_.descriptor()) != 0) fail("could not flush to the disk", errno);
    file_.close();
    if (::rename(path_.c_str(), target_.c_str()) != 0) fail("could not move the new file into place", errno);
    path_.clear();
    // The rename itself lasts only when the folder is on the disk too. A folder that cannot be opened or flushed (some
    // network file systems) leaves a whole file either way, so it is no failure.
    const std::size_t slash = target_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : target_.substr(0, slash + 1);
    const File handle(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (handle.descriptor() >= 0) ::fsync(handle.descriptor());
  }

 private:
  int create() {
    std::random_device entropy;
    for (;;) {
      char suffix[24];
      std::snprintf(suffix, sizeof suffix, ".tmp-%08x", unsigned(entropy()));
      const std::string name = target_ + suffix;
      const int descriptor = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor >= 0) {
        path_ = name;
        return descriptor;
      }
      if (errno != EEXIST) fail("could not create a file beside it", errno);
    }
  }

  const std::string target_;
  std::string path_;
  File file_;
};

std::string header_of(const Buffer& buffer, const Random& random, const std::vector<Ring>& rings) {
  std::string header;
  append(header, buffer.capacity());
  append(header, rings.size());
  for (const std::uint64_t word : random.state()) append(header, word);
  append(header, buffer.fields().size());
  for (const Field& field : buffer.fields()) {
    append(header, field.name.size());
    header += field.name;
    append(header, field.dtype_code);
    append(header, field.shape.size());
    for (const std::int64_t side : field.shape) append(header, std::uint64_t(side));
  }
  for (const Ring& ring : rings) {
    append(header, ring.end);
    append(header, ring.size);
  }
  return header;
}

}  // namespace

void Buffer::save(const std::string& path) {
  const std::lock_guard lock(mutex_);
  TemporaryFile file(path);
  Writer writer(file.descriptor());
  const std::string header = header_of(*this, random_, rings_);
  std::string preamble = kMagic;
  append(preamble, kVersion);
  append(preamble, header.size());
  writer.put(preamble.data(), preamble.size());
  writer.put(header.data(), header.size());
  writer.put_checksum();
  for (const Ring& ring : rings_) {
    for (std::size_t f = 0; f < fields_.size(); ++f) {
      ring.for_each_run(ring.begin(), ring.size, [&](Run run) {
        writer.put(storage_.at(f, run.row), run.count * storage_.item_bytes(f));
      });
      writer.put_checksum();
    }
  }
  file.replace_target();
}

std::unique_ptr<Buffer> Buffer::load(const std::string& path) {
  const File file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.descriptor() < 0) fail("could not open it", errno);
  struct stat info;
  if (::fstat(file.descriptor(), &info) != 0) fail("could not look at it", errno);
  if (!S_ISREG(info.st_mode)) throw SnapshotError("not a file");
  const std::uint64_t file_bytes = std::uint64_t(info.st_size);
  const auto sizes = [&](std::uint64_t expected) {
    return "it has " + std::to_string(file_bytes) + " bytes, expected " + std::to_string(expected);
  };

  std::string preamble(std::min<std::uint64_t>(file_bytes, kPreambleBytes), '\0');
  Reader reader(file.descriptor());
  reader.get(preamble.data(), preamble.size());
  if (preamble.empty() || preamble.compare(0, kMagicBytes, kMagic, std::min(preamble.size(), kMagicBytes)) != 0)
    throw SnapshotError(std::string("not a replay snapshot: expected it to begin with '") + kMagic + "'");
  if (preamble.size() < kPreambleBytes) throw SnapshotError("truncated: " + sizes(kPreambleBytes) + " or more");
  std::uint64_t version, header_bytes;
  std::memcpy(&version, preamble.data() + kMagicBytes, sizeof version);
  std::memcpy(&header_bytes, preamble.data() + kMagicBytes + sizeof version, sizeof header_bytes);
  if (version != kVersion)
    throw SnapshotError("format version " + std::to_string(version) + ", expected " + std::to_string(kVersion));
  const std::uint64_t most = file_bytes - kPreambleBytes;
  if (header_bytes > most || most - header_bytes < sizeof(std::uint64_t))
    throw SnapshotError("truncated or corrupted: it has " + std::to_string(file_bytes) +
                        " bytes, expected a header of " + std::to_string(header_bytes) + " and more");
  std::string header(header_bytes, '\0');
  reader.get(header.data(), header.size());
  if (!reader.checksum_matches()) throw SnapshotError("corrupted: the header does not match its checksum");

  HeaderParser parse(header);
  const std::uint64_t capacity = parse.number(1, std::uint64_t(1) << 62);
  const std::uint64_t num_envs = parse.number(1, std::min<std::uint64_t>(capacity, kMaxEnvs));
  Random::State state;
  for (std::uint64_t& word : state) word = parse.number();
  parse.require(state != Random::State{});  // the one state the generator would never leave
  std::vector<Field> fields(parse.number(1, header_bytes));
  for (Field& field : fields) {
    field.name = parse.text();
    parse.require(std::none_of(fields.data(), &field, [&](const Field& other) { return other.name == field.name; }));
    field.dtype_code = parse.number(0, kNumDTypes - 1);
    field.shape.resize(parse.number(0, header_bytes));
    for (std::int64_t& side : field.shape) side = std::int64_t(parse.number(1, std::uint64_t(1) << 62));
  }
  auto buffer = std::make_unique<Buffer>(std::move(fields), capacity, num_envs, 0);
  buffer->random_.restore(state);
  std::uint64_t expected = kPreambleBytes + header_bytes + sizeof(std::uint64_t);
  for (Ring& ring : buffer->rings_) {
    ring.end = parse.number(0, std::uint64_t(1) << kStepBits);
    ring.size = parse.number(0, std::min<std::uint64_t>(ring.end, ring.rows));
    expected += ring.size * buffer->step_bytes() + buffer->fields_.size() * sizeof(std::uint64_t);
  }
  parse.finish();
  if (file_bytes < expected) throw SnapshotError("truncated: " + sizes(expected));
  if (file_bytes > expected) throw SnapshotError("corrupted: " + sizes(expected));

  for (std::size_t env = 0; env < num_envs; ++env) {
    const Ring& ring = buffer->rings_[env];
    for (std::size_t f = 0; f < buffer->fields_.size(); ++f) {
      ring.for_each_run(ring.begin(), ring.size, [&](Run run) {
        reader.get(buffer->storage_.at(f, run.row), run.count * buffer->storage_.item_bytes(f));
      });
      if (!reader.checksum_matches())
        throw SnapshotError("corrupted: '" + buffer->fields_[f].name + "' of env " + std::to_string(env) +
                            " does not match its checksum");
    }
  }
  return buffer;
}

}  // namespace phyx::replay
