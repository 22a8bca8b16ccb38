// Steps on their way in: any strides, and the conversions that environments need.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>

#include "replay/storage.h"

namespace phyx::replay {

enum class Conversion { kNone, kFloat64ToFloat32, kInt64ToInt32 };

// One key of a vector step: (count, *shape) in memory of any layout.
struct Source {
  const std::byte* data = nullptr;  // null: the step does not bring this key, zeros are stored
  std::array<std::ptrdiff_t, 1 + kMaxAxes> strides{};
  Conversion conversion = Conversion::kNone;
};

// Throws std::invalid_argument for values that the stored dtype cannot hold, and for a reward that is not finite.
void check(const Source& source, const Field& field, std::size_t count, const std::int64_t* env_ids);

// Whether items lie in memory as they are stored.
bool is_plain(const Source& source, const Field& field);

// Stores the i-th item of a source that is not plain.
void store(const Source& source, const Field& field, std::size_t item_bytes, std::size_t i, std::byte* target);

}  // namespace phyx::replay
