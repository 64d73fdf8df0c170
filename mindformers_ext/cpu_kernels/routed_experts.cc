// All routed experts of a layer in one operator: gather, grouped SwiGLU, weighted sum back into token order.
//   for each choice (t, k) of expert e:  h = x_t W_e (gate and up side by side),  a = silu(h_gate) h_up
//   y_t = sum_k p_tk a D_e
// The sorted copies of x exist one block of rows at a time, those of y one panel of columns. Saved for the backward: h,
// by sorted row.
//   da = dy_t D_e^T,  dp_tk = <a, da>,  dh = swiglu'(p_tk da),  dx_t = sum_k dh W_e^T
//   dW_e = sum x_t^T dh,  dD_e = sum (p_tk a)^T dy_t
#include "expert_rows.h"
#include "matrix.h"
#include "swiglu.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 384;   // of a block of one expert
constexpr int64_t kTokens = 64;  // of a task that sums
constexpr int64_t kAhead = 2;    // rows that are fetched before their turn: where they lie follows no pattern
constexpr int64_t kPanel = 128, kPanelFloats = 1 << 21;  // least columns and usual size of a panel of products

struct Sizes {
  int64_t tokens, hidden, topk, experts, width;
};

Sizes sizes_of(const Tensor& x, const Tensor& ids, const Tensor& down) {
  return {x.rows(), x.columns(), ids.columns(), down.shape.at(0), down.shape.at(1)};
}

// The tokens (T, H) of rows [begin, end).
void gather(const float* tokens, const Sizes& s, const ExpertRows& sorted, int64_t begin, int64_t end, float* out) {
  const auto source = [&](int64_t row) { return tokens + sorted.choice_of_row[row] / s.topk * s.hidden; };
  for (int64_t row = begin; row < end; ++row, out += s.hidden) {
    if (row + kAhead < end) prefetch(source(row + kAhead), s.hidden);
    std::copy_n(source(row), s.hidden, out);
  }
}

// y_t = sum over the choices of t of r M_e, with r (inner,) the choice's sorted row and M_e (inner, H) its expert's
// matrix, stored (H, inner) when `transposed`; choices of no expert count nothing. A panel of columns of all products
// stays in the cache until it is summed.
void multiply_and_sum(const Sizes& s, const ExpertRows& sorted, const std::vector<RowBlock>& blocks, const float* rows,
                      int64_t inner, const float* matrices, bool transposed, float* y) {
  const int64_t used = sorted.first_row.back();
  const int64_t panel = std::min(s.hidden, std::max(kPanel, kPanelFloats / std::max<int64_t>(used, 1) / 16 * 16));
  const Scratch products(used * panel);
  for (int64_t column = 0; column < s.hidden; column += panel) {
    const int64_t width = std::min(panel, s.hidden - column);
    parallel(blocks.size(), [&](int64_t task) {
      const RowBlock& block = blocks[task];
      const float* own = matrices + block.expert * s.hidden * inner + (transposed ? column * inner : column);
      multiply(block.end - block.begin, width, inner, {rows + block.begin * inner, inner},
               {own, transposed ? inner : s.hidden, transposed}, products.get() + block.begin * width, width);
    });
    parallel_ranges(s.tokens, kTokens, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* out = y + t * s.hidden + column;
        const int64_t next = std::min((t + 2) * s.topk, end * s.topk);
        for (int64_t i = (t + 1) * s.topk; i < next; ++i) {
          prefetch(products.get() + sorted.row_of_choice[i] * width, width);
        }
        std::fill_n(out, width, 0.0f);
        for (int64_t i = t * s.topk; i < (t + 1) * s.topk; ++i) {
          const int64_t row = sorted.row_of_choice[i];
          if (row < used) add_scaled(out, products.get() + row * width, 1.0f, width);
        }
      }
    });
  }
}

// Inputs x (T, H), p (T, K), ids (T, K), W (L, H, 2F), D (L, F, H); outputs y (T, H), h (T*K, 2F).
void routed_experts(const Call& call) {
  const Sizes s = sizes_of(call[0], call[2], call[4]);
  const Input x(call[0]), p(call[1]), gate_up(call[3]), down(call[4]);
  Output y(call[5]), h(call[6]);
  const ExpertRows sorted = sort_by_expert(integers(call[2]), s.experts);
  const std::vector<RowBlock> blocks = row_blocks(sorted.first_row, kRows);
  const int64_t f = s.width;
  const Scratch weighted(s.tokens * s.topk * f);  // p a
  parallel(blocks.size(), [&](int64_t task) {
    const RowBlock& block = blocks[task];
    const Scratch x_rows(kRows * s.hidden);
    float* h_rows = h + block.begin * 2 * f;
    gather(x, s, sorted, block.begin, block.end, x_rows.get());
    multiply(block.end - block.begin, 2 * f, s.hidden, {x_rows.get(), s.hidden},
             {gate_up + block.expert * s.hidden * 2 * f, 2 * f}, h_rows, 2 * f);
    for (int64_t row = block.begin; row < block.end; ++row, h_rows += 2 * f) {
      float *a = weighted.get() + row * f, weight = p[sorted.choice_of_row[row]];
      swiglu_row(h_rows, h_rows + f, a, f);
      for (int64_t j = 0; j < f; ++j) a[j] *= weight;
    }
  });
  std::fill(h + sorted.first_row.back() * 2 * f, h + s.tokens * s.topk * 2 * f, 0.0f);
  multiply_and_sum(s, sorted, blocks, weighted.get(), f, down, false, y);
}

