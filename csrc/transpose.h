// Rows laid side by side: 16 of them, one a lane, by two rounds of weaving four strands into one, which vectorise.
#pragma once
#include <cstdint>

#include "simd.h"

namespace phyx {

// to = a0 b0 c0 d0 a1 b1 c1 d1 ...
PHYX_INLINE void zip(float* __restrict to, const float* a, const float* b, const float* c, const float* d,
                     int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[4 * i] = a[i];
    to[4 * i + 1] = b[i];
    to[4 * i + 2] = c[i];
    to[4 * i + 3] = d[i];
  }
}

PHYX_INLINE void unzip(float* __restrict a, float* __restrict b, float* __restrict c, float* __restrict d,
                       const float* __restrict from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    a[i] = from[4 * i];
    b[i] = from[4 * i + 1];
    c[i] = from[4 * i + 2];
    d[i] = from[4 * i + 3];
  }
}

// Element i of row l goes to to[16 i + l]: with l = 4 m + n, zipping by m, then by n. `spare` is as large as `to`.
PHYX_INLINE void lanes_of_rows(float* to, float* spare, const float* rows, int64_t stride, int64_t size) {
  const int64_t quarter = 4 * size;
  for (int n = 0; n < 4; ++n) {
    const float* row = rows + n * stride;
    zip(spare + n * quarter, row, row + 4 * stride, row + 8 * stride, row + 12 * stride, size);
  }
  zip(to, spare, spare + quarter, spare + 2 * quarter, spare + 3 * quarter, quarter);
}

// The inverse.
PHYX_INLINE void rows_of_lanes(float* rows, int64_t stride, float* spare, const float* lanes, int64_t size) {
  const int64_t quarter = 4 * size;
  unzip(spare, spare + quarter, spare + 2 * quarter, spare + 3 * quarter, lanes, quarter);
  for (int n = 0; n < 4; ++n) {
    float* row = rows + n * stride;
    unzip(row, row + 4 * stride, row + 8 * stride, row + 12 * stride, spare + n * quarter, size);
  }
}

}  // namespace phyx
