// Token permute and unpermute of a mixture of experts.
//   permute:    row r of the result is token (choice of row r) / K, choices sorted by expert
//   unpermute:  y_t = sum_k p_tk row(t, k)
// Each is the other's backward: permute's gradient is unpermute with weights 1.
#include "expert_rows.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kTokens = 64;  // of a task

// Inputs tokens (T, H), ids (T, K); outputs rows (R, H) with R <= T*K, and the row (T*K,) int32 of each choice.
void permute(const Call& call) {
  const Input tokens(call[0]);
  Output rows(call[2]);
  const int64_t width = call[0].columns(), topk = call[1].columns();
  const std::vector<int32_t> ids = integers(call[1]);
  const int64_t experts = ids.empty() ? 1 : *std::max_element(ids.begin(), ids.end()) + 1;
  const ExpertRows sorted = sort_by_expert(ids, experts);
  std::copy(sorted.row_of_choice.begin(), sorted.row_of_choice.end(), static_cast<int32_t*>(call[3].data));
  parallel_rows(call[2].rows(), kTokens, [&](int64_t row) {
    std::copy_n(tokens + sorted.choice_of_row[row] / topk * width, width, rows + row * width);
  });
}

// sum_k weight row(t, k); a choice whose row lies outside counts nothing. Without weights all are 1.
void sum_rows(const Tensor& rows_tensor, const Tensor& place_tensor, const float* weights, const Tensor& out_tensor) {
  const Input rows(rows_tensor);
  Output tokens(out_tensor);
  const int64_t width = rows_tensor.columns(), count = rows_tensor.rows();
  const std::vector<int32_t> place = integers(place_tensor);
  const int64_t topk = place.size() / std::max<int64_t>(out_tensor.rows(), 1);
  parallel_rows(out_tensor.rows(), kTokens, [&](int64_t t) {
    float* out = tokens + t * width;
    std::fill_n(out, width, 0.0f);
    for (int64_t i = t * topk; i < (t + 1) * topk; ++i) {
      if (place[i] >= count) continue;
      add_scaled(out, rows + place[i] * width, weights == nullptr ? 1.0f : weights[i], width);
    }
  });
}

// Inputs rows (R, H), place (T*K,), weights (T, K); output (T, H).
void unpermute(const Call& call) {
  const Input weights(call[2]);
  sum_rows(call[0], call[1], weights, call[3]);
}

// Inputs drows (R, H), place (T*K,) and ids, which only give a shape; output dtokens (T, H).
void permute_grad(const Call& call) { sum_rows(call[0], call[1], nullptr, call[call.size() - 1]); }

// Inputs dtokens (T, H), rows (R, H), place (T*K,), weights (T, K); outputs drows (R, H), dweights (T, K).
void unpermute_grad(const Call& call) {
  const Input dtokens(call[0]), rows(call[1]), weights(call[3]);
  Output drows(call[4]), dweights(call[5]);
  const int64_t width = call[1].columns(), count = call[1].rows(), topk = call[3].columns();
  const std::vector<int32_t> place = integers(call[2]);
  parallel_rows(call[0].rows() * topk, kTokens * topk, [&](int64_t i) {
    dweights[i] = 0.0f;
    if (place[i] >= count) return;
    const float *gradient = dtokens + i / topk * width, *row = rows + place[i] * width;
    float* out = drows + place[i] * width;
    for (int64_t j = 0; j < width; ++j) out[j] = weights[i] * gradient[j];
    dweights[i] = dot(gradient, row, width);
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(TokenPermute, cpu_kernels::permute)
CPU_KERNEL(TokenPermuteGrad, cpu_kernels::permute_grad)
CPU_KERNEL(TokenUnpermute, cpu_kernels::unpermute)
CPU_KERNEL(TokenUnpermuteGrad, cpu_kernels::unpermute_grad)
