// The observe scan of an RSSM and its backward (contract and reference: phyxdream/ops/rssm_observe.py, rssm_cells.py).
//
// A step is a few phases; within one, threads share the tiles of 16 features, and what a phase needs of the whole vector
// (its mean, say) is summed per tile by the phase before. So results do not depend on the number of threads.
// What does not recur (the embedding's layer, gradients of weights) is left to whoever calls, in rows of (T·B).
//
// The tape keeps per step what the backward cannot compute cheaply: of every layer its normalised values and 1/σ (or,
// without a norm, its values), and the softmax. Activations are computed again.
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "lanes.h"

namespace py = pybind11;

namespace phyx {
namespace {

enum class Cell { kGru, kLayerNorm, kBlock };
enum class Act { kIdentity, kSilu, kElu, kRelu };

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

// What Python gives: addresses of contiguous float32 memory (or None), and sizes, by name.
class Arguments {
 public:
  explicit Arguments(py::dict values) : values_(std::move(values)) {}

  template <typename T = float>
  T* address(const std::string& name) const {
    const py::object value = find(name);
    return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
  }
  int64_t size(const std::string& name) const { return find(name).cast<int64_t>(); }
  float number(const std::string& name) const { return find(name).cast<float>(); }

 private:
  py::object find(const std::string& name) const {
    if (!values_.contains(name.c_str())) throw std::invalid_argument("missing: " + name);
    return values_[name.c_str()];
  }
  py::dict values_;
};

// Norm and activation after a linear map, for all that the map's tiles write.
struct Layer {
  int64_t size = 0;
  std::vector<Tile> tiles;
  const float *bias = nullptr, *gain = nullptr, *shift = nullptr;
  float eps = 0.0f;
  Act act = Act::kIdentity;
  int64_t tape = 0;     // row of its values in a step of the tape; with a norm, row tape + size is 1/σ
  Lanes out;            // activated values
  Floats partial;       // per tile and group: two sums, each of kLanes
  Lanes grad;           // of what entered the norm
  Floats gain_sum, shift_sum;
  float *out_rows = nullptr, *grad_rows = nullptr;  // (T·B, row_size): for the gradients of weights
  int64_t row_size = 0;

  PHYX_INLINE float* sums(int64_t tile, int64_t g, int64_t groups) const {
    return partial.get() + (tile * groups + g) * 2 * kLanes;
  }
};

struct Scan {
  Cell cell;
  int64_t T, B, A, D, Z, C, U, V, G, statistics, groups;
  int threads;
  float unimix, min_std;
  bool backward;

  const float *embeds, *actions, *noise, *deter_first, *stoch_first, *stoch_start, *initial_deter, *initial_stoch;
  const float *stoch_weight, *out_bias, *input_bias, *hidden_bias, *gates_bias;
  const uint8_t* is_first;
  float *deter_out, *stoch_out, *stat_out, *tape;
  int32_t* index;
  const float *grad_deter, *grad_stoch, *grad_stat;
  float *stat_rows, *gate_rows, *hidden_gate_rows, *grad_deter_first, *grad_initial_deter, *grad_stoch_weight;

  Layer in[3], mix, gates, posterior;  // in: one, or of block_gru those of h, z and a; gates: the norm of LayerNormGRU
  int parts = 1, stoch_part = 0, action_part = 0;
  int64_t tape_rows = 0, gates_tape = 0, softmax_tape = 0;
  std::vector<Tile> in_tiles;  // of all parts; block says which part
  std::vector<Tile> deter_tiles, gate_tiles, stat_tiles, stoch_tiles, unit_tiles;
  int64_t unit_size = 0;  // statistics that are sampled together: whole tiles and whole variables

  // Weights, as the forward or, transposed, the backward reads them.
  Panels from_stoch, from_action, from_deter, mix_deter, mix_inputs, gates_x, gates_h, gate[3], gate_h[3];
  Panels posterior_deter, out;

  Floats memory[16];
  int memories = 0;
  Lanes action_lanes, stoch_lanes, stoch_sum, deter, previous, next_previous, stat, carry, gate_grad, gate_grad_h;
  Lanes initial_sum;
  Floats first;       // (T, groups, kLanes): 1 where the state is reset, and in lanes without a sequence
  Floats table;       // (Z, padded U): transposed stoch weight

  Lanes lanes(int64_t features) {
    memory[memories] = Floats(groups * features * kLanes);
    std::memset(memory[memories].get(), 0, sizeof(float) * groups * features * kLanes);
    return {memory[memories++].get(), features * kLanes};
  }

