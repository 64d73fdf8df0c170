// All routed experts of a layer in one operator: gather, grouped SwiGLU, weighted sum back into token order.
//   for each choice (t, k) of expert e:  h = x_t W_e (gate and up side by side),  a = silu(h_gate) h_up
//   y_t = sum_k p_tk a D_e
// The sorted copies of x and y exist one block of rows at a time. Saved for the backward: h, by sorted row.
//   da = dy_t D_e^T,  dp_tk = <a, da>,  dh = swiglu'(p_tk da),  dx_t = sum_k dh W_e^T
//   dW_e = sum x_t^T dh,  dD_e = sum (p_tk a)^T dy_t
#include "expert_rows.h"
#include "matrix.h"
#include "swiglu.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 256;     // of a block of one expert
constexpr int64_t kColumns = 256;  // of H in a task that sums weight gradients
constexpr int64_t kTokens = 64;

struct Sizes {
  int64_t tokens, hidden, topk, experts, width;
};

Sizes sizes_of(const Tensor& x, const Tensor& ids, const Tensor& down) {
  return {x.rows(), x.columns(), ids.columns(), down.shape.at(0), down.shape.at(1)};
}

// Columns [column, column + width) of the tokens of rows [begin, end), contiguous.
void gather(const float* tokens, const Sizes& s, const ExpertRows& sorted, int64_t begin, int64_t end, int64_t column,
            int64_t width, float* out) {
  for (int64_t row = begin; row < end; ++row, out += width) {
    std::copy_n(tokens + sorted.choice_of_row[row] / s.topk * s.hidden + column, width, out);
  }
}

// y_t = sum_k w_tk rows(t, k), without weights when they are null; choices of no expert count nothing.
void sum_choices(const float* rows, const Sizes& s, const ExpertRows& sorted, const float* weights, float* y) {
  const int64_t used = sorted.first_row.back();
  parallel_ranges(s.tokens, kTokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* out = y + t * s.hidden;
      std::fill_n(out, s.hidden, 0.0f);
      for (int64_t i = t * s.topk; i < (t + 1) * s.topk; ++i) {
        const int64_t row = sorted.row_of_choice[i];
        if (row < used) add_scaled(out, rows + row * s.hidden, weights == nullptr ? 1.0f : weights[i], s.hidden);
      }
    }
  });
}

// Inputs x (T, H), p (T, K), ids (T, K), W (L, H, 2F), D (L, F, H); outputs y (T, H), h (T*K, 2F).
void routed_experts(const Call& call) {
  const Sizes s = sizes_of(call[0], call[2], call[4]);
  const Input x(call[0]), p(call[1]), gate_up(call[3]), down(call[4]);
  Output y(call[5]), h(call[6]);
  const ExpertRows sorted = sort_by_expert(integers(call[2]), s.experts);
  const std::vector<RowBlock> blocks = row_blocks(sorted.first_row, kRows);
  const Scratch rows(s.tokens * s.topk * s.hidden);
  parallel(blocks.size(), [&](int64_t task) {
    const RowBlock& block = blocks[task];
    const int64_t count = block.end - block.begin, f = s.width;
    const Scratch own(kRows * (s.hidden + f));
    float *x_rows = own.get(), *a = x_rows + kRows * s.hidden, *h_rows = h + block.begin * 2 * f;
    gather(x, s, sorted, block.begin, block.end, 0, s.hidden, x_rows);
    multiply(count, 2 * f, s.hidden, {x_rows, s.hidden}, {gate_up + block.expert * s.hidden * 2 * f, 2 * f}, h_rows,
             2 * f);
    for (int64_t i = 0; i < count; ++i) swiglu_row(h_rows + i * 2 * f, h_rows + i * 2 * f + f, a + i * f, f);
    multiply(count, s.hidden, f, {a, f}, {down + block.expert * f * s.hidden, s.hidden},
             rows.get() + block.begin * s.hidden, s.hidden);
  });
  std::fill(h + sorted.first_row.back() * 2 * s.width, h + s.tokens * s.topk * 2 * s.width, 0.0f);
  sum_choices(rows.get(), s, sorted, p, y);
  y.store();
  h.store();
}

