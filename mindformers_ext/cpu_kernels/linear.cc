// Dense products and table look-ups.
//   linear:     y = x W^T;  backward dx = dy W, dW = dy^T x
//   matmul:     y = A B, either of them transposed
//   embedding:  y_t = W[id_t];  backward dW[v] = sum of dy_t with id_t = v, in token order
#include "kernel.h"
#include "matrix.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

// Inputs x (T, I), W (O, I); output y (T, O).
void linear(const Call& call) {
  const Input x(call[0]), w(call[1]);
  Output y(call[2]);
  const int64_t inner = call[0].columns(), width = call[2].columns();
  multiply_parallel(call[0].rows(), width, inner, {x, inner}, {w, inner, true}, y, width);
}

// Inputs dy (T, O), x (T, I), W (O, I); outputs dx (T, I), dW (O, I).
void linear_grad(const Call& call) {
  const Input dy(call[0]), x(call[1]), w(call[2]);
  Output dx(call[3]), dw(call[4]);
  const int64_t rows = call[0].rows(), width = call[0].columns(), inner = call[1].columns();
  multiply_parallel(rows, inner, width, {dy, width}, {w, inner}, dx, inner);
  multiply_parallel(width, inner, rows, {dy, width, true}, {x, inner}, dw, inner);
}

// Inputs A, B, output y (M, N). Attributes transpose_a, transpose_b: A is stored (K, M), B is stored (N, K).
void matmul(const Call& call) {
  const Input a(call[0]), b(call[1]);
  Output y(call[2]);
  const bool a_turned = call.number("transpose_a") != 0, b_turned = call.number("transpose_b") != 0;
  const int64_t a_width = call[0].columns(), b_width = call[1].columns(), width = call[2].columns();
  const int64_t inner = a_turned ? call[0].rows() : a_width;
  multiply_parallel(call[2].rows(), width, inner, {a, a_width, a_turned}, {b, b_width, b_turned}, y, width);
}

// Inputs W (V, H), ids (T,); output y (T, H).
void embedding(const Call& call) {
  const Input w(call[0]);
  Output y(call[2]);
  const std::vector<int32_t> ids = integers(call[1]);
  const int64_t width = call[0].columns(), vocabulary = call[0].rows();
  for (const int32_t id : ids) check(id >= 0 && id < vocabulary, "a token lies outside the vocabulary");
  parallel_rows(ids.size(), 64, [&](int64_t t) { std::copy_n(w + ids[t] * width, width, y + t * width); });
}

// Inputs dy (T, H), ids (T,) and perhaps W, which nothing reads; output dW (V, H).
void embedding_grad(const Call& call) {
  const Input dy(call[0]);
  const Tensor& gradient = call[call.size() - 1];
  Output dw(gradient);
  const std::vector<int32_t> ids = integers(call[1]);
  const int64_t width = call[0].columns();
  parallel_ranges(gradient.rows(), 1024, [&](int64_t begin, int64_t end) {
    std::fill(dw + begin * width, dw + end * width, 0.0f);
    for (size_t t = 0; t < ids.size(); ++t) {
      if (ids[t] >= begin && ids[t] < end) add_scaled(dw + ids[t] * width, dy + t * width, 1.0f, width);
    }
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(Linear, cpu_kernels::linear)
CPU_KERNEL(LinearGrad, cpu_kernels::linear_grad)
CPU_KERNEL(MatMul, cpu_kernels::matmul, "transpose_a", "transpose_b")
CPU_KERNEL(Embedding, cpu_kernels::embedding)
CPU_KERNEL(EmbeddingGrad, cpu_kernels::embedding_grad)
