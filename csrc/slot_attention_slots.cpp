// What happens to the slots between two passes over the tokens.
#include "slot_attention.h"

namespace phyx {
namespace slots {
namespace {

// What the chunks of a pass over the tokens summed up, for the slots of a group: (I, lanes) and (lanes).
PHYX_INLINE void collect(const SlotCall& c, int64_t group, float* pooled, float* total, float* sums) {
  const int lanes = c.rows_in(group);
  clear(total, 1);
  const float* rows = c.pooled.get() + group * kLanes * c.I;
  if (c.chunks == 1) {
    std::memcpy(total, c.total.get() + group * kLanes, sizeof(float) * lanes);
  } else {
    clear(sums, c.I);
    for (int l = 0; l < lanes; ++l) {
      const int64_t row = group * kLanes + l, first = row / c.K * c.chunks * c.K + row % c.K;
      for (int64_t at = first; at < first + c.chunks * c.K; at += c.K) {
        total[l] += c.total.get()[at];
        const float* from = c.pooled.get() + at * c.I;
        for (int64_t i = 0; i < c.I; ++i) sums[l * c.I + i] += from[i];
      }
    }
    rows = sums;
  }
  read_rows(pooled, rows, c.I, lanes, c.I);
}

// The cell of `torch.nn.GRUCell` from its two halves of gates; what the backward needs is kept.
PHYX_INLINE void gru(int64_t size, const float* __restrict x, const float* __restrict y, const float* __restrict s,
                     float* __restrict reset, float* __restrict update, float* __restrict candidate,
                     float* __restrict hidden_candidate, float* __restrict to) {
  for (int64_t i = 0; i < size; ++i) {
    reset[i] = sigmoid(x[i] + y[i]);
    update[i] = sigmoid(x[size + i] + y[size + i]);
    hidden_candidate[i] = y[2 * size + i];
    candidate[i] = tanh_of(x[2 * size + i] + reset[i] * hidden_candidate[i]);
    to[i] = candidate[i] + update[i] * (s[i] - candidate[i]);
  }
}

// Gradients of candidate, reset, update and hidden candidate, in this order, from that of the cell, out + inner; what
// goes by the update gate is added to the carry.
PHYX_INLINE void gru_backward(int64_t size, const float* __restrict out, const float* __restrict inner,
                              const float* __restrict s, const float* __restrict reset, const float* __restrict update,
                              const float* __restrict candidate, const float* __restrict hidden_candidate,
                              float* __restrict carry, float* __restrict gates) {
  for (int64_t i = 0; i < size; ++i) {
    const float d = out[i] + inner[i];
    const float of_candidate = d * (1.0f - update[i]) * (1.0f - candidate[i] * candidate[i]);
    carry[i] += d * update[i];
    gates[i] = of_candidate;
    gates[size + i] = of_candidate * hidden_candidate[i] * reset[i] * (1.0f - reset[i]);
    gates[2 * size + i] = d * (s[i] - candidate[i]) * update[i] * (1.0f - update[i]);
    gates[3 * size + i] = of_candidate * reset[i];
  }
}

PHYX_INLINE void write_factor(const SlotCall& c, const Factor& to, int64_t iteration, int64_t group, const float* from) {
  const int64_t row = ((iteration - (c.iterations - c.taped)) * c.groups + group) * kLanes;
  for (int64_t f = 0; f < to.features; f += kTile) {
    float* rows = to.panels.get() + f * c.factor_rows + row * kTile;
    if (f + kTile <= to.features) {
      transpose(rows, kTile, from + f * kLanes, kLanes);
    } else {
      clear(rows, kTile);
      to_rows(rows, kTile, kLanes, from + f * kLanes, static_cast<int>(to.features - f));
    }
  }
}

// Hands what is asked of the inputs, u and c, to a pass over the tokens.
PHYX_INLINE void ask(const SlotCall& c, int64_t iteration, int64_t group) {
  const int rows = c.rows_in(group);
  write_rows(c.query.get() + group * kLanes * c.I, c.I, rows, c.tape_at(iteration, group, c.tape.query), c.I);
  to_rows(c.offset.get() + group * kLanes, 1, rows, c.tape_at(iteration, group, c.tape.offset), 1);
}

PHYX_INLINE bool absent(const SlotCall& c, int64_t group, int lane) {
  return c.mask && !c.mask[group * kLanes + lane];
}

}  // namespace

// Groups [begin, end) at the border before `iteration`: the end of the one before it, then the queries of this one.
PHYX_MULTIVERSION void slot_forward_rows(const SlotCall& c, int64_t iteration, int64_t begin, int64_t end) {
  const int64_t I = c.I, D = c.D, H = c.H, most = 2;
  const int64_t DP = tiled(D), IP = tiled(I), HP = tiled(H), GP = tiled(3 * D);
  const Floats slots_(most * DP * kLanes), wide_(most * IP * kLanes), gates_(2 * most * GP * kLanes),
      normed_(most * DP * kLanes), hidden_(most * HP * kLanes);
  for (int64_t first = begin * c.side_by_side; first < std::min(c.groups, end * c.side_by_side);
       first += c.side_by_side) {
    const int count = static_cast<int>(std::min(c.side_by_side, c.groups - first));
    const int64_t gap = c.tape.size * kLanes;
    const auto slots = [&](int g) { return slots_.get() + g * DP * kLanes; };
    const auto wide = [&](int g) { return wide_.get() + g * IP * kLanes; };
    const auto input_gates = [&](int g) { return gates_.get() + g * GP * kLanes; };
    const auto hidden_gates = [&](int g) { return gates_.get() + (most + g) * GP * kLanes; };
    const auto normed = [&](int g) { return normed_.get() + g * DP * kLanes; };
    const auto hidden = [&](int g) { return hidden_.get() + g * HP * kLanes; };
    if (iteration == 0) {
      for (int g = 0; g < count; ++g)
        read_rows(slots(g), c.slots + (first + g) * kLanes * D, D, c.rows_in(first + g), D);
    } else {
      const auto tape = [&](int g, int64_t field) { return c.tape_at(iteration - 1, first + g, field); };
      for (int g = 0; g < count; ++g) {
        float *pooled = tape(g, c.tape.pooled), *total = tape(g, c.tape.total);
        collect(c, first + g, pooled, total, wide(0));
        for (int l = 0; l < kLanes; ++l)
          if (l >= c.rows_in(first + g) || absent(c, first + g, l)) total[l] = 1.0f;  // without eps, 0
        const Vector share = 1.0f / *vectors(total);
        for (int64_t i = 0; i < I; ++i) vectors(pooled)[i] *= share;
        broadcast(input_gates(g), c.input_bias, 3 * D);
        broadcast(hidden_gates(g), c.hidden_bias, 3 * D);
      }
      c.input_gates.add(count, tape(0, c.tape.pooled), gap, input_gates(0), GP * kLanes);
      c.hidden_gates.add(count, tape(0, c.tape.slots), gap, hidden_gates(0), GP * kLanes);
      for (int g = 0; g < count; ++g) {
        const float *x = input_gates(g), *y = hidden_gates(g), *s = tape(g, c.tape.slots);
        float *reset = tape(g, c.tape.reset), *update = tape(g, c.tape.update), *candidate = tape(g, c.tape.candidate),
              *hidden_candidate = tape(g, c.tape.hidden_candidate), *to = slots(g);
        gru(D * kLanes, x, y, s, reset, update, candidate, hidden_candidate, to);
        float *mean = tape(g, c.tape.mlp_mean), *inverse = tape(g, c.tape.mlp_inverse);
        moments(to, D, c.layer_eps, mean, inverse);
        normalise(normed(g), to, D, mean, inverse, c.mlp_gain, c.mlp_shift);
        broadcast(hidden(g), c.mlp_in_bias, H);
      }
      c.mlp_in.add(count, normed(0), DP * kLanes, hidden(0), HP * kLanes);
      for (int g = 0; g < count; ++g) {
        for (int64_t i = 0; i < H * kLanes; ++i) hidden(g)[i] = hidden(g)[i] > 0.0f ? hidden(g)[i] : 0.0f;
        copy(tape(g, c.tape.hidden), hidden(g), H);
        for (int64_t i = 0; i < D; ++i) vectors(slots(g))[i] += c.mlp_out_bias[i];
      }
      c.mlp_out.add(count, hidden(0), HP * kLanes, slots(0), DP * kLanes);
      for (int g = 0; g < count; ++g)
        for (int l = 0; l < c.rows_in(first + g); ++l)
          if (absent(c, first + g, l))
            for (int64_t i = 0; i < D; ++i) slots(g)[i * kLanes + l] = tape(g, c.tape.slots)[i * kLanes + l];
    }
    for (int g = 0; g < count; ++g) {
      const int64_t group = first + g;
      const int rows = c.rows_in(group);
      if (iteration == c.iterations) {
        write_rows(c.slots_out + group * kLanes * D, D, rows, slots(g), D);
        continue;
      }
      float *mean = c.tape_at(iteration, group, c.tape.mean), *inverse = c.tape_at(iteration, group, c.tape.inverse);
      copy(c.tape_at(iteration, group, c.tape.slots), slots(g), D);
      moments(slots(g), D, c.layer_eps, mean, inverse);
      normalise(normed(g), slots(g), D, mean, inverse, c.slots_gain, c.slots_shift);
      Vector sum{};
      for (int64_t i = 0; i < D; ++i) sum += c.offset_weight[i] * vectors(normed(g))[i];
      *vectors(c.tape_at(iteration, group, c.tape.offset)) = sum;
      clear(wide(g), IP);
    }
    if (iteration == c.iterations) continue;
    c.to_query.add(count, normed(0), DP * kLanes, wide(0), IP * kLanes);
    for (int g = 0; g < count; ++g) {
      copy(c.tape_at(iteration, first + g, c.tape.query), wide(g), I);
      ask(c, iteration, first + g);
    }
  }
}

// The same backwards: from the pass over the tokens of `iteration` to the slots before it, then to what the pass
// of the iteration before it needs.
PHYX_MULTIVERSION void slot_backward_rows(const SlotCall& c, int64_t iteration, int64_t begin, int64_t end) {
  const int64_t I = c.I, D = c.D, H = c.H, most = 2, before = iteration - 1;
  const int64_t DP = tiled(D), IP = tiled(I), HP = tiled(H);
  const Floats wide_(most * IP * kLanes), gates_(most * 4 * D * kLanes), narrow_(most * DP * kLanes),
      hidden_(most * HP * kLanes), out_(most * DP * kLanes), spare_(std::max(2 * DP, IP) * kLanes);
  float* spare = spare_.get();
  for (int64_t first = begin * c.side_by_side; first < std::min(c.groups, end * c.side_by_side);
       first += c.side_by_side) {
    const int count = static_cast<int>(std::min(c.side_by_side, c.groups - first));
    const auto carry = [&](int g) { return c.carry.get() + (first + g) * DP * kLanes; };
    const auto wide = [&](int g) { return wide_.get() + g * IP * kLanes; };
    const auto gates = [&](int g) { return gates_.get() + g * 4 * D * kLanes; };
    const auto narrow = [&](int g) { return narrow_.get() + g * DP * kLanes; };
    const auto hidden = [&](int g) { return hidden_.get() + g * HP * kLanes; };
    const auto sums = [&](int g, int i) { return c.vector_sums.get() + ((first + g) * 5 + i) * D * kLanes; };
    // All 16 lanes are written, those beyond the slots as zeros in one of the two factors of a gradient.
    const auto write = [&](const Factor& to, int64_t of, int g, const float* from) {
      write_factor(c, to, of, first + g, from);
    };
    if (iteration == c.iterations) {
      for (int g = 0; g < count; ++g) {
        clear(carry(g), DP);
        read_rows(carry(g), c.grad_slots + (first + g) * kLanes * D, D, c.rows_in(first + g), D);
      }
    } else {
      const auto tape = [&](int g, int64_t field) { return c.tape_at(iteration, first + g, field); };
      for (int g = 0; g < count; ++g) {
        float offset[kLanes];
        collect(c, first + g, wide(g), offset, spare);
        write(c.factors.query, iteration, g, wide(g));
        const float *s = tape(g, c.tape.slots), *mean = tape(g, c.tape.mean), *inverse = tape(g, c.tape.inverse);
        normalise(spare, s, D, mean, inverse, c.slots_gain, c.slots_shift);
        write(c.factors.normed, iteration, g, spare);
        clear(narrow(g), DP);
        for (int64_t i = 0; i < D; ++i) {
          vectors(narrow(g))[i] = c.offset_weight[i] * *vectors(offset);
          vectors(sums(g, 4))[i] += *vectors(offset) * vectors(spare)[i];
        }
      }
      c.to_query.add(count, wide(0), IP * kLanes, narrow(0), DP * kLanes);
      for (int g = 0; g < count; ++g) {
        normalise_backward(narrow(g), tape(g, c.tape.slots), D, tape(g, c.tape.mean), tape(g, c.tape.inverse),
                           c.slots_gain, sums(g, 0), sums(g, 1));
        for (int64_t i = 0; i < D * kLanes; ++i) carry(g)[i] += narrow(g)[i];
      }
    }
    if (iteration == c.iterations - c.taped) {
      for (int g = 0; g < count; ++g)
        write_rows(c.grad_given + (first + g) * kLanes * D, D, c.rows_in(first + g), carry(g), D);
      continue;
    }

    const auto tape = [&](int g, int64_t field) { return c.tape_at(before, first + g, field); };
    // `carry` splits: what absent slots have of it passes by, the rest goes through the MLP and the cell.
    const auto out = [&](int g) { return out_.get() + g * DP * kLanes; };
    for (int g = 0; g < count; ++g) {
      copy(out(g), carry(g), DP);
      clear(carry(g), DP);
      for (int l = 0; l < c.rows_in(first + g); ++l)
        if (absent(c, first + g, l))
          for (int64_t i = 0; i < D; ++i) std::swap(carry(g)[i * kLanes + l], out(g)[i * kLanes + l]);
      write(c.factors.out, before, g, out(g));
      write(c.factors.hidden, before, g, tape(g, c.tape.hidden));
      clear(hidden(g), HP);
    }
    c.mlp_out.add(count, out(0), DP * kLanes, hidden(0), HP * kLanes);
    for (int g = 0; g < count; ++g) {
      const float* forward = tape(g, c.tape.hidden);
      for (int64_t i = 0; i < H * kLanes; ++i) hidden(g)[i] = forward[i] > 0.0f ? hidden(g)[i] : 0.0f;
      write(c.factors.from_hidden, before, g, hidden(g));
      clear(narrow(g), DP);
    }
    c.mlp_in.add(count, hidden(0), HP * kLanes, narrow(0), DP * kLanes);
    for (int g = 0; g < count; ++g) {
      const float *s = tape(g, c.tape.slots), *reset = tape(g, c.tape.reset), *update = tape(g, c.tape.update),
                  *candidate = tape(g, c.tape.candidate), *hidden_candidate = tape(g, c.tape.hidden_candidate),
                  *mean = tape(g, c.tape.mlp_mean), *inverse = tape(g, c.tape.mlp_inverse);
      const int64_t size = D * kLanes;
      for (int64_t i = 0; i < size; ++i) spare[i] = candidate[i] + update[i] * (s[i] - candidate[i]);
      float* normed = spare + size;
      normalise(normed, spare, D, mean, inverse, c.mlp_gain, c.mlp_shift);
      write(c.factors.mlp_normed, before, g, normed);
      normalise_backward(narrow(g), spare, D, mean, inverse, c.mlp_gain, sums(g, 2), sums(g, 3));
      float* of_gates = gates(g);
      gru_backward(size, out(g), narrow(g), s, reset, update, candidate, hidden_candidate, carry(g), of_gates);
      const Factor* of[] = {&c.factors.candidate, &c.factors.reset, &c.factors.update, &c.factors.hidden_candidate};
      for (int i = 0; i < 4; ++i) write(*of[i], before, g, of_gates + i * size);
      write(c.factors.slots, before, g, s);
      write(c.factors.pooled, before, g, tape(g, c.tape.pooled));
      clear(wide(g), IP);
    }
    c.hidden_gates.add(count, gates(0) + D * kLanes, 4 * D * kLanes, carry(0), DP * kLanes);
    c.input_gates.add(count, gates(0), 4 * D * kLanes, wide(0), IP * kLanes);
    for (int g = 0; g < count; ++g) {
      const int64_t group = first + g;
      float dot[kLanes];
      const Vector *pooled = vectors(tape(g, c.tape.pooled)), share = 1.0f / *vectors(tape(g, c.tape.total));
      Vector *e = vectors(wide(g)), sum{};
      for (int64_t i = 0; i < I; ++i) {
        e[i] *= share;
        sum += e[i] * pooled[i];
      }
      *vectors(dot) = sum;
      write_rows(c.pooled_grad.get() + group * kLanes * I, I, c.rows_in(group), wide(g), I);
      to_rows(c.pooled_dot.get() + group * kLanes, 1, c.rows_in(group), dot, 1);
      ask(c, before, group);
    }
  }
}

}  // namespace slots
}  // namespace phyx