  PHYX_INLINE float* tape_at(int64_t t, int64_t g, int64_t row) const {
    return tape + ((t * groups + g) * tape_rows + row) * kLanes;
  }
  PHYX_INLINE const float* first_at(int64_t t, int64_t g) const { return first.get() + (t * groups + g) * kLanes; }
  PHYX_INLINE int used(int64_t g) const { return static_cast<int>(std::min<int64_t>(kLanes, B - g * kLanes)); }
  // The row of the first sequence of a group in (T, B, size).
  PHYX_INLINE int64_t row(int64_t t, int64_t g) const { return t * B + g * kLanes; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Layers.

using Block = float[2][kTile * kLanes];  // a tile of two groups

PHYX_INLINE void fill(float* tile, const float* values, int count) {
  for (int f = 0; f < kTile; ++f)
    for (int l = 0; l < kLanes; ++l) tile[f * kLanes + l] = values && f < count ? values[f] : 0.0f;
}

PHYX_INLINE void multiply_into(float (*tile)[kTile * kLanes], const Multiply& m, const Panels& panels, int64_t i,
                               const Lanes& x, int64_t feature, int64_t g, int64_t pair) {
  if (pair == 2)
    m.two(panels.tile(i), panels.inputs, x.at(g, feature), x.at(g + 1, feature), tile[0], tile[1]);
  else
    m.one(panels.tile(i), panels.inputs, x.at(g, feature), tile[0]);
}

template <Act kAct>
PHYX_INLINE void activate_rows(float* __restrict out, const float* __restrict u, int count) {
  for (int i = 0; i < count * kLanes; ++i) out[i] = activate<kAct>(u[i]);
}

// A tile of a layer before its norm: to the tape, its sums for the norm, or at once through the activation.
template <Act kAct>
PHYX_INLINE void enter(const Scan& s, const Layer& layer, int64_t i, const float* values, int64_t t, int64_t g) {
  const Tile& tile = layer.tiles[i];
  float* kept = s.tape_at(t, g, layer.tape + tile.start);
  std::memcpy(kept, values, sizeof(float) * tile.count * kLanes);
  if (!layer.gain) return activate_rows<kAct>(layer.out.at(g, tile.start), values, tile.count);
  float sum[kLanes] = {}, square[kLanes] = {}, mean[kLanes] = {};
  if (layer.shift) {
    for (int f = 0; f < tile.count; ++f)
      for (int l = 0; l < kLanes; ++l) sum[l] += values[f * kLanes + l];
    for (int l = 0; l < kLanes; ++l) mean[l] = sum[l] / static_cast<float>(tile.count);
  }
  for (int f = 0; f < tile.count; ++f)
    for (int l = 0; l < kLanes; ++l) {
      const float d = values[f * kLanes + l] - mean[l];
      square[l] += d * d;
    }
  float* sums = layer.sums(i, g, s.groups);
  for (int l = 0; l < kLanes; ++l) {
    sums[l] = sum[l];
    sums[kLanes + l] = square[l];
  }
}

// Mean and 1/σ of the whole vector from the sums of its tiles (Chan et al. 1979).
PHYX_INLINE void moments(const Scan& s, const Layer& layer, int64_t g, float* mean, float* inverse) {
  float square[kLanes] = {};
  const float size = static_cast<float>(layer.size);
  for (int l = 0; l < kLanes; ++l) mean[l] = 0.0f;
  const int64_t tiles = static_cast<int64_t>(layer.tiles.size());
  if (layer.shift) {
    for (int64_t i = 0; i < tiles; ++i)
      for (int l = 0; l < kLanes; ++l) mean[l] += layer.sums(i, g, s.groups)[l];
    for (int l = 0; l < kLanes; ++l) mean[l] /= size;
  }
  for (int64_t i = 0; i < tiles; ++i) {
    const float* sums = layer.sums(i, g, s.groups);
    const float count = static_cast<float>(layer.tiles[i].count);
    for (int l = 0; l < kLanes; ++l) {
      const float d = sums[l] / count - mean[l];
      square[l] += sums[kLanes + l] + (layer.shift ? count * d * d : 0.0f);
    }
  }
  for (int l = 0; l < kLanes; ++l) inverse[l] = 1.0f / std::sqrt(square[l] / size + layer.eps);
}

// u = n·gain + shift of features that lie on the tape.
PHYX_INLINE void affine(float* __restrict u, const float* __restrict n, const Layer& layer, int64_t start, int count) {
  for (int f = 0; f < count; ++f) {
    const float gain = layer.gain ? layer.gain[start + f] : 1.0f, shift = layer.shift ? layer.shift[start + f] : 0.0f;
    for (int l = 0; l < kLanes; ++l) u[f * kLanes + l] = n[f * kLanes + l] * gain + shift;
  }
}

PHYX_INLINE void normalise(float* __restrict n, int count, const float* __restrict mean,
                           const float* __restrict inverse) {
  for (int f = 0; f < count; ++f)
    for (int l = 0; l < kLanes; ++l) n[f * kLanes + l] = (n[f * kLanes + l] - mean[l]) * inverse[l];
}

template <Act kAct>
PHYX_INLINE void leave(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  float mean[kLanes], inverse[kLanes], u[kTile * kLanes];
  for (int64_t g = 0; g < s.groups; ++g) {
    moments(s, layer, g, mean, inverse);
    if (begin == 0) std::memcpy(s.tape_at(t, g, layer.tape + layer.size), inverse, sizeof inverse);
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = layer.tiles[i];
      float* n = s.tape_at(t, g, layer.tape + tile.start);
      normalise(n, tile.count, mean, inverse);
      affine(u, n, layer, tile.start, tile.count);
      activate_rows<kAct>(layer.out.at(g, tile.start), u, tile.count);
    }
  }
}

// The gradient of a tile of activated values, back through the activation and half through the norm.
template <Act kAct>
PHYX_INLINE void enter_backward(const Scan& s, const Layer& layer, int64_t i, const float* values, int64_t t,
                                int64_t g) {
  const Tile& tile = layer.tiles[i];
  const float* n = s.tape_at(t, g, layer.tape + tile.start);
  float u[kTile * kLanes], y[kTile * kLanes];
  affine(u, n, layer, tile.start, tile.count);
  float* grad = layer.grad.at(g, tile.start);
  for (int j = 0; j < tile.count * kLanes; ++j) grad[j] = values[j] * slope<kAct>(u[j]);
  if (layer.out_rows) {
    activate_rows<kAct>(y, u, tile.count);
    to_rows(layer.out_rows + s.row(t, g) * layer.row_size + tile.start, layer.row_size, s.used(g), y, tile.count);
  }
  if (!layer.gain)
    return to_rows(layer.grad_rows + s.row(t, g) * layer.row_size + tile.start, layer.row_size, s.used(g), grad,
                   tile.count);
  float sum[kLanes] = {}, along[kLanes] = {};
  for (int f = 0; f < tile.count; ++f) {
    const float gain = layer.gain[tile.start + f];
    float* gain_sum = layer.gain_sum.get() + (tile.start + f) * kLanes;
    float* shift_sum = layer.shift_sum.get() + (tile.start + f) * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      const int j = f * kLanes + l;
      gain_sum[l] += grad[j] * n[j];
      shift_sum[l] += grad[j];
      grad[j] *= gain;
      sum[l] += grad[j];
      along[l] += grad[j] * n[j];
    }
  }
  float* sums = layer.sums(i, g, s.groups);
  for (int l = 0; l < kLanes; ++l) {
    sums[l] = sum[l];
    sums[kLanes + l] = along[l];
  }
}

// The other half: grad = (d - mean d - n mean(d n)) / σ.
PHYX_INLINE void leave_backward(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  for (int64_t g = 0; g < s.groups; ++g) {
    float mean[kLanes] = {}, along[kLanes] = {};
    for (size_t i = 0; i < layer.tiles.size(); ++i) {
      const float* sums = layer.sums(i, g, s.groups);
      for (int l = 0; l < kLanes; ++l) {
        mean[l] += sums[l];
        along[l] += sums[kLanes + l];
      }
    }
    const float size = static_cast<float>(layer.size);
    for (int l = 0; l < kLanes; ++l) {
      mean[l] = layer.shift ? mean[l] / size : 0.0f;
      along[l] /= size;
    }
    const float* inverse = s.tape_at(t, g, layer.tape + layer.size);
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = layer.tiles[i];
      const float* n = s.tape_at(t, g, layer.tape + tile.start);
      float* grad = layer.grad.at(g, tile.start);
      for (int f = 0; f < tile.count; ++f)
        for (int l = 0; l < kLanes; ++l) {
          const int j = f * kLanes + l;
          grad[j] = inverse[l] * (grad[j] - mean[l] - n[j] * along[l]);
        }
      to_rows(layer.grad_rows + s.row(t, g) * layer.row_size + tile.start, layer.row_size, s.used(g), grad,
              tile.count);
    }
  }
}

#define PHYX_BY_ACT(function, act, ...)                               \
  switch (act) {                                                      \
    case Act::kIdentity: function<Act::kIdentity>(__VA_ARGS__); break; \
    case Act::kSilu: function<Act::kSilu>(__VA_ARGS__); break;        \
    case Act::kElu: function<Act::kElu>(__VA_ARGS__); break;          \
    case Act::kRelu: function<Act::kRelu>(__VA_ARGS__); break;        \
  }

// ---------------------------------------------------------------------------------------------------------------------
// Forward.

// The categorical z's part of its layer for a range of features: each one-hot picks a row of the transposed weight.
PHYX_INLINE void gather(const Scan& s, int64_t t, int64_t g, int64_t begin, int64_t end) {
  constexpr int64_t kMost = 256;
  const int64_t S = s.Z / s.C, padded = (s.U + kTile - 1) / kTile * kTile;
  for (int64_t from = begin; from < end; from += kMost) {
    const int64_t count = std::min(kMost, end - from);
    for (int l = 0; l < s.used(g); ++l) {
      const int64_t b = g * kLanes + l;
      float sum[kMost];
      if (t == 0) {
        std::memcpy(sum, s.stoch_first + b * s.U + from, sizeof(float) * count);
      } else if (s.first_at(t, g)[l] != 0.0f) {
        std::memcpy(sum, s.stoch_start + from, sizeof(float) * count);
      } else {
        std::memset(sum, 0, sizeof sum);
        const int32_t* index = s.index + ((t - 1) * s.B + b) * S;
        const int64_t whole = (count + kTile - 1) / kTile * kTile;  // the table's rows are padded
        for (int64_t v = 0; v < S; ++v) {
          const float* __restrict row = s.table.get() + (v * s.C + index[v]) * padded + from;
          for (int64_t i = 0; i < whole; ++i) sum[i] += row[i];
        }
      }
      for (int64_t i = 0; i < count; ++i) s.stoch_sum.at(g, from + i)[l] = sum[i];
    }
  }
}

PHYX_INLINE void forward_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  if (s.C > 0) {
    int64_t low = s.U, high = 0;
    for (int64_t i = begin; i < end; ++i)
      if (s.in_tiles[i].block == s.stoch_part) {
        low = std::min(low, s.in_tiles[i].start);
        high = std::max(high, s.in_tiles[i].start + s.in_tiles[i].count);
      }
    for (int64_t g = 0; low < high && g < s.groups; ++g) gather(s, t, g, low, high);
  }
  for (int64_t i = begin; i < end; ++i) {
    const int part = static_cast<int>(s.in_tiles[i].block);
    const Layer& layer = s.in[part];
    const int64_t local = i - part * static_cast<int64_t>(layer.tiles.size());
    const Tile& tile = layer.tiles[local];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], layer.bias ? layer.bias + tile.start : nullptr, tile.count);
      if (part == s.stoch_part) {
        if (s.C == 0) multiply_into(block, m, s.from_stoch, local, s.stoch_lanes, 0, g, pair);
        for (int64_t j = 0; s.C > 0 && j < pair; ++j) {
          const float* sum = s.stoch_sum.at(g + j, tile.start);
          for (int k = 0; k < tile.count * kLanes; ++k) block[j][k] += sum[k];
        }
      }
      if (part == s.action_part)
        multiply_into(block, m, s.from_action, local, {s.action_lanes.at(0, t * s.A), s.action_lanes.group}, 0, g,
                      pair);
      if (s.parts == 3 && part == 0) multiply_into(block, m, s.from_deter, local, s.previous, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) PHYX_BY_ACT(enter, layer.act, s, layer, local, block[j], t, g + j)
    }
  }
}

