// λ-return, forward and backward (contract and reference: phyxdream/ops/lambda_return.py).
//
//   forward, t falling:   R_t = r_t + d_t ((1 - λ_t) v_t + λ_t R_{t+1}),  R_T = v_{T-1}      (v_t: value after step t)
//   backward, t rising:   A_t = G_t + d_{t-1} λ_{t-1} A_{t-1}              (G: gradient of the output, A: total of R_t)
//     grad r_t = A_t                    grad v_t = A_t d_t (1 - λ_t), without the (1 - λ_t) for t = T-1
//     grad λ_t = A_t d_t (R_{t+1} - v_t)           grad d_t = A_t ((1 - λ_t) v_t + λ_t R_{t+1})
//
// Two loops of each, chosen by memory layout: `rows` walks columns innermost (time-major tensors), `lines` walks time
// innermost (batch-major views). Whatever lies otherwise is packed strip by strip into L1, so every stride, 0 included,
// runs through the same vectorised loops and no tensor is copied.
#include <algorithm>
#include <cstdint>

#include "bindings.h"
#include "parallel.h"
#include "simd.h"
#include "strided.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kRow = 512;   // columns per strip: five float32 strips are 10 KB, so the previous row stays in L1
constexpr int64_t kLine = 256;  // steps per strip
constexpr int64_t kGroup = 8;   // columns whose recurrences run side by side, to hide the latency of one

// One sheet (slow, fast) of an operand, read in strips along the fast axis.
template <typename T>
struct Strips {
  T* data;
  int64_t slow, fast;  // strides in elements
  T packed[kRow];
  bool constant = false;  // `packed` already holds the only value there is

  PHYX_INLINE Strips(char* base, int64_t slow_stride, int64_t fast_stride)
      : data(reinterpret_cast<T*>(base)), slow(slow_stride), fast(fast_stride) {}

  PHYX_INLINE const T* read(int64_t i, int64_t j, int64_t n) {
    const T* from = data + i * slow + j * fast;
    if (fast == 1) return from;
    if (fast == 0) {
      if (constant) return packed;
      constant = slow == 0;
      std::fill(packed, packed + (constant ? kRow : n), *from);
      return packed;
    }
    for (int64_t k = 0; k < n; ++k) packed[k] = from[k * fast];
    return packed;
  }

  // Where to write a strip; `flush` then brings it to its place. A gradient nobody wants (data null) stays in `packed`.
  PHYX_INLINE T* write(int64_t i, int64_t j) { return write(i, j, packed); }
  PHYX_INLINE T* write(int64_t i, int64_t j, T* otherwise) {
    return data && fast == 1 ? data + i * slow + j : otherwise;
  }
  PHYX_INLINE void flush(int64_t i, int64_t j, int64_t n) { flush(i, j, n, packed); }
  PHYX_INLINE void flush(int64_t i, int64_t j, int64_t n, const T* from) {
    if (!data || fast == 1) return;
    T* to = data + i * slow + j * fast;
    for (int64_t k = 0; k < n; ++k) to[k * fast] = from[k];
  }
};

// Operand 0 gives the order of the columns (see Grid).
enum Forward { kReturns, kReward, kNextValue, kDiscount, kLambda, kForwardCount };
enum Backward { kReturnsIn, kGrad, kNextValueIn, kDiscountIn, kLambdaIn, kGradReward, kGradNextValue, kGradDiscount,
                kGradLambda, kBackwardCount };
using ForwardGrid = Grid<kForwardCount>;
using BackwardGrid = Grid<kBackwardCount>;
using ForwardSheet = std::array<char*, kForwardCount>;
using BackwardSheet = std::array<char*, kBackwardCount>;

