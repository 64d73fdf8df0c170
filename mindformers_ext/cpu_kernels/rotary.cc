// Rotary embedding of heads; the mathematics stand in rotary.h. The backward turns by the opposite angle, so one kernel
// serves both.
#include "rotary.h"

#include "kernel.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kRows = 256;  // of a task

// Inputs x (B, N, S, D), cos and sin (1 or B, 1, S, D), each angle twice; output y (B, N, S, D).
// Attributes: direction, 1, or -1 for the backward; halves, 1 where a pair is (x_i, x_i+D/2).
void rotary(const Call& call) {
  const Input x(call[0]), cos(call[1]), sin(call[2]);
  Output y(call[3]);
  const std::vector<int64_t>& shape = call[0].shape;
  const int64_t heads = shape.at(1), length = shape.at(2), width = shape.at(3);
  const bool per_sequence = call[1].shape.at(0) > 1;
  const float direction = static_cast<float>(call.number("direction"));
  const auto turn = call.number("halves") != 0 ? turn_halves : turn_row;
  parallel_rows(call[0].rows(), kRows, [&](int64_t i) {
    const int64_t place = i % length + (per_sequence ? i / (heads * length) * length : 0);
    turn(x + i * width, cos + place * width, sin + place * width, direction, width, y + i * width);
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(Rotary, cpu_kernels::rotary, "direction", "halves")
