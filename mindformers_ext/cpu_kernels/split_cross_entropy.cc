// Cross entropy of logits z (T, V') whose vocabulary is split over devices (layers/vocabulary.py), the parts as large as
// the logits, with l_t = ln sum_v e^z_tv over this device's columns:
//   y_t = z_t,place or z_t,place - l_t,  dz_tv = g_t e^(z_tv - l_t) + c_t [v = place]
#include <cmath>

#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 8;  // of a task

// Inputs z and places (T elements), output y (T elements): y_t = z_t,place.
void pick_column(const Call& call) {
  const Input z(call[0]);
  const std::vector<int32_t> places = integers(call[1]);
  Output y(call[2]);
  for (size_t t = 0; t < places.size(); ++t) y[t] = z[t * call[0].columns() + places[t]];
}

// As pick_column, y_t = z_t,place - l_t.
void pick_log_softmax(const Call& call) {
  const Input z(call[0]);
  const std::vector<int32_t> places = integers(call[1]);
  Output y(call[2]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float *row = z + t * width, shift = maximum_of(row, width, row[0]);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < width; ++v) sum += exponential(row[v] - shift);
    y[t] = (row[places[t]] - shift) - std::log(sum);
  });
}

// Inputs z, g, places, c (T elements each but z), output dz (T, V').
void split_cross_entropy_grad(const Call& call) {
  const Input z(call[0]), g(call[1]), c(call[3]);
  const std::vector<int32_t> places = integers(call[2]);
  Output dz(call[4]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float *row = z + t * width, shift = maximum_of(row, width, row[0]);
    float *out = dz + t * width, sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < width; ++v) {
      out[v] = exponential(row[v] - shift);
      sum += out[v];
    }
    const float scale = g[t] / sum;
    for (int64_t v = 0; v < width; ++v) out[v] *= scale;
    out[places[t]] += c[t];
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(PickColumn, cpu_kernels::pick_column)
CPU_KERNEL(PickLogSoftmax, cpu_kernels::pick_log_softmax)
CPU_KERNEL(SplitCrossEntropyGrad, cpu_kernels::split_cross_entropy_grad)