PHYX_INLINE void forward_leave_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  for (int part = 0; part < s.parts; ++part) {
    const Layer& layer = s.in[part];
    const int64_t count = static_cast<int64_t>(layer.tiles.size()), from = std::max(begin - part * count, int64_t{0}),
                  to = std::min(end - part * count, count);
    if (layer.gain && from < to) PHYX_BY_ACT(leave, layer.act, s, layer, from, to, t)
  }
}

PHYX_INLINE void forward_mix(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.mix.tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], s.mix.bias ? s.mix.bias + tile.start : nullptr, tile.count);
      multiply_into(block, m, s.mix_deter, i, s.previous, tile.block * s.mix_deter.inputs, g, pair);
      multiply_into(block, m, s.mix_inputs, i, s.in[0].out, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) PHYX_BY_ACT(enter, s.mix.act, s, s.mix, i, block[j], t, g + j)
    }
  }
}

// The new state of a tile: to the lanes, to the result, and, with the resets of the next step, to what it starts from.
PHYX_INLINE void put_deter(const Scan& s, const Tile& tile, const float* h, int64_t t, int64_t g) {
  std::memcpy(s.deter.at(g, tile.start), h, sizeof(float) * tile.count * kLanes);
  to_rows(s.deter_out + s.row(t, g) * s.D + tile.start, s.D, s.used(g), h, tile.count);
  if (t + 1 == s.T) return;
  const float* first = s.first_at(t + 1, g);
  float* next = s.next_previous.at(g, tile.start);
  for (int f = 0; f < tile.count; ++f) {
    const float initial = s.initial_deter[tile.start + f];
    for (int l = 0; l < kLanes; ++l) next[f * kLanes + l] = first[l] != 0.0f ? initial : h[f * kLanes + l];
  }
}

PHYX_INLINE void gru_update(float* __restrict h, const float* __restrict reset, const float* __restrict candidate,
                            const float* __restrict update, const float* __restrict previous, int count) {
  for (int j = 0; j < count * kLanes; ++j) {
    const float c = tanh_of(sigmoid(reset[j]) * candidate[j]);
    h[j] = previous[j] + sigmoid(update[j] - 1.0f) * (c - previous[j]);
  }
}

PHYX_INLINE void forward_gru(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block gate[3], hidden;  // reset, update, new; and the new gate's part of h
      for (int k = 0; k < 3; ++k)
        for (int64_t j = 0; j < pair; ++j) fill(gate[k][j], s.input_bias + k * s.D + tile.start, tile.count);
      for (int64_t j = 0; j < pair; ++j) fill(hidden[j], nullptr, 0);
      Block bias;
      for (int k = 0; k < 3; ++k) {
        auto& to = k < 2 ? gate[k] : hidden;
        for (int64_t j = 0; j < pair; ++j) {
          fill(bias[j], s.hidden_bias + k * s.D + tile.start, tile.count);
          for (int e = 0; e < kTile * kLanes; ++e) to[j][e] += bias[j][e];
        }
        multiply_into(gate[k], m, s.gate[k], i, s.in[0].out, 0, g, pair);
        multiply_into(to, m, s.gate_h[k], i, s.previous, 0, g, pair);
      }
      for (int64_t j = 0; j < pair; ++j) {
        const float* previous = s.previous.at(g + j, tile.start);
        float h[kTile * kLanes];
        for (int e = 0; e < tile.count * kLanes; ++e) {
          const float u = sigmoid(gate[1][j][e]);
          gate[2][j][e] += sigmoid(gate[0][j][e]) * hidden[j][e];
          const float n = tanh_of(gate[2][j][e]);
          h[e] = n + u * (previous[e] - n);
        }
        for (int k = 0; k < 4; ++k)
          std::memcpy(s.tape_at(t, g + j, s.gates_tape + k * s.D + tile.start), k < 3 ? gate[k][j] : hidden[j],
                      sizeof(float) * tile.count * kLanes);
        put_deter(s, tile, h, t, g + j);
      }
    }
  }
}

PHYX_INLINE void forward_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
      multiply_into(block, m, s.gates_x, i, s.in[0].out, 0, g, pair);
      multiply_into(block, m, s.gates_h, i, s.previous, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) enter<Act::kIdentity>(s, s.gates, i, block[j], t, g + j);
    }
}

// The gates of a LayerNorm GRU span all of D: normalised and used here.
PHYX_INLINE void forward_update(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  float mean[kLanes], inverse[kLanes], gate[3][kTile * kLanes], h[kTile * kLanes];
  for (int64_t g = 0; g < s.groups; ++g) {
    moments(s, s.gates, g, mean, inverse);
    if (begin == 0) std::memcpy(s.tape_at(t, g, s.gates.tape + s.gates.size), inverse, sizeof inverse);
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = s.deter_tiles[i];
      for (int k = 0; k < 3; ++k) {
        float* n = s.tape_at(t, g, s.gates.tape + k * s.D + tile.start);
        normalise(n, tile.count, mean, inverse);
        affine(gate[k], n, s.gates, k * s.D + tile.start, tile.count);
      }
      gru_update(h, gate[0], gate[1], gate[2], s.previous.at(g, tile.start), tile.count);
      put_deter(s, tile, h, t, g);
    }
  }
}

PHYX_INLINE void forward_block_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const int64_t size = s.D / s.G;
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block gate[3];
      for (int k = 0; k < 3; ++k) {
        const float* bias = s.gates_bias + (2 * tile.block + k) * size + tile.start;  // block order: (G, 3, D/G)
        for (int64_t j = 0; j < pair; ++j) fill(gate[k][j], bias, tile.count);
        multiply_into(gate[k], m, s.gate[k], i, s.mix.out, tile.block * size, g, pair);
      }
      for (int64_t j = 0; j < pair; ++j) {
        float h[kTile * kLanes];
        gru_update(h, gate[0][j], gate[1][j], gate[2][j], s.previous.at(g + j, tile.start), tile.count);
        for (int k = 0; k < 3; ++k)
          std::memcpy(s.tape_at(t, g + j, s.gates_tape + k * s.D + tile.start), gate[k][j],
                      sizeof(float) * tile.count * kLanes);
        put_deter(s, tile, h, t, g + j);
      }
    }
  }
}

PHYX_INLINE void forward_posterior(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.posterior.tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) {
        if (tile.count < kTile) fill(block[j], nullptr, 0);
        from_rows(block[j], s.embeds + s.row(t, g + j) * s.V + tile.start, s.V, s.used(g + j), tile.count);
      }
      multiply_into(block, m, s.posterior_deter, i, s.deter, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j)
        PHYX_BY_ACT(enter, s.posterior.act, s, s.posterior, i, block[j], t, g + j)
    }
  }
}

