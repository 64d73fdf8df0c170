// The columns of x in two parts, x = [a ; b]; the backward joins their gradients.
#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 256;  // of a task

// Inputs or outputs a (..., A) and b (..., B), beside each other in x (..., A+B), whatever their type.
void copy(const Tensor& a, const Tensor& b, const Tensor& x, bool join) {
  const int64_t item = x.type == DType::kFloat32 ? 4 : 2, width = x.columns() * item;
  check(a.columns() + b.columns() == x.columns(), "the parts must have the columns of the whole");
  int64_t first = 0;
  for (const Tensor* part : {&a, &b}) {
    const int64_t own = part->columns() * item;
    parallel_rows(x.rows(), kRows, [&](int64_t i) {
      char *whole = static_cast<char*>(x.data) + i * width + first, *cut = static_cast<char*>(part->data) + i * own;
      std::memcpy(join ? whole : cut, join ? cut : whole, own);
    });
    first += own;
  }
}

// Input x, outputs a, b.
void split_columns(const Call& call) { copy(call[1], call[2], call[0], false); }

// Inputs da, db, output dx.
void join_columns(const Call& call) { copy(call[0], call[1], call[2], true); }

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(SplitColumns, cpu_kernels::split_columns)
CPU_KERNEL(JoinColumns, cpu_kernels::join_columns)
