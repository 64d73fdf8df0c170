// Matrix products of row-major float32 matrices, by OpenBLAS.
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

// c (m, n) = alpha a (m, k) b (k, n) + beta c, on the calling thread.
void multiply(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              float beta = 0.0f, float alpha = 1.0f);

// The same cut into blocks of c that run in parallel.
void multiply_parallel(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
                       float beta = 0.0f);

}  // namespace cpu_kernels
