// Batches seen sideways: 16 sequences lie side by side, one a lane, and features follow each other.
//
// A recurrent step multiplies few rows by large matrices. With a vector holding one feature of 16 sequences, a weight is
// read once and broadcast, norms and softmaxes are sums down the lanes, and no sum crosses them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "vec_math.h"

namespace phyx {

constexpr int kLanes = 16;  // sequences in a group
constexpr int kTile = 16;   // features computed at once

// Aligned floats that are not initialised.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t size) : data_(static_cast<float*>(::operator new[](sizeof(float) * size, std::align_val_t(64)))) {}
  float* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
};

// (groups, features, lanes), with `group` floats from one group to the next.
struct Lanes {
  float* data = nullptr;
  int64_t group = 0;

  PHYX_INLINE float* at(int64_t g, int64_t feature) const { return data + g * group + feature * kLanes; }
};

// Up to 16 neighbouring outputs of a layer; those of a block-diagonal map never cross a block.
struct Tile {
  int64_t start;
  int count;
  int64_t block;
};

inline std::vector<Tile> tiles_of(int64_t size, int64_t blocks = 1) {
  std::vector<Tile> tiles;
  const int64_t block_size = size / blocks;
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t i = 0; i < block_size; i += kTile)
      tiles.push_back({b * block_size + i, static_cast<int>(std::min<int64_t>(kTile, block_size - i)), b});
  return tiles;
}

// Where the weights of a tile lie: that of its output i for input k at data[i * output + k * input].
struct WeightTile {
  const float* data;
  int64_t output, input;
  int count;  // outputs
};

// A weight matrix as tiles read it: laid out in their order (for every tile its inputs, for every input 16 outputs), or
// where it lies, if it is read too few times for the layout to pay.
class Panels {
 public:
  int64_t inputs = 0;

  Panels() = default;
  // Output i of block b has its weight for input k at weight[b * block + i * output + k * input]. `threads` lay them
  // out; 0 leave them where they lie.
  Panels(const std::vector<Tile>& tiles, int64_t inputs, const float* weight, int64_t output, int64_t input,
         int64_t block, int threads)
      : inputs(inputs) {
    int64_t first_of_block = 0;
    from_.reserve(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
      if (i > 0 && tiles[i].block != tiles[i - 1].block) first_of_block = tiles[i].start;
      from_.push_back({weight + tiles[i].block * block + (tiles[i].start - first_of_block) * output, output, input,
                       tiles[i].count});
    }
    if (threads == 0) return;
    floats_ = Floats(static_cast<int64_t>(tiles.size()) * inputs * kTile);
    parallel_for(static_cast<int64_t>(tiles.size()), 2, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(floats_.get() + i * inputs * kTile, from_[i], inputs);
    });
  }

  PHYX_INLINE bool in_place() const { return !floats_.get(); }
  PHYX_INLINE const float* tile(int64_t i) const { return floats_.get() + i * inputs * kTile; }
  PHYX_INLINE const WeightTile& where(int64_t i) const { return from_[i]; }

 private:
  static void pack(float* to, const WeightTile& from, int64_t inputs);
  std::vector<WeightTile> from_;
  Floats floats_;
};

// out (16, lanes) += panel (inputs, 16)ᵀ x (inputs, lanes), for one group or for two that share the weights.
using MultiplyOne = void (*)(const float* panel, int64_t inputs, const float* x, float* out);
using MultiplyTwo = void (*)(const float* panel, int64_t inputs, const float* x0, const float* x1, float* out0,
                             float* out1);
// The same with weights that lie anywhere; outputs that there are not get anything.
using MultiplyInPlace = void (*)(const WeightTile& weights, int64_t inputs, const float* x, float* out);
struct Multiply {
  MultiplyOne one;
  MultiplyTwo two;
  MultiplyInPlace in_place;
};
const Multiply& multiply();  // by the registers this processor has

// Rows (lanes, features) with `stride` floats from lane to lane, to a tile (features, lanes) and back. Lanes beyond
// `lanes` read as 0 and are not written.
void from_rows(float* tile, const float* rows, int64_t stride, int lanes, int features);
void to_rows(float* rows, int64_t stride, int lanes, const float* tile, int features);

// Asks for rows that are needed soon: one below the other they lie on different pages, where no hardware looks ahead.
PHYX_INLINE void prefetch_rows(const float* rows, int64_t stride, int lanes, int64_t features) {
#if defined(__GNUC__)
  constexpr int64_t line = 16;
  for (int l = 0; l < lanes; ++l)
    for (int64_t f = 0; f < features; f += line) __builtin_prefetch(rows + l * stride + f);
#else
  (void)rows, (void)stride, (void)lanes, (void)features;
#endif
}

// Functions of one element for loops over lanes; errors are some units of the last place.
PHYX_INLINE float sigmoid(float x) { return 1.0f / (1.0f + vec_exp(x < -87.0f ? 87.0f : -x)); }

PHYX_INLINE float tanh_of(float x) {
  const float t = x * x;
  float p = 0.021869489f;  // the series of tanh, where 1 - 2 / (e^2x + 1) would cancel
  p = p * t - 0.053968254f;
  p = p * t + 0.13333333f;
  p = p * t - 0.33333333f;
  const float near = x + x * t * p;
  const float far = 1.0f - 2.0f / (1.0f + vec_exp(x > 40.0f ? 80.0f : 2.0f * x));
  return t < 0.04f ? near : far;
}

PHYX_INLINE float expm1_of(float x) {
  float p = 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  const float near = x + x * x * p;
  return x > -0.25f ? near : vec_exp(x) - 1.0f;  // for x <= 0
}

PHYX_INLINE float softplus(float x) { return (x > 0.0f ? x : 0.0f) + vec_log(1.0f + vec_exp(x > 0.0f ? -x : x)); }

}  // namespace phyx