// Softmax, unimix, and the class that arrives first: argmin(time / p).
PHYX_INLINE void sample_class(const Scan& s, int64_t variable, int64_t t, int64_t g) {
  const int64_t C = s.C, start = variable * C;
  const float* __restrict logits = s.stat.at(g, start);
  float* __restrict p = s.tape_at(t, g, s.softmax_tape + start);
  float peak[kLanes], sum[kLanes] = {}, best[kLanes], times[kTile * kLanes];
  int32_t winner[kLanes] = {};
  for (int l = 0; l < kLanes; ++l) peak[l] = logits[l];
  for (int64_t c = 1; c < C; ++c)
    for (int l = 0; l < kLanes; ++l) peak[l] = logits[c * kLanes + l] > peak[l] ? logits[c * kLanes + l] : peak[l];
  for (int64_t c = 0; c < C; ++c)
    for (int l = 0; l < kLanes; ++l) sum[l] += p[c * kLanes + l] = vec_exp(logits[c * kLanes + l] - peak[l]);
  const float uniform = 1.0f / static_cast<float>(C);
  for (int64_t c0 = 0; c0 < C; c0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, C - c0));
    from_rows(times, s.noise + s.row(t, g) * s.Z + start + c0, s.Z, s.used(g), count);
    for (int c = 0; c < count; ++c)
      for (int l = 0; l < kLanes; ++l) {
        const float share = p[(c0 + c) * kLanes + l] /= sum[l];
        const float time = times[c * kLanes + l] / (share + s.unimix * (uniform - share));
        const bool sooner = (c0 + c == 0) || time < best[l];
        winner[l] = sooner ? static_cast<int32_t>(c0 + c) : winner[l];
        best[l] = sooner ? time : best[l];
      }
  }
  const int64_t S = s.Z / C;
  for (int l = 0; l < s.used(g); ++l) {
    s.index[(s.row(t, g) + l) * S + variable] = winner[l];
    float* onehot = s.stoch_out + (s.row(t, g) + l) * s.Z + start;
    std::memset(onehot, 0, sizeof(float) * C);
    onehot[winner[l]] = 1.0f;
  }
}

PHYX_INLINE void sample_gaussian(const Scan& s, int64_t t, int64_t g) {
  float noise[kTile * kLanes], z[kTile * kLanes];
  for (int64_t f0 = 0; f0 < s.Z; f0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, s.Z - f0));
    from_rows(noise, s.noise + s.row(t, g) * s.Z + f0, s.Z, s.used(g), count);
    const float *mean = s.stat.at(g, f0), *raw = s.stat.at(g, s.Z + f0);
    for (int j = 0; j < count * kLanes; ++j) z[j] = mean[j] + (softplus(raw[j]) + s.min_std) * noise[j];
    to_rows(s.stoch_out + s.row(t, g) * s.Z + f0, s.Z, s.used(g), z, count);
    if (t + 1 == s.T) continue;
    const float* first = s.first_at(t + 1, g);
    float* next = s.stoch_lanes.at(g, f0);
    for (int f = 0; f < count; ++f)
      for (int l = 0; l < kLanes; ++l)
        next[f * kLanes + l] = first[l] != 0.0f ? s.initial_stoch[f0 + f] : z[f * kLanes + l];
  }
}

PHYX_INLINE void forward_sample(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t low = unit * s.unit_size, high = std::min(s.statistics, low + s.unit_size);
    for (int64_t i = low / kTile; i * kTile < high; ++i) {
      const Tile& tile = s.stat_tiles[i];
      for (int64_t g = 0; g < s.groups; g += 2) {
        const int64_t pair = std::min<int64_t>(2, s.groups - g);
        Block block;
        for (int64_t j = 0; j < pair; ++j) fill(block[j], s.out_bias + tile.start, tile.count);
        multiply_into(block, m, s.out, i, s.posterior.out, 0, g, pair);
        for (int64_t j = 0; j < pair; ++j) {
          std::memcpy(s.stat.at(g + j, tile.start), block[j], sizeof(float) * tile.count * kLanes);
          to_rows(s.stat_out + s.row(t, g + j) * s.statistics + tile.start, s.statistics, s.used(g + j), block[j],
                  tile.count);
        }
      }
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      if (s.C == 0) sample_gaussian(s, t, g);
      for (int64_t v = low; s.C > 0 && v < high; v += s.C) sample_class(s, v / s.C, t, g);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. Panels hold the transposed weights.

// The gradient of z_t, which step t + 1 read where it was not reset: tile i of Z into `block`.
PHYX_INLINE void stoch_gradient(const Scan& s, const Multiply& m, Block& block, int64_t i, int64_t t, int64_t g,
                                int64_t pair) {
  const Tile& tile = s.stoch_tiles[i];
  for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
  if (t + 1 < s.T) {
    multiply_into(block, m, s.from_stoch, i, s.in[s.stoch_part].grad, 0, g, pair);
    for (int64_t j = 0; j < pair; ++j) {
      const float* first = s.first_at(t + 1, g + j);
      for (int f = 0; f < tile.count; ++f)
        for (int l = 0; l < kLanes; ++l) {
          float& x = block[j][f * kLanes + l];
          x = first[l] != 0.0f ? 0.0f : x;
        }
    }
  }
  if (!s.grad_stoch) return;
  float given[kTile * kLanes];
  for (int64_t j = 0; j < pair; ++j) {
    from_rows(given, s.grad_stoch + s.row(t, g + j) * s.Z + tile.start, s.Z, s.used(g + j), tile.count);
    for (int k = 0; k < tile.count * kLanes; ++k) block[j][k] += given[k];
  }
}

// What flows into the statistics [low, low + count): grad of z is in `stat`, which becomes that of the statistics.
PHYX_INLINE void finish_statistics(const Scan& s, int64_t low, int64_t count, int64_t t, int64_t g) {
  float given[kTile * kLanes];
  for (int64_t f0 = low; f0 < low + count; f0 += kTile) {
    const int features = static_cast<int>(std::min<int64_t>(kTile, low + count - f0));
    float* grad = s.stat.at(g, f0);
    if (s.grad_stat) {
      from_rows(given, s.grad_stat + s.row(t, g) * s.statistics + f0, s.statistics, s.used(g), features);
      for (int k = 0; k < features * kLanes; ++k) grad[k] += given[k];
    }
    to_rows(s.stat_rows + s.row(t, g) * s.statistics + f0, s.statistics, s.used(g), grad, features);
  }
}

PHYX_INLINE void backward_class(const Scan& s, int64_t variable, int64_t t, int64_t g) {
  const int64_t C = s.C, start = variable * C;
  float* __restrict grad = s.stat.at(g, start);
  const float* __restrict p = s.tape_at(t, g, s.softmax_tape + start);
  float mean[kLanes] = {};
  for (int64_t c = 0; c < C; ++c)
    for (int l = 0; l < kLanes; ++l) mean[l] += grad[c * kLanes + l] * p[c * kLanes + l];
  const float rest = 1.0f - s.unimix;
  for (int64_t c = 0; c < C; ++c)
    for (int l = 0; l < kLanes; ++l)
      grad[c * kLanes + l] = rest * p[c * kLanes + l] * (grad[c * kLanes + l] - mean[l]);
}

PHYX_INLINE void backward_gaussian(const Scan& s, int64_t t, int64_t g) {
  float noise[kTile * kLanes], raw[kTile * kLanes];
  for (int64_t f0 = 0; f0 < s.Z; f0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, s.Z - f0));
    from_rows(noise, s.noise + s.row(t, g) * s.Z + f0, s.Z, s.used(g), count);
    from_rows(raw, s.stat_out + s.row(t, g) * s.statistics + s.Z + f0, s.statistics, s.used(g), count);
    const float* grad = s.stat.at(g, f0);  // of z, and of the mean
    float* to = s.stat.at(g, s.Z + f0);
    for (int k = 0; k < count * kLanes; ++k) to[k] = grad[k] * noise[k] * sigmoid(raw[k]);
  }
}

