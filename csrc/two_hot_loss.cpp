// Two-hot cross-entropy, and the mean of a categorical over bins, forward and backward (contracts and references:
// phyxdream/ops/two_hot_loss.py). For a row of logits x, with neighbours b and a of the target and weight w of a:
//
//   m = max x     e = e^(x - m)     s = Σ e     p = e / s
//   loss = (1 - w) (ln s + m - x_b) + w (ln s + m - x_a)     grad_x = g (p - (1 - w) 1_b - w 1_a)
//   mean = Σ e bins / s                                      grad_x = g p (bins - mean)
//
// Rows are contiguous and may lie anywhere. A row is read from memory once and then from L1: e is cheaper to compute
// again in the backward than to keep.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "bindings.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"
#include "vec_math.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kLanes = 16;       // sums run in this many columns, whatever the width of the registers
constexpr int64_t kChunk = 1 << 15;  // elements per chunk of rows: some 10 µs, worth waking a thread for
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Added to a block, the 16 numbers from 16 - n on hide its first n columns.
constexpr float kHide[2 * kLanes] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
                                     -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity, -kInfinity,
                                     -kInfinity, -kInfinity, -kInfinity, -kInfinity};

// Whole blocks first, from column 0. What they leave is one more block: the last 16 columns of the row, those already
// seen as -∞, which changes neither maximum nor sum; a row shorter than a block is filled up with -∞.
PHYX_INLINE int64_t in_whole_blocks(int64_t size) { return size / kLanes * kLanes; }

PHYX_INLINE void load_last(float* block, const float* x, int64_t size) {
  if (size < kLanes) {
    std::fill(block, block + kLanes, -kInfinity);
    std::copy(x, x + size, block);
    return;
  }
  const float *from = x + size - kLanes, *hide = kHide + size % kLanes;
  for (int64_t l = 0; l < kLanes; ++l) block[l] = from[l] + hide[l];
}

// The bits as an integer in the order of the floats, and back: without -ffast-math, compilers use SIMD for a maximum of
// integers alone. A NaN that gets lost here shows in the exponentials.
PHYX_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

PHYX_INLINE void max_step(int32_t* __restrict lane, const float* __restrict x) {
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = std::max(lane[l], ordered(static_cast<int32_t>(bits_of(x[l]))));
}

