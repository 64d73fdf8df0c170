// SwiGLU: y = silu(gate) up, of two tensors or of the two halves of one (the Ascend operator's form).
#include "swiglu.h"

#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 32;  // of a task

// y (..., F) of rows of gate and up that begin every `stride` floats.
void forward(const float* gate, const float* up, int64_t stride, const Tensor& out) {
  Output y(out);
  const int64_t width = out.columns();
  parallel_rows(out.rows(), kRows, [&](int64_t i) {
    swiglu_row(gate + i * stride, up + i * stride, y + i * width, width);
  });
}

// dgate and dup, whose rows lie as those of gate and up, of dy (..., F).
void backward(const Tensor& gradient, const float* gate, const float* up, int64_t stride, float* dgate, float* dup) {
  const Input dy(gradient);
  const int64_t width = gradient.columns();
  parallel_rows(gradient.rows(), kRows, [&](int64_t i) {
    const int64_t at = i * stride;
    swiglu_row_grad(dy + i * width, gate + at, up + at, dgate + at, dup + at, width);
  });
}

// Inputs gate (..., F), up (..., F), output y (..., F).
void swiglu(const Call& call) {
  const Input gate(call[0]), up(call[1]);
  forward(gate, up, call[0].columns(), call[2]);
}

// Inputs dy, gate, up, outputs dgate, dup; all (..., F).
void swiglu_grad(const Call& call) {
  const Input gate(call[1]), up(call[2]);
  Output dgate(call[3]), dup(call[4]);
  backward(call[0], gate, up, call[0].columns(), dgate, dup);
}

// Input x (..., 2F) = [gate | up], output y (..., F).
void swiglu_halves(const Call& call) {
  const Input x(call[0]);
  const int64_t width = call[1].columns();
  forward(x, x + width, 2 * width, call[1]);
}

// Inputs dy (..., F), x (..., 2F), output dx (..., 2F).
void swiglu_halves_grad(const Call& call) {
  const Input x(call[1]);
  Output dx(call[2]);
  const int64_t width = call[0].columns();
  backward(call[0], x, x + width, 2 * width, dx, dx + width);
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(SwiGlu, cpu_kernels::swiglu)
CPU_KERNEL(SwiGluGrad, cpu_kernels::swiglu_grad)
CPU_KERNEL(SwiGluHalves, cpu_kernels::swiglu_halves)
CPU_KERNEL(SwiGluHalvesGrad, cpu_kernels::swiglu_halves_grad)