PHYX_INLINE void backward_statistics(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t low = unit * s.unit_size, high = std::min(s.Z, low + s.unit_size);
    for (int64_t i = low / kTile; i * kTile < high; ++i)
      for (int64_t g = 0; g < s.groups; g += 2) {
        const int64_t pair = std::min<int64_t>(2, s.groups - g);
        Block block;
        stoch_gradient(s, m, block, i, t, g, pair);
        for (int64_t j = 0; j < pair; ++j)
          std::memcpy(s.stat.at(g + j, s.stoch_tiles[i].start), block[j],
                      sizeof(float) * s.stoch_tiles[i].count * kLanes);
      }
    for (int64_t g = 0; g < s.groups; ++g) {
      if (s.C == 0) {
        backward_gaussian(s, t, g);
        finish_statistics(s, 0, s.statistics, t, g);
      } else {
        for (int64_t v = low; v < high; v += s.C) backward_class(s, v / s.C, t, g);
        finish_statistics(s, low, high - low, t, g);
      }
    }
  }
}

// Tiles [begin, end) of a layer whose activated values went through one matrix.
PHYX_INLINE void backward_layer(const Scan& s, const Layer& layer, const Panels& panels, const Lanes& grad,
                                int64_t inputs_per_block, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
      multiply_into(block, m, panels, i, grad, layer.tiles[i].block * inputs_per_block, g, pair);
      for (int64_t j = 0; j < pair; ++j) PHYX_BY_ACT(enter_backward, layer.act, s, layer, i, block[j], t, g + j)
    }
}

// What the step started from: the state before, or where a reset leads.
PHYX_INLINE void load_previous(const Scan& s, float* previous, const Tile& tile, int64_t t, int64_t g) {
  const float* rows = t == 0 ? s.deter_first + g * kLanes * s.D : s.deter_out + s.row(t - 1, g) * s.D;
  from_rows(previous, rows + tile.start, s.D, s.used(g), tile.count);
  const float* first = s.first_at(t, g);
  for (int f = 0; f < tile.count; ++f)
    for (int l = 0; l < kLanes; ++l) {
      float& x = previous[f * kLanes + l];
      x = first[l] != 0.0f ? s.initial_deter[tile.start + f] : x;
    }
}

// reset, candidate, update <- their gradients; grad becomes what flows to the previous state past the gates.
PHYX_INLINE void gru_update_backward(float* __restrict grad, float* __restrict reset, float* __restrict candidate,
                                     float* __restrict update, const float* __restrict previous, int count) {
  for (int j = 0; j < count * kLanes; ++j) {
    const float r = sigmoid(reset[j]), u = sigmoid(update[j] - 1.0f), c = tanh_of(r * candidate[j]);
    const float inner = grad[j] * u * (1.0f - c * c);
    update[j] = grad[j] * (c - previous[j]) * u * (1.0f - u);
    reset[j] = inner * candidate[j] * r * (1.0f - r);
    candidate[j] = inner * r;
    grad[j] *= 1.0f - u;
  }
}

PHYX_INLINE void gru_backward(float* __restrict grad, float* __restrict reset, float* __restrict update,
                              float* __restrict fresh, float* __restrict hidden, const float* __restrict previous,
                              int count) {
  for (int j = 0; j < count * kLanes; ++j) {
    const float r = sigmoid(reset[j]), u = sigmoid(update[j]), n = tanh_of(fresh[j]);
    const float inner = grad[j] * (1.0f - u) * (1.0f - n * n);
    update[j] = grad[j] * (previous[j] - n) * u * (1.0f - u);
    reset[j] = inner * hidden[j] * r * (1.0f - r);
    fresh[j] = inner;
    hidden[j] = inner * r;
    grad[j] *= u;
  }
}

PHYX_INLINE void put_gate(const Scan& s, const Lanes& lanes, float* rows, int64_t feature, int count, const float* grad,
                          int64_t t, int64_t g) {
  std::memcpy(lanes.at(g, feature), grad, sizeof(float) * count * kLanes);
  to_rows(rows + s.row(t, g) * 3 * s.D + feature, 3 * s.D, s.used(g), grad, count);
}

PHYX_INLINE void backward_update(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    const int count = tile.count;
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) {
        fill(block[j], nullptr, 0);
        std::memcpy(block[j], s.carry.at(g + j, tile.start), sizeof(float) * count * kLanes);
      }
      multiply_into(block, m, s.posterior_deter, i, s.posterior.grad, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) {
        float gate[4][kTile * kLanes], previous[kTile * kLanes];
        if (s.grad_deter) {
          from_rows(gate[0], s.grad_deter + s.row(t, g + j) * s.D + tile.start, s.D, s.used(g + j), count);
          for (int k = 0; k < count * kLanes; ++k) block[j][k] += gate[0][k];
        }
        load_previous(s, previous, tile, t, g + j);
        const int kinds = s.cell == Cell::kGru ? 4 : 3;
        for (int k = 0; k < kinds; ++k) {
          const float* kept = s.tape_at(t, g + j, s.gates_tape + k * s.D + tile.start);
          if (s.cell == Cell::kLayerNorm)
            affine(gate[k], kept, s.gates, k * s.D + tile.start, count);
          else
            std::memcpy(gate[k], kept, sizeof(float) * count * kLanes);
        }
        if (s.cell == Cell::kGru) {
          gru_backward(block[j], gate[0], gate[1], gate[2], gate[3], previous, count);
          for (int k = 0; k < 3; ++k) {
            put_gate(s, s.gate_grad, s.gate_rows, k * s.D + tile.start, count, gate[k], t, g + j);
            put_gate(s, s.gate_grad_h, s.hidden_gate_rows, k * s.D + tile.start, count, gate[k < 2 ? k : 3], t, g + j);
          }
        } else {
          gru_update_backward(block[j], gate[0], gate[1], gate[2], previous, count);
          for (int k = 0; k < 3; ++k)
            if (s.cell == Cell::kBlock)
              put_gate(s, s.gate_grad, s.gate_rows, (2 * tile.block + k) * (s.D / s.G) + tile.start, count, gate[k], t,
                       g + j);
            else
              std::memcpy(s.gate_grad.at(g + j, k * s.D + tile.start), gate[k], sizeof(float) * count * kLanes);
        }
        std::memcpy(s.carry.at(g + j, tile.start), block[j], sizeof(float) * count * kLanes);
      }
    }
  }
}

// The gates' gradients, which backward_update left in gate_grad, half through their norm.
PHYX_INLINE void backward_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; ++g)
      enter_backward<Act::kIdentity>(s, s.gates, i, s.gate_grad.at(g, s.gates.tiles[i].start), t, g);
}

// Adds to the carry what a matrix brings back to the previous state; the last one stops it where that was a reset.
PHYX_INLINE void backward_carry(const Scan& s, const Panels& panels, const Lanes& grad, int64_t inputs_per_block,
                                bool last, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
      multiply_into(block, m, panels, i, grad, tile.block * inputs_per_block, g, pair);
      for (int64_t j = 0; j < pair; ++j) {
        float* carry = s.carry.at(g + j, tile.start);
        for (int k = 0; k < tile.count * kLanes; ++k) carry[k] += block[j][k];
        if (!last) continue;
        const float* first = s.first_at(t, g + j);
        float* initial = s.initial_sum.at(0, tile.start);
        for (int f = 0; f < tile.count; ++f)
          for (int l = 0; l < kLanes; ++l) {
            const int k = f * kLanes + l;
            initial[k] += first[l] != 0.0f ? carry[k] : 0.0f;
            carry[k] = first[l] != 0.0f ? 0.0f : carry[k];
          }
      }
    }
  }
}

