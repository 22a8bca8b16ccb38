// KL between latent states and its two gradients (contract and reference: phyxdream/ops/balanced_kl.py).
//
// Categorical, for every variable:   p = softmax(post)   q = softmax(prior)   P = (1-u) p + u/C   Q = (1-u) q + u/C
//   L = ln P/Q     KL = Σ P L     ∂KL/∂post = (1-u) p (L - Σ p L)     ∂KL/∂prior = (1-u) q (Σ q P/Q - P/Q)
// and with u = 0, where Q may vanish, L = post - prior - ln(Σ e^post / Σ e^prior) and ∂KL/∂prior = q - p.
//
// Gaussian, with r = σp/σq and d = (μp - μq)/σq:   KL = Σ (r² + d² - 1 - ln r²)/2
//   ∂μp = d/σq     ∂σp = r/σq - 1/σp     ∂μq = -d/σq     ∂σq = (1 - r² - d²)/σq
//
// The sums run over short vectors (C classes, S variables), so 16 vectors are laid side by side, one a lane, and no sum
// crosses lanes: any length is as good as any other, and which vectors share a block leaves no trace in the result.
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"
#include "vec_math.h"

namespace py = pybind11;

namespace phyx {
namespace {

// Loops over lanes are marked `unroll 1`: GCC would unroll them before it looks for something to vectorise.
constexpr int kLanes = 16;
constexpr int64_t kChunk = 1 << 13;  // elements per chunk of rows: some 10 µs, worth waking a thread for

using Vectors = std::array<float*, kLanes>;
using Lanes = std::array<float, kLanes>;

// A run of rows, each made of `per_row` vectors of `size`; what the vectors sum to is one number a row.
struct Shape {
  int64_t rows, per_row, size;
  float unimix, free_nats;
};

// One operand in a run of rows.
struct Operand {
  float* data;
  int64_t stride;
};

// Walks the vectors of a run, 16 at a time; the last block is filled up with its last vector.
struct Block {
  int64_t row = 0, place = 0;  // of the next vector
  int count = 0;
  std::array<int64_t, kLanes> row_of{}, place_of{};

  PHYX_INLINE bool next(const Shape& shape) {
    for (count = 0; count < kLanes && row < shape.rows; ++count) {
      row_of[count] = row;
      place_of[count] = place;
      if (++place == shape.per_row) place = 0, ++row;
    }
    for (int l = count; l < kLanes && count; ++l) row_of[l] = row_of[count - 1], place_of[l] = place_of[count - 1];
    return count;
  }

  PHYX_INLINE Vectors vectors(const Operand& x, int64_t size) const {
    Vectors at;
    for (int l = 0; l < kLanes; ++l) at[l] = x.data + row_of[l] * x.stride + place_of[l] * size;
    return at;
  }

  // Only a full block: where the last vector fills up, it may be 15 sizes from the first by chance.
  PHYX_INLINE bool in_one_piece(const Vectors& x, int64_t size) const {
    return count == kLanes && x[kLanes - 1] == x[0] + (kLanes - 1) * size;
  }

  PHYX_INLINE float of_row(const Operand& x, int l) const { return x.data[row_of[l] * x.stride]; }
};

// to = a0 b0 c0 d0 a1 b1 c1 d1 ...
PHYX_INLINE void zip(float* __restrict to, const float* a, const float* b, const float* c, const float* d,
                     int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[4 * i] = a[i];
    to[4 * i + 1] = b[i];
    to[4 * i + 2] = c[i];
    to[4 * i + 3] = d[i];
  }
}

PHYX_INLINE void unzip(float* __restrict a, float* __restrict b, float* __restrict c, float* __restrict d,
                       const float* __restrict from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    a[i] = from[4 * i];
    b[i] = from[4 * i + 1];
    c[i] = from[4 * i + 2];
    d[i] = from[4 * i + 3];
  }
}

// Element i of vector l goes to [i * kLanes + l]: with l = 4 m + n, zipping by m, then by n.
PHYX_INLINE void load(float* to, float* spare, const Block& block, const Operand& operand, int64_t size) {
  const Vectors from = block.vectors(operand, size);
  const int64_t quarter = 4 * size;
  if (block.in_one_piece(from, size))
    zip(spare, from[0], from[4], from[8], from[12], quarter);
  else
    for (int n = 0; n < 4; ++n) zip(spare + n * quarter, from[n], from[4 + n], from[8 + n], from[12 + n], size);
  zip(to, spare, spare + quarter, spare + 2 * quarter, spare + 3 * quarter, quarter);
}

