// Grouped matrix product: rows of group e meet weight e,  y_e = x_e W_e.
// Backward:  dx_e = dy_e W_e^T,  dW_e = x_e^T dy_e  (zero for a group without rows).
// Rows after the last group belong to nobody: Ascend's operator leaves them in y and dx as the memory was (CANN's
// grouped_matmul.h walks the groups only), so here they are NaN, and whoever reads them shows at once.
#include <limits>

#include "expert_rows.h"
#include "matrix.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 256;     // of a task
constexpr int64_t kColumns = 512;  // of a task's part of dW

// Where groups begin, from their ends (cumulative row counts).
std::vector<int64_t> starts_of(const Tensor& ends, int64_t rows) {
  std::vector<int64_t> first = {0};
  for (const int32_t end : integers(ends)) {
    check(end >= first.back() && end <= rows, "group_list must ascend and end within the rows");
    first.push_back(end);
  }
  return first;
}

// y = x W_e for the rows of each group, or x W_e^T.
void product(const Call& call, bool transposed) {
  const Input x(call[0]), w(call[1]);
  Output y(call[3]);
  const int64_t inner = call[0].columns(), width = call[3].columns(), rows = call[0].rows();
  const std::vector<int64_t> first = starts_of(call[2], rows);
  const std::vector<RowBlock> blocks = row_blocks(first, kRows);
  const int64_t stride = transposed ? inner : width;
  parallel(blocks.size(), [&](int64_t task) {
    const RowBlock& block = blocks[task];
    multiply(block.end - block.begin, width, inner, {x + block.begin * inner, inner},
             {w + block.expert * inner * width, stride, transposed}, y + block.begin * width, width);
  });
  std::fill(y + first.back() * width, y + rows * width, std::numeric_limits<float>::quiet_NaN());
}

// Inputs x (R, K), W (L, K, N), group_list (L,): ends of the groups; output y (R, N).
void grouped_matmul(const Call& call) { product(call, false); }

// Inputs dy (R, N), W (L, K, N), group_list (L,); output dx (R, K).
void input_grad(const Call& call) { product(call, true); }

// Inputs x (R, K), dy (R, N), group_list (L,); output dW (L, K, N).
void weight_grad(const Call& call) {
  const Input x(call[0]), dy(call[1]);
  Output dw(call[3]);
  const int64_t inner = call[0].columns(), width = call[1].columns();
  const std::vector<int64_t> first = starts_of(call[2], call[0].rows());
  const int64_t parts = blocks_of(width, kColumns);
  parallel((first.size() - 1) * parts, [&](int64_t task) {
    const int64_t e = task / parts, column = task % parts * kColumns;
    multiply(inner, std::min(kColumns, width - column), first[e + 1] - first[e], {x + first[e] * inner, inner, true},
             {dy + first[e] * width + column, width}, dw + e * inner * width + column, width);
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(GroupedMatmul, cpu_kernels::grouped_matmul)
CPU_KERNEL(GroupedMatmulInputGrad, cpu_kernels::input_grad)
CPU_KERNEL(GroupedMatmulWeightGrad, cpu_kernels::weight_grad)