PHYX_INLINE void backward_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const int64_t inputs = static_cast<int64_t>(s.in_tiles.size());
  const int64_t from = std::max(begin - inputs, int64_t{0}), to = end - inputs;
  switch (s.cell) {
    case Cell::kGru:
      if (begin < inputs) backward_layer(s, s.in[0], s.gates_x, s.gate_grad, 0, t, begin, std::min(end, inputs));
      if (from < to) backward_carry(s, s.gates_h, s.gate_grad_h, 0, true, t, from, to);
      break;
    case Cell::kLayerNorm:
      if (begin < inputs) backward_layer(s, s.in[0], s.gates_x, s.gates.grad, 0, t, begin, std::min(end, inputs));
      if (from < to) backward_carry(s, s.gates_h, s.gates.grad, 0, true, t, from, to);
      break;
    case Cell::kBlock: {
      const int64_t tiles = static_cast<int64_t>(s.in[0].tiles.size());
      const Multiply& m = multiply();
      for (int64_t i = begin; i < std::min(end, inputs); ++i) {
        const Layer& layer = s.in[s.in_tiles[i].block];
        for (int64_t g = 0; g < s.groups; g += 2) {
          const int64_t pair = std::min<int64_t>(2, s.groups - g);
          Block block;
          for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
          multiply_into(block, m, s.mix_inputs, i, s.mix.grad, 0, g, pair);
          for (int64_t j = 0; j < pair; ++j)
            PHYX_BY_ACT(enter_backward, layer.act, s, layer, i % tiles, block[j], t, g + j)
        }
      }
      if (from < to) backward_carry(s, s.mix_deter, s.mix.grad, s.mix_deter.inputs, false, t, from, to);
    }
  }
}

PHYX_INLINE void backward_leave_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  for (int part = 0; part < s.parts; ++part) {
    const Layer& layer = s.in[part];
    const int64_t count = static_cast<int64_t>(layer.tiles.size()), from = std::max(begin - part * count, int64_t{0}),
                  to = std::min(end - part * count, count);
    if (layer.gain && from < to) leave_backward(s, layer, from, to, t);
  }
}

// The transposed gradient of the stoch weight: each one-hot adds its gradient to a row, for a range of features.
PHYX_INLINE void scatter(const Scan& s, int64_t begin, int64_t end) {
  const Layer& layer = s.in[s.stoch_part];
  const int64_t S = s.Z / s.C;
  for (int64_t t = 1; t < s.T; ++t)
    for (int64_t b = 0; b < s.B; ++b) {
      if (s.is_first[t * s.B + b]) continue;
      const int32_t* index = s.index + ((t - 1) * s.B + b) * S;
      const float* __restrict grad = layer.grad_rows + (t * s.B + b) * layer.row_size;
      for (int64_t v = 0; v < S; ++v) {
        float* __restrict to = s.grad_stoch_weight + (v * s.C + index[v]) * s.U;
        for (int64_t i = begin; i < end; ++i) to[i] += grad[i];
      }
    }
}

enum class Phase {
  kInputs, kLeaveInputs, kMix, kLeaveMix, kGru, kGates, kUpdate, kBlockGates, kPosterior, kLeavePosterior, kSample,
  kStatistics, kPosteriorBack, kLeavePosteriorBack, kUpdateBack, kGatesBack, kLeaveGatesBack, kMixBack, kLeaveMixBack,
  kInputsBack, kLeaveInputsBack, kDeterBack, kScatter,
};

}  // namespace

// Multiversioned functions must have external linkage and be no templates; everything above is inlined into these two.
PHYX_MULTIVERSION void rssm_forward_phase(const void* scan, int phase, int64_t t, int64_t begin, int64_t end) {
  const Scan& s = *static_cast<const Scan*>(scan);
  switch (static_cast<Phase>(phase)) {
    case Phase::kInputs: return forward_inputs(s, t, begin, end);
    case Phase::kLeaveInputs: return forward_leave_inputs(s, t, begin, end);
    case Phase::kMix: return forward_mix(s, t, begin, end);
    case Phase::kLeaveMix: PHYX_BY_ACT(leave, s.mix.act, s, s.mix, begin, end, t) return;
    case Phase::kGru: return forward_gru(s, t, begin, end);
    case Phase::kGates: return forward_gates(s, t, begin, end);
    case Phase::kUpdate: return forward_update(s, t, begin, end);
    case Phase::kBlockGates: return forward_block_gates(s, t, begin, end);
    case Phase::kPosterior: return forward_posterior(s, t, begin, end);
    case Phase::kLeavePosterior: PHYX_BY_ACT(leave, s.posterior.act, s, s.posterior, begin, end, t) return;
    case Phase::kSample: return forward_sample(s, t, begin, end);
    default: return;
  }
}

PHYX_MULTIVERSION void rssm_backward_phase(const void* scan, int phase, int64_t t, int64_t begin, int64_t end) {
  const Scan& s = *static_cast<const Scan*>(scan);
  switch (static_cast<Phase>(phase)) {
    case Phase::kStatistics: return backward_statistics(s, t, begin, end);
    case Phase::kPosteriorBack: return backward_layer(s, s.posterior, s.out, s.stat, 0, t, begin, end);
    case Phase::kLeavePosteriorBack: return leave_backward(s, s.posterior, begin, end, t);
    case Phase::kUpdateBack: return backward_update(s, t, begin, end);
    case Phase::kGatesBack: return backward_gates(s, t, begin, end);
    case Phase::kLeaveGatesBack: return leave_backward(s, s.gates, begin, end, t);
    case Phase::kMixBack: return backward_layer(s, s.mix, s.gates_x, s.gate_grad, 3 * (s.D / s.G), t, begin, end);
    case Phase::kLeaveMixBack: return leave_backward(s, s.mix, begin, end, t);
    case Phase::kInputsBack: return backward_inputs(s, t, begin, end);
    case Phase::kLeaveInputsBack: return backward_leave_inputs(s, t, begin, end);
    case Phase::kDeterBack: return backward_carry(s, s.from_deter, s.in[0].grad, 0, true, t, begin, end);
    case Phase::kScatter: return scatter(s, begin, end);
    default: return;
  }
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Set-up, and the order of phases.

Layer make_layer(Scan& s, const Arguments& a, const std::string& name, int64_t size, int64_t blocks) {
  Layer layer;
  layer.size = size;
  layer.tiles = tiles_of(size, blocks);
  layer.bias = a.address(name + "_bias");
  layer.gain = a.address(name + "_gain");
  layer.shift = a.address(name + "_shift");
  layer.eps = a.number(layer.shift ? "layer_eps" : "rms_eps");
  layer.act = static_cast<Act>(a.size("act"));
  layer.tape = s.tape_rows;
  s.tape_rows += size + (layer.gain ? 1 : 0);
  layer.partial = Floats(static_cast<int64_t>(layer.tiles.size()) * s.groups * 2 * kLanes);
  layer.row_size = size;
  if (s.backward) {
    layer.grad_rows = a.address(name + "_grad_rows");
    layer.out_rows = a.address(name + "_out_rows");
    layer.gain_sum = Floats(size * kLanes);
    layer.shift_sum = Floats(size * kLanes);
    std::memset(layer.gain_sum.get(), 0, sizeof(float) * size * kLanes);
    std::memset(layer.shift_sum.get(), 0, sizeof(float) * size * kLanes);
  }
  return layer;
}

// A layer that others share a buffer with: its features start at `start` of `size`.
void place(Layer& layer, const Lanes& lanes, int64_t start, int64_t size) {
  (layer.grad_rows ? layer.grad : layer.out) = {lanes.at(0, start), lanes.group};
  layer.row_size = size;
  if (layer.grad_rows) layer.grad_rows += start;
  if (layer.out_rows) layer.out_rows += start;
}

// Everything both directions share. `scan` must stay where it is.
void set_up(Scan& s, const Arguments& a, bool backward) {
  s.backward = backward;
  s.cell = static_cast<Cell>(a.size("cell"));
  for (auto& [name, to] : {std::pair<const char*, int64_t*>{"T", &s.T}, {"B", &s.B}, {"A", &s.A}, {"D", &s.D},
                           {"Z", &s.Z}, {"C", &s.C}, {"U", &s.U}, {"V", &s.V}, {"G", &s.G},
                           {"statistics", &s.statistics}})
    *to = a.size(name);
  s.groups = (s.B + kLanes - 1) / kLanes;
  s.threads = static_cast<int>(a.size("threads"));
  s.unimix = a.number("unimix");
  s.min_std = a.number("min_std");
  s.is_first = a.address<uint8_t>("is_first");
  s.noise = a.address("noise");
  s.deter_first = a.address("deter");
  s.initial_deter = a.address("initial_deter");
  s.deter_out = a.address("deter_out");
  s.stoch_out = a.address("stoch_out");
  s.stat_out = a.address("statistics_out");
  s.tape = a.address("tape");
  s.index = a.address<int32_t>("index");

  s.first = Floats(s.T * s.groups * kLanes);
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t b = 0; b < s.groups * kLanes; ++b)
      s.first.get()[t * s.groups * kLanes + b] = b >= s.B || s.is_first[t * s.B + b] ? 1.0f : 0.0f;

  const bool block = s.cell == Cell::kBlock;
  s.parts = block ? 3 : 1;
  s.stoch_part = block ? 1 : 0;
  s.action_part = block ? 2 : 0;
  const char* names[] = {block ? "in_deter" : "in", "in_stoch", "in_action"};
  const Lanes inputs = s.lanes(s.parts * s.U);
  for (int part = 0; part < s.parts; ++part) {
    s.in[part] = make_layer(s, a, names[part], s.U, 1);
    place(s.in[part], inputs, part * s.U, s.parts * s.U);
    for (Tile tile : s.in[part].tiles) s.in_tiles.push_back({tile.start, tile.count, part});
  }
  if (block) {
    s.mix = make_layer(s, a, "mix", s.D, s.G);
    place(s.mix, s.lanes(s.D), 0, s.D);
  }
  s.gates_tape = s.tape_rows;
  if (s.cell == Cell::kLayerNorm) {
    s.gates = make_layer(s, a, "gates", 3 * s.D, 1);
    s.gates.act = Act::kIdentity;
  } else {
    s.tape_rows += (block ? 3 : 4) * s.D;
  }
  s.posterior = make_layer(s, a, "posterior", s.V, 1);
  place(s.posterior, s.lanes(s.V), 0, s.V);
  s.softmax_tape = s.tape_rows;
  if (s.C > 0) s.tape_rows += s.Z;
  if (s.tape_rows * s.T * s.groups * kLanes != a.size("tape_size"))
    throw std::invalid_argument("tape: not of the size that this call writes");

  s.deter_tiles = tiles_of(s.D, block ? s.G : 1);
  s.gate_tiles = tiles_of(3 * s.D);
  s.stat_tiles = tiles_of(s.statistics);
  s.stoch_tiles = tiles_of(s.Z);
  s.unit_size = s.C > 0 ? std::lcm<int64_t>(kTile, s.C) : std::max<int64_t>(s.statistics, 1);
  s.stat = s.lanes(s.statistics);
}

