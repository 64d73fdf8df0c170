// Root-mean-square norm over the last axis.
//   r = 1 / sqrt(mean(x^2) + eps),  y = x r w
// Backward, with n = x r and g = dy w:  dx = r (g - n mean(g n)),  dw = sum over rows of dy n.
#include <cmath>

#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 64;  // of a task

// Inputs x (..., D), w (D,); outputs y (..., D), r (rows,) float32. Attribute eps.
void rms_norm(const Call& call) {
  const Input x(call[0]), w(call[1]);
  Output y(call[2]), r(call[3]);
  const int64_t width = call[0].columns();
  const float eps = static_cast<float>(call.number("eps"));
  parallel_rows(call[0].rows(), kRows, [&](int64_t i) {
    const float *row = x + i * width, *weight = w;
    float* out = y + i * width;
    const float scale = 1.0f / std::sqrt(dot(row, row, width) / width + eps);
    r[i] = scale;
    for (int64_t j = 0; j < width; ++j) out[j] = row[j] * scale * weight[j];
  });
}

// Inputs dy (..., D), x (..., D), r (rows,), w (D,); outputs dx (..., D), dw (D,).
void rms_norm_grad(const Call& call) {
  const Input dy(call[0]), x(call[1]), r(call[2]), w(call[3]);
  Output dx(call[4]), dw(call[5]);
  const int64_t width = call[0].columns(), rows = call[0].rows(), blocks = blocks_of(rows, kRows);
  const Scratch partial(blocks * width);  // dw of each block of rows, summed in order below
  parallel(blocks, [&](int64_t block) {
    float* own = partial.get() + block * width;
    std::fill_n(own, width, 0.0f);
    for (int64_t i = block * kRows; i < std::min(rows, (block + 1) * kRows); ++i) {
      const float *g = dy + i * width, *row = x + i * width;
      float* out = dx + i * width;
      const float scale = r[i];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) sum += g[j] * w[j] * row[j];
      const float mean = sum * scale * scale / width;
      for (int64_t j = 0; j < width; ++j) {
        out[j] = scale * (g[j] * w[j] - row[j] * mean);
        own[j] += g[j] * row[j] * scale;
      }
    }
  });
  std::fill_n(static_cast<float*>(dw), width, 0.0f);
  for (int64_t block = 0; block < blocks; ++block) add_scaled(dw, partial.get() + block * width, 1.0f, width);
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(RmsNorm, cpu_kernels::rms_norm, "eps")
CPU_KERNEL(RmsNormGrad, cpu_kernels::rms_norm_grad)