template <typename T>
PHYX_INLINE void forward_rows(const ForwardGrid& grid, const ForwardSheet& base, int64_t first, int64_t past) {
  const auto strips = [&](int i) { return Strips<T>(base[i], grid.time_stride[i], grid.column_stride(i)); };
  auto returns = strips(kReturns), reward = strips(kReward), next_value = strips(kNextValue),
       discount = strips(kDiscount), lambda = strips(kLambda);
  for (int64_t j = first; j < past; j += kRow) {
    const int64_t n = std::min(kRow, past - j);
    const T* following = next_value.read(grid.steps - 1, j, n);
    T seed[kRow];
    std::copy(following, following + n, seed);
    following = seed;
    for (int64_t t = grid.steps - 1; t >= 0; --t) {
      const T *r = reward.read(t, j, n), *v = next_value.read(t, j, n), *d = discount.read(t, j, n),
              *l = lambda.read(t, j, n);
      T* out = returns.write(t, j);
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) out[k] = r[k] + d[k] * ((1 - l[k]) * v[k] + l[k] * following[k]);
      returns.flush(t, j, n);
      following = out;
    }
  }
}

template <typename T>
PHYX_INLINE void forward_lines(const ForwardGrid& grid, const ForwardSheet& base, int64_t first, int64_t past) {
  const auto strips = [&](int i) { return Strips<T>(base[i], grid.column_stride(i), grid.time_stride[i]); };
  auto returns = strips(kReturns), reward = strips(kReward), next_value = strips(kNextValue),
       discount = strips(kDiscount), lambda = strips(kLambda);
  T constant[kGroup][kLine], factor[kGroup][kLine];  // R_t = constant_t + factor_t R_{t+1}
  for (int64_t i = first; i < past; i += kGroup) {
    const int64_t group = std::min(kGroup, past - i);
    T following[kGroup] = {};
    for (int64_t c = 0; c < group; ++c) following[c] = *next_value.read(i + c, grid.steps - 1, 1);
    for (int64_t end = grid.steps; end > 0; end -= kLine) {
      const int64_t begin = std::max<int64_t>(0, end - kLine), n = end - begin;
      for (int64_t c = 0; c < group; ++c) {
        const T *r = reward.read(i + c, begin, n), *v = next_value.read(i + c, begin, n),
                *d = discount.read(i + c, begin, n), *l = lambda.read(i + c, begin, n);
        T *a = constant[c], *b = factor[c];
#pragma GCC ivdep
        for (int64_t k = 0; k < n; ++k) {
          a[k] = r[k] + d[k] * (1 - l[k]) * v[k];
          b[k] = d[k] * l[k];
        }
      }
      for (int64_t c = group; c < kGroup; ++c) {
        std::fill(constant[c], constant[c] + n, T(0));
        std::fill(factor[c], factor[c] + n, T(0));
      }
      T* out[kGroup];
      for (int64_t c = 0; c < kGroup; ++c) out[c] = c < group ? returns.write(i + c, begin, constant[c]) : constant[c];
      for (int64_t k = n - 1; k >= 0; --k)
        for (int64_t c = 0; c < kGroup; ++c) out[c][k] = following[c] = constant[c][k] + factor[c][k] * following[c];
      for (int64_t c = 0; c < group; ++c) returns.flush(i + c, begin, n, constant[c]);
    }
  }
}

// The gradients of one strip of n elements from its adjoints A; `keep` is 0 where R_{t+1} is itself v_t (the last step).
template <typename T>
PHYX_INLINE void gradients(int64_t n, const T* adjoint, const T* v, const T* d, const T* l, const T* following,
                           T keep, T* grad_next_value, T* grad_discount) {
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    grad_next_value[k] = adjoint[k] * d[k] * (1 - keep * l[k]);
    grad_discount[k] = adjoint[k] * ((1 - l[k]) * v[k] + l[k] * following[k]);
  }
}

template <typename T>
PHYX_INLINE void gradient_of_lambda(int64_t n, const T* adjoint, const T* v, const T* d, const T* following,
                                    T* grad_lambda) {
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) grad_lambda[k] = adjoint[k] * d[k] * (following[k] - v[k]);
}

