// Slot attention and its gradients (contract and reference: phyxdream/ops/slot_attention.py).
//
// Keys and values are never made. With h the normalised inputs, without gain and shift, and y the normalised slots,
//   k·q = h·u + c,   u = U y,   c = o·y                      (K vectors u for each element of the batch)
//   input gates of the GRU = G m + bias,   m = Σ w h / Σ w,   w = A + eps
// where U, o and G are products of weights (phyxdream/ops/slot_attention_weights.py), so a pass over the tokens reads h alone: K products for the logits, K for the sums. Backward, with e the gradient of m
// divided by Σ w, and t = m·e, which is what Σ_n w (h·e) would give:
//   dA = h·e - t      dl = A ⊙ (dA - Σ_k A dA)      dh += Σ_k dl u + w e      du = Σ_n dl h      dc = Σ_n dl
// The softmax is over slots, so it never leaves a token, and nothing of size N·K is kept.
//
// Both halves lie in lanes (csrc/lanes.h): tokens in tiles of 16, and slots, whatever element they are of, in groups of
// 16. Tokens are walked in chunks of a fixed length, each with its own sums, so threads leave no trace in the result.
#include <cstring>
#include <utility>

#include "bindings.h"
#include "lanes.h"
#include "vector.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kChunk = 32;  // tiles that share one set of sums
constexpr int64_t kPack = 8;    // tiles that are walked twice while they are in the first cache

// Loops over lanes are written with vectors: GCC unrolls them before it looks for any.

int64_t tiled(int64_t size) { return (size + kTile - 1) / kTile * kTile; }

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

}  // namespace

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

namespace {

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

// ---------------------------------------------------------------------------------------------------------------------
// Tokens. Slots are taken up to 8 at once, or 2 where there are 16 registers of 8 floats.

int64_t most_slots() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has_wide = __builtin_cpu_supports("avx512f");
  return has_wide ? 8 : 2;
#else
  return 2;
#endif
}

// out[t][k] = Σ_d vectors_of_slots[k][d] h[t][d] for kTiles tiles.
template <int kSlots, int kTiles>
PHYX_INLINE void project(const float* slots, int64_t I, const float* h, float* out, int64_t out_tile) {
  Vector sum[kTiles][kSlots];
  std::memset(&sum, 0, sizeof sum);
  const Vector* in = vectors(h);
  for (int64_t d = 0; d < I; ++d) {
    Vector v[kTiles];
    for (int t = 0; t < kTiles; ++t) v[t] = in[t * I + d];
    for (int k = 0; k < kSlots; ++k) {
      const float w = slots[k * I + d];
      for (int t = 0; t < kTiles; ++t) sum[t][k] += w * v[t];
    }
  }
  for (int t = 0; t < kTiles; ++t)
    for (int k = 0; k < kSlots; ++k) vectors(out + t * out_tile)[k] = sum[t][k];
}

// For all slots and tiles of a pack.
struct ProjectPack {
  const float* slots;
  int64_t I;
  const float* h;
  int64_t tiles;
  float* out;
  int64_t out_tile;

  template <int kSlots>
  PHYX_INLINE void run(int64_t k) const {
    const float* of = slots + k * I;
    float* to = out + k * kLanes;
    int64_t t = 0;
    for (; t + 1 < tiles; t += 2) project<kSlots, 2>(of, I, h + t * I * kLanes, to + t * out_tile, out_tile);
    if (t < tiles) project<kSlots, 1>(of, I, h + t * I * kLanes, to + t * out_tile, out_tile);
  }
};

// sums[k][d] += Σ_t w[t][k] h[t][d] for kInputs neighbouring d, lane by lane.
template <int kSlots, int kInputs>
PHYX_INLINE void gather(const float* w, int64_t w_tile, const float* h, int64_t I, int64_t tiles, float* sums) {
  Vector sum[kSlots][kInputs];
  for (int k = 0; k < kSlots; ++k)
    for (int d = 0; d < kInputs; ++d) sum[k][d] = vectors(sums)[k * I + d];
  for (int64_t t = 0; t < tiles; ++t) {
    const Vector *in = vectors(h) + t * I, *weight = vectors(w + t * w_tile);
    Vector v[kInputs];
    for (int d = 0; d < kInputs; ++d) v[d] = in[d];
    for (int k = 0; k < kSlots; ++k) {
      const Vector by = weight[k];
      for (int d = 0; d < kInputs; ++d) sum[k][d] += by * v[d];
    }
  }
  for (int k = 0; k < kSlots; ++k)
    for (int d = 0; d < kInputs; ++d) vectors(sums)[k * I + d] = sum[k][d];
}

