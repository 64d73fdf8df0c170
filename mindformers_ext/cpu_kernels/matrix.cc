// Matrix products by OpenBLAS (PyPI package scipy-openblas32), one thread per call; blocks run on our threads.
#include "matrix.h"

#include <cblas.h>

namespace cpu_kernels {
namespace {

// Every call copies both matrices into its own order first, so large tiles of c cost least: kTile x kTile, and smaller
// ones only to give kTasks tasks, none below kTaskSize multiply-adds.
constexpr int64_t kTile = 256, kTasks = 8, kTaskSize = 1 << 23;

// Size of each of `parts` parts of `side`, a multiple of the width of vectors.
int64_t part_size(int64_t side, int64_t parts) { return blocks_of(blocks_of(side, parts), 16) * 16; }

const bool single_threaded = [] {
  scipy_openblas_set_num_threads(1);
  return true;
}();

}  // namespace

void multiply(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, float* c, int64_t c_stride,
              float beta, float alpha) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) c[i * c_stride + j] = beta == 0.0f ? 0.0f : beta * c[i * c_stride + j];
    }
    return;
  }
  const auto order = [](const Matrix& x) { return x.transposed ? CblasTrans : CblasNoTrans; };
  scipy_cblas_sgemm(CblasRowMajor, order(a), order(b), m, n, k, alpha, a.data, a.stride, b.data, b.stride, beta, c,
                    c_stride);
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