template <typename T>
PHYX_INLINE void backward_rows(const BackwardGrid& grid, const BackwardSheet& base, int64_t first, int64_t past) {
  const auto strips = [&](int i) { return Strips<T>(base[i], grid.time_stride[i], grid.column_stride(i)); };
  auto returns = strips(kReturnsIn), grad = strips(kGrad), next_value = strips(kNextValueIn),
       discount = strips(kDiscountIn), lambda = strips(kLambdaIn), grad_reward = strips(kGradReward),
       grad_next_value = strips(kGradNextValue), grad_discount = strips(kGradDiscount),
       grad_lambda = strips(kGradLambda);
  for (int64_t j = first; j < past; j += kRow) {
    const int64_t n = std::min(kRow, past - j);
    T inflow[kRow];  // d_{t-1} λ_{t-1} A_{t-1}
    std::fill(inflow, inflow + n, T(0));
    for (int64_t t = 0; t < grid.steps; ++t) {
      const bool last = t == grid.steps - 1;
      const T *g = grad.read(t, j, n), *v = next_value.read(t, j, n), *d = discount.read(t, j, n),
              *l = lambda.read(t, j, n), *following = last ? v : returns.read(t + 1, j, n);
      T* adjoint = grad_reward.write(t, j);
#pragma GCC ivdep
      for (int64_t k = 0; k < n; ++k) {
        adjoint[k] = g[k] + inflow[k];
        inflow[k] = d[k] * l[k] * adjoint[k];
      }
      gradients(n, adjoint, v, d, l, following, T(!last), grad_next_value.write(t, j), grad_discount.write(t, j));
      grad_reward.flush(t, j, n);
      grad_next_value.flush(t, j, n);
      grad_discount.flush(t, j, n);
      if (!grad_lambda.data) continue;
      gradient_of_lambda(n, adjoint, v, d, following, grad_lambda.write(t, j));
      grad_lambda.flush(t, j, n);
    }
  }
}

template <typename T>
PHYX_INLINE void backward_lines(const BackwardGrid& grid, const BackwardSheet& base, int64_t first, int64_t past) {
  const auto strips = [&](int i) { return Strips<T>(base[i], grid.column_stride(i), grid.time_stride[i]); };
  auto returns = strips(kReturnsIn), grad = strips(kGrad), next_value = strips(kNextValueIn),
       discount = strips(kDiscountIn), lambda = strips(kLambdaIn), grad_reward = strips(kGradReward),
       grad_next_value = strips(kGradNextValue), grad_discount = strips(kGradDiscount),
       grad_lambda = strips(kGradLambda);
  T adjoint[kGroup][kLine], factor[kGroup][kLine];  // A_{t+1} = G_{t+1} + factor_t A_t
  for (int64_t i = first; i < past; i += kGroup) {
    const int64_t group = std::min(kGroup, past - i);
    T inflow[kGroup] = {};
    for (int64_t begin = 0; begin < grid.steps; begin += kLine) {
      const int64_t end = std::min(grid.steps, begin + kLine), n = end - begin;
      for (int64_t c = 0; c < group; ++c) {
        const T *g = grad.read(i + c, begin, n), *d = discount.read(i + c, begin, n), *l = lambda.read(i + c, begin, n);
#pragma GCC ivdep
        for (int64_t k = 0; k < n; ++k) {
          adjoint[c][k] = g[k];
          factor[c][k] = d[k] * l[k];
        }
      }
      for (int64_t c = group; c < kGroup; ++c) {
        std::fill(adjoint[c], adjoint[c] + n, T(0));
        std::fill(factor[c], factor[c] + n, T(0));
      }
      for (int64_t k = 0; k < n; ++k)
        for (int64_t c = 0; c < kGroup; ++c) {
          adjoint[c][k] += inflow[c];
          inflow[c] = factor[c][k] * adjoint[c][k];
        }
      for (int64_t c = 0; c < group; ++c) {
        const T *v = next_value.read(i + c, begin, n), *d = discount.read(i + c, begin, n),
                *l = lambda.read(i + c, begin, n);
        const bool last = end == grid.steps;
        const T* following = n > 1 || !last ? returns.read(i + c, begin + 1, n - last) : v;
        T ending[kLine];
        if (last) {
          std::copy(following, following + n - 1, ending);
          ending[n - 1] = v[n - 1];
          following = ending;
        }
        T *to_value = grad_next_value.write(i + c, begin), *to_discount = grad_discount.write(i + c, begin);
        gradients(n, adjoint[c], v, d, l, following, T(1), to_value, to_discount);
        if (last) to_value[n - 1] = adjoint[c][n - 1] * d[n - 1];
        std::copy(adjoint[c], adjoint[c] + n, grad_reward.write(i + c, begin));
        grad_reward.flush(i + c, begin, n);
        grad_next_value.flush(i + c, begin, n);
        grad_discount.flush(i + c, begin, n);
        if (!grad_lambda.data) continue;
        gradient_of_lambda(n, adjoint[c], v, d, following, grad_lambda.write(i + c, begin));
        grad_lambda.flush(i + c, begin, n);
      }
    }
  }
}

}  // namespace

