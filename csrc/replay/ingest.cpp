#include "replay/ingest.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace phyx::replay {
namespace {

template <typename T>
T read(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Calls visit(address) for every element of an item, the last axis fastest.
template <typename F>
void walk(const std::byte* item, const std::int64_t* shape, const std::ptrdiff_t* strides, std::size_t axes, F& visit) {
  if (axes == 0) return visit(item);
  if (axes == 1) {
    for (std::int64_t i = 0; i < shape[0]; ++i) visit(item + i * strides[0]);
    return;
  }
  for (std::int64_t i = 0; i < shape[0]; ++i) walk(item + i * strides[0], shape + 1, strides + 1, axes - 1, visit);
}

template <typename F>
void for_each_element(const Source& source, const Field& field, std::size_t i, F visit) {
  walk(source.data + std::ptrdiff_t(i) * source.strides[0], field.shape.data(), source.strides.data() + 1,
       field.shape.size(), visit);
}

template <typename Stored, typename Given>
void convert(const Source& source, const Field& field, std::size_t i, std::byte* target) {
  for_each_element(source, field, i, [&](const std::byte* at) {
    const Stored value = Stored(read<Given>(at));
    std::memcpy(target, &value, sizeof value);
    target += sizeof value;
  });
}

template <std::size_t Bytes>
void gather(const Source& source, const Field& field, std::size_t i, std::byte* target) {
  for_each_element(source, field, i, [&](const std::byte* at) {
    std::memcpy(target, at, Bytes);
    target += Bytes;
  });
}

// Infinite or NaN: all exponent bits set.
bool finite(const std::byte* at, const DType& dtype, Conversion conversion) {
  if (conversion == Conversion::kFloat64ToFloat32) return std::isfinite(read<double>(at));
  switch (dtype.bytes) {
    case 2: return dtype.kind == 'V' ? (read<std::uint16_t>(at) & 0x7f80) != 0x7f80
                                     : (read<std::uint16_t>(at) & 0x7c00) != 0x7c00;
    default: return (read<std::uint32_t>(at) & 0x7f800000u) != 0x7f800000u;
  }
}

// Whether the value survives the conversion; NaN and infinity do.
bool fits(const std::byte* at, Conversion conversion) {
  if (conversion == Conversion::kFloat64ToFloat32) {
    const double value = read<double>(at);
    return !std::isfinite(value) || std::isfinite(float(value));
  }
  const auto value = read<std::int64_t>(at);
  return value >= std::numeric_limits<std::int32_t>::min() && value <= std::numeric_limits<std::int32_t>::max();
}

}  // namespace

void check(const Source& source, const Field& field, std::size_t count, const std::int64_t* env_ids) {
  if (source.data == nullptr) return;
  const DType& dtype = field.dtype();
  const bool reward = field.name == "reward" && (dtype.kind == 'f' || dtype.kind == 'V');
  if (!reward && source.conversion == Conversion::kNone) return;
  for (std::size_t i = 0; i < count; ++i) {
    bool all_finite = true, all_fit = true;
    for_each_element(source, field, i, [&](const std::byte* at) {
      if (reward) all_finite &= finite(at, dtype, source.conversion);
      if (source.conversion != Conversion::kNone) all_fit &= fits(at, source.conversion);
    });
    if (!all_finite)
      throw std::invalid_argument("reward: the step of env " + std::to_string(env_ids[i]) +
                                  " has a NaN or infinite reward, expected finite numbers");
    if (!all_fit)
      throw std::invalid_argument(field.name + ": the step of env " + std::to_string(env_ids[i]) +
                                  " holds values beyond the range of " + dtype.name);
  }
}

bool is_plain(const Source& source, const Field& field) {
  if (source.data == nullptr || source.conversion != Conversion::kNone) return false;
  std::ptrdiff_t expected = std::ptrdiff_t(field.dtype().bytes);
  for (std::size_t axis = field.shape.size(); axis-- > 0;) {
    if (field.shape[axis] != 1 && source.strides[axis + 1] != expected) return false;
    expected *= field.shape[axis];
  }
  return true;
}

void store(const Source& source, const Field& field, std::size_t item_bytes, std::size_t i, std::byte* target) {
  if (source.data == nullptr) {
    std::memset(target, 0, item_bytes);
    return;
  }
  switch (source.conversion) {
    case Conversion::kFloat64ToFloat32: return convert<float, double>(source, field, i, target);
    case Conversion::kInt64ToInt32: return convert<std::int32_t, std::int64_t>(source, field, i, target);
    case Conversion::kNone: break;
  }
  switch (field.dtype().bytes) {
    case 1: return gather<1>(source, field, i, target);
    case 2: return gather<2>(source, field, i, target);
    case 4: return gather<4>(source, field, i, target);
    default: return gather<8>(source, field, i, target);
  }
}

}  // namespace phyx::replay
