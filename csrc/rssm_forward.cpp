// The phases of a scan's steps. Multiversioned functions must have external linkage and be no templates; everything else
// is inlined into them.

#include "rssm_layers.h"

namespace phyx {
namespace scan {

// ---------------------------------------------------------------------------------------------------------------------
// What layers read of z, and a policy's or prior's layers.

// The sums of the rows that the classes pick of a slice of a table, `count` floats from where `slice` points.
PHYX_INLINE void add_classes(float* __restrict sum, const float* slice, const int32_t* index, int64_t S, int64_t C,
                             int64_t count) {
  if (count == kSlice) {  // in registers: few instructions a row let the processor fetch many rows at once
    Vector a{}, b{}, c{}, d{};
    for (int64_t v = 0; v < S; ++v) {
      const Vector* row = vectors(slice + (v * C + index[v]) * kSlice);
      a += row[0];
      b += row[1];
      c += row[2];
      d += row[3];
    }
    Vector* to = vectors(sum);
    to[0] = a;
    to[1] = b;
    to[2] = c;
    to[3] = d;
    return;
  }
  std::memset(sum, 0, sizeof(float) * count);
  for (int64_t v = 0; v < S; ++v) {
    const float* __restrict row = slice + (v * C + index[v]) * kSlice;
    for (int64_t i = 0; i < count; ++i) sum[i] += row[i];
  }
}

// What a categorical z brings to features [begin, end) of a layer: each one-hot picks a row of the transposed weight.
// At step 0, z may be anything, and what it brings is given: `first` (B, size).
PHYX_MULTIVERSION void gather(const Scan& s, const Floats& table, int64_t size, const float* first, const Lanes& to,
                              int64_t t, int64_t begin, int64_t end) {
  const int64_t S = s.Z / s.C;
  alignas(64) float sums[kLanes][kSlice];
  for (int64_t from = begin, count; from < end; from += count) {
    const int64_t offset = from % kSlice;
    count = std::min(kSlice - offset, end - from);
    const float* slice = table.get() + from / kSlice * s.Z * kSlice + offset;
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int l = 0; l < s.used(g); ++l) {
        const int64_t b = s.sequence(g) + l;
        if (t == 0)
          std::memcpy(sums[l], first + b * size + from, sizeof(float) * count);
        else if (s.first_at(t, g)[l] != 0.0f)
          std::memcpy(sums[l], s.stoch_start + from, sizeof(float) * count);
        else
          add_classes(sums[l], slice, s.index + ((t - 1) * s.B + b) * S, S, s.C, count);
      }
      from_rows(to.at(g, from), sums[0], kSlice, s.used(g), static_cast<int>(count));
    }
  }
}

// Tiles [begin, end) of a head's layer before its norm. The policy reads the state before the step, others that after.
PHYX_MULTIVERSION void forward_head(const Scan& s, const Head& head, const HeadWeights& weights, const Lanes& deter,
                              int64_t which, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const Layer& layer = head.layers[which];
  const bool first = which == 0, policy = &head == &s.policy;
  if (first && policy && s.C > 0)
    gather(s, weights.table, layer.size, head.stoch_first, head.stoch_sum, t, layer.tiles[begin].start,
           layer.tiles[end - 1].start + layer.tiles[end - 1].count);
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = layer.tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      prefetch_tape(s, layer.tape + tile.start, tile.count, t, g, pair);
      Block block;
      for (int64_t j = 0; j < pair; ++j) {
        fill(block[j], layer.bias ? layer.bias + tile.start : nullptr, tile.count);
        if (first && head.rows)
          from_rows(block[j], head.rows + s.row(t, g + j) * layer.size + tile.start, layer.size, s.used(g + j),
                    tile.count);
        if (first && policy && s.C > 0) {
          const float* sum = head.stoch_sum.at(g + j, tile.start);
          for (int k = 0; k < tile.count * kLanes; ++k) block[j][k] += sum[k];
        }
      }
      if (first) {
        multiply_into(block, m, weights.deter, i, deter, 0, g, pair);
        if (policy && s.C == 0) multiply_into(block, m, weights.stoch, i, s.stoch_lanes, 0, g, pair);
      } else {
        multiply_into(block, m, weights.hidden[which - 1], i, head.layers[which - 1].out, 0, g, pair);
      }
      for (int64_t j = 0; j < pair; ++j) enter(s, layer, i, block[j], t, g + j);
    }
  }
}

