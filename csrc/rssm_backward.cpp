// The phases of the steps of a scan's backward. Panels hold the transposed weights.
#include "rssm_layers.h"

namespace phyx {
namespace scan {

// The gradient of z_t, which step t + 1 read where it was not reset: tile i of Z into `block`.
PHYX_INLINE void stoch_gradient(const Scan& s, const Multiply& m, Block& block, int64_t i, int64_t t, int64_t g,
                                int64_t pair) {
  const Tile& tile = s.stoch_tiles[i];
  for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
  if (t + 1 < s.T) {
    multiply_into(block, m, s.weights->from_stoch, i, s.in[s.stoch_part].grad, 0, g, pair);
    if (s.policy_state)
      multiply_into(block, m, s.weights->policy.stoch, i, s.policy.layers[0].grad, 0, g, pair);
    for (int64_t j = 0; j < pair; ++j) {
      const Vector first = *vectors(s.first_at(t + 1, g + j));
      for (int f = 0; f < tile.count; ++f) vectors(block[j])[f] = reset(first, 0.0f, vectors(block[j])[f]);
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
    float* grad = s.state.stat.at(g, f0);
    if (s.grad_stat) {
      from_rows(given, s.grad_stat + s.row(t, g) * s.state.statistics + f0, s.state.statistics, s.used(g), features);
      for (int k = 0; k < features * kLanes; ++k) grad[k] += given[k];
    }
    if (s.state.stat_rows)
      to_rows(s.state.stat_rows + s.row(t, g) * s.state.statistics + f0, s.state.statistics, s.used(g), grad, features);
  }
}

// Logits' gradients from those of p = (1 - unimix) softmax + unimix / C.
PHYX_INLINE void backward_class(float* grad, const float* softmax, int64_t C, float unimix) {
  const Vector* p = vectors(softmax);
  Vector *d = vectors(grad), mean{};
  for (int64_t c = 0; c < C; ++c) mean += d[c] * p[c];
  const float rest = 1.0f - unimix;
  for (int64_t c = 0; c < C; ++c) d[c] = rest * p[c] * (d[c] - mean);
}

// The gradient of p from that of the Gumbel-softmax that p and the noise make: ratios p / time, over their sum.
PHYX_INLINE void backward_gumbel(float* grad, const float* softmax, int64_t C, float unimix, const float* rows,
                                 int64_t stride, int used) {
  const Vector *share = vectors(softmax), uniform = Vector{} + 1.0f / static_cast<float>(C);
  Vector *d = vectors(grad), total{}, along{};
  float times[kTile * kLanes];
  for (bool first : {true, false}) {
    for (int64_t c0 = 0; c0 < C; c0 += kTile) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, C - c0));
      from_rows(times, rows + c0, stride, used, count);
      for (int i = 0; i < count * kLanes; ++i) times[i] = arrival_time(times[i]);
      for (int c = 0; c < count; ++c) {
        const Vector s = share[c0 + c], time = vectors(times)[c], ratio = (s + unimix * (uniform - s)) / time;
        if (first) {
          total += ratio;
          along += d[c0 + c] * ratio;
        } else {
          d[c0 + c] = (d[c0 + c] - along / total) / (time * total);
        }
      }
    }
    const Vector tiny = Vector{} + std::numeric_limits<float>::min();  // where no class ever arrives
    total = if_less(total, tiny, tiny, total);
  }
}

PHYX_INLINE void backward_gaussian(const Scan& s, int64_t t, int64_t g) {
  float noise[kTile * kLanes], raw[kTile * kLanes];
  for (int64_t f0 = 0; f0 < s.Z; f0 += kTile) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, s.Z - f0));
    from_rows(noise, s.noise + s.row(t, g) * s.Z + f0, s.Z, s.used(g), count);
    from_rows(raw, s.stat_out + s.row(t, g) * s.state.statistics + s.Z + f0, s.state.statistics, s.used(g), count);
    const float* grad = s.state.stat.at(g, f0);  // of z, and of the mean
    float* to = s.state.stat.at(g, s.Z + f0);
    for (int k = 0; k < count * kLanes; ++k) to[k] = grad[k] * noise[k] * sigmoid(raw[k]);
  }
}

