#include "lanes.h"

#include "vector.h"

namespace phyx {
namespace {

// Weights are read once a step, in order, from wherever they lie. The hardware's prefetchers stop at every page of 4 KB:
// far ahead by hand, the last cache or even memory feeds the sums at nearly full speed (128 to 234 GFLOP/s, 67 MB).
constexpr int64_t kAhead = 128 * kTile;

PHYX_INLINE void prefetch(const float* weight) {
#if defined(__GNUC__)
  __builtin_prefetch(weight + kAhead);
#endif
}

// kRows of the 16 outputs at a time, for as many as the registers hold.
template <int kRows>
PHYX_INLINE void multiply_one_group(const float* panel, int64_t inputs, const float* x, float* out) {
  const auto* in = reinterpret_cast<const Vector*>(x);
  for (int first = 0; first < kTile; first += kRows) {
    auto* to = reinterpret_cast<Vector*>(out) + first;
    Vector sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = to[r];
    const float* w = panel + first;
    for (int64_t k = 0; k < inputs; ++k, w += kTile) {
      const Vector v = in[k];
      prefetch(w);
      for (int r = 0; r < kRows; ++r) sum[r] += w[r] * v;
    }
    for (int r = 0; r < kRows; ++r) to[r] = sum[r];
  }
}

template <int kRows>
PHYX_INLINE void multiply_two_groups(const float* panel, int64_t inputs, const float* x0, const float* x1, float* out0,
                                     float* out1) {
  const auto *in0 = reinterpret_cast<const Vector*>(x0), *in1 = reinterpret_cast<const Vector*>(x1);
  for (int first = 0; first < kTile; first += kRows) {
    auto *to0 = reinterpret_cast<Vector*>(out0) + first, *to1 = reinterpret_cast<Vector*>(out1) + first;
    Vector sum0[kRows], sum1[kRows];
    for (int r = 0; r < kRows; ++r) {
      sum0[r] = to0[r];
      sum1[r] = to1[r];
    }
    const float* w = panel + first;
    for (int64_t k = 0; k < inputs; ++k, w += kTile) {
      const Vector v0 = in0[k], v1 = in1[k];
      prefetch(w);
      for (int r = 0; r < kRows; ++r) {
        sum0[r] += w[r] * v0;
        sum1[r] += w[r] * v1;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      to0[r] = sum0[r];
      to1[r] = sum1[r];
    }
  }
}

// Rows of weights, `kRows` outputs at once: rows are often a multiple of 4 KB apart, where more would throw each other
// out of the first cache. While some are summed, the next ones are fetched: each of them starts on a page of its own.
template <int kRows>
PHYX_INLINE void multiply_rows(const WeightTile& weights, int64_t inputs, const float* x, float* out) {
  constexpr int64_t line = 16;
  const auto* in = reinterpret_cast<const Vector*>(x);
  const int64_t step = weights.input;
  for (int first = 0; first < weights.count; first += kRows) {
    const float* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = weights.data + std::min(first + r, weights.count - 1) * weights.output;
    auto* to = reinterpret_cast<Vector*>(out) + first;
    Vector sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = to[r];
    int64_t k = 0;
    for (; step == 1 && k + line <= inputs; k += line) {
#if defined(__GNUC__)
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(w[r] + kRows * weights.output + k);
#endif
      for (int64_t i = k; i < k + line; ++i) {
        const Vector v = in[i];
        for (int r = 0; r < kRows; ++r) sum[r] += w[r][i] * v;
      }
    }
    for (; k < inputs; ++k) {
      const Vector v = in[k];
      for (int r = 0; r < kRows; ++r) sum[r] += w[r][k * step] * v;
    }
    for (int r = 0; r < kRows; ++r) to[r] = sum[r];
  }
}

// Sixteen outputs side by side; meanwhile the next sixteen are fetched.
template <int kRows>
PHYX_INLINE void multiply_columns(const WeightTile& weights, int64_t inputs, const float* x, float* out) {
  const auto* in = reinterpret_cast<const Vector*>(x);
  for (int first = 0; first < kTile; first += kRows) {
    auto* to = reinterpret_cast<Vector*>(out) + first;
    Vector sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = to[r];
    const float* w = weights.data + first;
    for (int64_t k = 0; k < inputs; ++k, w += weights.input) {
      const Vector v = in[k];
#if defined(__GNUC__)
      if (first == 0) __builtin_prefetch(w + kTile);
#endif
      for (int r = 0; r < kRows; ++r) sum[r] += w[r] * v;
    }
    for (int r = 0; r < kRows; ++r) to[r] = sum[r];
  }
}

template <int kRows, int kColumns>
PHYX_INLINE void multiply_where(const WeightTile& weights, int64_t inputs, const float* x, float* out) {
  if (weights.output == 1 && weights.count == kTile)
    multiply_columns<kColumns>(weights, inputs, x, out);
  else
    multiply_rows<kRows>(weights, inputs, x, out);
}

}  // namespace

// 32 registers of 16 floats, or 16 registers of 8: what is summed at once must leave room for the inputs.
PHYX_MULTIVERSION void multiply_one_wide(const float* panel, int64_t inputs, const float* x, float* out) {
  multiply_one_group<16>(panel, inputs, x, out);
}
PHYX_MULTIVERSION void multiply_two_wide(const float* panel, int64_t inputs, const float* x0, const float* x1,
                                         float* out0, float* out1) {
  multiply_two_groups<8>(panel, inputs, x0, x1, out0, out1);
}
PHYX_MULTIVERSION void multiply_in_place_wide(const WeightTile& weights, int64_t inputs, const float* x, float* out) {
  multiply_where<8, 16>(weights, inputs, x, out);
}
PHYX_MULTIVERSION void multiply_one_narrow(const float* panel, int64_t inputs, const float* x, float* out) {
  multiply_one_group<4>(panel, inputs, x, out);
}
PHYX_MULTIVERSION void multiply_two_narrow(const float* panel, int64_t inputs, const float* x0, const float* x1,
                                           float* out0, float* out1) {
  multiply_one_group<4>(panel, inputs, x0, out0);
  multiply_one_group<4>(panel, inputs, x1, out1);
}

PHYX_MULTIVERSION void multiply_in_place_narrow(const WeightTile& weights, int64_t inputs, const float* x,
                                                float* out) {
  multiply_where<4, 4>(weights, inputs, x, out);
}

bool has_wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool wide = __builtin_cpu_supports("avx512f");
  return wide;
#else
  return false;
#endif
}

const Multiply& multiply() {
  static const Multiply wide{multiply_one_wide, multiply_two_wide, multiply_in_place_wide};
  static const Multiply narrow{multiply_one_narrow, multiply_two_narrow, multiply_in_place_narrow};
  return has_wide_registers() ? wide : narrow;
}

namespace {

template <int kWidth>
PHYX_INLINE void pack_columns(float* to, const float* from, int64_t term, int64_t panels, int64_t terms) {
  constexpr int64_t ahead = 8;  // every term is on another page, where the hardware does not prefetch
  for (int64_t k = 0; k < terms; ++k, from += term, to += kWidth)
    for (int64_t p = 0; p < panels; ++p) {
#if defined(__GNUC__)
      __builtin_prefetch(from + ahead * term + p * kWidth);
#endif
      std::memcpy(to + p * terms * kWidth, from + p * kWidth, sizeof(float) * kWidth);
    }
}

}  // namespace

PHYX_MULTIVERSION void pack_rows(float* to, int64_t width, const float* from, int64_t row, int64_t term, int64_t rows,
                                 int64_t terms) {
  if (row == 1) {
    const int64_t panels = rows / width;
    width == kTile ? pack_columns<kTile>(to, from, term, panels, terms)
                   : pack_columns<kTile / 2>(to, from, term, panels, terms);
    to += panels * width * terms;
    from += panels * width;
    rows -= panels * width;
  }
  for (; rows > 0; rows -= width, from += width * row, to += width * terms) {
    const int64_t count = std::min(rows, width);
    if (count < width) std::memset(to, 0, sizeof(float) * width * terms);
    if (term == 1)
      transpose(to, width, from, row, static_cast<int>(count), static_cast<int>(terms));
    else
      for (int64_t k = 0; k < terms; ++k)
        for (int64_t r = 0; r < count; ++r) to[k * width + r] = from[r * row + k * term];
  }
}

PHYX_MULTIVERSION void from_rows(float* tile, const float* rows, int64_t stride, int lanes, int features) {
  transpose(tile, kLanes, rows, stride, lanes, features);
  for (int f = 0; lanes < kLanes && f < features; ++f)
    for (int l = lanes; l < kLanes; ++l) tile[f * kLanes + l] = 0.0f;
}

PHYX_MULTIVERSION void to_rows(float* rows, int64_t stride, int lanes, const float* tile, int features) {
  transpose(rows, stride, tile, kLanes, features, lanes);
}

void Panels::pack(float* to, const WeightTile& from, int64_t inputs) {
  pack_rows(to, kTile, from.data, from.output, from.input, from.count, inputs);
}

}  // namespace phyx
