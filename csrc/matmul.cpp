// C = A Bᵀ (+ bias) for strided float32 matrices: the products around a scan and of the dense layers.
//
// The kernel sums 8 rows of A, broadcast, over 32 rows of B, two vectors, in registers. Both are first laid out in its
// order: of B a block that the last cache holds, for all threads; of A a chunk of rows, for the thread that has it. The
// sum is cut into stretches, for each of which what the kernel reads again and again fits into the first cache.
//
// Few rows of A would not pay for the layout of B: they lie side by side, a row a lane, and B is read where it is.
#include "matmul.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "bindings.h"
#include "lanes.h"
#include "vector.h"

namespace py = pybind11;

namespace phyx {
namespace {

constexpr int kPanel = 8;            // rows of A summed at once
constexpr int kWide = 2;             // tiles of 16 rows of B beside each other
constexpr int64_t kStretch = 240;    // terms: 30 KB of B and 8 KB of A; not 256, since 8 KB apart all panels share sets
constexpr int64_t kChunk = 128;      // rows of A that a thread lays out: 128 KB
constexpr int64_t kTerms = 2048;     // terms of a block of B
constexpr int64_t kBlock = 1 << 20;  // its floats
constexpr int64_t kFewRows = 32;     // of A, up to which B is read where it lies
constexpr int64_t kRowsAtOnce = 256;  // summed one after the other: 16,384 of them would lose two digits

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `kRows` rows of A times `kTiles` tiles of B; C gets the sum, the bias of its columns, and what it held if `add`.
template <int kRows, int kTiles>
PHYX_INLINE void multiply_block(const float* panel, int64_t length, const float* x, int64_t tile, float* c,
                                int64_t c_row, const float* bias, bool add) {
  Vector sum[kRows][kTiles];
  for (int r = 0; r < kRows; ++r) {
    prefetch_rows(c + r * c_row, 0, 1, kTiles * kTile);
    for (int t = 0; t < kTiles; ++t) sum[r][t] = Vector{};
  }
  for (int64_t k = 0; k < length; ++k, panel += kPanel, x += kTile) {
    Vector v[kTiles];
    for (int t = 0; t < kTiles; ++t) v[t] = *reinterpret_cast<const Vector*>(x + t * tile);
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTiles; ++t) sum[r][t] += panel[r] * v[t];
  }
  for (int t = 0; t < kTiles; ++t)
    for (int r = 0; r < kRows; ++r) {
      Vector* to = reinterpret_cast<Vector*>(c + r * c_row + t * kTile);  // `auto` would lose that it is not aligned
      if (bias) sum[r][t] += *reinterpret_cast<const Vector*>(bias + t * kTile);
      if (add) sum[r][t] += *to;
      *to = sum[r][t];
    }
}

}  // namespace

// 32 registers of 16 floats, or 16 registers of 8.
PHYX_MULTIVERSION void multiply_panel_wide(const float* panel, int64_t length, const float* x, int64_t tile, int tiles,
                                           float* c, int64_t c_row, const float* bias, bool add) {
  if (tiles == kWide)
    multiply_block<kPanel, kWide>(panel, length, x, tile, c, c_row, bias, add);
  else
    multiply_block<kPanel, 1>(panel, length, x, tile, c, c_row, bias, add);
}
PHYX_MULTIVERSION void multiply_panel_narrow(const float* panel, int64_t length, const float* x, int64_t tile,
                                             int tiles, float* c, int64_t c_row, const float* bias, bool add) {
  for (int t = 0; t < tiles; ++t)
    for (int r = 0; r < kPanel; r += 4)
      multiply_block<4, 1>(panel + r, length, x + t * tile, tile, c + r * c_row + t * kTile, c_row,
                           bias ? bias + t * kTile : nullptr, add);
}

PHYX_MULTIVERSION void add_rows(float* sum, const float* x, int64_t row, int64_t rows, int64_t columns) {
  for (; rows > 0; --rows, x += row)
    for (int64_t i = 0; i < columns; ++i) sum[i] += x[i];
}

