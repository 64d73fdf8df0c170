// One head of attention in blocks with an online softmax (arXiv 2205.14135, 2307.08691): no S x S tensor is stored.
//   P = softmax(scale Q K^T), a score that may not be attended is left out,  O = P V
// A row of queries keeps its running maximum m and sum l; L = m + ln l is saved, with which the backward recomputes P:
//   dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.
// Query i may attend to keys j <= i + diagonal (causal; later blocks are skipped), or where a given mask is 0 (packed
// sequences).
#pragma once

#include "kernel.h"

namespace cpu_kernels {

constexpr int64_t kAttentionBlock = 128;  // queries and keys of a block

struct AttentionRule {
  int64_t queries, keys, key_width, value_width;
  int64_t value_stride, out_stride;  // floats between the rows of V and of O; those of Q and K lie side by side
  float scale;
  int64_t diagonal;
};

// One head; mask (Sq, Sk), 1 may not be attended, or null: causal.
struct Head {
  const float *q, *k, *v;
  const uint8_t* mask;
};

// O and L of the block of queries that begins at `query`.
void attend(const AttentionRule& rule, const Head& head, int64_t query, float* out, float* log_sum);

// dQ, dK and dV of a head, the latter with value_stride; `out` is null where O was rounded to bfloat16.
void attend_grad(const AttentionRule& rule, const Head& head, const float* out, const float* log_sum,
                 const float* dout, float* dq, float* dk, float* dv);

}  // namespace cpu_kernels