// The inverse; vectors that fill up the block go to `rest`.
PHYX_INLINE void store(const Block& block, const Operand& operand, float* rest, float* spare, const float* from,
                       int64_t size) {
  Vectors to = block.vectors(operand, size);
  for (int l = block.count; l < kLanes; ++l) to[l] = rest + l * size;
  const int64_t quarter = 4 * size;
  unzip(spare, spare + quarter, spare + 2 * quarter, spare + 3 * quarter, from, quarter);
  if (block.in_one_piece(to, size))
    unzip(to[0], to[4], to[8], to[12], spare, quarter);
  else
    for (int n = 0; n < 4; ++n) unzip(to[n], to[4 + n], to[8 + n], to[12 + n], spare + n * quarter, size);
}

PHYX_INLINE Lanes peaks(const float* x, int64_t size) {
  Lanes peak;
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) peak[l] = x[l];
  for (int64_t i = kLanes; i < size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) peak[l] = x[i + l] > peak[l] ? x[i + l] : peak[l];
  return peak;
}

// e^-u for u >= 0; beyond 87 it is as good as 0.
PHYX_INLINE float decay(float u) { return normal_exp(u > 87.0f ? -87.0f : -u); }

// post, prior <- e^(· - max), returns their sums. Without unimix, also difference <- (post - max) - (prior - max).
template <bool kMixed>
PHYX_INLINE std::array<Lanes, 2> exponentials(float* __restrict post, float* __restrict prior,
                                              float* __restrict difference, int64_t size) {
  const Lanes post_peak = peaks(post, size), prior_peak = peaks(prior, size);
  Lanes post_sum{}, prior_sum{};
  for (int64_t i = 0; i < size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float a = post_peak[l] - post[i + l], b = prior_peak[l] - prior[i + l];
      if (!kMixed) difference[i + l] = b - a;
      post_sum[l] += post[i + l] = decay(a);
      prior_sum[l] += prior[i + l] = decay(b);
    }
  return {post_sum, prior_sum};
}

template <bool kMixed>
PHYX_INLINE Lanes categorical_kl(float* __restrict post, float* __restrict prior, float* __restrict difference,
                                 const Shape& shape) {
  const auto [post_sum, prior_sum] = exponentials<kMixed>(post, prior, difference, shape.size);
  const float uniform = shape.unimix / static_cast<float>(shape.size);
  Lanes post_scale, prior_scale, log_sums, kl{};
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) {
    post_scale[l] = (1.0f - shape.unimix) / post_sum[l];
    prior_scale[l] = (1.0f - shape.unimix) / prior_sum[l];
    log_sums[l] = log_ratio(post_sum[l], prior_sum[l]);
  }
  for (int64_t i = 0; i < shape.size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float p = post[i + l] * post_scale[l] + uniform, q = prior[i + l] * prior_scale[l] + uniform;
      kl[l] += p * (kMixed ? log_ratio(p, q) : difference[i + l] - log_sums[l]);
    }
  return kl;
}

// post, prior <- the gradients of KL times post_grad and prior_grad. logs and ratios are working space.
template <bool kMixed>
PHYX_INLINE void categorical_gradients(float* __restrict post, float* __restrict prior, float* __restrict logs,
                                       float* __restrict ratios, const Shape& shape, const Lanes& post_grad,
                                       const Lanes& prior_grad) {
  const auto [post_sum, prior_sum] = exponentials<kMixed>(post, prior, logs, shape.size);
  const float rest = 1.0f - shape.unimix, uniform = shape.unimix / static_cast<float>(shape.size);
  Lanes post_scale, prior_scale, log_sums, mean_log{}, mean_ratio{};
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) {
    post_scale[l] = 1.0f / post_sum[l];
    prior_scale[l] = 1.0f / prior_sum[l];
    log_sums[l] = log_ratio(post_sum[l], prior_sum[l]);
  }
  for (int64_t i = 0; i < shape.size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float p = post[i + l] *= post_scale[l], q = prior[i + l] *= prior_scale[l];
      if (kMixed) {
        const float mixed_p = rest * p + uniform, mixed_q = rest * q + uniform;
        logs[i + l] = log_ratio(mixed_p, mixed_q);
        mean_ratio[l] += q * (ratios[i + l] = mixed_p / mixed_q);
      } else {
        logs[i + l] -= log_sums[l];
      }
      mean_log[l] += p * logs[i + l];
    }
  for (int64_t i = 0; i < shape.size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float p = post[i + l], q = prior[i + l];
      post[i + l] = post_grad[l] * rest * p * (logs[i + l] - mean_log[l]);
      prior[i + l] = prior_grad[l] * (kMixed ? rest * q * (mean_ratio[l] - ratios[i + l]) : q - p);
    }
}