class Runner {
 public:
  Runner(const Scan& s, decltype(&rssm_forward_phase) function) : s_(s), function_(function) {}

  // `grain` tiles at a time, so that threads which start late or are interrupted leave the rest to others.
  void operator()(Phase phase, int64_t t, int64_t tiles) const {
    const int64_t grain = std::max<int64_t>(1, (tiles + 3 * s_.threads - 1) / (3 * s_.threads));
    parallel_for(tiles, grain, s_.threads, [&](int64_t begin, int64_t end) {
      function_(&s_, static_cast<int>(phase), t, begin, end);
    });
  }

 private:
  const Scan& s_;
  decltype(&rssm_forward_phase) function_;
};

int64_t count(const std::vector<Tile>& tiles) { return static_cast<int64_t>(tiles.size()); }

void forward(py::dict arguments) {
  const Arguments a(std::move(arguments));
  Scan s{};
  set_up(s, a, false);
  const int64_t D = s.D, U = s.U, Z = s.Z, size = D / s.G;
  const auto address = [&](const char* name) { return a.address(name); };
  const float *in_action = address("in_action"), *in_stoch = address("in_stoch"), *posterior = address("posterior"),
              *out = address("out");
  const float *in_deter = nullptr, *mix_deter = nullptr, *mix_inputs = nullptr, *gates = nullptr, *hidden = nullptr;
  s.embeds = address("embeds");
  s.actions = address("action");
  s.out_bias = address("out_bias");
  s.stoch_first = address("stoch_first");
  s.stoch_start = address("stoch_start");
  s.initial_stoch = address("initial_stoch");
  gates = address("gates");
  if (s.cell == Cell::kGru) {
    hidden = address("hidden_gates");
    s.input_bias = address("input_bias");
    s.hidden_bias = address("hidden_bias");
  } else if (s.cell == Cell::kBlock) {
    in_deter = address("in_deter");
    mix_deter = address("mix_deter");
    mix_inputs = address("mix_inputs");
    s.gates_bias = address("gates_bias");
  }
  const int64_t posterior_row = a.size("posterior_row");
  py::gil_scoped_release release;

  const auto& tiles = s.in[0].tiles;
  s.from_action = Panels(tiles, s.A, in_action, s.A, 1, 0, 1);
  if (s.C == 0) s.from_stoch = Panels(tiles, Z, in_stoch, Z, 1, 0, 1);
  s.posterior_deter = Panels(s.posterior.tiles, D, posterior, posterior_row, 1, 0, s.threads);
  s.out = Panels(s.stat_tiles, s.V, out, s.V, 1, 0, s.threads);
  if (s.cell == Cell::kGru) {
    for (int k = 0; k < 3; ++k) {
      s.gate[k] = Panels(s.deter_tiles, U, gates + k * D * U, U, 1, 0, s.threads);
      s.gate_h[k] = Panels(s.deter_tiles, D, hidden + k * D * D, D, 1, 0, s.threads);
    }
  } else if (s.cell == Cell::kLayerNorm) {
    s.gates_x = Panels(s.gate_tiles, U, gates, U + D, 1, 0, s.threads);
    s.gates_h = Panels(s.gate_tiles, D, gates + U, U + D, 1, 0, s.threads);
  } else {
    s.from_deter = Panels(tiles, D, in_deter, D, 1, 0, s.threads);
    s.mix_deter = Panels(s.deter_tiles, size, mix_deter, 1, size, size * size, s.threads);
    s.mix_inputs = Panels(s.deter_tiles, 3 * U, mix_inputs, 3 * U, 1, size * 3 * U, s.threads);
    for (int k = 0; k < 3; ++k)
      s.gate[k] = Panels(s.deter_tiles, size, gates + k * size, 1, 3 * size, 3 * size * size, s.threads);
  }
  if (s.C > 0) {
    const int64_t padded = (U + kTile - 1) / kTile * kTile;
    s.table = Floats(Z * padded);
    parallel_for(Z, 64, s.threads, [&](int64_t begin, int64_t end) {
      for (int64_t u0 = 0; u0 < padded; u0 += kTile)
        for (int64_t z = begin; z < end; ++z)
          for (int64_t u = u0; u < u0 + kTile; ++u)
            s.table.get()[z * padded + u] = u < U ? in_stoch[u * Z + z] : 0.0f;
    });
    s.stoch_sum = s.lanes(U);
    for (int64_t g = 0; g < s.groups; ++g)  // lanes without a sequence stay finite
      std::memset(s.stoch_sum.at(g, 0), 0, sizeof(float) * U * kLanes);
  } else {
    s.stoch_lanes = s.lanes(Z);
    for (int64_t g = 0; g < s.groups; ++g)  // `stoch_first` is the z of step 0, resets made
      from_rows(s.stoch_lanes.at(g, 0), s.stoch_first + g * kLanes * Z, Z, s.used(g), static_cast<int>(Z));
  }
  s.action_lanes = s.lanes(s.T * s.A);
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t g = 0; g < s.groups; ++g)
      from_rows(s.action_lanes.at(g, t * s.A), s.actions + s.row(t, g) * s.A, s.A, s.used(g), static_cast<int>(s.A));
  s.deter = s.lanes(D);
  s.previous = s.lanes(D);
  s.next_previous = s.lanes(D);
  for (const Tile& tile : s.deter_tiles)
    for (int64_t g = 0; g < s.groups; ++g) load_previous(s, s.previous.at(g, tile.start), tile, 0, g);

  const Runner run(s, rssm_forward_phase);
  const bool inputs_normed = s.in[0].gain || (s.parts == 3 && (s.in[1].gain || s.in[2].gain));
  for (int64_t t = 0; t < s.T; ++t) {
    run(Phase::kInputs, t, count(s.in_tiles));
    if (inputs_normed) run(Phase::kLeaveInputs, t, count(s.in_tiles));
    if (s.cell == Cell::kGru) {
      run(Phase::kGru, t, count(s.deter_tiles));
    } else if (s.cell == Cell::kLayerNorm) {
      run(Phase::kGates, t, count(s.gate_tiles));
      run(Phase::kUpdate, t, count(s.deter_tiles));
    } else {
      run(Phase::kMix, t, count(s.deter_tiles));
      if (s.mix.gain) run(Phase::kLeaveMix, t, count(s.deter_tiles));
      run(Phase::kBlockGates, t, count(s.deter_tiles));
    }
    run(Phase::kPosterior, t, count(s.posterior.tiles));
    if (s.posterior.gain) run(Phase::kLeavePosterior, t, count(s.posterior.tiles));
    run(Phase::kSample, t, (s.statistics + s.unit_size - 1) / s.unit_size);
    std::swap(s.previous, s.next_previous);
  }
}