struct GatherPack {
  const float* w;
  int64_t w_tile;
  const float* h;
  int64_t I, tiles;
  float* sums;

  template <int kSlots>
  PHYX_INLINE void run(int64_t k) const {
    const float* by = w + k * kLanes;
    float* to = sums + k * I * kLanes;
    int64_t d = 0;
    for (; d + 3 <= I; d += 3) gather<kSlots, 3>(by, w_tile, h + d * kLanes, I, tiles, to + d * kLanes);
    for (; d < I; ++d) gather<kSlots, 1>(by, w_tile, h + d * kLanes, I, tiles, to + d * kLanes);
  }
};

// Runs a pass for even shares of K slots. Not a lambda, which would not be inlined and so be compiled for the baseline.
template <typename Pass>
PHYX_INLINE void for_slots(int64_t K, int64_t most, const Pass& pass) {
  const int64_t parts = (K + most - 1) / most;
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t count = K / parts + (part < K % parts);
    switch (count) {
      case 1: pass.template run<1>(first); break;
      case 2: pass.template run<2>(first); break;
      case 3: pass.template run<3>(first); break;
      case 4: pass.template run<4>(first); break;
      case 5: pass.template run<5>(first); break;
      case 6: pass.template run<6>(first); break;
      case 7: pass.template run<7>(first); break;
      default: pass.template run<8>(first); break;
    }
    first += count;
  }
}

// logits (K, lanes) <- attention; absent slots get none.
PHYX_INLINE void softmax(float* logits, const float* offset, const uint8_t* present, int64_t K) {
  float peak[kLanes], sum[kLanes] = {};
#pragma GCC unroll 1
  for (int l = 0; l < kLanes; ++l) peak[l] = -INFINITY;
  for (int64_t k = 0; k < K; ++k) {
    if (present && !present[k]) continue;
    const float by = offset[k];
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) {
      const float x = logits[k * kLanes + l] += by;
      peak[l] = x > peak[l] ? x : peak[l];
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    if (present && !present[k]) {
      clear(logits + k * kLanes, 1);
      continue;
    }
#pragma GCC unroll 1
    for (int l = 0; l < kLanes; ++l) sum[l] += logits[k * kLanes + l] = vec_exp(logits[k * kLanes + l] - peak[l]);
  }
  const Vector scale = 1.0f / *vectors(sum);
  for (int64_t k = 0; k < K; ++k)
    if (!present || present[k]) vectors(logits)[k] *= scale;
}

}  // namespace

// tokens and 1/σ of chunks [begin, end) of (B, chunks).
PHYX_MULTIVERSION void slot_normalise_tokens(const SlotCall& c, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / c.chunks, first = item % c.chunks * kChunk;
    for (int64_t tile = first; tile < std::min(c.tiles, first + kChunk); ++tile) {
      float *h = c.token_tile(b, tile), *inverse = c.inverse.get() + (b * c.tiles + tile) * kLanes, mean[kLanes];
      Vector* in = vectors(h);
      read_rows(h, c.inputs + b * c.inputs_element + tile * kLanes * c.inputs_token, c.inputs_token, c.lanes_in(tile),
                c.I);
      moments(h, c.I, c.layer_eps, mean, inverse);
      const Vector centre = *vectors(mean), scale = *vectors(inverse);
      for (int64_t i = 0; i < c.I; ++i) in[i] = (in[i] - centre) * scale;
    }
  }
}