PHYX_INLINE Lanes gaussian_kl(const float* post_mean, const float* post_std, const float* prior_mean,
                              const float* prior_std, int64_t size) {
  Lanes kl{};
  for (int64_t i = 0; i < size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float r = post_std[i + l] / prior_std[i + l], d = (post_mean[i + l] - prior_mean[i + l]) / prior_std[i + l];
      kl[l] += 0.5f * (r * r + d * d - 1.0f) - log_ratio(post_std[i + l], prior_std[i + l]);
    }
  return kl;
}

// Every operand <- its gradient.
PHYX_INLINE void gaussian_gradients(float* __restrict post_mean, float* __restrict post_std,
                                    float* __restrict prior_mean, float* __restrict prior_std, int64_t size,
                                    const Lanes& post_grad, const Lanes& prior_grad) {
  for (int64_t i = 0; i < size * kLanes; i += kLanes)
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float inverse = 1.0f / prior_std[i + l];
      const float r = post_std[i + l] / prior_std[i + l], d = (post_mean[i + l] - prior_mean[i + l]) * inverse;
      post_mean[i + l] = post_grad[l] * (d * inverse);
      post_std[i + l] = post_grad[l] * (r * inverse - 1.0f / post_std[i + l]);
      prior_mean[i + l] = prior_grad[l] * (-d * inverse);
      prior_std[i + l] = prior_grad[l] * ((1.0f - r * r - d * d) * inverse);
    }
}

// The sum over a row ends with its last vector, which may lie in a later block.
struct RowSum {
  float sum = 0.0f;

  PHYX_INLINE void add(const Block& block, const Lanes& kl, const Shape& shape, const Operand* outputs) {
    for (int l = 0; l < block.count; ++l) {
      sum += kl[l];
      if (block.place_of[l] + 1 < shape.per_row) continue;
      const float clipped = sum < shape.free_nats ? shape.free_nats : sum;
      const int64_t row = block.row_of[l];
      outputs[0].data[row * outputs[0].stride] = outputs[1].data[row * outputs[1].stride] = clipped;
      outputs[2].data[row * outputs[2].stride] = sum;
      sum = 0.0f;
    }
  }
};

// What flows back into the representation half and the dynamics half, by lane; inputs: grads of dynamics and
// representation, then the KL, of which nothing flows back below free_nats.
PHYX_INLINE std::array<Lanes, 2> inflow(const Block& block, const Shape& shape, const Operand* inputs) {
  Lanes post, prior;
  for (int l = 0; l < kLanes; ++l) {
    const bool flows = block.of_row(inputs[2], l) >= shape.free_nats;
    prior[l] = flows ? block.of_row(inputs[0], l) : 0.0f;
    post[l] = flows ? block.of_row(inputs[1], l) : 0.0f;
  }
  return {post, prior};
}

}  // namespace

// Multiversioned functions must have external linkage and be no templates. Operands: dynamics, representation, kl (or
// the gradients of the two, kl), then the inputs, then the gradients of the inputs.

PHYX_MULTIVERSION void balanced_kl_forward_rows(const Shape& shape, const Operand* x, float* space) {
  const int64_t size = shape.size, step = kLanes * size;
  float *post = space, *prior = post + step, *difference = prior + step, *spare = difference + step;
  RowSum row;
  for (Block block; block.next(shape);) {
    load(post, spare, block, x[3], size);
    load(prior, spare, block, x[4], size);
    row.add(block,
            shape.unimix > 0.0f ? categorical_kl<true>(post, prior, difference, shape)
                                : categorical_kl<false>(post, prior, difference, shape),
            shape, x);
  }
}

