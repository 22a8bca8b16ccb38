// The passes of slot attention over the tokens. Slots are taken up to 8 at once, or 2 where there are 16 registers of
// 8 floats.
#include "slot_attention.h"

namespace phyx {
namespace slots {
namespace {

int64_t most_slots() { return has_wide_registers() ? 8 : 2; }

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

}  // namespace slots
}  // namespace phyx
