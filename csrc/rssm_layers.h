// Layers of a scan, in lanes: linear maps from and to tiles, norms and activations, forward and back. All inlined into
// the two multiversioned functions of the scan.
#pragma once
#include <cstring>
#include <limits>

#include "rssm_scan.h"
#include "vector.h"

namespace phyx {

template <Act kAct>
PHYX_INLINE float activate(float u) {
  if (kAct == Act::kSilu) return u * sigmoid(u);
  if (kAct == Act::kElu) return u > 0.0f ? u : expm1_of(u);
  if (kAct == Act::kRelu) return u > 0.0f ? u : 0.0f * u;  // NaN passes through
  return u;
}

template <Act kAct>
PHYX_INLINE float slope(float u) {
  if (kAct == Act::kSilu) {
    const float s = sigmoid(u);
    return s * (1.0f + u * (1.0f - s));
  }
  if (kAct == Act::kElu) return u > 0.0f ? 1.0f : vec_exp(u);
  if (kAct == Act::kRelu) return u > 0.0f ? 1.0f : 0.0f;
  return 1.0f;
}

using Block = float[2][kTile * kLanes];  // a tile of two groups

PHYX_INLINE void fill(float* tile, const float* values, int count) {
  for (int f = 0; f < kTile; ++f) vectors(tile)[f] = Vector{} + (values && f < count ? values[f] : 0.0f);
}

PHYX_INLINE void multiply_into(float (*tile)[kTile * kLanes], const Multiply& m, const Panels& panels, int64_t i,
                               const Lanes& x, int64_t feature, int64_t g, int64_t pair) {
  if (panels.in_place())
    for (int64_t j = 0; j < pair; ++j) m.in_place(panels.where(i), panels.inputs, x.at(g + j, feature), tile[j]);
  else if (pair == 2)
    m.two(panels.tile(i), panels.inputs, x.at(g, feature), x.at(g + 1, feature), tile[0], tile[1]);
  else
    m.one(panels.tile(i), panels.inputs, x.at(g, feature), tile[0]);
}

#define PHYX_BY_ACT(function, act, ...)                               \
  switch (act) {                                                      \
    case Act::kIdentity: function<Act::kIdentity>(__VA_ARGS__); break; \
    case Act::kSilu: function<Act::kSilu>(__VA_ARGS__); break;        \
    case Act::kElu: function<Act::kElu>(__VA_ARGS__); break;          \
    case Act::kRelu: function<Act::kRelu>(__VA_ARGS__); break;        \
  }

template <Act kAct>
PHYX_INLINE void activate_all(float* __restrict out, const float* __restrict u, int size) {
  for (int i = 0; i < size; ++i) out[i] = activate<kAct>(u[i]);
}

PHYX_INLINE void activate_rows(Act act, float* out, const float* u, int count) {
  PHYX_BY_ACT(activate_all, act, out, u, count * kLanes)
}

// The activated values again, and the gradient of what was activated: both need the same exponential.
template <Act kAct>
PHYX_INLINE void slope_all(float* __restrict grad, float* __restrict out, const float* __restrict values,
                           const float* __restrict u, int size) {
  for (int i = 0; i < size; ++i) {
    out[i] = activate<kAct>(u[i]);
    grad[i] = values[i] * slope<kAct>(u[i]);
  }
}

// Uniform noise as an exponential time (`rssm_cells.arrival_times`); what is not positive never arrives.
PHYX_INLINE float arrival_time(float noise) {
  const float time = -vec_log(noise);
  return noise > 0.0f ? std::max(time, std::numeric_limits<float>::min()) : std::numeric_limits<float>::infinity();
}

// Before the products of a tile: by their end, the part of the tape that comes next has arrived.
PHYX_INLINE void prefetch_tape(const Scan& s, int64_t row, int count, int64_t t, int64_t g, int64_t pair) {
  for (int64_t j = 0; j < pair; ++j) prefetch_rows(s.tape_at(t, g + j, row), kLanes, count, kLanes);
}

// A tile of a layer before its norm: to the tape, its sums for the norm, or at once through the activation.
PHYX_INLINE void enter(const Scan& s, const Layer& layer, int64_t i, const float* values, int64_t t, int64_t g) {
  const Tile& tile = layer.tiles[i];
  float* kept = s.tape_at(t, g, layer.tape + tile.start);
  std::memcpy(kept, values, sizeof(float) * tile.count * kLanes);
  if (!layer.gain) return activate_rows(layer.act, layer.out.at(g, tile.start), values, tile.count);
  const Vector* x = vectors(values);
  Vector sum{}, square{};
  for (int f = 0; layer.shift && f < tile.count; ++f) sum += x[f];
  const Vector mean = (1.0f / static_cast<float>(tile.count)) * sum;
  for (int f = 0; f < tile.count; ++f) {
    const Vector d = x[f] - mean;
    square += d * d;
  }
  Vector* sums = vectors(layer.sums(i, g, s.groups));
  sums[0] = sum;
  sums[1] = square;
}

// Mean and 1/σ of the whole vector from the sums of its tiles (Chan et al. 1979).
PHYX_INLINE void moments(const Scan& s, const Layer& layer, int64_t g, Vector* mean, Vector* inverse) {
  const float part = 1.0f / static_cast<float>(layer.size);
  const int64_t tiles = static_cast<int64_t>(layer.tiles.size());
  Vector sum{}, square{};
  for (int64_t i = 0; i < tiles; ++i) {
    sum += vectors(layer.sums(i, g, s.groups))[0];
    square += vectors(layer.sums(i, g, s.groups))[1];
  }
  *mean = part * sum;
  for (int64_t i = 0; layer.shift && i < tiles; ++i) {
    const float count = static_cast<float>(layer.tiles[i].count);
    const Vector d = (1.0f / count) * vectors(layer.sums(i, g, s.groups))[0] - *mean;
    square += count * d * d;
  }
  for (int l = 0; l < kLanes; ++l) (*inverse)[l] = 1.0f / std::sqrt(part * square[l] + layer.eps);
}

// u = n·gain + shift of features that lie on the tape.
PHYX_INLINE void affine(float* __restrict u, const float* __restrict n, const Layer& layer, int64_t start, int count) {
  for (int f = 0; f < count; ++f) {
    const float gain = layer.gain ? layer.gain[start + f] : 1.0f, shift = layer.shift ? layer.shift[start + f] : 0.0f;
    vectors(u)[f] = gain * vectors(n)[f] + shift;
  }
}

PHYX_INLINE void normalise(float* n, int count, const Vector& mean, const Vector& inverse) {
  for (int f = 0; f < count; ++f) vectors(n)[f] = (vectors(n)[f] - mean) * inverse;
}

PHYX_INLINE void leave(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  float u[kTile * kLanes];
  for (int64_t g = 0; g < s.groups; ++g) {
    Vector mean, inverse;
    moments(s, layer, g, &mean, &inverse);
    if (begin == 0) *vectors(s.tape_at(t, g, layer.tape + layer.size)) = inverse;
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = layer.tiles[i];
      float* n = s.tape_at(t, g, layer.tape + tile.start);
      normalise(n, tile.count, mean, inverse);
      affine(u, n, layer, tile.start, tile.count);
      activate_rows(layer.act, layer.out.at(g, tile.start), u, tile.count);
    }
  }
}