// Tile i of the statistics that a head ends in, for a pair of groups.
PHYX_INLINE void forward_statistics(const Head& head, const HeadWeights& weights, const Multiply& m, int64_t i,
                                    int64_t g, int64_t pair) {
  const Tile& tile = head.tiles[i];
  Block block;
  for (int64_t j = 0; j < pair; ++j) fill(block[j], head.out_bias + tile.start, tile.count);
  multiply_into(block, m, weights.out, i, head.layers.back().out, 0, g, pair);
  for (int64_t j = 0; j < pair; ++j)
    std::memcpy(head.stat.at(g + j, tile.start), block[j], sizeof(float) * tile.count * kLanes);
}

// ---------------------------------------------------------------------------------------------------------------------
// Samples.

// Softmax of every lane: out <- e^(in - max), returns the sums.
PHYX_INLINE Vector exponentials(float* __restrict p, const float* __restrict logits, int64_t C) {
  const Vector* in = vectors(logits);
  Vector *out = vectors(p), peak = in[0], sum{};
  for (int64_t c = 1; c < C; ++c) peak = if_less(peak, in[c], in[c], peak);
  for (int64_t c = 0; c < C; ++c) out[c] = in[c] - peak;
  for (int64_t i = 0; i < C * kLanes; ++i) p[i] = vec_exp(p[i]);
  for (int64_t c = 0; c < C; ++c) sum += out[c];
  return sum;
}

// Softmax, unimix, and the class where the cumulative probabilities pass the noise, which is one number a row.
PHYX_INLINE void pass_class(int32_t* winner, float* __restrict p, const float* __restrict logits, int64_t C,
                            float unimix, const float* rows, int64_t stride, int used) {
  const Vector uniform = Vector{} + 1.0f / static_cast<float>(C), sum = exponentials(p, logits, C);
  Vector *out = vectors(p), level{}, total{}, passed{};
  for (int l = 0; l < used; ++l) level[l] = rows[l * stride];
  for (int64_t c = 0; c < C; ++c) {
    const Vector share = out[c] / sum;
    out[c] = share;
    total += share + unimix * (uniform - share);
    passed += if_less(total, level, Vector{} + 1.0f, Vector{});
  }
  for (int l = 0; l < kLanes; ++l) winner[l] = std::min(static_cast<int32_t>(passed[l]), static_cast<int32_t>(C - 1));
}

// Softmax, unimix, and the class that arrives first, argmin(time / p), of every lane. The noise is in rows (B, stride).
PHYX_INLINE void draw_class(int32_t* winner, float* __restrict p, const float* __restrict logits, int64_t C,
                            float unimix, const float* rows, int64_t stride, int used) {
  const Vector uniform = Vector{} + 1.0f / static_cast<float>(C), sum = exponentials(p, logits, C);
  Vector *out = vectors(p), best{}, first{};
  for (int64_t c0 = 0; c0 < C; c0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, C - c0));
    float times[kTile * kLanes];
    from_rows(times, rows + c0, stride, used, count);
    for (int i = 0; i < count * kLanes; ++i) times[i] = arrival_time(times[i]);
    for (int c = 0; c < count; ++c) {
      const Vector share = out[c0 + c] / sum, time = vectors(times)[c] / (share + unimix * (uniform - share));
      out[c0 + c] = share;
      if (c0 + c == 0) best = time;
      first = if_less(time, best, Vector{} + static_cast<float>(c0 + c), first);
      best = if_less(time, best, time, best);
    }
  }
  for (int l = 0; l < kLanes; ++l) winner[l] = static_cast<int32_t>(first[l]);
}

PHYX_INLINE void sample_class(const Scan& s, int64_t variable, int64_t t, int64_t g) {
  const int64_t C = s.C, start = variable * C;
  int32_t* winner = s.classes + (g * (s.Z / C) + variable) * kLanes;
  float* kept = s.tape_at(t, g, s.state.tape + start);
  const float* logits = s.state.stat.at(g, start);
  const int64_t S = s.Z / C;
  if (s.cumulative)
    pass_class(winner, kept, logits, C, s.unimix, s.noise + s.row(t, g) * S + variable, S, s.used(g));
  else
    draw_class(winner, kept, logits, C, s.unimix, s.noise + s.row(t, g) * s.Z + start, s.Z, s.used(g));
  for (int l = 0; l < s.used(g); ++l) {
    float* onehot = s.stoch_out + (s.row(t, g) + l) * s.Z + start;
    const int32_t one = winner[l];
    for (int32_t c = 0; c < C; ++c) onehot[c] = c == one ? 1.0f : 0.0f;
  }
}