// What the backward of the experts reads and writes: sorted rows of dh (T*K, 2F), dp by choice, dW and dD.
struct Backward {
  const Sizes& s;
  const ExpertRows& sorted;
  const float *dy, *x, *p, *down, *h;
  float *dh, *dp, *dgate_up, *ddown;
};

// dh, dp, and what the rows [begin, end) of an expert add to its weight gradients; `first` of the expert sets them.
void expert_block_grad(const Backward& b, int64_t expert, int64_t begin, int64_t end, bool first) {
  const int64_t count = end - begin, hidden = b.s.hidden, f = b.s.width;
  const float* down = b.down + expert * f * hidden;
  const Scratch own(count * (hidden + 2 * f));
  float *tokens = own.get(), *da = tokens + count * hidden, *weighted = da + count * f;  // weighted: p a
  float* dh = b.dh + begin * 2 * f;
  gather(b.dy, b.s, b.sorted, begin, end, tokens);
  multiply(count, f, hidden, {tokens, hidden}, {down, hidden, true}, da, f);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t choice = b.sorted.choice_of_row[begin + i];
    const float *h = b.h + (begin + i) * 2 * f, weight = b.p[choice];
    float *a = weighted + i * f, *da_row = da + i * f;
    swiglu_row(h, h + f, a, f);
    b.dp[choice] = dot(a, da_row, f);
    for (int64_t j = 0; j < f; ++j) {
      a[j] *= weight;
      da_row[j] *= weight;
    }
    swiglu_row_grad(da_row, h, h + f, dh + i * 2 * f, dh + i * 2 * f + f, f);
  }
  float *ddown = b.ddown + expert * f * hidden, *dgate_up = b.dgate_up + expert * hidden * 2 * f;
  const float beta = first ? 0.0f : 1.0f;
  multiply(f, hidden, count, {weighted, f, true}, {tokens, hidden}, ddown, hidden, beta);
  gather(b.x, b.s, b.sorted, begin, end, tokens);
  multiply(hidden, 2 * f, count, {tokens, hidden, true}, {dh, 2 * f}, dgate_up, 2 * f, beta);
}

// Inputs dy (T, H), x (T, H), p (T, K), ids (T, K), W, D, h (T*K, 2F); outputs dx (T, H), dp (T, K), dW, dD.
void routed_experts_grad(const Call& call) {
  const Sizes s = sizes_of(call[1], call[3], call[5]);
  const Input dy(call[0]), x(call[1]), p(call[2]), gate_up(call[4]), down(call[5]), h(call[6]);
  Output dx(call[7]), dp(call[8]), dgate_up(call[9]), ddown(call[10]);
  const ExpertRows sorted = sort_by_expert(integers(call[3]), s.experts);
  const int64_t choices = s.tokens * s.topk, weights = s.hidden * s.width;
  const std::vector<RowBlock> experts = row_blocks(sorted.first_row, std::max<int64_t>(choices, 1));  // all rows of each
  const Scratch dh(choices * 2 * s.width);
  const Backward backward = {s, sorted, dy, x, p, down, h, dh.get(), dp, dgate_up, ddown};
  std::fill_n(static_cast<float*>(dp), choices, 0.0f);
  parallel(experts.size(), [&](int64_t task) {
    const RowBlock& rows = experts[task];
    each_block(rows.begin, rows.end, kRows, [&](int64_t begin, int64_t end) {
      expert_block_grad(backward, rows.expert, begin, end, begin == rows.begin);
    });
  });
  parallel(s.experts, [&](int64_t expert) {
    if (sorted.first_row[expert] < sorted.first_row[expert + 1]) return;
    std::fill_n(dgate_up + expert * 2 * weights, 2 * weights, 0.0f);
    std::fill_n(ddown + expert * weights, weights, 0.0f);
  });
  multiply_and_sum(s, sorted, row_blocks(sorted.first_row, kRows), dh.get(), 2 * s.width, gate_up, true, dx);
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(RoutedExperts, cpu_kernels::routed_experts)
CPU_KERNEL(RoutedExpertsGrad, cpu_kernels::routed_experts_grad)
