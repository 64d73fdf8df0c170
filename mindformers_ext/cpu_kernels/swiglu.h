// SwiGLU of one row: y = silu(gate) up, silu(z) = z sigmoid(z).
#pragma once

#include "vector_math.h"

namespace cpu_kernels {

inline void swiglu_row(const float* __restrict gate, const float* __restrict up, float* __restrict y, int64_t width) {
  for (int64_t j = 0; j < width; ++j) y[j] = gate[j] * sigmoid(gate[j]) * up[j];
}

// d silu(z) / dz = s (1 + z (1 - s)) with s = sigmoid(z).
inline void swiglu_row_grad(const float* __restrict dy, const float* __restrict gate, const float* __restrict up,
                            float* __restrict dgate, float* __restrict dup, int64_t width) {
  for (int64_t j = 0; j < width; ++j) {
    const float s = sigmoid(gate[j]), g = dy[j], z = gate[j], u = up[j];
    dup[j] = g * z * s;
    dgate[j] = g * u * s * (1.0f + z * (1.0f - s));
  }
}

}  // namespace cpu_kernels
