// C = A Bᵀ and column sums for strided float32 matrices (csrc/matmul.cpp).
#pragma once
#include <cstdint>

namespace phyx {

// Entry (i, k) is at data[i * row + k * term].
struct Operand {
  const float* data;
  int64_t rows, row, term;

  const float* at(int64_t i, int64_t k) const { return data + i * row + k * term; }
};

// `accumulate` adds to what is in C (entry (i, j) at c[i * c_row + j]); else C starts from the bias of its columns, or
// from 0 where that is null. The result does not depend on the number of threads.
void matmul(const Operand& a, const Operand& b, int64_t terms, float* c, int64_t c_row, const float* bias,
            bool accumulate, int threads);

// sum (columns) of rows that are `row` floats apart.
void sum_rows(float* sum, const float* x, int64_t row, int64_t rows, int64_t columns, int threads);

}  // namespace phyx
