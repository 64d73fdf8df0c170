// Rows that are chosen by index, in buffers longer than their number: behind the real ones an index is -1. What is
// taken with it is NaN (-1 where the rows are integers), and what is added with it goes nowhere.
#include <limits>

#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 64;     // of a task
constexpr int64_t kColumns = 64;  // of a task that adds

int64_t width_of(const Tensor& tensor) { return tensor.shape.size() < 2 ? 1 : tensor.columns(); }

// Input x (M,) or (M, C) int; output (R, 1) or (R, 2) int64: where x is not zero, in order, its axes side by side.
void nonzero_places(const Call& call) {
  const std::vector<int32_t> x = integers(call[0]);
  auto* places = static_cast<int64_t*>(call[1].data);
  const int64_t axes = call[1].columns(), most = call[1].rows(), width = width_of(call[0]);
  check(axes == static_cast<int64_t>(call[0].shape.size()) && axes <= 2, "NonZero must have one or two axes");
  int64_t found = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    if (x[i] == 0) continue;
    check(found < most, "more rows are chosen than there can be");
    if (axes == 2) places[2 * found] = i / width;
    places[axes * found + axes - 1] = axes == 2 ? i % width : i;
    ++found;
  }
  std::fill(places + axes * found, places + axes * most, int64_t{-1});
}

// Inputs x (M, C) or (M,), index (R,); output (R, C) or (R,).
void take_rows(const Call& call) {
  const std::vector<int32_t> index = integers(call[1]);
  const int64_t width = width_of(call[0]), count = call[0].count() / std::max<int64_t>(width, 1);
  for (const int32_t i : index) check(i < count, "an index lies behind the last row");
  if (call[0].type == DType::kInt32) {
    const auto* x = static_cast<const int32_t*>(call[0].data);
    auto* taken = static_cast<int32_t*>(call[2].data);
    for (size_t row = 0; row < index.size(); ++row) {
      for (int64_t j = 0; j < width; ++j) taken[row * width + j] = index[row] < 0 ? -1 : x[index[row] * width + j];
    }
    return;
  }
  const Input x(call[0]);
  Output taken(call[2]);
  parallel_rows(index.size(), kRows, [&](int64_t row) {
    float* out = taken + row * width;
    if (index[row] < 0) {
      std::fill_n(out, width, std::numeric_limits<float>::quiet_NaN());
    } else {
      std::copy_n(x + index[row] * width, width, out);
    }
  });
}

// Inputs x (M, C) or (M,), index (R,), rows (R, C) or (R,); output x with the rows added, in their order.
void add_rows(const Call& call) {
  const Input x(call[0]), rows(call[2]);
  Output sum(call[3]);
  const std::vector<int32_t> index = integers(call[1]);
  const int64_t width = width_of(call[0]), count = call[0].count() / std::max<int64_t>(width, 1);
  for (const int32_t i : index) check(i < count, "an index lies behind the last row");
  parallel_ranges(width, kColumns, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; ++i) std::copy(x + i * width + begin, x + i * width + end, sum + i * width + begin);
    for (size_t row = 0; row < index.size(); ++row) {
      if (index[row] >= 0) add_scaled(sum + index[row] * width + begin, rows + row * width + begin, 1.0f, end - begin);
    }
  });
}

// Input x (R, C); output (R, 1): the sum of each row.
void row_sums(const Call& call) {
  const Input x(call[0]);
  Output sums(call[1]);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t row) {
    float sum = 0.0f;
    for (int64_t j = 0; j < width; ++j) sum += x[row * width + j];
    sums[row] = sum;
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(NonZeroPlaces, cpu_kernels::nonzero_places)
CPU_KERNEL(TakeRows, cpu_kernels::take_rows)
CPU_KERNEL(AddRows, cpu_kernels::add_rows)
CPU_KERNEL(RowSums, cpu_kernels::row_sums)