PHYX_INLINE void sample_gaussian(const Scan& s, int64_t t, int64_t g) {
  float noise[kTile * kLanes], z[kTile * kLanes];
  for (int64_t f0 = 0; f0 < s.Z; f0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, s.Z - f0));
    from_rows(noise, s.noise + s.row(t, g) * s.Z + f0, s.Z, s.used(g), count);
    const float *mean = s.state.stat.at(g, f0), *raw = s.state.stat.at(g, s.Z + f0);
    for (int j = 0; j < count * kLanes; ++j) z[j] = mean[j] + (softplus(raw[j]) + s.min_std) * noise[j];
    to_rows(s.stoch_out + s.row(t, g) * s.Z + f0, s.Z, s.used(g), z, count);
    if (t + 1 == s.T) continue;
    const Vector first = *vectors(s.first_at(t + 1, g));
    Vector* next = vectors(s.stoch_lanes.at(g, f0));
    for (int f = 0; f < count; ++f) next[f] = reset(first, s.initial_stoch[f0 + f], vectors(z)[f]);
  }
}

PHYX_MULTIVERSION void forward_sample(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const int64_t statistics = s.state.statistics;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t low = unit * s.unit_size, high = std::min(statistics, low + s.unit_size);
    for (int64_t g = 0; s.C > 0 && g < s.groups; ++g) {
      const int64_t at = s.row(t, g) * s.Z + low;
      const float* noise = s.cumulative ? nullptr : s.noise;
      for (const float* rows : {noise, static_cast<const float*>(s.stat_out), static_cast<const float*>(s.stoch_out)})
        if (rows) prefetch_rows(rows + at, s.Z, s.used(g), high - low);
      prefetch_tape(s, s.state.tape + low, static_cast<int>(high - low), t, g, 1);
    }
    for (int64_t i = low / kTile; i * kTile < high; ++i) {
      const Tile& tile = s.state.tiles[i];
      for (int64_t g = 0; g < s.groups; g += 2) {
        const int64_t pair = std::min<int64_t>(2, s.groups - g);
        forward_statistics(s.state, s.weights->state, m, i, g, pair);
        for (int64_t j = 0; j < pair; ++j)
          to_rows(s.stat_out + s.row(t, g + j) * statistics + tile.start, statistics, s.used(g + j),
                  s.state.stat.at(g + j, tile.start), tile.count);
      }
    }
    for (int64_t g = 0; g < s.groups; ++g) {
      if (s.C == 0) sample_gaussian(s, t, g);
      for (int64_t v = low; s.C > 0 && v < high; v += s.C) sample_class(s, v / s.C, t, g);
    }
  }
}

// Mean and standard deviation of an action that is normal, or the tanh of what is.
PHYX_INLINE void action_moments(const Scan& s, float m, float raw, float* mean, float* std) {
  if (s.dist == Policy::kBoundedNormal) {
    *mean = tanh_of(m);
    *std = (s.policy_max_std - s.policy_min_std) * sigmoid(raw + 2.0f) + s.policy_min_std;
  } else {
    *mean = 5.0f * tanh_of(m / 5.0f);
    *std = softplus(raw + s.policy_offset) + 1e-4f;
  }
}

// The action of a group in lanes, and to the tape what its gradient needs: the softmax, or the statistics.
PHYX_INLINE void draw_action(const Scan& s, float* action, int64_t t, int64_t g) {
  const float* noise = s.action_noise + s.row(t, g) * s.A;
  float* kept = s.tape_at(t, g, s.policy.tape);
  const float* stat = s.policy.stat.at(g, 0);
  if (s.dist == Policy::kCategorical) {
    int32_t winner[kLanes];
    draw_class(winner, kept, stat, s.A, s.policy_unimix, noise, s.A, s.used(g));
    for (int64_t a = 0; a < s.A; ++a)
      for (int l = 0; l < kLanes; ++l) action[a * kLanes + l] = winner[l] == a ? 1.0f : 0.0f;
    return;
  }
  std::memcpy(kept, stat, sizeof(float) * 2 * s.A * kLanes);
  from_rows(action, noise, s.A, s.used(g), static_cast<int>(s.A));
  for (int64_t k = 0; k < s.A * kLanes; ++k) {
    float mean, std;
    action_moments(s, stat[k], stat[s.A * kLanes + k], &mean, &std);
    const float x = mean + std * action[k];
    action[k] = s.dist == Policy::kTanhNormal ? tanh_of(x) : x;
  }
}