// dW_e and dD_e: tasks of one expert and kColumns of H, rows in blocks.
void weight_gradients(const Sizes& s, const ExpertRows& sorted, const float* tokens, const float* by_row, int64_t f,
                      bool tokens_first, float* gradient) {
  const int64_t parts = blocks_of(s.hidden, kColumns);
  parallel(s.experts * parts, [&](int64_t task) {
    const int64_t e = task / parts, column = task % parts * kColumns;
    const int64_t width = std::min(kColumns, s.hidden - column), first = sorted.first_row[e];
    const int64_t last = sorted.first_row[e + 1], block = kRows;
    const Scratch own(block * width);
    float* out = gradient + e * s.hidden * f + (tokens_first ? column * f : column);
    const int64_t stride = tokens_first ? f : s.hidden;
    if (first == last) multiply(tokens_first ? width : f, tokens_first ? f : width, 0, {}, {}, out, stride);
    for (int64_t row = first; row < last; row += block) {
      const int64_t end = std::min(last, row + block);
      gather(tokens, s, sorted, row, end, column, width, own.get());
      const Matrix gathered = {own.get(), width, tokens_first}, rows = {by_row + row * f, f, !tokens_first};
      const float beta = row == first ? 0.0f : 1.0f;
      if (tokens_first) {
        multiply(width, f, end - row, gathered, rows, out, stride, beta);
      } else {
        multiply(f, width, end - row, rows, gathered, out, stride, beta);
      }
    }
  });
}

// Inputs dy (T, H), x (T, H), p (T, K), ids (T, K), W, D, h (T*K, 2F); outputs dx (T, H), dp (T, K), dW, dD.
void routed_experts_grad(const Call& call) {
  const Sizes s = sizes_of(call[1], call[3], call[5]);
  const Input dy(call[0]), x(call[1]), p(call[2]), gate_up(call[4]), down(call[5]), h(call[6]);
  Output dx(call[7]), dp(call[8]), dgate_up(call[9]), ddown(call[10]);
  const ExpertRows sorted = sort_by_expert(integers(call[3]), s.experts);
  const std::vector<RowBlock> blocks = row_blocks(sorted.first_row, kRows);
  const int64_t choices = s.tokens * s.topk, f = s.width;
  const Scratch dx_rows(choices * s.hidden), dh(choices * 2 * f), weighted(choices * f);  // weighted: p a
  std::fill_n(static_cast<float*>(dp), choices, 0.0f);
  parallel(blocks.size(), [&](int64_t task) {
    const RowBlock& block = blocks[task];
    const int64_t count = block.end - block.begin;
    const Scratch own(kRows * (s.hidden + f));
    float *dy_rows = own.get(), *da = dy_rows + kRows * s.hidden;
    gather(dy, s, sorted, block.begin, block.end, 0, s.hidden, dy_rows);
    multiply(count, f, s.hidden, {dy_rows, s.hidden}, {down + block.expert * f * s.hidden, s.hidden, true}, da, f);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = block.begin + i, choice = sorted.choice_of_row[row];
      const float *h_row = h + row * 2 * f, weight = p[choice];
      float *a = weighted.get() + row * f, *da_row = da + i * f, *dh_row = dh.get() + row * 2 * f;
      swiglu_row(h_row, h_row + f, a, f);
      dp[choice] = dot(a, da_row, f);
      for (int64_t j = 0; j < f; ++j) {
        a[j] *= weight;
        da_row[j] *= weight;
      }
      swiglu_row_grad(da_row, h_row, h_row + f, dh_row, dh_row + f, f);
    }
    multiply(count, s.hidden, 2 * f, {dh.get() + block.begin * 2 * f, 2 * f},
             {gate_up + block.expert * s.hidden * 2 * f, 2 * f, true}, dx_rows.get() + block.begin * s.hidden,
             s.hidden);
  });
  sum_choices(dx_rows.get(), s, sorted, nullptr, dx);
  weight_gradients(s, sorted, x, dh.get(), 2 * f, true, dgate_up);
  weight_gradients(s, sorted, dy, weighted.get(), f, false, ddown);
  dx.store();
  dp.store();
  dgate_up.store();
  ddown.store();
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(RoutedExperts, cpu_kernels::routed_experts)
CPU_KERNEL(RoutedExpertsGrad, cpu_kernels::routed_experts_grad)