// Sums of a tile, (16, lanes), to rows of C.
PHYX_MULTIVERSION void put_lanes(float* c, int64_t c_row, const float* sum, int rows, int columns, bool add) {
  alignas(64) float turned[kLanes * kTile];
  transpose(turned, kTile, sum, kLanes, columns, rows);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) c[r * c_row + j] = turned[r * kTile + j] + (add ? c[r * c_row + j] : 0.0f);
}

namespace {

void matmul_few_rows(const Operand& a, const Operand& b, int64_t terms, float* c, int64_t c_row, const float* bias,
                     bool add, int threads) {
  const int64_t groups = ceil_div(a.rows, kLanes), tiles = ceil_div(b.rows, kTile);
  const Floats x(groups * kLanes * std::max<int64_t>(1, terms));
  pack_rows(x.get(), kLanes, a.data, a.row, a.term, a.rows, terms);
  const int64_t grain = std::max<int64_t>(1, ceil_div(tiles, 4 * threads));
  parallel_for(tiles, grain, threads, [&](int64_t from, int64_t to) {
    alignas(64) float sum[kTile * kLanes];
    for (int64_t t = from; t < to; ++t) {
      const int count = static_cast<int>(std::min<int64_t>(kTile, b.rows - t * kTile));
      for (int64_t g = 0; g < groups; ++g) {
        const int used = static_cast<int>(std::min<int64_t>(kLanes, a.rows - g * kLanes));
        for (int j = 0; j < count; ++j) std::fill_n(sum + j * kLanes, kLanes, bias ? bias[t * kTile + j] : 0.0f);
        for (int64_t k = 0; k < terms; k += kStretch)
          multiply().in_place({b.at(t * kTile, k), b.row, b.term, count}, std::min(kStretch, terms - k),
                              x.get() + (g * terms + k) * kLanes, sum);
        put_lanes(c + g * kLanes * c_row + t * kTile, c_row, sum, used, count, add);
      }
    }
  });
}

void matmul_block(const Operand& a, const Operand& b, int64_t terms, float* c, int64_t c_row, const float* bias,
                  bool add, float* packed, int threads) {
  const int64_t stretches = std::max<int64_t>(1, ceil_div(terms, kStretch)), stretch = ceil_div(terms, stretches);
  const int64_t tiles = ceil_div(b.rows, kTile);
  const auto length_of = [&](int64_t s) { return std::min(terms, (s + 1) * stretch) - s * stretch; };
  constexpr int64_t side = 8;  // tiles packed at once, so that some hundred bytes are read of every term
  parallel_for(stretches * ceil_div(tiles, side), 1, threads, [&](int64_t from, int64_t to) {
    for (int64_t item = from; item < to; ++item) {
      const int64_t s = item % stretches, first = item / stretches * side, length = length_of(s);
      pack_rows(packed + (s * tiles * stretch + first * length) * kTile, kTile, b.at(first * kTile, s * stretch), b.row,
                b.term, std::min(side * kTile, b.rows - first * kTile), length);
    }
  });

  static const auto panel_times = has_wide_registers() ? multiply_panel_wide : multiply_panel_narrow;
  const int64_t chunks = ceil_div(a.rows, kChunk), wides = ceil_div(tiles, kWide);
  // Few rows: a chunk is shared, each thread laying it out for its own columns.
  const int64_t shares = std::clamp<int64_t>(ceil_div(4 * threads, chunks), 1, ceil_div(wides, 4));
  const int64_t share = ceil_div(wides, shares);
  parallel_for(chunks * shares, 1, threads, [&](int64_t from, int64_t to) {
    static thread_local const Floats panels(kChunk * kStretch);
    alignas(64) float edge[kPanel * kWide * kTile];
    for (int64_t item = from; item < to; ++item) {
      const int64_t first = item / shares * kChunk, rows = std::min(kChunk, a.rows - first);
      const int64_t t_begin = item % shares * share * kWide, t_end = std::min(tiles, t_begin + share * kWide);
      for (int64_t s = 0; s < stretches; ++s) {
        const int64_t length = length_of(s);
        const float* start = s == 0 ? bias : nullptr;
        pack_rows(panels.get(), kPanel, a.at(first, s * stretch), a.row, a.term, rows, length);
        for (int64_t t = t_begin; t < t_end; t += kWide) {
          const int count = static_cast<int>(std::min<int64_t>(kWide, t_end - t));
          const int64_t column = t * kTile, columns = std::min<int64_t>(count * kTile, b.rows - column);
          const float* x = packed + (s * tiles * stretch + t * length) * kTile;
          for (int64_t r = 0; r < rows; r += kPanel) {
            float* to_rows = c + (first + r) * c_row + column;
            const int64_t used = std::min<int64_t>(kPanel, rows - r);
            if (used == kPanel && columns == count * kTile) {
              panel_times(panels.get() + r * length, length, x, length * kTile, count, to_rows, c_row,
                          start ? start + column : nullptr, add || s > 0);
              continue;
            }
            panel_times(panels.get() + r * length, length, x, length * kTile, count, edge, kWide * kTile, nullptr,
                        false);
            for (int64_t i = 0; i < used; ++i)
              for (int64_t j = 0; j < columns; ++j) {
                float& to_one = to_rows[i * c_row + j];
                to_one = edge[i * kWide * kTile + j] + (start ? start[column + j] : 0.0f) +
                         (add || s > 0 ? to_one : 0.0f);
              }
          }
        }
      }
    }
  });
}

}  // namespace