PHYX_MULTIVERSION void forward_act(const Scan& s, int64_t t) {
  const Multiply& m = multiply();
  for (int64_t g = 0; g < s.groups; g += 2) {
    const int64_t pair = std::min<int64_t>(2, s.groups - g);
    for (size_t i = 0; i < s.policy.tiles.size(); ++i)
      forward_statistics(s.policy, s.weights->policy, m, static_cast<int64_t>(i), g, pair);
    for (int64_t j = 0; j < pair; ++j) {
      float* action = s.action_lanes.at(g + j, t * s.A);
      draw_action(s, action, t, g + j);
      to_rows(s.actions + s.row(t, g + j) * s.A, s.A, s.used(g + j), action, static_cast<int>(s.A));
      for (int64_t k = 0; s.clip_action && k < s.A * kLanes; ++k) {
        const float size = std::fabs(action[k]);
        action[k] /= size > 1.0f ? size : 1.0f;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The cells.

PHYX_MULTIVERSION void forward_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  if (s.C > 0) {
    int64_t low = s.U, high = 0;
    for (int64_t i = begin; i < end; ++i)
      if (s.in_tiles[i].block == s.stoch_part) {
        low = std::min(low, s.in_tiles[i].start);
        high = std::max(high, s.in_tiles[i].start + s.in_tiles[i].count);
      }
    gather(s, s.weights->table, s.U, s.stoch_first, s.stoch_sum, t, low, high);
  }
  for (int64_t i = begin; i < end; ++i) {
    const int part = static_cast<int>(s.in_tiles[i].block);
    const Layer& layer = s.in[part];
    const int64_t local = i - part * static_cast<int64_t>(layer.tiles.size());
    const Tile& tile = layer.tiles[local];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      prefetch_tape(s, layer.tape + tile.start, tile.count, t, g, pair);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], layer.bias ? layer.bias + tile.start : nullptr, tile.count);
      if (part == s.stoch_part) {
        if (s.C == 0) multiply_into(block, m, s.weights->from_stoch, local, s.stoch_lanes, 0, g, pair);
        for (int64_t j = 0; s.C > 0 && j < pair; ++j) {
          const float* sum = s.stoch_sum.at(g + j, tile.start);
          for (int k = 0; k < tile.count * kLanes; ++k) block[j][k] += sum[k];
        }
      }
      if (part == s.action_part)
        multiply_into(block, m, s.weights->from_action, local, {s.action_lanes.at(0, t * s.A), s.action_lanes.group}, 0, g,
                      pair);
      if (s.parts == 3 && part == 0) multiply_into(block, m, s.weights->from_deter, local, s.previous, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) enter(s, layer, local, block[j], t, g + j);
    }
  }
}

PHYX_MULTIVERSION void forward_mix(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.mix.tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      prefetch_tape(s, s.mix.tape + tile.start, tile.count, t, g, pair);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], s.mix.bias ? s.mix.bias + tile.start : nullptr, tile.count);
      multiply_into(block, m, s.weights->mix_deter, i, s.previous, tile.block * s.weights->mix_deter.inputs, g, pair);
      multiply_into(block, m, s.weights->mix_inputs, i, s.in[0].out, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) enter(s, s.mix, i, block[j], t, g + j);
    }
  }
}

// The new state of a tile: to the lanes, to the result, and, with the resets of the next step, to what it starts from.
PHYX_INLINE void put_deter(const Scan& s, const Tile& tile, const float* h, int64_t t, int64_t g) {
  std::memcpy(s.deter.at(g, tile.start), h, sizeof(float) * tile.count * kLanes);
  to_rows(s.deter_out + s.row(t, g) * s.D + tile.start, s.D, s.used(g), h, tile.count);
  if (t + 1 == s.T) return;
  const Vector first = *vectors(s.first_at(t + 1, g));
  Vector* next = vectors(s.next_previous.at(g, tile.start));
  for (int f = 0; f < tile.count; ++f) next[f] = reset(first, s.initial_deter[tile.start + f], vectors(h)[f]);
}

