// Rows of x, or a number in the rows that are masked.
#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 64;  // of a task

// Inputs x (R, C), mask (R, 1) bool, number (); output y (R, C).
void masked_rows(const Call& call) {
  const Input x(call[0]), number(call[2]);
  Output y(call[3]);
  check(call[1].type == DType::kByte, "the mask of rows must be bool");
  const auto* masked = static_cast<const uint8_t*>(call[1].data);
  const int64_t width = call[0].columns();
  parallel_rows(call[0].rows(), kRows, [&](int64_t i) {
    if (masked[i]) {
      std::fill_n(y + i * width, width, number[0]);
    } else {
      std::copy_n(x + i * width, width, y + i * width);
    }
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(MaskedRows, cpu_kernels::masked_rows)