PHYX_MULTIVERSION void slot_forward_tokens(const SlotCall& c, bool last, int64_t begin, int64_t end) {
  const int64_t K = c.K, I = c.I, most = most_slots();
  const Floats buffer(kPack * K * kLanes), sum_buffer(K * (I + 1) * kLanes);
  float *logits = buffer.get(), *sums = sum_buffer.get(), *totals = sums + K * I * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / c.chunks, first = item % c.chunks * kChunk, stop = std::min(c.tiles, first + kChunk);
    const float *query = c.query.get() + b * K * I, *offset = c.offset.get() + b * K;
    clear(sums, K * (I + 1));
    for (int64_t pack = first; pack < stop; pack += kPack) {
      const int64_t tiles = std::min(kPack, stop - pack);
      const float* h = c.token_tile(b, pack);
      for_slots(K, most, ProjectPack{query, I, h, tiles, logits, K * kLanes});
      for (int64_t t = 0; t < tiles; ++t) {
        float* a = logits + t * K * kLanes;
        const int lanes = c.lanes_in(pack + t);
        softmax(a, offset, c.mask ? c.mask + b * K : nullptr, K);
        if (last && c.attention)
          for (int64_t k = 0; k < K; ++k)
            std::memcpy(c.attention + (b * K + k) * c.N + (pack + t) * kLanes, a + k * kLanes, sizeof(float) * lanes);
        for (int64_t k = 0; k < K; ++k) {
          vectors(a)[k] += c.eps;
          for (int l = lanes; l < kLanes; ++l) a[k * kLanes + l] = 0.0f;
          vectors(totals)[k] += vectors(a)[k];
        }
      }
      for_slots(K, most, GatherPack{logits, K * kLanes, h, I, tiles, sums});
    }
    sum_lanes(c.total.get() + item * K, totals, K);
    sum_lanes(c.pooled.get() + item * K * I, sums, K * I);
  }
}

// With `last`, this is the first time that the tokens have a gradient.
PHYX_MULTIVERSION void slot_backward_tokens(const SlotCall& c, bool last, int64_t begin, int64_t end) {
  const int64_t K = c.K, I = c.I, most = most_slots(), two = 2 * K * kLanes, spread = tiled(I) * kLanes;
  const Floats coefficients(kPack * two), slopes(kPack * K * kLanes), sum_buffer(K * (I + 1) * kLanes);
  const Floats both(2 * K * I);
  float *sums = sum_buffer.get(), *totals = sums + K * I * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / c.chunks, first = item % c.chunks * kChunk, stop = std::min(c.tiles, first + kChunk);
    const float *query = c.query.get() + b * K * I, *offset = c.offset.get() + b * K;
    const float *grad = c.pooled_grad.get() + b * K * I, *dot = c.pooled_dot.get() + b * K;
    std::memcpy(both.get(), query, sizeof(float) * K * I);
    std::memcpy(both.get() + K * I, grad, sizeof(float) * K * I);
    const Map to_tokens(I, 2 * K, both.get(), 1, I, 1);
    clear(sums, K * (I + 1));
    for (int64_t pack = first; pack < stop; pack += kPack) {
      const int64_t tiles = std::min(kPack, stop - pack);
      const float* h = c.token_tile(b, pack);
      for_slots(K, most, ProjectPack{query, I, h, tiles, coefficients.get(), two});
      for_slots(K, most, ProjectPack{grad, I, h, tiles, slopes.get(), K * kLanes});
      for (int64_t t = 0; t < tiles; ++t) {
        float *a = coefficients.get() + t * two, *w = a + K * kLanes, *da = slopes.get() + t * K * kLanes;
        const int lanes = c.lanes_in(pack + t);
        Vector mean{};
        softmax(a, offset, c.mask ? c.mask + b * K : nullptr, K);
        for (int64_t k = 0; k < K; ++k) {
          Vector slope = vectors(da)[k] - dot[k];
          if (last && c.grad_attention) {
            Vector given{};
            std::memcpy(&given, c.grad_attention + (b * K + k) * c.N + (pack + t) * kLanes, sizeof(float) * lanes);
            slope += given;
          }
          vectors(da)[k] = slope;
          mean += vectors(a)[k] * slope;
          vectors(w)[k] = vectors(a)[k] + c.eps;
        }
        for (int64_t k = 0; k < K; ++k) {
          vectors(a)[k] *= vectors(da)[k] - mean;
          for (int l = lanes; l < kLanes; ++l) a[k * kLanes + l] = 0.0f;
          vectors(totals)[k] += vectors(a)[k];
        }
      }
      for_slots(K, most, GatherPack{coefficients.get(), two, h, I, tiles, sums});
      float* to = c.grad_tile(b, pack);
      if (last) std::memset(to, 0, sizeof(float) * tiles * spread);
      for (int64_t t = 0; t < tiles; t += 2)
        to_tokens.add(static_cast<int>(std::min<int64_t>(2, tiles - t)), coefficients.get() + t * two, two,
                      to + t * spread, spread);
    }
    sum_lanes(c.total.get() + item * K, totals, K);
    sum_lanes(c.pooled.get() + item * K * I, sums, K * I);
  }
}

