// Torch tensors as the ops see them: raw memory, one list of sizes, one list of strides (in elements) per operand.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

namespace phyx {

constexpr int kMaxDims = 64;  // torch's own limit

// `Count` operands over the same (steps, columns...) grid, at most one of them a number. The column dimensions are ordered
// from the longest stride to the shortest of operand 0; neighbours that every operand walks in one go are one dimension.
template <int Count>
struct Grid {
  int item = 4;  // bytes an element
  int64_t steps = 0;
  int column_dims = 0;
  std::array<int64_t, kMaxDims> size{};
  std::array<char*, Count> data{};  // null: operand left out
  std::array<int64_t, Count> time_stride{};
  std::array<std::array<int64_t, Count>, kMaxDims> stride{};

  // shape: tuple (T, ...). An operand is (address, strides), or a number, which is an operand that
  // stands still (in float32 or float64, by item), or None.
  Grid(int item, pybind11::tuple shape, const std::array<pybind11::handle, Count>& operands) : item(item) {
    const int dims = static_cast<int>(shape.size());
    if (item != 4 && item != 8) throw std::invalid_argument("item: expected 4 (float32) or 8 (float64)");
    if (dims < 1 || dims > kMaxDims) throw std::invalid_argument("shape: expected 1 to 64 dimensions");
    steps = PyLong_AsLongLong(shape[0].ptr());
    column_dims = dims - 1;
    for (int d = 0; d < column_dims; ++d) size[d] = PyLong_AsLongLong(shape[d + 1].ptr());
    for (int i = 0; i < Count; ++i) {
      if (operands[i].is_none()) continue;
      if (PyFloat_Check(operands[i].ptr())) {
        number_f64_ = PyFloat_AS_DOUBLE(operands[i].ptr());
        number_f32_ = static_cast<float>(number_f64_);
        data[i] = item == 4 ? reinterpret_cast<char*>(&number_f32_) : reinterpret_cast<char*>(&number_f64_);
        continue;
      }
      const auto view = pybind11::reinterpret_borrow<pybind11::tuple>(operands[i]);
      const auto strides = pybind11::reinterpret_borrow<pybind11::tuple>(view[1]);
      if (static_cast<int>(strides.size()) != dims) throw std::invalid_argument("strides: not as many as dimensions");
      data[i] = static_cast<char*>(PyLong_AsVoidPtr(view[0].ptr()));
      time_stride[i] = PyLong_AsLongLong(strides[0].ptr());
      for (int d = 0; d < column_dims; ++d) stride[d][i] = PyLong_AsLongLong(strides[d + 1].ptr());
    }
    collapse();
  }
  Grid(const Grid&) = delete;  // data may point at the number inside

  // Calls body(base addresses) for each sheet: the (steps, innermost columns) plane of every operand.
  template <typename Body>
  void for_each_sheet(Body&& body) const {
    std::array<char*, Count> base = data;
    std::array<int64_t, kMaxDims> index{};
    for (;;) {
      body(base);
      int d = column_dims - 2;
      for (; d >= 0; --d) {
        const bool wraps = ++index[d] == size[d];
        const int64_t move = wraps ? 1 - size[d] : 1;
        for (int i = 0; i < Count; ++i)
          if (base[i]) base[i] += move * stride[d][i] * item;
        if (!wraps) break;
        index[d] = 0;
      }
      if (d < 0) return;
    }
  }

  int64_t columns() const { return size[column_dims - 1]; }
  int64_t column_stride(int i) const { return stride[column_dims - 1][i]; }

 protected:
  Grid() = default;  // for an op whose inner axis is another; it fills in the members, then calls collapse

  void collapse() {
    int kept = 0;
    for (int d = 0; d < column_dims; ++d) {
      if (size[d] == 1) continue;
      const int64_t n = size[d];
      const auto s = stride[d];
      int at = kept++;
      for (; at > 0 && stride[at - 1][0] < s[0]; --at) {
        size[at] = size[at - 1];
        stride[at] = stride[at - 1];
      }
      size[at] = n;
      stride[at] = s;
    }
    int last = 0;
    for (int d = 1; d < kept; ++d) {
      bool one_walk = true;
      for (int i = 0; i < Count; ++i) one_walk &= stride[last][i] == stride[d][i] * size[d];
      if (one_walk) {
        size[last] *= size[d];
        stride[last] = stride[d];
      } else {
        ++last;
        size[last] = size[d];
        stride[last] = stride[d];
      }
    }
    if (kept == 0) {
      size[0] = 1;
      stride[0].fill(0);
    }
    column_dims = last + 1;
  }

 private:
  float number_f32_ = 0;
  double number_f64_ = 0;
};

}  // namespace phyx
