// Rotary embedding of one row: each pair (a, b) is turned by its angle,
//   a cos - b sin,  b cos + a sin.
// turn_row has interleaved pairs (x_2i, x_2i+1), turn_halves pairs (x_i, x_i+width/2). cos and sin hold each angle twice,
// where its pair lies; direction -1 turns back, which is the gradient.
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

inline void turn_halves(const float* x, const float* cos, const float* sin, float direction, int64_t width, float* y) {
  const int64_t half = width / 2;
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half], turn = direction * sin[j];
    y[j] = a * cos[j] - b * turn;
    y[j + half] = b * cos[j] + a * turn;
  }
}

}  // namespace cpu_kernels
