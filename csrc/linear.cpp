// Dense layers (contract and reference: phyxdream/ops/linear.py).
//
//   y = x Wᵀ + b      grad_x = grad W      grad_W = gradᵀ x      grad_b = Σ_rows grad
//
// A feature [h, z] ends in one-hot vectors: hundreds of columns of which a row uses some dozens. What these bring to y
// is a sum of rows of Wᵀ, and grad is added to as many rows of grad_Wᵀ.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "bindings.h"
#include "lanes.h"
#include "matmul.h"
#include "vector.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kLeastRows = 128, kLeastColumns = 128;  // with fewer, finding the ones costs what it saves
constexpr int64_t kRarer = 8;                             // one column in so many holds a one, or fewer
constexpr int64_t kSamples = 16;                          // rows looked at before all are
constexpr int64_t kStripe = 64;                           // outputs at a time: of 1024 columns 256 KB
constexpr int64_t kRowsAtOnce = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The last columns of x, from `first` on, where they hold nothing but zeros and ones, and few ones.
struct Ones {
  int64_t first;  // = columns of x where there is no such tail
  int64_t room = 0;
  std::vector<int32_t> index{}, count{};  // of every row: where its ones are, counted from `first`

  const int32_t* of(int64_t row) const { return index.data() + row * room; }
};

bool is_one_or_zero(float x) { return x == 0.0f || x == 1.0f; }

}  // namespace

// Where the ones of a row are; their number, or -1 if there are more than `room` or something else than 0 and 1. Bits
// are compared, since sums of floats would have to be made in order, one after the other.
PHYX_MULTIVERSION int64_t find_ones_of_row(const float* x, int64_t width, int32_t* index, int64_t room) {
  constexpr uint32_t one = 0x3f800000;
  constexpr int64_t group = 8;
  uint32_t other = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    other |= bits == one ? 0 : bits;
  }
  if (other) return -1;
  int64_t found = 0;
  for (int64_t begin = 0; begin < width; begin += group) {
    const int64_t count = std::min(group, width - begin);
    uint64_t pairs[group / 2] = {};
    std::memcpy(pairs, x + begin, sizeof(float) * count);
    if ((pairs[0] | pairs[1] | pairs[2] | pairs[3]) == 0) continue;
    if (found + count > room) return -1;  // stricter than it need be, so that what follows has no branch
    for (int64_t i = 0; i < count; ++i) {
      index[found] = static_cast<int32_t>(begin + i);
      found += x[begin + i] != 0.0f;
    }
  }
  return found;
}

// Stripes of `kStripe` outputs of weights (outputs, columns), transposed: (columns, kStripe). The last may be narrower.
PHYX_MULTIVERSION void to_stripe(float* stripe, const float* weight, int64_t row, int64_t outputs, int64_t columns) {
  transpose(stripe, kStripe, weight, row, static_cast<int>(outputs), static_cast<int>(columns));
}
PHYX_MULTIVERSION void from_stripe(float* weight, int64_t row, const float* stripe, int64_t outputs, int64_t columns) {
  transpose(weight, row, stripe, kStripe, static_cast<int>(columns), static_cast<int>(outputs));
}

// y (outputs) += Σ stripe[index] for one row, and stripe[index] += grad (outputs).
PHYX_MULTIVERSION void gather(float* y, const float* stripe, const int32_t* index, int64_t count, int64_t outputs) {
  if (outputs == kStripe) {
    Vector* to = reinterpret_cast<Vector*>(y);
    Vector a = to[0], b = to[1], c = to[2], d = to[3];
    for (int64_t i = 0; i < count; ++i) {
      const Vector* x = reinterpret_cast<const Vector*>(stripe + index[i] * kStripe);
      a += x[0];
      b += x[1];
      c += x[2];
      d += x[3];
    }
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t o = 0; o < outputs; ++o) y[o] += stripe[index[i] * kStripe + o];
  }
}
PHYX_MULTIVERSION void scatter(float* stripe, const float* grad, const int32_t* index, int64_t count, int64_t outputs) {
  if (outputs == kStripe) {
    const Vector* from = reinterpret_cast<const Vector*>(grad);
    const Vector a = from[0], b = from[1], c = from[2], d = from[3];
    for (int64_t i = 0; i < count; ++i) {
      Vector* x = reinterpret_cast<Vector*>(stripe + index[i] * kStripe);
      x[0] += a;
      x[1] += b;
      x[2] += c;
      x[3] += d;
    }
  } else {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t o = 0; o < outputs; ++o) stripe[index[i] * kStripe + o] += grad[o];
  }
}

