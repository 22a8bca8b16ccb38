// C = A Bᵀ (+ bias) for strided float32 matrices: the products around a scan, large enough for threads.
//
// The kernel is that of the scans (csrc/lanes.h): 16 rows of A are broadcast over vectors of 16 rows of B. Both are first
// laid out in its order, a stretch of the sum at a time, so that what it reads stays in the caches.
#include <cstring>

#include "bindings.h"
#include "lanes.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int64_t kStretch = 512;   // terms of the sum: 16 rows of A take 32 KB
constexpr int64_t kColumns = 256;   // rows of B at a time: 512 KB

// Entry (i, k) is at data[i * row + k * term].
struct Operand {
  const float* data;
  int64_t rows, row, term;
};

void pack(float* to, const Operand& x, int64_t first, int64_t begin, int64_t end) {
  const int count = static_cast<int>(std::min<int64_t>(kTile, x.rows - first));
  const float* from = x.data + first * x.row;
  if (x.row == 1 && count == kTile) {
    for (int64_t k = begin; k < end; ++k, to += kTile) std::memcpy(to, from + k * x.term, sizeof(float) * kTile);
    return;
  }
  for (int64_t k0 = begin; k0 < end; k0 += kTile, to += kTile * kTile) {
    const int64_t terms = std::min<int64_t>(kTile, end - k0);
    if (count < kTile) std::memset(to, 0, sizeof(float) * kTile * terms);
    for (int r = 0; r < count; ++r)
      for (int64_t k = 0; k < terms; ++k) to[k * kTile + r] = from[r * x.row + (k0 + k) * x.term];
  }
}

int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// `accumulate` adds to what is in C; else C starts from the bias (of its columns) or 0.
void matmul(const Operand& a, const Operand& b, int64_t terms, float* c, int64_t c_row, const float* bias,
            bool accumulate, int threads) {
  const int64_t stretches = std::max<int64_t>(1, (terms + kStretch - 1) / kStretch);
  const int64_t stretch = (terms + stretches - 1) / stretches, a_tiles = tiles(a.rows), b_tiles = tiles(b.rows);
  if (2 * a.rows * b.rows * terms < 1 << 22) threads = 1;
  const Floats a_packed(a_tiles * kTile * stretch), b_packed((b_tiles + 1) * kTile * stretch);
  const Multiply& m = multiply();
  for (int64_t begin = 0; begin < terms || begin == 0; begin += stretch) {
    const int64_t end = std::min(terms, begin + stretch), length = end - begin;
    parallel_for(a_tiles + b_tiles, 4, threads, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i)
        if (i < a_tiles)
          pack(a_packed.get() + i * kTile * length, a, i * kTile, begin, end);
        else
          pack(b_packed.get() + (i - a_tiles) * kTile * length, b, (i - a_tiles) * kTile, begin, end);
    });
    const int64_t wide = kColumns / kTile, blocks = (b_tiles + wide - 1) / wide, tall = 4;
    const int64_t chunks = (a_tiles + tall - 1) / tall;
    parallel_for(blocks * chunks, 1, threads, [&](int64_t from, int64_t to) {
      alignas(64) float tile[2][kTile * kTile];
      for (int64_t item = from; item < to; ++item) {
        const int64_t j_end = std::min(b_tiles, (item / chunks + 1) * wide);
        const int64_t i_end = std::min(a_tiles, (item % chunks + 1) * tall);
        for (int64_t i = item % chunks * tall; i < i_end; ++i)
          for (int64_t j = item / chunks * wide; j < j_end; j += 2) {
            const int64_t pair = std::min<int64_t>(2, j_end - j);
            std::memset(tile, 0, sizeof tile);
            const float* panel = a_packed.get() + i * kTile * length;
            const float* x = b_packed.get() + j * kTile * length;
            if (pair == 2)
              m.two(panel, length, x, x + kTile * length, tile[0], tile[1]);
            else
              m.one(panel, length, x, tile[0]);
            const int64_t rows = std::min<int64_t>(kTile, a.rows - i * kTile);
            for (int64_t p = 0; p < pair; ++p) {
              const int64_t column = (j + p) * kTile, columns = std::min<int64_t>(kTile, b.rows - column);
              for (int64_t r = 0; r < rows; ++r) {
                float* to_row = c + (i * kTile + r) * c_row + column;
                const float* sum = tile[p] + r * kTile;
                if (begin > 0 || accumulate)
                  for (int64_t q = 0; q < columns; ++q) to_row[q] += sum[q];
                else if (bias)
                  for (int64_t q = 0; q < columns; ++q) to_row[q] = sum[q] + bias[column + q];
                else
                  std::memcpy(to_row, sum, sizeof(float) * columns);
              }
            }
          }
      }
    });
  }
}

// a, b: (address, rows, stride of rows, stride of terms); c: (address, stride of rows).
void matmul_of_views(py::tuple a, py::tuple b, int64_t terms, py::tuple c, uintptr_t bias, bool accumulate,
                     int threads) {
  const auto operand = [](const py::tuple& view) {
    return Operand{reinterpret_cast<const float*>(view[0].cast<uintptr_t>()), view[1].cast<int64_t>(),
                   view[2].cast<int64_t>(), view[3].cast<int64_t>()};
  };
  const Operand x = operand(a), y = operand(b);
  float* to = reinterpret_cast<float*>(c[0].cast<uintptr_t>());
  const int64_t row = c[1].cast<int64_t>();
  py::gil_scoped_release release;
  matmul(x, y, terms, to, row, reinterpret_cast<const float*>(bias), accumulate, threads);
}

}  // namespace

void bind_matmul(py::module_& module) { module.def("matmul", &matmul_of_views); }

}  // namespace phyx