PHYX_INLINE void gru_update(float* __restrict h, const float* __restrict reset, const float* __restrict candidate,
                            const float* __restrict update, const float* __restrict previous, int count) {
  for (int j = 0; j < count * kLanes; ++j) {
    const float c = tanh_of(sigmoid(reset[j]) * candidate[j]);
    h[j] = previous[j] + sigmoid(update[j] - 1.0f) * (c - previous[j]);
  }
}

PHYX_MULTIVERSION void forward_gru(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      for (int k = 0; k < 4; ++k) prefetch_tape(s, s.gates_tape + k * s.D + tile.start, tile.count, t, g, pair);
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
        multiply_into(gate[k], m, s.weights->gate[k], i, s.in[0].out, 0, g, pair);
        multiply_into(to, m, s.weights->gate_h[k], i, s.previous, 0, g, pair);
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

PHYX_MULTIVERSION void forward_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      prefetch_tape(s, s.gates.tape + s.gates.tiles[i].start, s.gates.tiles[i].count, t, g, pair);
      Block block;
      const float* bias = s.gates.bias ? s.gates.bias + s.gates.tiles[i].start : nullptr;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], bias, s.gates.tiles[i].count);
      multiply_into(block, m, s.weights->gates_x, i, s.in[0].out, 0, g, pair);
      multiply_into(block, m, s.weights->gates_h, i, s.previous, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) enter(s, s.gates, i, block[j], t, g + j);
    }
}

// The gates of a LayerNorm GRU span all of D: normalised and used here.
PHYX_MULTIVERSION void forward_update(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  float gate[3][kTile * kLanes], h[kTile * kLanes];
  for (int64_t g = 0; g < s.groups; ++g) {
    Vector mean, inverse;
    moments(s, s.gates, g, &mean, &inverse);
    if (begin == 0) *vectors(s.tape_at(t, g, s.gates.tape + s.gates.size)) = inverse;
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

PHYX_MULTIVERSION void forward_block_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const int64_t size = s.D / s.G;
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      for (int k = 0; k < 3; ++k) prefetch_tape(s, s.gates_tape + k * s.D + tile.start, tile.count, t, g, pair);
      Block gate[3];
      for (int k = 0; k < 3; ++k) {
        const float* bias = s.gates_bias + (2 * tile.block + k) * size + tile.start;  // block order: (G, 3, D/G)
        for (int64_t j = 0; j < pair; ++j) fill(gate[k][j], bias, tile.count);
        multiply_into(gate[k], m, s.weights->gate[k], i, s.mix.out, tile.block * size, g, pair);
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

PHYX_MULTIVERSION void leave_layer(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  leave(s, layer, begin, end, t);
}

}  // namespace scan

void rssm_forward_phase(const Scan* of, Phase phase, int64_t layer, int64_t t, int64_t begin,
                        int64_t end) {
  const Scan& s = *of;
  using namespace scan;
  switch (phase) {
    case Phase::kPolicy:
    case Phase::kState: {
      const bool policy = phase == Phase::kPolicy;
      return forward_head(s, policy ? s.policy : s.state, policy ? s.weights->policy : s.weights->state,
                          policy ? s.previous : s.deter, layer, t, begin, end);
    }
    case Phase::kAct: return forward_act(s, t);
    case Phase::kInputs: return forward_inputs(s, t, begin, end);
    case Phase::kMix: return forward_mix(s, t, begin, end);
    case Phase::kGru: return forward_gru(s, t, begin, end);
    case Phase::kGates: return forward_gates(s, t, begin, end);
    case Phase::kUpdate: return forward_update(s, t, begin, end);
    case Phase::kBlockGates: return forward_block_gates(s, t, begin, end);
    case Phase::kSample: return forward_sample(s, t, begin, end);
    default: break;
  }
  const Layer& left = phase == Phase::kLeaveInputs   ? s.in[layer]
                      : phase == Phase::kLeaveMix    ? s.mix
                      : phase == Phase::kLeavePolicy ? s.policy.layers[layer]
                                                     : s.state.layers[layer];
  leave_layer(s, left, begin, end, t);
}

}  // namespace phyx
