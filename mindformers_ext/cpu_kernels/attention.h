// One head of attention in blocks with an online softmax (arXiv 2205.14135, 2307.08691): no S x S tensor is stored.
//   P = softmax(scale Q K^T), a score that may not be attended is left out,  O = P V
// A row of queries keeps its running maximum m and sum l; L = m + ln l is saved, with which the backward recomputes P:
//   dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.
// Query i may attend to keys j <= i + diagonal (causal; later blocks are skipped), or where a given mask is 0. The
// documents of a packed sequence are pieces of it, each with an attention of its own: what lies between two documents is
// neither computed nor stored.
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

// One head, rows side by side: Q (Sq, Dk), K (Sk, Dk), V (Sk, Dv); K^T (Dk, Sk) with `turned_stride` floats between its
// rows; mask (Sq, Sk), where 1 may not be attended, or null: causal.
struct Head {
  const float *q, *k, *v, *k_turned;
  int64_t turned_stride;
  const uint8_t* mask;
};

// Queries and keys that see each other only: a document, or all there are.
struct Piece {
  int64_t query, queries, key, keys, diagonal;

  AttentionRule rule(AttentionRule whole) const;
  Head head(const AttentionRule& whole, const Head& head) const;
};

// What the queries of each sequence may attend to.
class Visible {
 public:
  // `tensor` is null (causal), a mask (1 or B, 1, Sq, Sk), uint8 or bool, or int32 (B, L): where documents end in each
  // sequence, one after another; what follows the last end is a document too.
  Visible(const AttentionRule& rule, const Tensor* tensor, int64_t sequences);
  const uint8_t* mask(int64_t sequence) const;
  const std::vector<Piece>& pieces(int64_t sequence) const { return pieces_.at(pieces_.size() == 1 ? 0 : sequence); }

 private:
  const AttentionRule& rule_;
  const Tensor* mask_;
  std::vector<std::vector<Piece>> pieces_;
};

// A block of queries of a piece: what is computed at a time.
struct QueryBlock {
  Piece piece;
  int64_t first;  // of the piece's queries
};

// The blocks of pieces, the longest rows first.
std::vector<QueryBlock> query_blocks(const std::vector<Piece>& pieces);

// Write K^T of a head.
void turn_keys(const AttentionRule& rule, const float* k, float* k_turned);

// O (Sq, Dv), with context_stride, L and each row's largest score (Sq,) of a head: the rows of one block.
void attend(const AttentionRule& rule, const Head& head, const QueryBlock& block, float* out, float* log_sum,
            float* largest);

// dQ, dK and dV of a head, rows side by side, zero outside of its pieces; `out` is null where O was rounded to bfloat16.
void attend_grad(const AttentionRule& rule, const Head& head, const std::vector<Piece>& pieces, const float* out,
                 const float* log_sum, const float* dout, float* dq, float* dk, float* dv);

}  // namespace cpu_kernels
