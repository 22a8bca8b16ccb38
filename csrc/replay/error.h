// What the buffer throws besides std::invalid_argument (a ValueError in Python).
#pragma once
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace phyx::replay {

// The memory asked for cannot be had: a MemoryError in Python.
class ReserveError : public std::bad_alloc {
 public:
  explicit ReserveError(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// A snapshot could not be written, or is not whole.
class SnapshotError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The buffer was closed while, or before, somebody waited for it.
class ClosedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The limiter's time to wait is over.
class TimeoutError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace phyx::replay