PHYX_INLINE float row_max(const float* x, int64_t size) {
  int32_t lane[kLanes];
  float last[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = std::numeric_limits<int32_t>::min();
  load_last(last, x, size);
  max_step(lane, last);
  for (int64_t i = 0; i < in_whole_blocks(size); i += kLanes) max_step(lane, x + i);
  for (int64_t l = 0; l < 8; ++l) lane[l] = std::max(lane[l], lane[l + 8]);
  for (int64_t l = 0; l < 4; ++l) lane[l] = std::max(lane[l], lane[l + 4]);
  return float_of(static_cast<uint32_t>(ordered(std::max(std::max(lane[0], lane[2]), std::max(lane[1], lane[3])))));
}

PHYX_INLINE float sum_of_lanes(float* lane) {
  for (int64_t l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

PHYX_INLINE void exp_step(float* __restrict lane, float* __restrict e, const float* __restrict x, float max) {
  for (int64_t l = 0; l < kLanes; ++l) {
    e[l] = vec_exp(x[l] - max);
    lane[l] += e[l];
  }
}

// Σ e^(x - max); the terms go to `e`, which does not overlap x, or nowhere.
PHYX_INLINE float sum_exp(const float* x, int64_t size, float max, float* e) {
  float lane[kLanes] = {}, block[kLanes], last[kLanes];
  if (size % kLanes) {
    load_last(last, x, size);
    exp_step(lane, block, last, max);
    // The hidden columns are written over below.
    if (e && size < kLanes) std::copy(block, block + size, e);
    if (e && size > kLanes) std::copy(block, block + kLanes, e + size - kLanes);
  }
  for (int64_t i = 0; i < in_whole_blocks(size); i += kLanes) exp_step(lane, e ? e + i : block, x + i, max);
  return sum_of_lanes(lane);
}

struct TwoHot {
  int64_t below;
  float weight;  // of the bin above `below`; the bin below has the rest
};

PHYX_INLINE TwoHot two_hot(float target, const float* bins, int64_t size) {
  int64_t above = 0;  // the first bin that is not below the target
  for (int64_t rest = size; rest > 0;) {
    const int64_t half = (rest + 1) / 2;
    above += bins[above + half - 1] >= target ? 0 : half;
    rest -= half;
  }
  above = std::min(std::max<int64_t>(above, 1), size - 1);
  const float low = bins[above - 1], weight = (target - low) / (bins[above] - low);
  const float floored = weight < 0.0f ? 0.0f : weight;  // NaN passes through
  return {above - 1, floored > 1.0f ? 1.0f : floored};
}

}  // namespace

// Multiversioned functions must have external linkage and be no templates. Strides are between rows, in elements.
PHYX_MULTIVERSION void two_hot_loss_forward_rows(int64_t rows, int64_t size, const float* bins, float* loss,
                                                 int64_t loss_stride, const float* x, int64_t x_stride,
                                                 const float* target, int64_t target_stride) {
  for (; rows > 0; --rows, loss += loss_stride, x += x_stride, target += target_stride) {
    const auto [below, weight] = two_hot(*target, bins, size);
    const float max = row_max(x, size), log_sum = vec_log(sum_exp(x, size, max, nullptr));
    *loss = (1.0f - weight) * (log_sum + (max - x[below])) + weight * (log_sum + (max - x[below + 1]));
  }
}

PHYX_MULTIVERSION void two_hot_loss_backward_rows(int64_t rows, int64_t size, const float* bins, float* grad_x,
                                                  int64_t grad_x_stride, const float* grad, int64_t grad_stride,
                                                  const float* x, int64_t x_stride, const float* target,
                                                  int64_t target_stride) {
  for (; rows > 0; --rows, grad_x += grad_x_stride, grad += grad_stride, x += x_stride, target += target_stride) {
    const auto [below, weight] = two_hot(*target, bins, size);
    const float scale = *grad / sum_exp(x, size, row_max(x, size), grad_x);
    for (int64_t i = 0; i < size; ++i) grad_x[i] *= scale;
    grad_x[below] -= *grad * (1.0f - weight);
    grad_x[below + 1] -= *grad * weight;
  }
}

// `terms` has room for the terms of one row, with kLanes zeros before and after them.
PHYX_MULTIVERSION void two_hot_mean_forward_rows(int64_t rows, int64_t size, const float* bins, float* mean,
                                                 int64_t mean_stride, const float* x, int64_t x_stride,
                                                 float* terms) {
  const int64_t half = size / 2;
  const float* low = terms + half - 1;            // from the centre down
  const float* high = terms + size - half;  // from the centre up
  for (; rows > 0; --rows, mean += mean_stride, x += x_stride) {
    const float sum = sum_exp(x, size, row_max(x, size), terms);
    for (int64_t i = 0; i < size; ++i) terms[i] *= bins[i];
    // The products lie in memory, out of reach of a fused multiply-add: -ab + ab must be 0, not a rounding error.
    float lane[kLanes] = {};
    for (int64_t i = 0; i < half; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lane[l] += low[-(i + l)] + high[i + l];
    *mean = (sum_of_lanes(lane) + (size % 2 ? terms[half] : 0.0f)) / sum;
  }
}

PHYX_MULTIVERSION void two_hot_mean_backward_rows(int64_t rows, int64_t size, const float* bins, float* grad_x,
                                                  int64_t grad_x_stride, const float* grad, int64_t grad_stride,
                                                  const float* x, int64_t x_stride, const float* mean,
                                                  int64_t mean_stride) {
  for (; rows > 0; --rows, grad_x += grad_x_stride, grad += grad_stride, x += x_stride, mean += mean_stride) {
    const float scale = *grad / sum_exp(x, size, row_max(x, size), grad_x), centre = *mean;
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) grad_x[i] *= scale * (bins[i] - centre);
  }
}

namespace {

int64_t rows_per_chunk(int64_t size) { return std::max<int64_t>(1, kChunk / size); }

// `shape` is (..., K). Views are (address, strides in elements) of float32 tensors: (..., K) with a contiguous last
// axis, or (...) beside it. Bins are K contiguous numbers.
void two_hot_loss_forward(py::tuple shape, py::handle logits, py::handle loss, py::handle target, uintptr_t bins,
                          int threads) {
  enum { kX, kLoss, kTarget };
  const Rows<3> rows(shape, {logits, loss, target});
  py::gil_scoped_release release;
  parallel_for(rows.count, rows_per_chunk(rows.steps), threads, [&](int64_t begin, int64_t end) {
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      two_hot_loss_forward_rows(run, rows.steps, reinterpret_cast<const float*>(bins), row[kLoss],
                                rows.column_stride(kLoss), row[kX], rows.column_stride(kX), row[kTarget],
                                rows.column_stride(kTarget));
    });
  });
}

void two_hot_loss_backward(py::tuple shape, py::handle grad_logits, py::handle grad, py::handle logits,
                           py::handle target, uintptr_t bins, int threads) {
  enum { kGradX, kGrad, kX, kTarget };
  const Rows<4> rows(shape, {grad_logits, grad, logits, target});
  py::gil_scoped_release release;
  parallel_for(rows.count, rows_per_chunk(rows.steps), threads, [&](int64_t begin, int64_t end) {
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      two_hot_loss_backward_rows(run, rows.steps, reinterpret_cast<const float*>(bins), row[kGradX],
                                 rows.column_stride(kGradX), row[kGrad], rows.column_stride(kGrad), row[kX],
                                 rows.column_stride(kX), row[kTarget], rows.column_stride(kTarget));
    });
  });
}