// From the gradients of h to those of the inputs.
PHYX_MULTIVERSION void slot_leave_tokens(const SlotCall& c, int64_t begin, int64_t end) {
  const float share = 1.0f / static_cast<float>(c.I);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / c.chunks, first = item % c.chunks * kChunk;
    for (int64_t tile = first; tile < std::min(c.tiles, first + kChunk); ++tile) {
      float* grad = c.grad_tile(b, tile);
      const Vector *h = vectors(c.token_tile(b, tile)), scale = vectors(c.inverse.get())[b * c.tiles + tile];
      Vector *d = vectors(grad), sum{}, dot{};
      for (int64_t i = 0; i < c.I; ++i) {
        sum += d[i];
        dot += d[i] * h[i];
      }
      for (int64_t i = 0; i < c.I; ++i) d[i] = scale * (d[i] - share * (sum + h[i] * dot));
      write_rows(c.grad_inputs + (b * c.N + tile * kLanes) * c.I, c.I, c.lanes_in(tile), grad, c.I);
    }
  }
}

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Slots.

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

namespace {

// Tiles [begin, end) of outputs, those of all weights in a row.
void add_weight_gradients(const SlotCall& c, const std::vector<WeightGradient>& all, int64_t begin, int64_t end) {
  const Multiply& m = multiply();
  const int64_t rows = c.factor_rows;
  alignas(64) float sums[2][kTile * kLanes];
  int64_t before = 0;
  for (const WeightGradient& w : all) {
    const int64_t outputs = w.of_outputs->features, inputs = w.inputs->features, tiles = tiled(outputs) / kTile;
    for (int64_t tile = std::max(begin, before); tile < std::min(end, before + tiles); ++tile) {
      const int64_t first = (tile - before) * kTile, count = std::min<int64_t>(kTile, outputs - first);
      const float* panel = w.of_outputs->panels.get() + first * rows;
      for (int64_t i = 0; i < inputs; i += 2 * kTile) {
        const float* x = w.inputs->panels.get() + i * rows;
        const bool two = i + kTile < inputs;
        std::memset(sums, 0, sizeof sums);
        if (two)
          m.two(panel, rows, x, x + kTile * rows, sums[0], sums[1]);
        else
          m.one(panel, rows, x, sums[0]);
        for (int64_t o = 0; o < count; ++o)
          for (int64_t j = i; j < std::min(inputs, i + 2 * kTile); ++j)
            w.weight[(first + o) * inputs + j] += sums[(j - i) / kTile][o * kLanes + (j - i) % kTile];
      }
      if (!w.bias) continue;
      Vector sum[4] = {};  // one would wait for itself
      for (int64_t row = 0; row < rows; row += 4)
        for (int i = 0; i < 4; ++i) sum[i] += vectors(panel)[row + i];
      const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int64_t o = 0; o < count; ++o) w.bias[first + o] += all[static_cast<int>(o)];
    }
    before += tiles;
  }
}

template <typename T = float>
T* address(const py::dict& arguments, const char* name) {
  const py::object value = arguments[name];
  return value.is_none() ? nullptr : reinterpret_cast<T*>(value.cast<uintptr_t>());
}