PHYX_MULTIVERSION void backward_statistics(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t low = unit * s.unit_size, high = std::min(s.Z, low + s.unit_size);
    for (int64_t g = 0; s.C > 0 && g < s.groups; ++g) {
      for (const float* rows : {s.grad_stoch, s.grad_stat, static_cast<const float*>(s.state.stat_rows), s.noise})
        if (rows) prefetch_rows(rows + s.row(t, g) * s.Z + low, s.Z, s.used(g), high - low);
      prefetch_tape(s, s.state.tape + low, static_cast<int>(high - low), t, g, 1);
    }
    for (int64_t i = low / kTile; i * kTile < high; ++i)
      for (int64_t g = 0; g < s.groups; g += 2) {
        const int64_t pair = std::min<int64_t>(2, s.groups - g);
        Block block;
        stoch_gradient(s, m, block, i, t, g, pair);
        for (int64_t j = 0; j < pair; ++j)
          std::memcpy(s.state.stat.at(g + j, s.stoch_tiles[i].start), block[j],
                      sizeof(float) * s.stoch_tiles[i].count * kLanes);
      }
    for (int64_t g = 0; g < s.groups; ++g) {
      if (s.C == 0) {
        backward_gaussian(s, t, g);
        finish_statistics(s, 0, s.state.statistics, t, g);
      } else {
        for (int64_t v = low; v < high; v += s.C) {
          if (s.gumbel)
            backward_gumbel(s.state.stat.at(g, v), s.tape_at(t, g, s.state.tape + v), s.C, s.unimix,
                            s.noise + s.row(t, g) * s.Z + v, s.Z, s.used(g));
          backward_class(s.state.stat.at(g, v), s.tape_at(t, g, s.state.tape + v), s.C, s.unimix);
        }
        finish_statistics(s, low, high - low, t, g);
      }
    }
  }
}

// Tiles [begin, end) of a layer whose activated values went through one matrix; its panels start at `first_panel`.
PHYX_MULTIVERSION void backward_layer(const Scan& s, const Layer& layer, const Panels& panels, int64_t first_panel,
                                      const Lanes& grad, int64_t inputs_per_block, int64_t t, int64_t begin,
                                      int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      prefetch_tape(s, layer.tape + layer.tiles[i].start, layer.tiles[i].count, t, g, pair);
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
      multiply_into(block, m, panels, first_panel + i, grad, layer.tiles[i].block * inputs_per_block, g, pair);
      for (int64_t j = 0; j < pair; ++j) enter_backward(s, layer, i, block[j], t, g + j);
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
  if (rows) to_rows(rows + s.row(t, g) * 3 * s.D + feature, 3 * s.D, s.used(g), grad, count);
}

PHYX_MULTIVERSION void backward_update(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  for (int64_t i = begin; i < end; ++i) {
    const Tile& tile = s.deter_tiles[i];
    const int count = tile.count, kinds = s.cell == Cell::kGru ? 4 : 3;
    for (int64_t g = 0; g < s.groups; g += 2) {
      const int64_t pair = std::min<int64_t>(2, s.groups - g);
      for (int k = 0; k < kinds; ++k) prefetch_tape(s, s.gates_tape + k * s.D + tile.start, count, t, g, pair);
      for (int64_t j = 0; j < pair; ++j) {
        const int64_t before = s.row(t - (t > 0), g + j) * s.D + tile.start;
        prefetch_rows(s.deter_out + before, s.D, s.used(g + j), count);
        if (s.grad_deter) prefetch_rows(s.grad_deter + s.row(t, g + j) * s.D + tile.start, s.D, s.used(g + j), count);
      }
      Block block;
      for (int64_t j = 0; j < pair; ++j) {
        fill(block[j], nullptr, 0);
        std::memcpy(block[j], s.carry.at(g + j, tile.start), sizeof(float) * count * kLanes);
      }
      multiply_into(block, m, s.weights->state.deter, i, s.state.layers[0].grad, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j) {
        float gate[4][kTile * kLanes], previous[kTile * kLanes];
        if (s.grad_deter) {
          from_rows(gate[0], s.grad_deter + s.row(t, g + j) * s.D + tile.start, s.D, s.used(g + j), count);
          for (int k = 0; k < count * kLanes; ++k) block[j][k] += gate[0][k];
        }
        load_previous(s, previous, tile, t, g + j);
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
PHYX_MULTIVERSION void backward_gates(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t g = 0; g < s.groups; ++g)
      enter_backward(s, s.gates, i, s.gate_grad.at(g, s.gates.tiles[i].start), t, g);
}

// Adds to the carry what a matrix brings back to the previous state; the last one stops it where that was a reset.
PHYX_MULTIVERSION void backward_carry(const Scan& s, const Panels& panels, const Lanes& grad, int64_t inputs_per_block,
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
        const Vector first = *vectors(s.first_at(t, g + j));
        Vector* initial = vectors(s.initial_sum.get() + ((g + j) / kUnit * s.D + tile.start) * kLanes);
        for (int f = 0; f < tile.count; ++f) {
          const Vector grad = vectors(carry)[f];
          initial[f] += if_less(Vector{}, first, grad, Vector{});
          vectors(carry)[f] = reset(first, 0.0f, grad);
        }
      }
    }
  }
}