PHYX_MULTIVERSION void balanced_kl_backward_rows(const Shape& shape, const Operand* x, float* space) {
  const int64_t size = shape.size, step = kLanes * size;
  float *post = space, *prior = post + step, *logs = prior + step, *ratios = logs + step, *spare = ratios + step;
  for (Block block; block.next(shape);) {
    load(post, spare, block, x[3], size);
    load(prior, spare, block, x[4], size);
    const auto [post_grad, prior_grad] = inflow(block, shape, x);
    if (shape.unimix > 0.0f)
      categorical_gradients<true>(post, prior, logs, ratios, shape, post_grad, prior_grad);
    else
      categorical_gradients<false>(post, prior, logs, ratios, shape, post_grad, prior_grad);
    store(block, x[5], logs, spare, post, size);
    store(block, x[6], logs, spare, prior, size);
  }
}

PHYX_MULTIVERSION void balanced_kl_gaussian_forward_rows(const Shape& shape, const Operand* x, float* space) {
  const int64_t size = shape.size, step = kLanes * size;
  float* spare = space + 4 * step;
  RowSum row;
  for (Block block; block.next(shape);) {
    for (int i = 0; i < 4; ++i) load(space + i * step, spare, block, x[3 + i], size);
    row.add(block, gaussian_kl(space, space + step, space + 2 * step, space + 3 * step, size), shape, x);
  }
}

PHYX_MULTIVERSION void balanced_kl_gaussian_backward_rows(const Shape& shape, const Operand* x, float* space) {
  const int64_t size = shape.size, step = kLanes * size;
  float *spare = space + 4 * step, *rest = spare + step;
  for (Block block; block.next(shape);) {
    for (int i = 0; i < 4; ++i) load(space + i * step, spare, block, x[3 + i], size);
    const auto [post_grad, prior_grad] = inflow(block, shape, x);
    gaussian_gradients(space, space + step, space + 2 * step, space + 3 * step, size, post_grad, prior_grad);
    for (int i = 0; i < 4; ++i) store(block, x[7 + i], rest, spare, space + i * step, size);
  }
}

namespace {

using RowsFunction = void (*)(const Shape&, const Operand*, float*);

// shape: (..., size of a row), and a row is vectors of `size`. views: a tuple of (address, strides in elements) of
// float32 tensors, those of (...) first, then the inputs and their gradients, whose rows are contiguous.
template <RowsFunction kFunction, int kCount, int kSpaces>
void run(py::tuple shape, int64_t size, float unimix, float free_nats, int threads, py::tuple views) {
  if (static_cast<int>(views.size()) != kCount) throw std::invalid_argument("views: not as many as operands");
  std::array<py::handle, kCount> handles;
  for (int i = 0; i < kCount; ++i) handles[i] = views[i];
  const Rows<kCount> rows(shape, handles);
  py::gil_scoped_release release;
  parallel_for(rows.count, std::max<int64_t>(1, kChunk / rows.steps), threads, [&](int64_t begin, int64_t end) {
    std::vector<float> space(kSpaces * kLanes * size);
    rows.for_each_run(begin, end, [&](int64_t run, const auto& row) {
      std::array<Operand, kCount> operands;
      for (int i = 0; i < kCount; ++i) operands[i] = {row[i], rows.column_stride(i)};
      kFunction({run, rows.steps / size, size, unimix, free_nats}, operands.data(), space.data());
    });
  });
}

}  // namespace

void bind_balanced_kl(py::module_& module) {
  module.def("balanced_kl_forward", &run<balanced_kl_forward_rows, 5, 4>);
  module.def("balanced_kl_backward", &run<balanced_kl_backward_rows, 7, 5>);
  module.def("balanced_kl_gaussian_forward", &run<balanced_kl_gaussian_forward_rows, 7, 5>);
  module.def("balanced_kl_gaussian_backward", &run<balanced_kl_gaussian_backward_rows, 11, 6>);
}

}  // namespace phyx
