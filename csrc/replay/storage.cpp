#include "replay/storage.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>

namespace phyx::replay {
namespace {

std::string gigabytes(double bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GB", bytes / 1e9);
  return text;
}

}  // namespace

std::size_t Field::item_bytes() const {
  std::size_t bytes = dtype().bytes;
  for (const std::int64_t side : shape)
    if (__builtin_mul_overflow(bytes, std::size_t(side), &bytes))
      throw ReserveError("one step of '" + name + "' has more bytes than 64 bits count");
  return bytes;
}

Storage::Storage(const std::vector<Field>& fields, std::size_t rows) {
  const std::size_t page = std::size_t(::sysconf(_SC_PAGESIZE));
  const double memory = double(::sysconf(_SC_PHYS_PAGES)) * double(page);
  double needed = 0;  // in floating point, where it cannot overflow
  for (const Field& field : fields) {
    columns_.push_back({nullptr, field.item_bytes()});
    needed += double(field.item_bytes()) * double(rows);
  }
  // The pages come late, so a reservation beyond the machine would succeed now and kill the process days later.
  if (needed > memory)
    throw ReserveError(std::to_string(rows) + " steps need " + gigabytes(needed) + ", this machine has " +
                       gigabytes(memory) + ": at most " +
                       std::to_string(std::uint64_t(memory / (needed / double(rows)))) + " steps fit");
  std::vector<std::size_t> offsets;
  for (const Column& column : columns_) {
    step_bytes_ += column.item_bytes;
    offsets.push_back(region_bytes_);
    region_bytes_ += (column.item_bytes * rows + page - 1) / page * page;  // every column begins on a page
  }
  region_ = ::mmap(nullptr, region_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (region_ == MAP_FAILED)
    throw ReserveError("the system refused to reserve " + gigabytes(needed) + " for " + std::to_string(rows) +
                       " steps: " + std::generic_category().message(errno));
  for (std::size_t f = 0; f < columns_.size(); ++f) columns_[f].base = static_cast<std::byte*>(region_) + offsets[f];
}

Storage::~Storage() { ::munmap(region_, region_bytes_); }

}  // namespace phyx::replay