void set_up(SlotCall& c, const py::dict& a) {
  const auto size = [&](const char* name) { return a[name].cast<int64_t>(); };
  c.B = size("B"), c.N = size("N"), c.K = size("K"), c.I = size("I"), c.D = size("D"), c.H = size("H");
  c.iterations = size("iterations");
  c.taped = size("taped");
  c.threads = static_cast<int>(size("threads"));
  c.eps = a["eps"].cast<float>();
  c.layer_eps = a["layer_eps"].cast<float>();
  c.inputs = address(a, "inputs");
  c.inputs_element = size("inputs_element");
  c.inputs_token = size("inputs_token");
  c.slots = address(a, "slots");
  c.mask = address<const uint8_t>(a, "slot_mask");
  c.offset_weight = address(a, "offset");
  c.slots_gain = address(a, "slots_gain");
  c.slots_shift = address(a, "slots_shift");
  c.input_bias = address(a, "input_bias");
  c.hidden_bias = address(a, "hidden_bias");
  c.mlp_gain = address(a, "mlp_gain");
  c.mlp_shift = address(a, "mlp_shift");
  c.mlp_in_bias = address(a, "mlp_in_bias");
  c.mlp_out_bias = address(a, "mlp_out_bias");
  c.tape_data = address(a, "tape");
  c.tape = Tape(c.I, c.D, c.H);
  c.tiles = (c.N + kLanes - 1) / kLanes;
  c.chunks = (c.tiles + kChunk - 1) / kChunk;
  c.rows = c.B * c.K;
  c.groups = (c.rows + kLanes - 1) / kLanes;
  c.side_by_side = c.groups < 4 ? 1 : 2;
  c.tokens = Floats(c.B * c.tiles * c.I * kLanes);
  c.inverse = Floats(c.B * c.tiles * kLanes);
  c.query = Floats(c.rows * c.I);
  c.offset = Floats(c.rows);
  c.pooled = Floats(c.B * c.chunks * c.K * c.I);
  c.total = Floats(c.B * c.chunks * c.K);
}

// Items are chunks of tokens; some microseconds of them make a block.
template <typename Body>
void over_tokens(const SlotCall& c, Body&& body) {
  const int64_t tiles = std::min(c.tiles, kChunk);
  parallel_for(c.B * c.chunks, std::max<int64_t>(1, kChunk / tiles), c.threads, body);
}

template <typename Body>
void over_slots(const SlotCall& c, Body&& body) {
  parallel_for((c.groups + c.side_by_side - 1) / c.side_by_side, 1, c.threads, body);
}

void forward(const py::dict& a) {
  SlotCall c{};
  set_up(c, a);
  c.slots_out = address(a, "slots_out");
  c.attention = address(a, "attention");
  const float *to_query = address(a, "query"), *input_gates = address(a, "input_gates"),
              *hidden_gates = address(a, "hidden_gates"), *mlp_in = address(a, "mlp_in"),
              *mlp_out = address(a, "mlp_out");
  py::gil_scoped_release release;
  const int64_t I = c.I, D = c.D, H = c.H;
  c.to_query = Map(I, D, to_query, D, 1, c.threads);
  c.input_gates = Map(3 * D, I, input_gates, I, 1, c.threads);
  c.hidden_gates = Map(3 * D, D, hidden_gates, D, 1, c.threads);
  c.mlp_in = Map(H, D, mlp_in, D, 1, c.threads);
  c.mlp_out = Map(D, H, mlp_out, H, 1, c.threads);
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_normalise_tokens(c, begin, end); });
  for (int64_t i = 0; i <= c.iterations; ++i) {
    over_slots(c, [&](int64_t begin, int64_t end) { slot_forward_rows(c, i, begin, end); });
    if (i < c.iterations)
      over_tokens(c, [&](int64_t begin, int64_t end) { slot_forward_tokens(c, i == c.iterations - 1, begin, end); });
  }
}

