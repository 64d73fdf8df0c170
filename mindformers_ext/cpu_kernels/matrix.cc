// Matrix products by a tuned library, one thread per call; blocks run on our threads. On x86 the library is oneDNN,
// which MindSpore brings and whose kernels are made for the CPU at run time; elsewhere OpenBLAS (PyPI's
// scipy-openblas32).
#include "matrix.h"

#include "../files/transpose.h"

#ifdef __x86_64__
extern "C" int dnnl_sgemm(char transa, char transb, int64_t m, int64_t n, int64_t k, float alpha, const float* a,
                          int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc);  // dnnl.h
#else
#include <cblas.h>
#endif

namespace cpu_kernels {
namespace {

// Side of the tiles of c; smaller ones only to give kTasks tasks, none below kTaskSize multiply-adds.
constexpr int64_t kTile = 512, kTasks = 8, kTaskSize = 1 << 23;
constexpr int64_t kManyRows = 32;  // of a, for which copying b pays
#ifdef __AVX512F__
constexpr int kVector = 64;
#else
constexpr int kVector = 16;
#endif

// Size of each of `parts` parts of `side`, a multiple of the width of vectors.
int64_t part_size(int64_t side, int64_t parts) { return blocks_of(blocks_of(side, parts), 16) * 16; }

#ifdef __x86_64__
void product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride, float beta,
             float alpha) {
  const auto order = [](const Matrix& x) { return x.transposed ? 'T' : 'N'; };
  dnnl_sgemm(order(a), order(b), m, n, k, alpha, a.data, a.stride, b.data, b.stride, beta, c, c_stride);
}
#else
const bool single_threaded = [] {
  scipy_openblas_set_num_threads(1);
  return true;
}();

void product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride, float beta,
             float alpha) {
  const auto order = [](const Matrix& x) { return x.transposed ? CblasTrans : CblasNoTrans; };
  scipy_cblas_sgemm(CblasRowMajor, order(a), order(b), m, n, k, alpha, a.data, a.stride, b.data, b.stride, beta, c,
                    c_stride);
}
#endif

}  // namespace

int64_t good_stride(int64_t columns) {
  const int64_t whole = blocks_of(columns, 16) * 16;
  return whole % 256 == 0 ? whole + 16 : whole;
}

void write_transposed(const float* x, int64_t rows, int64_t columns, int64_t x_stride, float* y, int64_t y_stride) {
  transposing::Transpose<kVector>(x, rows, columns, x_stride, y, y_stride);
}

void multiply(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              float beta, float alpha) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c[i * c_stride + j] = beta == 0.0f ? 0.0f : beta * c[i * c_stride + j];
    }
    return;
  }
  if (m < kManyRows || (!b.transposed && b.stride % 1024 != 0)) {
    product(m, n, k, a, b, c, c_stride, beta, alpha);
    return;
  }
  const int64_t stride = good_stride(n);
  const Scratch copy(k * stride);
  if (b.transposed) {
    write_transposed(b.data, n, k, b.stride, copy.get(), stride);
  } else {
    for (int64_t i = 0; i < k; ++i) std::copy_n(b.data + i * b.stride, n, copy.get() + i * stride);
  }
  product(m, n, k, a, {copy.get(), stride}, c, c_stride, beta, alpha);
}

void multiply_parallel(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
                       float beta) {
  if (m == 0 || n == 0) return;
  int64_t high = blocks_of(m, kTile), wide = blocks_of(n, kTile);  // tiles
  while (high * wide < kTasks && m * n * k / (high * wide) > kTaskSize) (m * wide >= n * high ? high : wide) *= 2;
  const int64_t rows = part_size(m, high), columns = part_size(n, wide);
  wide = blocks_of(n, columns);
  parallel(blocks_of(m, rows) * wide, [&](int64_t tile) {
    const int64_t row = tile / wide * rows, column = tile % wide * columns;
    const Matrix a_rows = {a.data + (a.transposed ? row : row * a.stride), a.stride, a.transposed};
    const Matrix b_columns = {b.data + (b.transposed ? column * b.stride : column), b.stride, b.transposed};
    multiply(std::min(rows, m - row), std::min(columns, n - column), k, a_rows, b_columns, c + row * c_stride + column,
             c_stride, beta);
  });
}

}  // namespace cpu_kernels

// c = a b of square matrices, to measure what the machine reaches.
extern "C" void cpu_kernels_multiply(int64_t size, const float* a, const float* b, float* c) {
  cpu_kernels::multiply_parallel(size, size, size, {a, size}, {b, size}, c, size);
}
