// One head of attention in blocks with an online softmax (arXiv 2205.14135, 2307.08691): no S x S tensor is stored.
//   P = softmax(scale Q K^T), a score that may not be attended is left out,  O = P V
// A row of queries keeps its running maximum m and sum l; L = m + ln l is saved, with which the backward recomputes P:
//   dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.
// Query i may attend to keys j <= i + diagonal (causal; later blocks are skipped), or where a given mask is 0 (packed
// sequences).
#pragma once

#include "matrix.h"

namespace cpu_kernels {

constexpr int64_t kQueryBlock = 64, kKeyBlock = 512;  // few queries: less of the blocks on the diagonal is masked

struct AttentionRule {
  int64_t queries, keys, key_width, value_width;
  float scale;
  int64_t diagonal, context_stride;  // floats between the rows of O and of dO

  int64_t turned_stride() const { return good_stride(keys); }           // of K^T
  int64_t turned_keys() const { return key_width * turned_stride(); }  // floats
};

// One head, rows side by side: Q (Sq, Dk), K (Sk, Dk), V (Sk, Dv); K^T (Dk, Sk) with turned_stride; mask (Sq, Sk),
// where 1 may not be attended, or null: causal.
struct Head {
  const float *q, *k, *v, *k_turned;
  const uint8_t* mask;
};

// The mask of a sequence in a tensor (1 or B, 1, Sq, Sk), uint8 or bool; null where there is none.
const uint8_t* mask_of(const AttentionRule& rule, const Tensor* mask, int64_t sequence);

// Write K^T of a head.
void turn_keys(const AttentionRule& rule, const float* k, float* k_turned);

// O (rows, Dv), with context_stride, L (rows,) and each row's largest score of the block of queries that begins at
// `query`.
void attend(const AttentionRule& rule, const Head& head, int64_t query, float* out, float* log_sum, float* largest);

// dQ, dK and dV of a head, rows side by side; `out` is null where O was rounded to bfloat16.
void attend_grad(const AttentionRule& rule, const Head& head, const float* out, const float* log_sum,
                 const float* dout, float* dq, float* dk, float* dv);

}  // namespace cpu_kernels
