// RMS norm and SiLU in one pass, forward and backward (contract and reference: phyxdream/ops/rms_norm_silu.py).
//
//   r = 1/√(mean x² + ε)     n = r x     u = n w     σ = 1/(1 + e^-u)     y = u σ
//   h = grad_y σ (1 + u (1 - σ))         grad_w = Σ_rows h n
//   t = h w                              grad_x = r (t - n mean(t n))
//
// Rows are contiguous and may lie anywhere. A row is read from memory once and then from L1 for every further loop.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bindings.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"
#include "vec_math.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kLanes = 16;           // sums run in this many columns, whatever the width of the registers
constexpr int64_t kBlock = 1024;         // elements of a row that are summed at once
constexpr int64_t kChunk = 1 << 15;      // elements per chunk of rows: some 8 µs, worth waking a thread for
constexpr int64_t kLeastChunkRows = 16;  // keeps the partial sums of grad_w small beside the rows

// Outside ±87 SiLU is 0 or u to the last bit of a float32; NaN passes through.
PHYX_INLINE float at_least(float u) { return u < -87.0f ? -87.0f : u; }
PHYX_INLINE float at_most(float u) { return u > 87.0f ? 87.0f : u; }

PHYX_INLINE float dot_of_block(const float* a, const float* b, int64_t size) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lane[l] += a[i + l] * b[i + l];
  for (int64_t l = 0; i + l < size; ++l) lane[l] += a[i + l] * b[i + l];
  for (int64_t l = 0; l < 8; ++l) lane[l] += lane[l + 8];
  for (int64_t l = 0; l < 4; ++l) lane[l] += lane[l + 4];
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// In blocks, since rounding goes one way where all terms are alike: one sum of 40,000 loses four digits.
PHYX_INLINE float dot(const float* a, const float* b, int64_t size) {
  float sum = 0.0f;
  for (int64_t i = 0; i < size; i += kBlock) sum += dot_of_block(a + i, b + i, std::min(size - i, kBlock));
  return sum;
}

PHYX_INLINE float inverse_rms(const float* x, int64_t size, float eps) {
  return 1.0f / std::sqrt(dot(x, x, size) / static_cast<float>(size) + eps);
}

}  // namespace

// Multiversioned functions must have external linkage and be no templates. Strides are between rows, in elements.
PHYX_MULTIVERSION void rms_norm_silu_forward_rows(int64_t rows, int64_t size, float eps, const float* weight, float* y,
                                                  int64_t y_stride, const float* x, int64_t x_stride) {
  for (; rows > 0; --rows, x += x_stride, y += y_stride) {
    const float r = inverse_rms(x, size, eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      const float u = at_least(x[i] * r * weight[i]);
      y[i] = u / (1.0f + normal_exp(-at_most(u)));
    }
  }
}

PHYX_MULTIVERSION void rms_norm_silu_backward_rows(int64_t rows, int64_t size, float eps, const float* weight,
                                                   float* grad_weight, float* grad_x, int64_t grad_x_stride,
                                                   const float* grad, int64_t grad_stride, const float* x,
                                                   int64_t x_stride) {
  for (; rows > 0; --rows, x += x_stride, grad += grad_stride, grad_x += grad_x_stride) {
    const float r = inverse_rms(x, size, eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) {
      const float n = x[i] * r, u = at_most(at_least(n * weight[i]));
      const float e = normal_exp(-u), sigma = 1.0f / (1.0f + e);
      const float h = grad[i] * sigma * (1.0f + u * (e * sigma));
      grad_weight[i] += h * n;
      grad_x[i] = h * weight[i];
    }
    const float along = dot(grad_x, x, size) * r * r / static_cast<float>(size);  // mean(t n) r, of n = r x
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) grad_x[i] = r * (grad_x[i] - x[i] * along);
  }
}

namespace {

enum Forward { kY, kX, kForwardCount };
enum Backward { kGradX, kGrad, kXIn, kBackwardCount };

int64_t rows_per_chunk(int64_t size) { return std::max(kLeastChunkRows, kChunk / size); }

// Views are (address, strides in elements) of float32 tensors with the same shape and a contiguous last axis.
void rms_norm_silu_forward(py::tuple shape, py::handle y, py::handle x, uintptr_t weight, float eps, int threads) {
  const Rows<kForwardCount> rows(shape, {y, x});
  py::gil_scoped_release release;
  parallel_for(rows.count, rows_per_chunk(rows.steps), threads, [&](int64_t begin, int64_t end) {
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      rms_norm_silu_forward_rows(run, rows.steps, eps, reinterpret_cast<const float*>(weight), row[kY],
                                 rows.column_stride(kY), row[kX], rows.column_stride(kX));
    });
  });
}

void rms_norm_silu_backward(py::tuple shape, py::handle grad_x, uintptr_t grad_weight, py::handle grad, py::handle x,
                            uintptr_t weight, float eps, int threads) {
  const Rows<kBackwardCount> rows(shape, {grad_x, grad, x});
  py::gil_scoped_release release;
  // grad_w is summed per chunk, then over the chunks in order, whichever thread did them: the threads leave no trace.
  const int64_t size = rows.steps, grain = rows_per_chunk(size), chunks = (rows.count + grain - 1) / grain;
  std::vector<float> partial(chunks * size);
  parallel_for(chunks, 1, threads, [&](int64_t first, int64_t past) {
    for (int64_t chunk = first; chunk < past; ++chunk)
      rows.for_each_run(chunk * grain, std::min(rows.count, (chunk + 1) * grain), [&](int64_t run, const auto& row) {
        rms_norm_silu_backward_rows(run, size, eps, reinterpret_cast<const float*>(weight),
                                    partial.data() + chunk * size, row[kGradX], rows.column_stride(kGradX), row[kGrad],
                                    rows.column_stride(kGrad), row[kXIn], rows.column_stride(kXIn));
      });
  });
  float* total = reinterpret_cast<float*>(grad_weight);
  std::fill(total, total + size, 0.0f);
  for (size_t begin = 0; begin < partial.size(); begin += size)
    for (int64_t i = 0; i < size; ++i) total[i] += partial[begin + i];
}

}  // namespace

void bind_rms_norm_silu(py::module_& module) {
  module.def("rms_norm_silu_forward", &rms_norm_silu_forward);
  module.def("rms_norm_silu_backward", &rms_norm_silu_backward);
}

}  // namespace phyx
