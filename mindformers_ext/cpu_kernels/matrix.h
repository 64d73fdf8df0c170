// Matrix products of row-major float32 matrices; matrix.cc names the library.
#pragma once

#include "kernel.h"

namespace cpu_kernels {

// A matrix stored with `stride` floats between its rows; `transposed` means that it is used as its transpose.
struct Matrix {
  const float* data;
  int64_t stride;
  bool transposed = false;
};

inline Matrix transpose(const Matrix& m) { return {m.data, m.stride, !m.transposed}; }

// Floats between the rows of an own matrix of so many columns: rows on multiples of 1 KiB would share few cache lines.
int64_t good_stride(int64_t columns);

// y (columns, rows), with y_stride floats between its rows, = x (rows, columns) transposed.
void write_transposed(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y, int64_t y_stride);

// c (m, n) = alpha a (m, k) b (k, n) + beta c, on the calling thread.
void multiply(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              float beta = 0.0f, float alpha = 1.0f);

// The same cut into blocks of c that run in parallel.
void multiply_parallel(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
                       float beta = 0.0f);

}  // namespace cpu_kernels
