// Cross entropy of logits z (T, V') whose vocabulary is split over devices, in the steps between their collectives:
//   m_t = max_v z_tv (then over devices),  s_t = sum_v e^(z_tv - m_t) (then over devices),  l_t = ln s_t
//   loss_t = -(z_t,label - m_t - l_t) on the device that has the label, 0 elsewhere (then summed over devices)
//   dz_tv = f g_t (e^(z_tv - m_t - l_t) - [v = label])
// A label outside 0..V'-1 belongs to another device.
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

// Inputs z, m, l, labels (T,), output loss (T elements).
void split_cross_entropy(const Call& call) {
  const Input z(call[0]), m(call[1]), l(call[2]);
  const std::vector<int32_t> labels = integers(call[3]);
  Output loss(call[4]);
  const int64_t width = call[0].columns();
  for (size_t t = 0; t < labels.size(); ++t) {
    const bool own = labels[t] >= 0 && labels[t] < width;
    loss[t] = own ? -((z[t * width + labels[t]] - m[t]) - l[t]) : 0.0f;
  }
}

// Inputs z, m, l, labels (T,), g (T elements), output dz (T, V'). Attribute factor.
void split_cross_entropy_grad(const Call& call) {
  const Input z(call[0]), m(call[1]), l(call[2]), g(call[4]);
  const std::vector<int32_t> labels = integers(call[3]);
  Output dz(call[5]);
  const int64_t width = call[0].columns();
  const float factor = static_cast<float>(call.number("factor"));
  parallel_rows(call[0].rows(), kRows, [&](int64_t t) {
    const float *row = z + t * width, shift = m[t], log_sum = l[t], scale = factor * g[t];
    float* out = dz + t * width;
    for (int64_t v = 0; v < width; ++v) out[v] = scale * exponential((row[v] - shift) - log_sum);
    if (labels[t] >= 0 && labels[t] < width) out[labels[t]] -= scale;
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(RowMax, cpu_kernels::row_max)
CPU_KERNEL(RowExpSum, cpu_kernels::row_exp_sum)
CPU_KERNEL(SplitCrossEntropy, cpu_kernels::split_cross_entropy)
CPU_KERNEL(SplitCrossEntropyGrad, cpu_kernels::split_cross_entropy_grad, "factor")
