// Where the steps lie: one region of memory, in it one column per key, in a column one ring of rows per env.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "replay/error.h"

namespace phyx::replay {

struct DType {
  const char* name;
  char kind;  // as in numpy: b bool, u unsigned, i signed, f float; V for bfloat16, which numpy takes as raw bytes
  std::size_t bytes;
};

// The index in this table is the dtype's code in a snapshot: append, never reorder.
constexpr DType kDTypes[] = {{"uint8", 'u', 1},   {"int32", 'i', 4}, {"int64", 'i', 8},
                             {"float32", 'f', 4}, {"bool", 'b', 1},  {"float16", 'f', 2},
                             {"int8", 'i', 1},    {"int16", 'i', 2}, {"bfloat16", 'V', 2}};
constexpr std::size_t kNumDTypes = sizeof kDTypes / sizeof kDTypes[0];

constexpr std::size_t kMaxAxes = 7;  // of one step

// One key of the spec.
struct Field {
  std::string name;
  std::size_t dtype_code;
  std::vector<std::int64_t> shape;  // of one step
  bool latent = false;              // written by update(), and by add() only if it brings it

  const DType& dtype() const { return kDTypes[dtype_code]; }
  // Bytes of one step; throws ReserveError when they cannot be counted in 64 bits.
  std::size_t item_bytes() const;
};

// A stretch of consecutive steps that is contiguous in memory.
struct Run {
  std::size_t row;
  std::size_t count;
};

// Steps [start, start + count) of a ring, in order: one run, or two when they pass the end of the ring.
template <typename F>
void for_each_run(std::size_t first_row, std::size_t rows, std::uint64_t start, std::size_t count, F&& visit) {
  const std::size_t at = start % rows;
  const std::size_t head = count < rows - at ? count : rows - at;
  if (head > 0) visit(Run{first_row + at, head});
  if (count > head) visit(Run{first_row, count - head});
}

// Reserved at once. In RAM the system gives pages when they are first written, huge ones for large columns; with a
// directory the memory is an unnamed file there, which goes with the process however that ends.
class Storage {
 public:
  // Throws ReserveError when the memory or the disk space cannot be had.
  Storage(const std::vector<Field>& fields, std::size_t rows, const std::string& directory, bool prefault);
  ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  std::byte* at(std::size_t field, std::size_t row) { return columns_[field].base + row * columns_[field].item_bytes; }
  const std::byte* at(std::size_t field, std::size_t row) const {
    return columns_[field].base + row * columns_[field].item_bytes;
  }
  std::size_t item_bytes(std::size_t field) const { return columns_[field].item_bytes; }
  std::size_t step_bytes() const { return step_bytes_; }

 private:
  struct Column {
    std::byte* base;
    std::size_t item_bytes;
  };
  std::vector<Column> columns_;
  std::size_t step_bytes_ = 0;
  std::byte* region_ = nullptr;
  std::size_t region_bytes_ = 0;
};

}  // namespace phyx::replay
