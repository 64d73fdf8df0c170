// Cross entropy of logits z (T, V') whose vocabulary is split over devices (layers/vocabulary.py), the parts as large as
// the logits:
//   m_t = max_v z_tv,  s_t = sum_v e^(z_tv - m_t),  y_t = z_t,place,  dz_tv = g_t e^(z_tv - l_t) + c_t [v = place]
#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 8;  // of a task

// Input z (T, V'), output m (T elements).
void row_max(const Call& call) {
  const Input z(call[0]);
  Output m(call[1]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float* row = z + t * width;
    m[t] = maximum_of(row, width, row[0]);
  });
}

// Inputs z, m, output s (T elements).
void row_exp_sum(const Call& call) {
  const Input z(call[0]), m(call[1]);
  Output s(call[2]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float *row = z + t * width, shift = m[t];
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < width; ++v) sum += exponential(row[v] - shift);
    s[t] = sum;
  });
}

// Inputs z and places (T elements), output y (T elements).
void pick_column(const Call& call) {
  const Input z(call[0]);
  const std::vector<int32_t> places = integers(call[1]);
  Output y(call[2]);
  for (size_t t = 0; t < places.size(); ++t) y[t] = z[t * call[0].columns() + places[t]];
}

// Inputs z, l, g, places, c (T elements each but z), output dz (T, V').
void split_cross_entropy_grad(const Call& call) {
  const Input z(call[0]), l(call[1]), g(call[2]), c(call[4]);
  const std::vector<int32_t> places = integers(call[3]);
  Output dz(call[5]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float *row = z + t * width, log_sum = l[t], scale = g[t];
    float* out = dz + t * width;
    for (int64_t v = 0; v < width; ++v) out[v] = scale * exponential(row[v] - log_sum);
    out[places[t]] += c[t];
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(RowMax, cpu_kernels::row_max)
CPU_KERNEL(RowExpSum, cpu_kernels::row_exp_sum)
CPU_KERNEL(PickColumn, cpu_kernels::pick_column)
CPU_KERNEL(SplitCrossEntropyGrad, cpu_kernels::split_cross_entropy_grad)
