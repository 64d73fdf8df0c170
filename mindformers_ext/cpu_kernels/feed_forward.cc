// A SwiGLU feed-forward network in one operator.
//   h = [x G^T | x U^T],  a = silu(h_gate) h_up,  y = a D^T
// Saved for the backward: h.
//   da = dy D,  dh = swiglu'(da),  dx = dh_gate G + dh_up U,  dG = dh_gate^T x,  dU = dh_up^T x,  dD = dy^T a
#include "matrix.h"
#include "swiglu.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 32;  // of a task

// Inputs x (T, H), G (F, H), U (F, H), D (H, F); outputs y (T, H), h (T, 2F) float32.
void feed_forward(const Call& call) {
  const Input x(call[0]), gate(call[1]), up(call[2]), down(call[3]);
  Output y(call[4]), h(call[5]);
  const int64_t rows = call[0].rows(), hidden = call[0].columns(), f = call[1].rows();
  const Scratch a(rows * f);
  multiply_parallel(rows, f, hidden, {x, hidden}, {gate, hidden, true}, h, 2 * f);
  multiply_parallel(rows, f, hidden, {x, hidden}, {up, hidden, true}, h + f, 2 * f);
  parallel_rows(rows, kRows, [&](int64_t i) { swiglu_row(h + i * 2 * f, h + i * 2 * f + f, a.get() + i * f, f); });
  multiply_parallel(rows, hidden, f, {a.get(), f}, {down, f, true}, y, hidden);
}

// Inputs dy (T, H), x, G, U, D, h; outputs dx (T, H), dG, dU, dD.
void feed_forward_grad(const Call& call) {
  const Input dy(call[0]), x(call[1]), gate(call[2]), up(call[3]), down(call[4]), h(call[5]);
  Output dx(call[6]), dgate(call[7]), dup(call[8]), ddown(call[9]);
  const int64_t rows = call[1].rows(), hidden = call[1].columns(), f = call[2].rows();
  const Scratch da(rows * f), a(rows * f), dh(rows * 2 * f);
  multiply_parallel(rows, f, hidden, {dy, hidden}, {down, f}, da.get(), f);
  parallel_rows(rows, kRows, [&](int64_t i) {
    const float *own = h + i * 2 * f, *gradient = da.get() + i * f;
    float* out = dh.get() + i * 2 * f;
    swiglu_row(own, own + f, a.get() + i * f, f);
    swiglu_row_grad(gradient, own, own + f, out, out + f, f);
  });
  const Matrix dh_gate = {dh.get(), 2 * f}, dh_up = {dh.get() + f, 2 * f};
  multiply_parallel(rows, hidden, f, dh_gate, {gate, hidden}, dx, hidden);
  multiply_parallel(rows, hidden, f, dh_up, {up, hidden}, dx, hidden, 1.0f);
  multiply_parallel(f, hidden, rows, transpose(dh_gate), {x, hidden}, dgate, hidden);
  multiply_parallel(f, hidden, rows, transpose(dh_up), {x, hidden}, dup, hidden);
  multiply_parallel(hidden, f, rows, {dy, hidden, true}, {a.get(), f}, ddown, f);
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(FeedForward, cpu_kernels::feed_forward)
CPU_KERNEL(FeedForwardGrad, cpu_kernels::feed_forward_grad)
