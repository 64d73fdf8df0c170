// Global gradient norm, and AdamW over all tensors of a model in one pass (arXiv 1711.05101):
//   m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  with g = factor * gradient
//   p = p (1 - lr decay) - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// A factor that is not finite leaves everything as it is: such a step is skipped.
#include <cmath>

#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kPiece = 1 << 14;  // values of a task

struct Piece {
  int tensor;
  int64_t begin, end;
};

std::vector<Piece> pieces_of(const Call& call, int first, int count) {
  std::vector<Piece> pieces;
  for (int i = 0; i < count; ++i) {
    const int64_t size = call[first + i].count();
    for (int64_t begin = 0; begin < size; begin += kPiece) pieces.push_back({i, begin, std::min(size, begin + kPiece)});
  }
  return pieces;
}

// Sum of squares of each of `count` tensors of a call.
std::vector<double> square_sums(const Call& call, int first, int count) {
  const std::vector<Piece> pieces = pieces_of(call, first, count);
  std::vector<double> sums(pieces.size()), of_tensor(count);
  parallel(pieces.size(), [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Tensor& tensor = call[first + piece.tensor];
    double sum = 0;
    for (int64_t begin = piece.begin; begin < piece.end; begin += 1024) {
      const int64_t count = std::min<int64_t>(1024, piece.end - begin);
      float buffer[1024];
      const float* values = static_cast<const float*>(tensor.data) + begin;
      if (tensor.type == DType::kBFloat16) {
        const uint16_t* bits = static_cast<const uint16_t*>(tensor.data) + begin;
        for (int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(bits[i]);
        values = buffer;
      }
      sum += dot(values, values, count);
    }
    sums[task] = sum;
  });
  for (size_t i = 0; i < pieces.size(); ++i) of_tensor[pieces[i].tensor] += sums[i];
  return of_tensor;
}

// Any number of inputs; output (1,) float32: the Euclidean norm of all of them.
void global_norm(const Call& call) {
  double total = 0;
  for (const double sum : square_sums(call, 0, call.size() - 1)) total += sum;
  *static_cast<float*>(call[call.size() - 1].data) = static_cast<float>(std::sqrt(total));
}

// Inputs w (n,), then n tensors; output (1,) float32: sum_i w_i |x_i|^2.
void weighted_square_sum(const Call& call) {
  const std::vector<double> sums = square_sums(call, 1, call.size() - 2);
  const auto* weights = static_cast<const float*>(call[0].data);
  double total = 0;
  for (size_t i = 0; i < sums.size(); ++i) total += weights[i] * sums[i];
  *static_cast<float*>(call[call.size() - 1].data) = static_cast<float>(total);
}

struct Rule {
  float beta1, beta2, eps, step_size, scale2, factor;  // scale2 = 1 / (1 - b2^t)
};

void update(float* p, float* m, float* v, const float* g, float keep, const Rule& rule, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float grad = g[i] * rule.factor;
    m[i] = m[i] * rule.beta1 + grad * (1.0f - rule.beta1);
    v[i] = v[i] * rule.beta2 + grad * grad * (1.0f - rule.beta2);
    p[i] = p[i] * keep - rule.step_size * m[i] / (std::sqrt(v[i] * rule.scale2) + rule.eps);
  }
}

// Inputs step (1,) int32, learning rate (1,), factor (1,), decay (n,), then n parameters, n first moments, n second
// moments (all three are updated in place, as is step) and n gradients, all float32 but gradients and parameters, which
// may be bfloat16. Output (1,) float32: 1, or 0 for a skipped step. Attributes beta1, beta2, eps.
void adamw(const Call& call) {
  const int tensors = (call.size() - 5) / 4;
  auto* step = static_cast<int32_t*>(call[0].data);
  const float rate = *static_cast<const float*>(call[1].data), factor = *static_cast<const float*>(call[2].data);
  const auto* decay = static_cast<const float*>(call[3].data);
  auto* done = static_cast<float*>(call[call.size() - 1].data);
  *done = std::isfinite(factor) ? 1.0f : 0.0f;
  if (*done == 0.0f) return;
  ++*step;
  const double beta1 = call.number("beta1"), beta2 = call.number("beta2");
  const Rule rule = {static_cast<float>(beta1),
                     static_cast<float>(beta2),
                     static_cast<float>(call.number("eps")),
                     static_cast<float>(rate / (1 - std::pow(beta1, *step))),
                     static_cast<float>(1 / (1 - std::pow(beta2, *step))),
                     factor};
  const std::vector<Piece> pieces = pieces_of(call, 4, tensors);
  parallel(pieces.size(), [&](int64_t task) {
    const Piece& piece = pieces[task];
    const Tensor &p = call[4 + piece.tensor], &g = call[4 + 3 * tensors + piece.tensor];
    const float keep = 1.0f - rate * decay[piece.tensor];
    auto* m = static_cast<float*>(call[4 + tensors + piece.tensor].data);
    auto* v = static_cast<float*>(call[4 + 2 * tensors + piece.tensor].data);
    float parameters[1024], gradients[1024];
    for (int64_t at = piece.begin; at < piece.end; at += 1024) {
      const int64_t count = std::min<int64_t>(1024, piece.end - at);
      float* own = p.type == DType::kFloat32 ? static_cast<float*>(p.data) + at : parameters;
      const float* grad = g.type == DType::kFloat32 ? static_cast<const float*>(g.data) + at : gradients;
      auto* bits = static_cast<uint16_t*>(p.data) + at;
      if (own == parameters) {
        for (int64_t i = 0; i < count; ++i) own[i] = from_bfloat16(bits[i]);
      }
      if (grad == gradients) {
        for (int64_t i = 0; i < count; ++i) gradients[i] = from_bfloat16(static_cast<uint16_t*>(g.data)[at + i]);
      }
      update(own, m + at, v + at, grad, keep, rule, count);
      if (own == parameters) {
        for (int64_t i = 0; i < count; ++i) bits[i] = to_bfloat16(own[i]);
      }
    }
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(GlobalNorm, cpu_kernels::global_norm)
CPU_KERNEL(WeightedSquareSum, cpu_kernels::weighted_square_sum)
CPU_KERNEL(AdamW, cpu_kernels::adamw, "beta1", "beta2", "eps")
