// SwiGLU: y = silu(gate) up, of two tensors or of the two halves of one (the Ascend operator's form).
#include "swiglu.h"

#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 32;  // of a task

// Inputs gate (..., F), up (..., F), output y (..., F).
void swiglu(const Call& call) {
  const Input gate(call[0]), up(call[1]);
  Output y(call[2]);
  const int64_t width = call[0].columns();
  parallel_ranges(call[0].rows(), kRows, [&](int64_t begin, int64_t end) {
    swiglu_row(gate + begin * width, up + begin * width, y + begin * width, (end - begin) * width);
  });
  y.store();
}

// Inputs dy, gate, up, outputs dgate, dup; all (..., F).
void swiglu_grad(const Call& call) {
  const Input dy(call[0]), gate(call[1]), up(call[2]);
  Output dgate(call[3]), dup(call[4]);
  const int64_t width = call[0].columns();
  parallel_ranges(call[0].rows(), kRows, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * width;
    swiglu_row_grad(dy + at, gate + at, up + at, dgate + at, dup + at, (end - begin) * width);
  });
  dgate.store();
  dup.store();
}

// Input x (..., 2F) = [gate | up], output y (..., F).
void swiglu_halves(const Call& call) {
  const Input x(call[0]);
  Output y(call[1]);
  const int64_t width = call[1].columns();
  parallel_ranges(call[1].rows(), kRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      swiglu_row(x + i * 2 * width, x + (i * 2 + 1) * width, y + i * width, width);
    }
  });
  y.store();
}

// Inputs dy (..., F), x (..., 2F), output dx (..., 2F).
void swiglu_halves_grad(const Call& call) {
  const Input dy(call[0]), x(call[1]);
  Output dx(call[2]);
  const int64_t width = call[0].columns();
  parallel_ranges(call[0].rows(), kRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t gate = i * 2 * width, up = gate + width;
      swiglu_row_grad(dy + i * width, x + gate, x + up, dx + gate, dx + up, width);
    }
  });
  dx.store();
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(SwiGlu, cpu_kernels::swiglu)
CPU_KERNEL(SwiGluGrad, cpu_kernels::swiglu_grad)
CPU_KERNEL(SwiGluHalves, cpu_kernels::swiglu_halves)
CPU_KERNEL(SwiGluHalvesGrad, cpu_kernels::swiglu_halves_grad)
