// What the parts of slot attention share (the formulas: slot_attention.cpp).
#pragma once
#include <cstring>
#include <utility>

#include "lanes.h"
#include "vector.h"

namespace phyx {
namespace slots {

constexpr int64_t kChunk = 32;  // tiles that share one set of sums
constexpr int64_t kPack = 8;    // tiles that are walked twice while they are in the first cache

inline int64_t tiled(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

// A linear map of lanes.
struct Map {
  std::vector<Tile> tiles;
  Panels panels;

  Map() = default;
  // Output i has its weight for input k at weight[i * output + k * input].
  Map(int64_t outputs, int64_t inputs, const float* weight, int64_t output, int64_t input, int threads)
      : tiles(tiles_of(outputs)), panels(tiles, inputs, weight, output, input, 0, threads) {}

  // out (outputs, rounded up to tiles) += weight x, for one or two groups that lie `x_next` and `out_next` apart.
  void add(int count, const float* x, int64_t x_next, float* out, int64_t out_next) const {
    const Multiply& m = multiply();
    for (size_t i = 0; i < tiles.size(); ++i) {
      const float* panel = panels.tile(static_cast<int64_t>(i));
      float* to = out + tiles[i].start * kLanes;
      if (count == 2)
        m.two(panel, panels.inputs, x, x + x_next, to, to + out_next);
      else
        m.one(panel, panels.inputs, x, to);
    }
  }
};

// What the forward keeps of a group and an iteration, as numbers of features.
struct Tape {
  int64_t slots, mean, inverse, query, offset, pooled, total, reset, update, candidate, hidden_candidate, mlp_mean,
      mlp_inverse, hidden, size;

  Tape(int64_t I, int64_t D, int64_t H) {
    int64_t at = 0;
    for (const auto& [field, features] :
         {std::pair{&slots, D}, {&mean, int64_t{1}}, {&inverse, int64_t{1}}, {&query, I}, {&offset, int64_t{1}},
          {&pooled, I}, {&total, int64_t{1}}, {&reset, D}, {&update, D}, {&candidate, D}, {&hidden_candidate, D},
          {&mlp_mean, int64_t{1}}, {&mlp_inverse, int64_t{1}}, {&hidden, H}}) {
      *field = at;
      at += features;
    }
    size = at;
  }
};

// One factor of the gradients of weights, of all slots and iterations: for every tile of features the rows, for every
// row 16 features. So it is a panel and an input of `multiply` at once.
struct Factor {
  int64_t features = 0;
  Floats panels;

  Factor() = default;
  Factor(int64_t features, int64_t rows) : features(features), panels(tiled(features) * rows) {}
};

struct Factors {
  Factor query, normed, pooled, candidate, reset, update, hidden_candidate, slots, hidden, mlp_normed, out, from_hidden;
};

// The gradient of a weight (outputs, inputs), to which it is added, and of the bias, if there is one.
struct WeightGradient {
  const Factor *of_outputs, *inputs;
  float *weight, *bias;
};

struct SlotCall {
  int64_t B, N, K, I, D, H, iterations, taped;
  int threads;
  float eps, layer_eps;
  const float* inputs;
  int64_t inputs_element, inputs_token;
  const float* slots;
  const uint8_t* mask;
  const float *offset_weight, *slots_gain, *slots_shift, *input_bias, *hidden_bias, *mlp_gain, *mlp_shift, *mlp_in_bias,
      *mlp_out_bias;
  float *slots_out, *attention, *tape_data;
  Tape tape{0, 0, 0};
  int64_t tiles, chunks, rows, groups, side_by_side;

  Floats tokens;                  // h, (B, tiles, I, lanes)
  Floats inverse;                 // (B, tiles, lanes)
  Floats query, offset;           // u (rows, I) and c (rows)
  Floats pooled, total;           // Σ w h (B, chunks, K, I) and Σ w (B, chunks, K); in the backward du and dc
  Map to_query, input_gates, hidden_gates, mlp_in, mlp_out;  // in the backward transposed

  const float *grad_slots, *grad_attention;
  float *grad_given, *grad_inputs;
  float* vector_grads[5];         // gradients of gain and shift of slots and MLP, and of o
  Factors factors;
  int64_t factor_rows;            // slots in whole groups, of all differentiated iterations
  Floats pooled_grad, pooled_dot; // e (rows, I) and t (rows)
  Floats tokens_grad;             // dh, (B, tiles, I rounded up, lanes)
  Floats carry;                   // gradient of the slots, (groups, D rounded up, lanes)
  Floats vector_sums;             // (groups, 5 D, lanes)

  float* token_tile(int64_t b, int64_t tile) const { return tokens.get() + (b * tiles + tile) * I * kLanes; }
  float* grad_tile(int64_t b, int64_t tile) const { return tokens_grad.get() + (b * tiles + tile) * tiled(I) * kLanes; }
  float* tape_at(int64_t iteration, int64_t group, int64_t field) const {
    const int64_t kept = iteration - (iterations - taped);
    return tape_data + ((std::max<int64_t>(0, kept) * groups + group) * tape.size + field) * kLanes;
  }
  bool differentiated(int64_t iteration) const { return iteration >= iterations - taped; }
  int lanes_in(int64_t tile) const { return static_cast<int>(std::min<int64_t>(kLanes, N - tile * kLanes)); }
  int rows_in(int64_t group) const { return static_cast<int>(std::min<int64_t>(kLanes, rows - group * kLanes)); }
};

// mean and 1/σ down the lanes; where there is no variance at all, 0 instead of infinity.
PHYX_INLINE void moments(const float* x, int64_t size, float eps, float* mean, float* inverse) {
  const Vector* in = vectors(x);
  const float share = 1.0f / static_cast<float>(size);
  Vector centre{}, square{};
  for (int64_t i = 0; i < size; ++i) centre += in[i];
  centre = share * centre;
  for (int64_t i = 0; i < size; ++i) square += (in[i] - centre) * (in[i] - centre);
  square = share * square;
  *vectors(mean) = centre;
  for (int l = 0; l < kLanes; ++l) {
    const float variance = square[l] + eps;
    inverse[l] = variance > 0.0f ? 1.0f / std::sqrt(variance) : variance;
  }
}

PHYX_INLINE void normalise(float* to, const float* x, int64_t size, const float* mean, const float* inverse,
                           const float* gain, const float* shift) {
  const Vector *in = vectors(x), centre = *vectors(mean), scale = *vectors(inverse);
  for (int64_t i = 0; i < size; ++i) vectors(to)[i] = gain[i] * ((in[i] - centre) * scale) + shift[i];
}

// grad <- the gradient of x; those of gain and shift are added to the sums (size, lanes).
PHYX_INLINE void normalise_backward(float* grad, const float* x, int64_t size, const float* mean, const float* inverse,
                                    const float* gain, float* gain_sum, float* shift_sum) {
  const Vector *in = vectors(x), centre = *vectors(mean), scale = *vectors(inverse);
  Vector *d = vectors(grad), sum{}, dot{};
  for (int64_t i = 0; i < size; ++i) {
    const Vector n = (in[i] - centre) * scale, from_out = d[i];
    vectors(gain_sum)[i] += from_out * n;
    vectors(shift_sum)[i] += from_out;
    d[i] = gain[i] * from_out;
    sum += d[i];
    dot += d[i] * n;
  }
  const float share = 1.0f / static_cast<float>(size);
  for (int64_t i = 0; i < size; ++i) d[i] = scale * (d[i] - share * (sum + (in[i] - centre) * scale * dot));
}

PHYX_INLINE void broadcast(float* to, const float* values, int64_t size) {
  for (int64_t i = 0; i < size; ++i) vectors(to)[i] = Vector{} + values[i];
}

PHYX_INLINE void clear(float* x, int64_t features) { std::memset(x, 0, sizeof(float) * features * kLanes); }
PHYX_INLINE void copy(float* to, const float* from, int64_t features) {
  std::memcpy(to, from, sizeof(float) * features * kLanes);
}

#if defined(__GNUC__) && !defined(__clang__)
// Of two rows that lie `kSide` apart, exchanges what is off the diagonal of every square of twice `kSide`.
template <int kSide>
PHYX_INLINE void exchange(Vector& a, Vector& b) {
  typedef int Places __attribute__((vector_size(4 * kLanes)));
  Places first{}, second{};
  for (int l = 0; l < kLanes; ++l) {
    first[l] = l & kSide ? kLanes + (l ^ kSide) : l;
    second[l] = l & kSide ? kLanes + l : l ^ kSide;
  }
  const Vector x = a, y = b;
  a = __builtin_shuffle(x, y, first);
  b = __builtin_shuffle(x, y, second);
}

template <int kSide>
PHYX_INLINE void exchange(Vector* rows) {
  for (int r = 0; r < kLanes; ++r)
    if (!(r & kSide)) exchange<kSide>(rows[r], rows[r + kSide]);
}

// rows (kSide) <- of rows (2 kSide), neighbours of `kSide` lanes added up.
template <int kSide>
PHYX_INLINE void halve(Vector* rows) {
  for (int r = 0; r < kSide; ++r) {
    exchange<kSide>(rows[r], rows[r + kSide]);
    rows[r] += rows[r + kSide];
  }
}

// to (16) <- sums over lanes of x (16, lanes).
PHYX_INLINE void sum_lanes_of_tile(float* to, const float* x) {
  Vector rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = vectors(x)[r];
  halve<8>(rows);
  halve<4>(rows);
  halve<2>(rows);
  halve<1>(rows);
  *vectors(to) = rows[0];
}

// to (16, 16) <- fromᵀ, in registers where there are 32.
PHYX_INLINE void transpose(float* to, int64_t to_row, const float* from, int64_t from_row) {
  Vector rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = *vectors(from + r * from_row);
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
  for (int r = 0; r < kLanes; ++r) *vectors(to + r * to_row) = rows[r];
}
#else
PHYX_INLINE void transpose(float* to, int64_t to_row, const float* from, int64_t from_row) {
  for (int r = 0; r < kLanes; ++r)
    for (int l = 0; l < kLanes; ++l) to[r * to_row + l] = from[l * from_row + r];
}

PHYX_INLINE void sum_lanes_of_tile(float* to, const float* x) {
  for (int r = 0; r < kLanes; ++r) {
    to[r] = 0.0f;
    for (int l = 0; l < kLanes; ++l) to[r] += x[r * kLanes + l];
  }
}
#endif

// Between rows and lanes; lanes without a row read as 0 and are not written.
PHYX_INLINE void read_rows(float* to, const float* rows, int64_t stride, int lanes, int64_t features) {
  int64_t f = 0;
  if (lanes == kLanes)
    for (; f + kTile <= features; f += kTile) transpose(to + f * kLanes, kLanes, rows + f, stride);
  from_rows(to + f * kLanes, rows + f, stride, lanes, static_cast<int>(features - f));
}

PHYX_INLINE void write_rows(float* rows, int64_t stride, int lanes, const float* from, int64_t features) {
  int64_t f = 0;
  if (lanes == kLanes)
    for (; f + kTile <= features; f += kTile) transpose(rows + f, stride, from + f * kLanes, kLanes);
  to_rows(rows + f, stride, lanes, from + f * kLanes, static_cast<int>(features - f));
}

// to (count) <- sums over lanes of x (count, lanes).
PHYX_INLINE void sum_lanes(float* to, const float* x, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sum_lanes_of_tile(to + i, x + i * kLanes);
  if (i == count) return;
  alignas(64) float rest[kLanes * kLanes] = {}, sums[kLanes];
  copy(rest, x + i * kLanes, count - i);
  sum_lanes_of_tile(sums, rest);
  std::memcpy(to + i, sums, sizeof(float) * (count - i));
}

// slot_attention_tokens.cpp: items [begin, end) are chunks of tokens, (B, chunks).
void slot_normalise_tokens(const SlotCall& c, int64_t begin, int64_t end);
void slot_forward_tokens(const SlotCall& c, bool last, int64_t begin, int64_t end);
void slot_backward_tokens(const SlotCall& c, bool last, int64_t begin, int64_t end);
void slot_leave_tokens(const SlotCall& c, int64_t begin, int64_t end);

// slot_attention_slots.cpp: items are groups of slots, `side_by_side` of them.
void slot_forward_rows(const SlotCall& c, int64_t iteration, int64_t begin, int64_t end);
void slot_backward_rows(const SlotCall& c, int64_t iteration, int64_t begin, int64_t end);

}  // namespace slots
}  // namespace phyx
