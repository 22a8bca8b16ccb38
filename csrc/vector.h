// Sixteen floats as one value, and the transposition that turns rows into such vectors.
#pragma once
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace phyx {

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
#else
struct Vector {
  float lane[16];

  float& operator[](int l) { return lane[l]; }
  template <typename F>
  Vector& each(F f) {
    for (int l = 0; l < 16; ++l) lane[l] = f(lane[l], l);
    return *this;
  }
  Vector& operator+=(const Vector& x) { return each([&](float a, int l) { return a + x.lane[l]; }); }
  Vector& operator-=(const Vector& x) { return each([&](float a, int l) { return a - x.lane[l]; }); }
  Vector& operator*=(const Vector& x) { return each([&](float a, int l) { return a * x.lane[l]; }); }
  Vector& operator/=(const Vector& x) { return each([&](float a, int l) { return a / x.lane[l]; }); }
  Vector& operator+=(float x) { return each([&](float a, int) { return a + x; }); }
  Vector& operator*=(float x) { return each([&](float a, int) { return a * x; }); }
  friend Vector operator+(Vector a, const Vector& b) { return a += b; }
  friend Vector operator-(Vector a, const Vector& b) { return a -= b; }
  friend Vector operator*(Vector a, const Vector& b) { return a *= b; }
  friend Vector operator/(Vector a, const Vector& b) { return a /= b; }
  friend Vector operator+(Vector a, float b) { return a += b; }
  friend Vector operator-(Vector a, float b) { return a += -b; }
  friend Vector operator*(float w, Vector x) { return x *= w; }
  friend Vector operator/(float w, const Vector& x) {
    Vector y;
    return y.each([&](float, int l) { return w / x.lane[l]; });
  }
};
#endif

PHYX_INLINE const Vector* vectors(const float* x) { return reinterpret_cast<const Vector*>(x); }
PHYX_INLINE Vector* vectors(float* x) { return reinterpret_cast<Vector*>(x); }

// x in the lanes where a < b, else y.
PHYX_INLINE Vector if_less(const Vector& a, const Vector& b, const Vector& x, const Vector& y) {
#if defined(__GNUC__)
  return a < b ? x : y;
#else
  Vector z;
  return z.each([&](float, int l) { return a.lane[l] < b.lane[l] ? x.lane[l] : y.lane[l]; });
#endif
}

bool has_wide_registers();  // 32 of 16 floats, not 16 of 8

// to[c * to_row + r] = from[r * from_row + c] for 8 rows and 8 columns.
#if defined(__GNUC__)
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t HalfIndex __attribute__((vector_size(32)));

#if defined(__clang__)
#define PHYX_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PHYX_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, HalfIndex{__VA_ARGS__})
#endif

PHYX_INLINE void transpose_8x8(float* to, int64_t to_row, const float* from, int64_t from_row) {
  Half x[8], y[8];
  for (int r = 0; r < 8; ++r) x[r] = *reinterpret_cast<const Half*>(from + r * from_row);
  for (int r = 0; r < 8; r += 2) {
    y[r] = PHYX_SHUFFLE(x[r], x[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    y[r + 1] = PHYX_SHUFFLE(x[r], x[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4)
    for (int h = 0; h < 2; ++h) {
      x[r + 2 * h] = PHYX_SHUFFLE(y[r + h], y[r + 2 + h], 0, 1, 8, 9, 4, 5, 12, 13);
      x[r + 2 * h + 1] = PHYX_SHUFFLE(y[r + h], y[r + 2 + h], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int c = 0; c < 4; ++c) {
    *reinterpret_cast<Half*>(to + c * to_row) = PHYX_SHUFFLE(x[c], x[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *reinterpret_cast<Half*>(to + (c + 4) * to_row) = PHYX_SHUFFLE(x[c], x[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#undef PHYX_SHUFFLE
#else
PHYX_INLINE void transpose_8x8(float* to, int64_t to_row, const float* from, int64_t from_row) {
  for (int c = 0; c < 8; ++c)
    for (int r = 0; r < 8; ++r) to[c * to_row + r] = from[r * from_row + c];
}
#endif

// The same for any size: squares of 8, and their edges one by one.
PHYX_INLINE void transpose(float* to, int64_t to_row, const float* from, int64_t from_row, int rows, int columns) {
  int r = 0;
  for (; r + 8 <= rows; r += 8) {
    int c = 0;
    for (; c + 8 <= columns; c += 8) transpose_8x8(to + c * to_row + r, to_row, from + r * from_row + c, from_row);
    for (; c < columns; ++c)
      for (int i = r; i < r + 8; ++i) to[c * to_row + i] = from[i * from_row + c];
  }
  for (; r < rows; ++r)
    for (int c = 0; c < columns; ++c) to[c * to_row + r] = from[r * from_row + c];
}

// Rows in panels of `width`, 8 or 16, one behind the other: for every term the entries of `width` rows side by side, 0
// beyond the last. Entry (r, k) is at from[r * row + k * term].
void pack_rows(float* to, int64_t width, const float* from, int64_t row, int64_t term, int64_t rows, int64_t terms);

}  // namespace phyx