// The gradient of a policy's statistics, which `stat` becomes, from that of the action as the cell read it, in `grad`.
PHYX_INLINE void backward_action(const Scan& s, float* __restrict grad, int64_t t, int64_t g) {
  const int64_t size = s.A * kLanes;
  const int count = static_cast<int>(s.A);
  const float* kept = s.tape_at(t, g, s.policy.tape);
  float* __restrict stat = s.policy.stat.at(g, 0);
  float* __restrict action = s.action_lanes.at(g, 0);
  from_rows(action, s.actions + s.row(t, g) * s.A, s.A, s.used(g), count);
  for (int64_t k = 0; s.clip_action && k < size; ++k) {
    const float magnitude = std::fabs(action[k]);
    grad[k] /= magnitude > 1.0f ? magnitude : 1.0f;
  }
  if (s.grad_action) {
    from_rows(stat, s.grad_action + s.row(t, g) * s.A, s.A, s.used(g), count);
    for (int64_t k = 0; k < size; ++k) grad[k] += stat[k];
  }
  if (s.dist == Policy::kCategorical) {
    backward_class(grad, kept, s.A, s.policy_unimix);
    std::memcpy(stat, grad, sizeof(float) * size);
  } else {
    const bool squashed = s.dist == Policy::kTanhNormal;
    const float span = s.policy_max_std - s.policy_min_std;
    float* __restrict raw_grad = stat + size;
    from_rows(raw_grad, s.action_noise + s.row(t, g) * s.A, s.A, s.used(g), count);
    for (int64_t k = 0; k < size; ++k) {
      const float raw = kept[size + k], mean = tanh_of(squashed ? kept[k] / 5.0f : kept[k]);
      const float d = squashed ? grad[k] * (1.0f - action[k] * action[k]) : grad[k];
      const float gate = sigmoid(squashed ? raw + s.policy_offset : raw + 2.0f);
      stat[k] = d * (1.0f - mean * mean);
      raw_grad[k] *= d * (squashed ? gate : span * gate * (1.0f - gate));
    }
  }
  if (s.policy.stat_rows)
    to_rows(s.policy.stat_rows + s.row(t, g) * s.policy.statistics, s.policy.statistics, s.used(g), stat,
            static_cast<int>(s.policy.statistics));
}

PHYX_MULTIVERSION void backward_act(const Scan& s, int64_t t) {
  const Multiply& m = multiply();
  for (int64_t g = 0; g < s.groups; g += 2) {
    const int64_t pair = std::min<int64_t>(2, s.groups - g);
    for (size_t i = 0; i < s.action_tiles.size(); ++i) {
      Block block;
      for (int64_t j = 0; j < pair; ++j) fill(block[j], nullptr, 0);
      multiply_into(block, m, s.weights->from_action, static_cast<int64_t>(i), s.in[s.action_part].grad, 0, g, pair);
      for (int64_t j = 0; j < pair; ++j)
        std::memcpy(s.action_grad.at(g + j, s.action_tiles[i].start), block[j],
                    sizeof(float) * s.action_tiles[i].count * kLanes);
    }
    for (int64_t j = 0; j < pair; ++j) backward_action(s, s.action_grad.at(g + j, 0), t, g + j);
  }
}