void matmul(const Operand& a, const Operand& b, int64_t terms, float* c, int64_t c_row, const float* bias,
            bool accumulate, int threads) {
  if (a.rows == 0) return;
  if (a.rows <= kFewRows) {
    if (b.rows * terms < 1 << 17) threads = 1;
    return matmul_few_rows(a, b, terms, c, c_row, bias, accumulate, threads);
  }
  if (2 * a.rows * b.rows * terms < 1 << 22) threads = 1;
  const int64_t depth = std::clamp<int64_t>(terms, 1, kTerms), width = kBlock / depth / kTile * kTile;
  const Floats packed(depth * std::min(width, ceil_div(b.rows, kTile) * kTile));
  for (int64_t j = 0; j < b.rows; j += width)
    for (int64_t k = 0; k < terms || k == 0; k += depth) {
      const Operand x{a.at(0, k), a.rows, a.row, a.term}, y{b.at(j, k), std::min(width, b.rows - j), b.row, b.term};
      matmul_block(x, y, std::min(depth, terms - k), c + j, c_row,
                   bias && k == 0 ? bias + j : nullptr, accumulate || k > 0, packed.get(), threads);
    }
}

void sum_rows(float* sum, const float* x, int64_t row, int64_t rows, int64_t columns, int threads) {
  const int64_t runs = ceil_div(rows, kRowsAtOnce);
  std::vector<float> partial(runs * columns);
  parallel_for(runs, 4, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      add_rows(partial.data() + i * columns, x + i * kRowsAtOnce * row, row,
               std::min(kRowsAtOnce, rows - i * kRowsAtOnce), columns);
  });
  std::fill(sum, sum + columns, 0.0f);
  add_rows(sum, partial.data(), columns, runs, columns);
}

namespace {

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

// x: (address, rows, columns, stride of rows).
void sum_rows_of_view(uintptr_t sum, py::tuple x, int threads) {
  const auto rows = x[1].cast<int64_t>(), columns = x[2].cast<int64_t>(), row = x[3].cast<int64_t>();
  const auto* from = reinterpret_cast<const float*>(x[0].cast<uintptr_t>());
  py::gil_scoped_release release;
  sum_rows(reinterpret_cast<float*>(sum), from, row, rows, columns, threads);
}

}  // namespace

void bind_matmul(py::module_& module) {
  module.def("matmul", &matmul_of_views);
  module.def("sum_rows", &sum_rows_of_view);
}

}  // namespace phyx
