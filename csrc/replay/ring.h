// The steps of one env: which are stored, where, and who is reading them.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "replay/episodes.h"
#include "replay/storage.h"

namespace phyx::replay {

// Its n-th step ever (from 0) lies at first_row + n % rows until n + rows overwrites it.
struct Ring {
  std::size_t first_row = 0;
  std::size_t rows = 0;
  std::uint64_t end = 0;    // steps ever added
  std::uint64_t size = 0;   // of them still stored: end - size ... end - 1
  std::uint64_t fresh = 0;  // the first step that the online queue has not handed out
  Episodes episodes;
  std::vector<std::uint64_t> readings;  // first steps of the sequences being copied out
  std::uint64_t unsaved = kNone;        // first step that a snapshot being written has not reached

  static constexpr std::uint64_t kNone = std::numeric_limits<std::uint64_t>::max();

  std::uint64_t begin() const { return end - size; }
  std::size_t row(std::uint64_t step) const { return first_row + step % rows; }
  bool holds(std::uint64_t step) const { return begin() <= step && step < end; }
  std::uint64_t starts(std::uint64_t length) const { return size >= length ? size - length + 1 : 0; }

  // Whether the next step would overwrite one that a save, or a draw, has not copied yet.
  bool awaits_save() const { return size == rows && unsaved <= begin(); }
  bool awaits_readers() const {
    return size == rows && std::any_of(readings.begin(), readings.end(), [&](auto first) { return first <= begin(); });
  }
};

}  // namespace phyx::replay