PHYX_INLINE void put_grad_rows(const Scan& s, const Layer& layer, const Tile& tile, const float* grad, int64_t t,
                               int64_t g) {
  if (layer.grad_rows)
    to_rows(layer.grad_rows + s.row(t, g) * layer.row_size + tile.start, layer.row_size, s.used(g), grad, tile.count);
}

// The gradient of a tile of activated values, back through the activation and half through the norm.
PHYX_INLINE void enter_backward(const Scan& s, const Layer& layer, int64_t i, const float* values, int64_t t,
                                int64_t g) {
  const Tile& tile = layer.tiles[i];
  const float* n = s.tape_at(t, g, layer.tape + tile.start);
  float u[kTile * kLanes], y[kTile * kLanes];
  affine(u, n, layer, tile.start, tile.count);
  float* grad = layer.grad.at(g, tile.start);
  PHYX_BY_ACT(slope_all, layer.act, grad, y, values, u, tile.count * kLanes)
  if (layer.out_rows)
    to_rows(layer.out_rows + s.row(t, g) * layer.row_size + tile.start, layer.row_size, s.used(g), y, tile.count);
  if (!layer.gain) return put_grad_rows(s, layer, tile, grad, t, g);
  const Vector* normal = vectors(n);
  Vector *d = vectors(grad), sum{}, along{};
  if (layer.gain_sum.get()) {
    const int64_t start = (g / kUnit * layer.size + tile.start) * kLanes;
    Vector *gain_sum = vectors(layer.gain_sum.get() + start), *shift_sum = vectors(layer.shift_sum.get() + start);
    for (int f = 0; f < tile.count; ++f) {
      gain_sum[f] += d[f] * normal[f];
      shift_sum[f] += d[f];
    }
  }
  for (int f = 0; f < tile.count; ++f) {
    const Vector scaled = layer.gain[tile.start + f] * d[f];
    d[f] = scaled;
    sum += scaled;
    along += scaled * normal[f];
  }
  Vector* sums = vectors(layer.sums(i, g, s.groups));
  sums[0] = sum;
  sums[1] = along;
}

// The other half: grad = (d - mean d - n mean(d n)) / σ.
PHYX_INLINE void leave_backward(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  for (int64_t g = 0; g < s.groups; ++g) {
    const float part = 1.0f / static_cast<float>(layer.size);
    Vector mean{}, along{};
    for (size_t i = 0; i < layer.tiles.size(); ++i) {
      const Vector* sums = vectors(layer.sums(i, g, s.groups));
      mean += sums[0];
      along += sums[1];
    }
    mean = layer.shift ? part * mean : Vector{};
    along *= part;
    const Vector inverse = *vectors(s.tape_at(t, g, layer.tape + layer.size));
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = layer.tiles[i];
      const Vector* n = vectors(s.tape_at(t, g, layer.tape + tile.start));
      float* grad = layer.grad.at(g, tile.start);
      for (int f = 0; f < tile.count; ++f)
        vectors(grad)[f] = inverse * (vectors(grad)[f] - mean - n[f] * along);
      put_grad_rows(s, layer, tile, grad, t, g);
    }
  }
}

// `initial` in the lanes where `first` is 1, else x.
PHYX_INLINE Vector reset(const Vector& first, float initial, const Vector& x) {
  return if_less(Vector{}, first, Vector{} + initial, x);
}

// What the step started from: the state before, or where a reset leads.
PHYX_INLINE void load_previous(const Scan& s, float* previous, const Tile& tile, int64_t t, int64_t g) {
  const float* rows = t == 0 ? s.deter_first + s.sequence(g) * s.D : s.deter_out + s.row(t - 1, g) * s.D;
  from_rows(previous, rows + tile.start, s.D, s.used(g), tile.count);
  const Vector first = *vectors(s.first_at(t, g));
  for (int f = 0; f < tile.count; ++f)
    vectors(previous)[f] = reset(first, s.initial_deter[tile.start + f], vectors(previous)[f]);
}

}  // namespace phyx