void backward(const py::dict& a) {
  SlotCall c{};
  set_up(c, a);
  c.grad_slots = address(a, "grad_slots");
  c.grad_attention = address(a, "grad_attention");
  c.grad_given = address(a, "grad_given");
  c.grad_inputs = address(a, "grad_inputs");
  const char* names[] = {"grad_slots_gain", "grad_slots_shift", "grad_mlp_gain", "grad_mlp_shift", "grad_offset"};
  for (int i = 0; i < 5; ++i) c.vector_grads[i] = address(a, names[i]);
  Factors& f = c.factors;
  const int64_t of_pooled = c.D * c.I, of_slots = c.D * c.D;
  float *of_input = address(a, "grad_input_gates"), *input_bias = address(a, "grad_input_bias"),
        *of_hidden = address(a, "grad_hidden_gates"), *hidden_bias = address(a, "grad_hidden_bias");
  const std::vector<WeightGradient> weights{
      {&f.query, &f.normed, address(a, "grad_query"), nullptr},
      {&f.reset, &f.pooled, of_input, input_bias},
      {&f.update, &f.pooled, of_input + of_pooled, input_bias + c.D},
      {&f.candidate, &f.pooled, of_input + 2 * of_pooled, input_bias + 2 * c.D},
      {&f.reset, &f.slots, of_hidden, hidden_bias},
      {&f.update, &f.slots, of_hidden + of_slots, hidden_bias + c.D},
      {&f.hidden_candidate, &f.slots, of_hidden + 2 * of_slots, hidden_bias + 2 * c.D},
      {&f.from_hidden, &f.mlp_normed, address(a, "grad_mlp_in"), address(a, "grad_mlp_in_bias")},
      {&f.out, &f.hidden, address(a, "grad_mlp_out"), address(a, "grad_mlp_out_bias")},
  };
  const float *to_query = address(a, "query"), *input_gates = address(a, "input_gates"),
              *hidden_gates = address(a, "hidden_gates"), *mlp_in = address(a, "mlp_in"),
              *mlp_out = address(a, "mlp_out");
  py::gil_scoped_release release;
  const int64_t I = c.I, D = c.D, H = c.H;
  c.to_query = Map(D, I, to_query, 1, D, c.threads);
  c.input_gates = Map(I, 3 * D, input_gates, 1, I, c.threads);  // of candidate, reset, update
  c.hidden_gates = Map(D, 3 * D, hidden_gates, 1, D, c.threads);
  c.mlp_in = Map(D, H, mlp_in, 1, D, c.threads);
  c.mlp_out = Map(H, D, mlp_out, 1, H, c.threads);
  const int64_t rows = c.factor_rows = c.taped * c.groups * kLanes;
  f = {Factor(I, rows), Factor(D, rows), Factor(I, rows), Factor(D, rows), Factor(D, rows), Factor(D, rows),
       Factor(D, rows), Factor(D, rows), Factor(H, rows), Factor(D, rows), Factor(D, rows), Factor(H, rows)};
  c.pooled_grad = Floats(c.rows * I);
  c.pooled_dot = Floats(c.rows);
  c.tokens_grad = Floats(c.B * c.tiles * tiled(I) * kLanes);
  c.carry = Floats(c.groups * tiled(D) * kLanes);
  c.vector_sums = Floats(c.groups * 5 * D * kLanes);
  clear(c.vector_sums.get(), c.groups * 5 * D);
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_normalise_tokens(c, begin, end); });
  for (int64_t i = c.iterations; i >= c.iterations - c.taped; --i) {
    over_slots(c, [&](int64_t begin, int64_t end) { slot_backward_rows(c, i, begin, end); });
    if (i > c.iterations - c.taped)
      over_tokens(c, [&](int64_t begin, int64_t end) { slot_backward_tokens(c, i == c.iterations, begin, end); });
  }
  over_tokens(c, [&](int64_t begin, int64_t end) { slot_leave_tokens(c, begin, end); });
  int64_t tiles = 0;
  for (const WeightGradient& w : weights) tiles += tiled(w.of_outputs->features) / kTile;
  parallel_for(tiles, 1, c.threads, [&](int64_t begin, int64_t end) { add_weight_gradients(c, weights, begin, end); });
  for (int64_t g = 0; g < c.groups; ++g) {
    const float* from = c.vector_sums.get() + g * 5 * D * kLanes;
    for (float* to : c.vector_grads)
      for (int64_t i = 0; i < D; ++i, from += kLanes)
        for (int l = 0; l < kLanes; ++l) to[i] += from[l];
  }
}

}  // namespace

void bind_slot_attention(py::module_& module) {
  module.def("slot_attention_forward", &forward);
  module.def("slot_attention_backward", &backward);
}

}  // namespace phyx