// Columns [first, past) of one sheet. Multiversioned functions cannot be templates and need external linkage.
#define PHYX_LAMBDA_RETURN_KERNEL(pass, Pass, suffix, T)                                              \
  PHYX_MULTIVERSION void lambda_return_##pass##_##suffix(const Pass##Grid& grid, const Pass##Sheet& base, \
                                                         bool lines, int64_t first, int64_t past) {   \
    lines ? pass##_lines<T>(grid, base, first, past) : pass##_rows<T>(grid, base, first, past);       \
  }
PHYX_LAMBDA_RETURN_KERNEL(forward, Forward, f32, float)
PHYX_LAMBDA_RETURN_KERNEL(forward, Forward, f64, double)
PHYX_LAMBDA_RETURN_KERNEL(backward, Backward, f32, float)
PHYX_LAMBDA_RETURN_KERNEL(backward, Backward, f64, double)
#undef PHYX_LAMBDA_RETURN_KERNEL

namespace {

// Whether most of the operands from first to last lie with time, not columns, in neighbouring memory.
template <int Count>
bool time_is_innermost(const Grid<Count>& grid, int first, int last) {
  int votes = 0;
  for (int i = first; i <= last; ++i)
    votes += (grid.time_stride[i] == 1) - (grid.columns() > 1 && grid.column_stride(i) == 1);
  return votes > 0;
}

template <int Count, typename Kernel>
void run(const Grid<Count>& grid, int threads, bool lines, Kernel kernel) {
  py::gil_scoped_release release;
  grid.for_each_sheet([&](const std::array<char*, Count>& base) {
    parallel_for(grid.columns(), kRow, threads,
                 [&](int64_t first, int64_t past) { kernel(grid, base, lines, first, past); });
  });
}

// Operands are (address, strides in elements); lambda is one too, or a number. shape is that of the tensors, (T, ...).
void lambda_return_forward(int item, int threads, py::tuple shape, py::handle returns, py::handle reward,
                           py::handle next_value, py::handle discount, py::handle lambda) {
  const ForwardGrid grid(item, shape, {returns, reward, next_value, discount, lambda});
  const bool lines = time_is_innermost(grid, kReturns, kDiscount);
  run(grid, threads, lines, item == 4 ? lambda_return_forward_f32 : lambda_return_forward_f64);
}

// A gradient that is not wanted is None.
void lambda_return_backward(int item, int threads, py::tuple shape, py::handle grad_reward, py::handle grad_next_value,
                            py::handle grad_discount, py::handle grad_lambda, py::handle grad, py::handle returns,
                            py::handle next_value, py::handle discount, py::handle lambda) {
  const BackwardGrid grid(item, shape, {returns, grad, next_value, discount, lambda, grad_reward, grad_next_value,
                                        grad_discount, grad_lambda});
  const bool lines = time_is_innermost(grid, kReturnsIn, kDiscountIn);
  run(grid, threads, lines, item == 4 ? lambda_return_backward_f32 : lambda_return_backward_f64);
}

}  // namespace

void bind_lambda_return(py::module_& module) {
  module.def("lambda_return_forward", &lambda_return_forward);
  module.def("lambda_return_backward", &lambda_return_backward);
}

}  // namespace phyx
