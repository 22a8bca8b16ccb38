// The rows of (..., size) float32 tensors, for ops that work along a contiguous last axis.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

#include "strided.h"

namespace phyx {

// `steps` is the last axis, columns are the leading ones. A view is (address, strides) with strides of the leading axes
// at least, so that (...) goes beside (..., size).
template <int Count>
struct Rows : Grid<Count> {
  int64_t count = 1;

  Rows(const pybind11::tuple& shape, const std::array<pybind11::handle, Count>& views) {
    const int dims = static_cast<int>(shape.size());
    if (dims < 1 || dims > kMaxDims) throw std::invalid_argument("shape: expected 1 to 64 dimensions");
    this->column_dims = dims - 1;
    this->steps = PyLong_AsLongLong(shape[dims - 1].ptr());
    for (int d = 0; d < this->column_dims; ++d)
      count *= this->size[d] = PyLong_AsLongLong(shape[d].ptr());
    for (int i = 0; i < Count; ++i) {
      const auto view = pybind11::reinterpret_borrow<pybind11::tuple>(views[i]);
      const auto strides = pybind11::reinterpret_borrow<pybind11::tuple>(view[1]);
      if (static_cast<int>(strides.size()) < dims - 1) throw std::invalid_argument("strides: fewer than leading axes");
      this->data[i] = static_cast<char*>(PyLong_AsVoidPtr(view[0].ptr()));
      for (int d = 0; d < this->column_dims; ++d) this->stride[d][i] = PyLong_AsLongLong(strides[d].ptr());
    }
    this->collapse();
  }

  // Calls body(rows, addresses of the first) for every stretch of [begin, end) that one stride walks.
  template <typename Body>
  void for_each_run(int64_t begin, int64_t end, Body&& body) const {
    const int innermost = this->column_dims - 1;
    while (begin < end) {
      std::array<float*, Count> row;
      for (int i = 0; i < Count; ++i) row[i] = reinterpret_cast<float*>(this->data[i]);
      int64_t rest = begin, run = 0;
      for (int d = innermost; d >= 0; --d) {
        const int64_t index = rest % this->size[d];
        rest /= this->size[d];
        for (int i = 0; i < Count; ++i) row[i] += index * this->stride[d][i];
        if (d == innermost) run = std::min(end - begin, this->size[d] - index);
      }
      body(run, row);
      begin += run;
    }
  }
};

}  // namespace phyx
