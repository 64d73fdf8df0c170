// Interleaved rotary embedding of one row: each pair (a, b) = (x_2i, x_2i+1) is turned by its angle,
//   y_2i = a cos - b sin,  y_2i+1 = b cos + a sin.
// cos and sin hold each angle twice; direction -1 turns back, which is the gradient.
#pragma once

#include <cstdint>

namespace cpu_kernels {

inline void turn_row(const float* x, const float* cos, const float* sin, float direction, int64_t width, float* y) {
  for (int64_t j = 0; j < width; j += 2) {
    const float a = x[j], b = x[j + 1], turn = direction * sin[j];
    y[j] = a * cos[j] - b * turn;
    y[j + 1] = b * cos[j] + a * turn;
  }
}

}  // namespace cpu_kernels
