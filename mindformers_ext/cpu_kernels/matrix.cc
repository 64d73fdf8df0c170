// Matrix products by OpenBLAS (PyPI package scipy-openblas32), one thread per call; blocks run on our threads.
#include "matrix.h"

#include <cblas.h>

namespace cpu_kernels {
namespace {

// Products below this many multiply-adds are not worth cutting further.
constexpr int64_t kTaskSize = 1 << 23;

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
  // Cut the longer side of c, in multiples of 64.
  const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(64, m * n * std::max<int64_t>(k, 1) / kTaskSize));
  const int64_t side = std::max(m, n);
  const int64_t block = std::max<int64_t>(64, (blocks_of(side, wanted) + 63) / 64 * 64);
  parallel_ranges(side, block, [&](int64_t begin, int64_t end) {
    if (m >= n) {
      const Matrix part = {a.data + (a.transposed ? begin : begin * a.stride), a.stride, a.transposed};
      multiply(end - begin, n, k, part, b, c + begin * c_stride, c_stride, beta);
    } else {
      const Matrix part = {b.data + (b.transposed ? begin * b.stride : begin), b.stride, b.transposed};
      multiply(m, end - begin, k, a, part, c + begin, c_stride, beta);
    }
  });
}

}  // namespace cpu_kernels
