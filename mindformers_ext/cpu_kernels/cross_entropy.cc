// Cross entropy of a language-model head, from hidden states: logits exist one block of tokens at a time.
//   z = W x_t,  loss = sum_t m_t (ln sum_v e^z_v - z_label) / (sum_t m_t + 1e-8)
// The gradients are computed in the same pass, for a loss gradient of 1 (the backward multiplies by the real one):
//   dz = c_t (softmax(z) - onehot(label)),  c_t = m_t / (sum m + 1e-8),  dx_t = dz W,  dW = sum_t dz^T x_t
#include <cmath>

#include "kernel.h"
#include "matrix.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kBlockFloats = 1 << 21;  // logits of a block: 8 MiB
constexpr float kTiny = 1e-8f;             // as MindFormers' CrossEntropyLoss

// Turns logits z (V,) into c (softmax(z) - onehot); returns the token's loss.
double loss_and_gradient(float* z, int64_t vocabulary, int32_t label, float c) {
  const float best = maximum_of(z, vocabulary, z[0]), chosen = z[label];
  double sum = 0;
  for (int64_t first = 0; first < vocabulary; first += 4096) {  // short float sums, added in double
    const int64_t last = std::min(vocabulary, first + 4096);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t v = first; v < last; ++v) {
      z[v] = exponential(z[v] - best);
      part += z[v];
    }
    sum += part;
  }
  const float scale = static_cast<float>(c / sum);
  for (int64_t v = 0; v < vocabulary; ++v) z[v] *= scale;
  z[label] -= c;
  return std::log(sum) + best - chosen;
}

// Inputs x (T, H), W (V, H), labels (T,), m (T,); outputs loss (1,) float32, dx (T, H), dW (V, H).
void linear_cross_entropy(const Call& call) {
  const Input x(call[0]), w(call[1]), mask(call[3]);
  const std::vector<int32_t> labels = integers(call[2]);
  Output dx(call[5]), dw(call[6]);
  const int64_t tokens = call[0].rows(), hidden = call[0].columns(), vocabulary = call[1].rows();
  for (const int32_t label : labels) check(label >= 0 && label < vocabulary, "a label lies outside the vocabulary");
  double count = 0;
  for (int64_t t = 0; t < tokens; ++t) count += mask[t];
  const double divisor = static_cast<float>(count) + kTiny;
  const int64_t block = std::max<int64_t>(16, std::min<int64_t>(512, kBlockFloats / vocabulary));
  const int64_t stride = good_stride(vocabulary);
  const Scratch logits(block * stride);
  std::vector<double> losses(tokens);
  if (tokens == 0) std::fill_n(static_cast<float*>(dw), vocabulary * hidden, 0.0f);
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t rows = std::min(block, tokens - first);
    float* z = logits.get();
    multiply_parallel(rows, vocabulary, hidden, {x + first * hidden, hidden}, {w, hidden, true}, z, stride);
    parallel_rows(rows, 8, [&](int64_t i) {
      const int64_t t = first + i;
      const float c = static_cast<float>(mask[t] / divisor);
      losses[t] = mask[t] * loss_and_gradient(z + i * stride, vocabulary, labels[t], c);
    });
    multiply_parallel(rows, hidden, vocabulary, {z, stride}, {w, hidden}, dx + first * hidden, hidden);
    multiply_parallel(vocabulary, hidden, rows, {z, stride, true}, {x + first * hidden, hidden}, dw, hidden,
                      first == 0 ? 0.0f : 1.0f);
  }
  double total = 0;
  for (const double loss : losses) total += loss;
  *static_cast<float*>(call[4].data) = static_cast<float>(total / divisor);
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(LinearCrossEntropy, cpu_kernels::linear_cross_entropy)