void two_hot_mean_forward(py::tuple shape, py::handle logits, py::handle mean, uintptr_t bins, int threads) {
  enum { kX, kMean };
  const Rows<2> rows(shape, {logits, mean});
  py::gil_scoped_release release;
  const int64_t grain = rows_per_chunk(rows.steps), room = rows.steps + 2 * kLanes;
  std::vector<float> terms((rows.count + grain - 1) / grain * room);  // of one row for every chunk
  parallel_for(rows.count, grain, threads, [&](int64_t begin, int64_t end) {
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      two_hot_mean_forward_rows(run, rows.steps, reinterpret_cast<const float*>(bins), row[kMean],
                                rows.column_stride(kMean), row[kX], rows.column_stride(kX),
                                terms.data() + begin / grain * room + kLanes);
    });
  });
}

void two_hot_mean_backward(py::tuple shape, py::handle grad_logits, py::handle grad, py::handle logits,
                           py::handle mean, uintptr_t bins, int threads) {
  enum { kGradX, kGrad, kX, kMean };
  const Rows<4> rows(shape, {grad_logits, grad, logits, mean});
  py::gil_scoped_release release;
  parallel_for(rows.count, rows_per_chunk(rows.steps), threads, [&](int64_t begin, int64_t end) {
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      two_hot_mean_backward_rows(run, rows.steps, reinterpret_cast<const float*>(bins), row[kGradX],
                                 rows.column_stride(kGradX), row[kGrad], rows.column_stride(kGrad), row[kX],
                                 rows.column_stride(kX), row[kMean], rows.column_stride(kMean));
    });
  });
}

}  // namespace

void bind_two_hot_loss(py::module_& module) {
  module.def("two_hot_loss_forward", &two_hot_loss_forward);
  module.def("two_hot_loss_backward", &two_hot_loss_backward);
  module.def("two_hot_mean_forward", &two_hot_mean_forward);
  module.def("two_hot_mean_backward", &two_hot_mean_backward);
}

}  // namespace phyx