PHYX_MULTIVERSION void leave_layer_backward(const Scan& s, const Layer& layer, int64_t begin, int64_t end, int64_t t) {
  leave_backward(s, layer, begin, end, t);
}

// Layer `which` of a head, from the gradient of the one after it or of the statistics.
void backward_head(const Scan& s, const Head& head, const HeadWeights& weights, int64_t which, int64_t t, int64_t begin,
                   int64_t end) {
  const bool last = which + 1 == static_cast<int64_t>(head.layers.size());
  backward_layer(s, head.layers[which], last ? weights.out : weights.hidden[which], 0,
                 last ? head.stat : head.layers[which + 1].grad, 0, t, begin, end);
}

// What the inputs enter, and after its tiles those of h: both read the gates' gradients, or the mixed layer's.
void backward_inputs(const Scan& s, int64_t t, int64_t begin, int64_t end) {
  const Weights& w = *s.weights;
  const bool gru = s.cell == Cell::kGru, block = s.cell == Cell::kBlock;
  const int64_t count = static_cast<int64_t>(s.in[0].tiles.size()), inputs = s.parts * count;
  for (int64_t part = 0; part < s.parts; ++part) {
    const int64_t from = std::max(begin - part * count, int64_t{0}), to = std::min(end - part * count, count);
    if (from < to)
      backward_layer(s, s.in[part], block ? w.mix_inputs : w.gates_x, part * count, block ? s.mix.grad : s.gate_grad,
                     0, t, from, to);
  }
  if (end > inputs)
    backward_carry(s, block ? w.mix_deter : w.gates_h, block ? s.mix.grad : gru ? s.gate_grad_h : s.gate_grad,
                   block ? s.D / s.G : 0, !block, t, std::max(begin - inputs, int64_t{0}), end - inputs);
}

}  // namespace scan

void rssm_backward_phase(const Scan* of, Phase phase, int64_t layer, int64_t t, int64_t begin, int64_t end) {
  using namespace scan;
  const Scan& s = *of;
  const Weights& w = *s.weights;
  switch (phase) {
    case Phase::kStatistics: return backward_statistics(s, t, begin, end);
    case Phase::kStateBack: return backward_head(s, s.state, w.state, layer, t, begin, end);
    case Phase::kLeaveStateBack: return leave_layer_backward(s, s.state.layers[layer], begin, end, t);
    case Phase::kUpdateBack: return backward_update(s, t, begin, end);
    case Phase::kGatesBack: return backward_gates(s, t, begin, end);
    case Phase::kLeaveGatesBack: return leave_layer_backward(s, s.gates, begin, end, t);
    case Phase::kMixBack: return backward_layer(s, s.mix, w.gates_x, 0, s.gate_grad, 3 * (s.D / s.G), t, begin, end);
    case Phase::kLeaveMixBack: return leave_layer_backward(s, s.mix, begin, end, t);
    case Phase::kInputsBack: return backward_inputs(s, t, begin, end);
    case Phase::kLeaveInputsBack: return leave_layer_backward(s, s.in[layer], begin, end, t);
    case Phase::kDeterBack: return backward_carry(s, w.from_deter, s.in[0].grad, 0, true, t, begin, end);
    case Phase::kActBack: return backward_act(s, t);
    case Phase::kPolicyBack: return backward_head(s, s.policy, w.policy, layer, t, begin, end);
    case Phase::kLeavePolicyBack: return leave_layer_backward(s, s.policy.layers[layer], begin, end, t);
    case Phase::kPolicyDeterBack:
      return backward_carry(s, w.policy.deter, s.policy.layers[0].grad, 0, false, t, begin, end);
    default: return;
  }
}

}  // namespace phyx
