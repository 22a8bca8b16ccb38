#include "lanes.h"

namespace phyx {
namespace {

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
#else
struct Vector {
  float lane[kLanes];
  Vector& operator+=(const Vector& x) {
    for (int l = 0; l < kLanes; ++l) lane[l] += x.lane[l];
    return *this;
  }
  friend Vector operator*(float w, const Vector& x) {
    Vector y;
    for (int l = 0; l < kLanes; ++l) y.lane[l] = w * x.lane[l];
    return y;
  }
};
#endif

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

}  // namespace

// 32 registers of 16 floats, or 16 registers of 8: what is summed at once must leave room for the inputs.
PHYX_MULTIVERSION void multiply_one_wide(const float* panel, int64_t inputs, const float* x, float* out) {
  multiply_one_group<16>(panel, inputs, x, out);
}
PHYX_MULTIVERSION void multiply_two_wide(const float* panel, int64_t inputs, const float* x0, const float* x1,
                                         float* out0, float* out1) {
  multiply_two_groups<8>(panel, inputs, x0, x1, out0, out1);
}
PHYX_MULTIVERSION void multiply_one_narrow(const float* panel, int64_t inputs, const float* x, float* out) {
  multiply_one_group<4>(panel, inputs, x, out);
}
PHYX_MULTIVERSION void multiply_two_narrow(const float* panel, int64_t inputs, const float* x0, const float* x1,
                                           float* out0, float* out1) {
  multiply_one_group<4>(panel, inputs, x0, out0);
  multiply_one_group<4>(panel, inputs, x1, out1);
}

const Multiply& multiply() {
  static const Multiply wide{multiply_one_wide, multiply_two_wide}, narrow{multiply_one_narrow, multiply_two_narrow};
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has_wide = __builtin_cpu_supports("avx512f");
  return has_wide ? wide : narrow;
#else
  return narrow;
#endif
}

void Panels::pack(float* to, const float* from, int count, int64_t inputs, int64_t output, int64_t input) {
  for (int64_t k0 = 0; k0 < inputs; k0 += kTile) {  // squares, so that neither side strides through memory
    const int64_t k1 = std::min(inputs, k0 + kTile);
    for (int r = 0; r < count; ++r)
      for (int64_t k = k0; k < k1; ++k) to[k * kTile + r] = from[r * output + k * input];
    for (int r = count; r < kTile; ++r)
      for (int64_t k = k0; k < k1; ++k) to[k * kTile + r] = 0.0f;
  }
}

}  // namespace phyx