namespace {

Ones find_ones(const Operand& x, int64_t columns, int threads) {
  Ones ones{columns};
  if (x.rows < kLeastRows || x.term != 1) return ones;
  int64_t first = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    const float* row = x.at(i * (x.rows - 1) / (kSamples - 1), 0);
    int64_t c = columns;
    while (c > first && is_one_or_zero(row[c - 1])) --c;
    first = std::max(first, c);
  }
  first = ceil_div(first, kTile) * kTile;
  if (columns - first < kLeastColumns) return ones;
  const int64_t width = columns - first, room = width / kRarer + kTile;
  ones.room = room;
  ones.index.resize(x.rows * room);
  ones.count.resize(x.rows);
  std::atomic<bool> fits{true};
  parallel_for(x.rows, kRowsAtOnce, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end && fits.load(std::memory_order_relaxed); ++r) {
      const int64_t found = find_ones_of_row(x.at(r, first), width, ones.index.data() + r * room, room);
      if (found < 0) fits.store(false, std::memory_order_relaxed);
      ones.count[r] = static_cast<int32_t>(found);
    }
  });
  if (fits.load()) ones.first = first;
  return ones;
}

struct Layer {
  Operand x;            // (rows, columns)
  const float* weight;  // (outputs, columns), contiguous
  int64_t outputs, columns;
  int threads;
};

void forward(const Layer& l, const float* bias, float* y) {
  const Ones ones = find_ones(l.x, l.columns, l.threads);
  matmul(l.x, {l.weight, l.outputs, l.columns, 1}, ones.first, y, l.outputs, bias, false, l.threads);
  if (ones.first == l.columns) return;
  const int64_t width = l.columns - ones.first, stripes = ceil_div(l.outputs, kStripe);
  parallel_for(stripes, 1, l.threads, [&](int64_t begin, int64_t end) {
    const Floats stripe(width * kStripe);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * kStripe, outputs = std::min(kStripe, l.outputs - first);
      to_stripe(stripe.get(), l.weight + first * l.columns + ones.first, l.columns, outputs, width);
      for (int64_t r = 0; r < l.x.rows; ++r)
        gather(y + r * l.outputs + first, stripe.get(), ones.of(r), ones.count[r], outputs);
    }
  });
}

void backward(const Layer& l, const float* grad, float* grad_x, float* grad_weight, float* grad_bias) {
  if (grad_x)
    matmul({grad, l.x.rows, l.outputs, 1}, {l.weight, l.columns, 1, l.columns}, l.outputs, grad_x, l.columns, nullptr,
           false, l.threads);
  if (grad_bias) sum_rows(grad_bias, grad, l.outputs, l.x.rows, l.outputs, l.threads);
  if (!grad_weight) return;
  const Ones ones = find_ones(l.x, l.columns, l.threads);
  matmul({grad, l.outputs, 1, l.outputs}, {l.x.data, ones.first, l.x.term, l.x.row}, l.x.rows, grad_weight, l.columns,
         nullptr, false, l.threads);
  if (ones.first == l.columns) return;
  const int64_t width = l.columns - ones.first, stripes = ceil_div(l.outputs, kStripe);
  parallel_for(stripes, 1, l.threads, [&](int64_t begin, int64_t end) {
    const Floats stripe(width * kStripe);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t first = s * kStripe, outputs = std::min(kStripe, l.outputs - first);
      std::memset(stripe.get(), 0, sizeof(float) * width * kStripe);
      for (int64_t r = 0; r < l.x.rows; ++r)
        scatter(stripe.get(), grad + r * l.outputs + first, ones.of(r), ones.count[r], outputs);
      from_stripe(grad_weight + first * l.columns + ones.first, l.columns, stripe.get(), outputs, width);
    }
  });
}

template <typename T = float>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// x: (address, rows, stride of rows, stride of columns); everything else is contiguous, and absent where its address
// is 0.
Layer layer(const py::tuple& x, uintptr_t weight, int64_t outputs, int64_t columns, int threads) {
  return {{pointer<const float>(x[0].cast<uintptr_t>()), x[1].cast<int64_t>(), x[2].cast<int64_t>(),
           x[3].cast<int64_t>()},
          pointer<const float>(weight), outputs, columns, threads};
}

void linear_forward(py::tuple x, uintptr_t weight, int64_t outputs, int64_t columns, uintptr_t bias, uintptr_t y,
                    int threads) {
  const Layer l = layer(x, weight, outputs, columns, threads);
  py::gil_scoped_release release;
  forward(l, pointer<const float>(bias), pointer(y));
}

void linear_backward(uintptr_t grad, py::tuple x, uintptr_t weight, int64_t outputs, int64_t columns, uintptr_t grad_x,
                     uintptr_t grad_weight, uintptr_t grad_bias, int threads) {
  const Layer l = layer(x, weight, outputs, columns, threads);
  py::gil_scoped_release release;
  backward(l, pointer<const float>(grad), pointer(grad_x), pointer(grad_weight), pointer(grad_bias));
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def("linear_forward", &linear_forward);
  module.def("linear_backward", &linear_backward);
}

}  // namespace phyx
