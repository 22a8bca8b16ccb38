#include "replay/storage.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <system_error>

namespace phyx::replay {
namespace {

constexpr std::size_t kHugePage = std::size_t(2) << 20;
constexpr std::size_t kHugeFrom = 16 * kHugePage;  // below, huge pages would waste more than they save

std::string gigabytes(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GB", bytes / 1e9);
  return text;
}

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// What this process may use: the machine's memory, or less in a container.
double memory_limit() {
  double limit = double(::sysconf(_SC_PHYS_PAGES)) * double(::sysconf(_SC_PAGESIZE));
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    double allowed = 0;  // "max" is no number: the read fails
    if (std::ifstream(path) >> allowed && allowed > 0) limit = std::min(limit, allowed);
  }
  return limit;
}

// A file that has no name any more, with room for `bytes`.
int unnamed_file(const std::string& directory, std::size_t bytes, std::size_t rows) {
  const auto fail = [&](const std::string& what, int error) {
    throw ReserveError("directory '" + directory + "': " + what + ": " + std::generic_category().message(error));
  };
  struct statvfs disk;
  if (::statvfs(directory.c_str(), &disk) != 0) fail("could not look at it", errno);
  const double free = double(disk.f_bavail) * double(disk.f_frsize);
  const auto too_small = [&] {
    throw ReserveError(std::to_string(rows) + " steps need " + gigabytes(double(bytes)) + ", directory '" + directory +
                       "' has " + gigabytes(free) + " free: at most " +
                       std::to_string(std::uint64_t(free / (double(bytes) / double(rows)))) + " steps fit");
  };
  if (double(bytes) > free) too_small();
  std::string name = directory + "/phyxdream-replay-XXXXXX";
  const int descriptor = ::mkstemp(name.data());
  if (descriptor < 0) fail("could not create a file there", errno);
  ::unlink(name.c_str());
  ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
#if defined(__linux__)
  // Without the blocks a full disk would show as a bus error, days later.
  const int error = ::posix_fallocate(descriptor, 0, off_t(bytes));
#else
  const int error = ::ftruncate(descriptor, off_t(bytes)) == 0 ? 0 : errno;
#endif
  if (error != 0) {
    ::close(descriptor);
    if (error == ENOSPC) too_small();
    fail("could not reserve " + gigabytes(double(bytes)), error);
  }
  return descriptor;
}

}  // namespace

std::size_t Field::item_bytes() const {
  std::size_t bytes = dtype().bytes;
  for (const std::int64_t side : shape)
    if (__builtin_mul_overflow(bytes, std::size_t(side), &bytes))
      throw ReserveError("one step of '" + name + "' has more bytes than 64 bits count");
  return bytes;
}

Storage::Storage(const std::vector<Field>& fields, std::size_t rows, const std::string& directory, bool prefault) {
  const std::size_t page = std::size_t(::sysconf(_SC_PAGESIZE));
  double needed = 0;  // in floating point, where it cannot overflow
  for (const Field& field : fields) {
    columns_.push_back({nullptr, field.item_bytes()});
    needed += double(field.item_bytes()) * double(rows);
  }
  // The pages come late, so a reservation beyond the machine would succeed now and kill the process days later.
  const double memory = memory_limit();
  if (directory.empty() && needed > memory)
    throw ReserveError(std::to_string(rows) + " steps need " + gigabytes(needed) + ", this machine has " +
                       gigabytes(memory) + ": at most " +
                       std::to_string(std::uint64_t(memory / (needed / double(rows)))) + " steps fit");
  if (needed > 4e18) throw ReserveError(std::to_string(rows) + " steps need " + gigabytes(needed));
  std::vector<std::size_t> offsets;
  for (const Column& column : columns_) {
    const std::size_t bytes = column.item_bytes * rows;
    const std::size_t unit = bytes >= kHugeFrom ? kHugePage : page;  // every column begins on a page
    step_bytes_ += column.item_bytes;
    offsets.push_back(region_bytes_ = round_up(region_bytes_, unit));
    region_bytes_ += round_up(bytes, unit);
  }
  region_bytes_ += kHugePage;  // so that the first column can begin on a huge page
  void* region;
  if (directory.empty()) {
    region = ::mmap(nullptr, region_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  } else {
    const int descriptor = unnamed_file(directory, region_bytes_, rows);
    region = ::mmap(nullptr, region_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    const int error = errno;
    ::close(descriptor);
    errno = error;
  }
  if (region == MAP_FAILED)
    throw ReserveError("the system refused to reserve " + gigabytes(needed) + " for " + std::to_string(rows) +
                       " steps: " + std::generic_category().message(errno));
  region_ = static_cast<std::byte*>(region);
  auto* base = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<std::uintptr_t>(region), kHugePage));
  for (std::size_t f = 0; f < columns_.size(); ++f) {
    columns_[f].base = base + offsets[f];
    const std::size_t bytes = columns_[f].item_bytes * rows;
#if defined(MADV_HUGEPAGE)
    if (directory.empty() && bytes >= kHugeFrom) ::madvise(columns_[f].base, round_up(bytes, kHugePage), MADV_HUGEPAGE);
#endif
    if (prefault)
      for (std::size_t at = 0; at < bytes; at += page) columns_[f].base[at] = std::byte{0};
  }
}

Storage::~Storage() { ::munmap(region_, region_bytes_); }

}  // namespace phyx::replay
