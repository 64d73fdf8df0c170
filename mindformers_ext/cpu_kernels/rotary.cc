// Interleaved rotary embedding: each pair (a, b) = (x_2i, x_2i+1) is turned by its angle,
//   y_2i = a cos - b sin,  y_2i+1 = b cos + a sin.
// The backward turns by the opposite angle, so one kernel serves both.
#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 256;  // of a task

// Inputs x (B, N, S, D), cos and sin (1 or B, 1, S, D), each angle twice; output y (B, N, S, D).
// Attribute direction: 1, or -1 for the backward.
void rotary(const Call& call) {
  const Input x(call[0]), cos(call[1]), sin(call[2]);
  Output y(call[3]);
  const std::vector<int64_t>& shape = call[0].shape;
  const int64_t heads = shape.at(1), length = shape.at(2), width = shape.at(3);
  const bool per_sequence = call[1].shape.at(0) > 1;
  const float direction = static_cast<float>(call.number("direction"));
  parallel_ranges(call[0].rows(), kRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t place = i % length + (per_sequence ? i / (heads * length) * length : 0);
      const float *row = x + i * width, *c = cos + place * width, *s = sin + place * width;
      float* out = y + i * width;
      for (int64_t j = 0; j < width; j += 2) {
        const float a = row[j], b = row[j + 1], turn = direction * s[j];
        out[j] = a * c[j] - b * turn;
        out[j + 1] = b * c[j] + a * turn;
      }
    }
  });
  y.store();
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(Rotary, cpu_kernels::rotary, "direction")