void sum_lanes(float* to, const float* lanes, int64_t size) {
  for (int64_t i = 0; to && i < size; ++i) to[i] = std::accumulate(lanes + i * kLanes, lanes + (i + 1) * kLanes, 0.0f);
}

void backward(py::dict arguments) {
  const Arguments a(std::move(arguments));
  Scan s{};
  set_up(s, a, true);
  const int64_t D = s.D, U = s.U, Z = s.Z, size = D / s.G;
  const auto address = [&](const char* name) { return a.address(name); };
  const float *in_stoch = address("in_stoch"), *posterior = address("posterior"), *out = address("out"),
              *gates = address("gates");
  const float *in_deter = nullptr, *mix_deter = nullptr, *mix_inputs = nullptr, *hidden = nullptr;
  s.grad_deter = address("grad_deter");
  s.grad_stoch = address("grad_stoch");
  s.grad_stat = address("grad_statistics");
  s.stat_rows = address("statistics_rows");
  s.grad_deter_first = address("grad_deter_first");
  s.grad_initial_deter = address("grad_initial_deter");
  s.grad_stoch_weight = address("grad_stoch_weight");
  if (s.cell != Cell::kLayerNorm) s.gate_rows = address("gate_rows");
  if (s.cell == Cell::kGru) {
    hidden = address("hidden_gates");
    s.hidden_gate_rows = address("hidden_gate_rows");
  } else if (s.cell == Cell::kBlock) {
    in_deter = address("in_deter");
    mix_deter = address("mix_deter");
    mix_inputs = address("mix_inputs");
  }
  const int64_t posterior_row = a.size("posterior_row");
  std::vector<std::pair<const Layer*, std::pair<float*, float*>>> affine_grads;
  const auto wanted = [&](const Layer& layer, const std::string& name) {
    affine_grads.push_back({&layer, {a.address("grad_" + name + "_gain"), a.address("grad_" + name + "_shift")}});
  };
  const char* names[] = {s.parts == 3 ? "in_deter" : "in", "in_stoch", "in_action"};
  for (int part = 0; part < s.parts; ++part) wanted(s.in[part], names[part]);
  if (s.cell == Cell::kBlock) wanted(s.mix, "mix");
  if (s.cell == Cell::kLayerNorm) wanted(s.gates, "gates");
  wanted(s.posterior, "posterior");
  py::gil_scoped_release release;

  const auto& tiles = s.in[0].tiles;
  s.from_stoch = Panels(s.stoch_tiles, U, in_stoch, 1, Z, 0, s.threads);
  s.posterior_deter = Panels(s.deter_tiles, s.V, posterior, 1, posterior_row, size, s.threads);
  s.out = Panels(s.posterior.tiles, s.statistics, out, 1, s.V, 0, s.threads);
  s.gate_grad = s.lanes(3 * D);
  if (s.cell == Cell::kGru) {
    s.gates_x = Panels(tiles, 3 * D, gates, 1, U, 0, s.threads);
    s.gates_h = Panels(s.deter_tiles, 3 * D, hidden, 1, D, 0, s.threads);
    s.gate_grad_h = s.lanes(3 * D);
  } else if (s.cell == Cell::kLayerNorm) {
    s.gates_x = Panels(tiles, 3 * D, gates, 1, U + D, 0, s.threads);
    s.gates_h = Panels(s.deter_tiles, 3 * D, gates + U, 1, U + D, 0, s.threads);
    s.gates.grad = s.gate_grad;
  } else {
    s.gates_x = Panels(s.deter_tiles, 3 * size, gates, 3 * size, 1, 3 * size * size, s.threads);
    std::vector<Tile> input_tiles;  // of (3U), none across two parts
    for (const Tile& tile : s.in_tiles) input_tiles.push_back({tile.block * U + tile.start, tile.count, tile.block});
    s.mix_inputs = Panels(input_tiles, D, mix_inputs, 1, 3 * U, U, s.threads);
    s.mix_deter = Panels(s.deter_tiles, size, mix_deter, size, 1, size * size, s.threads);
    s.from_deter = Panels(s.deter_tiles, U, in_deter, 1, D, size, s.threads);
  }
  s.carry = s.lanes(D);
  s.initial_sum = s.lanes(D);

  const Runner run(s, rssm_backward_phase);
  const bool inputs_normed = s.in[0].gain || (s.parts == 3 && (s.in[1].gain || s.in[2].gain));
  for (int64_t t = s.T - 1; t >= 0; --t) {
    run(Phase::kStatistics, t, (Z + s.unit_size - 1) / s.unit_size);
    run(Phase::kPosteriorBack, t, count(s.posterior.tiles));
    if (s.posterior.gain) run(Phase::kLeavePosteriorBack, t, count(s.posterior.tiles));
    run(Phase::kUpdateBack, t, count(s.deter_tiles));
    if (s.cell == Cell::kLayerNorm) {
      run(Phase::kGatesBack, t, count(s.gate_tiles));
      run(Phase::kLeaveGatesBack, t, count(s.gate_tiles));
    }
    if (s.cell == Cell::kBlock) {
      run(Phase::kMixBack, t, count(s.deter_tiles));
      if (s.mix.gain) run(Phase::kLeaveMixBack, t, count(s.deter_tiles));
    }
    run(Phase::kInputsBack, t, count(s.in_tiles) + count(s.deter_tiles));
    if (inputs_normed) run(Phase::kLeaveInputsBack, t, count(s.in_tiles));
    if (s.cell == Cell::kBlock) run(Phase::kDeterBack, t, count(s.deter_tiles));
  }
  for (int64_t g = 0; g < s.groups; ++g)
    to_rows(s.grad_deter_first + g * kLanes * D, D, s.used(g), s.carry.at(g, 0), static_cast<int>(D));
  sum_lanes(s.grad_initial_deter, s.initial_sum.at(0, 0), D);
  for (const auto& [layer, grads] : affine_grads) {
    sum_lanes(grads.first, layer->gain_sum.get(), layer->size);
    sum_lanes(grads.second, layer->shift_sum.get(), layer->size);
  }
  if (s.grad_stoch_weight)
    parallel_for(U, 128, s.threads,
                 [&](int64_t begin, int64_t end) { rssm_backward_phase(&s, static_cast<int>(Phase::kScatter), 0, begin, end); });
}

}  // namespace

void bind_rssm_observe(py::module_& module) {
  module.def("rssm_observe_forward", &forward);
  module.def("rssm_observe_backward", &backward);
}

}  // namespace phyx
