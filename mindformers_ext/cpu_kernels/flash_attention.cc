// Attention in blocks with an online softmax (arXiv 2205.14135, 2307.08691): no S x S tensor is stored.
//   P = softmax(scale Q K^T), a score that may not be attended is left out,  O = P V
// A row of queries keeps its running maximum m and sum l; L = m + ln l is saved, with which the backward recomputes P:
//   dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q.
// Query i may attend to keys j <= i + diagonal (causal; later blocks are skipped), or where a given mask is 0 (packed
// sequences). The operators with Ascend's names take Ascend's tensors, for the graphs of ranks.
#include <cmath>
#include <limits>

#include "kernel.h"
#include "matrix.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kBlock = 128;  // queries and keys of a block
constexpr float kMasked = -std::numeric_limits<float>::infinity();

struct Shapes {
  int64_t batch, heads, queries, keys, key_width, value_width;
  const uint8_t* mask;  // (B, 1, Sq, Sk), 1 may not be attended; null: causal
  int64_t mask_batches;
  float scale;
  int64_t diagonal;
};

Shapes shapes_of(const Call& call, int query, int key, int value, const Tensor* mask) {
  const auto &q = call[query].shape, &k = call[key].shape;
  Shapes s{q.at(0), q.at(1), q.at(2), k.at(2), q.at(3), call[value].shape.at(3), nullptr, 1,
           static_cast<float>(call.number("scale")), static_cast<int64_t>(call.number("diagonal"))};
  if (mask != nullptr) {
    check(mask->type == DType::kByte, "the attention mask must be uint8 or bool");
    s.mask = static_cast<const uint8_t*>(mask->data);
    s.mask_batches = mask->shape.at(0);
  }
  return s;
}

// Number of keys that queries before `last` may attend to at most.
int64_t visible_keys(const Shapes& s, int64_t last) {
  return s.mask != nullptr ? s.keys : std::max<int64_t>(0, std::min(s.keys, last + s.diagonal));
}

// scores (rows, columns), stride kBlock: scale Q K^T with -inf where masked.
void score_block(const Shapes& s, int64_t b, const float* q, const float* k, int64_t query, int64_t rows, int64_t key,
                 int64_t columns, float* scores) {
  multiply(rows, columns, s.key_width, {q + query * s.key_width, s.key_width},
           {k + key * s.key_width, s.key_width, true}, scores, kBlock, 0.0f, s.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kBlock;
    if (s.mask == nullptr) {
      const int64_t allowed = query + i + 1 + s.diagonal - key;
      for (int64_t j = std::max<int64_t>(0, allowed); j < columns; ++j) row[j] = kMasked;
    } else {
      const uint8_t* masked = s.mask + ((b % s.mask_batches) * s.queries + query + i) * s.keys + key;
      for (int64_t j = 0; j < columns; ++j) row[j] = masked[j] ? kMasked : row[j];
    }
  }
}

// Softmax of one block of queries of one head.
void attend(const Shapes& s, int64_t b, const float* q, const float* k, const float* v, int64_t query, float* out,
            float* log_sum) {
  const int64_t rows = std::min(kBlock, s.queries - query), width = s.value_width;
  const Scratch memory(kBlock * kBlock + 2 * kBlock);
  float *scores = memory.get(), *maximum = scores + kBlock * kBlock, *sum = maximum + kBlock;
  std::fill_n(maximum, rows, kMasked);
  std::fill_n(sum, rows, 0.0f);
  std::fill_n(out + query * width, rows * width, 0.0f);
  for (int64_t key = 0, visible = visible_keys(s, query + rows); key < visible; key += kBlock) {
    const int64_t columns = std::min(kBlock, visible - key);
    score_block(s, b, q, k, query, rows, key, columns, scores);
    for (int64_t i = 0; i < rows; ++i) {
      float *row = scores + i * kBlock, *o = out + (query + i) * width;
      float best = maximum[i];
      for (int64_t j = 0; j < columns; ++j) best = row[j] > best ? row[j] : best;
      if (best == kMasked) {  // nothing to attend to yet
        std::fill_n(row, columns, 0.0f);
        continue;
      }
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < columns; ++j) {
        row[j] = exponential(row[j] - best);
        total += row[j];
      }
      const float shrink = exponential(maximum[i] - best);
      for (int64_t j = 0; j < width; ++j) o[j] *= shrink;
      sum[i] = sum[i] * shrink + total;
      maximum[i] = best;
    }
    multiply(rows, width, columns, {scores, kBlock}, {v + key * width, width}, out + query * width, width, 1.0f);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float scale = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
    for (int64_t j = 0; j < width; ++j) out[(query + i) * width + j] *= scale;
    log_sum[query + i] = sum[i] > 0 ? maximum[i] + std::log(sum[i]) : std::numeric_limits<float>::infinity();
  }
}

// Inputs query (B, N, Sq, Dk), key (B, N, Sk, Dk), value (B, N, Sk, Dv) and, unless causal, a mask (1 or B, 1, Sq, Sk);
// outputs context (B, N, Sq, Dv), L (B, N, Sq) float32. Attributes scale, diagonal.
void flash_attention(const Call& call) {
  const bool masked = call.size() == 6;
  const Shapes s = shapes_of(call, 0, 1, 2, masked ? &call[3] : nullptr);
  const Input q(call[0]), k(call[1]), v(call[2]);
  Output out(call[call.size() - 2]), log_sum(call[call.size() - 1]);
  const int64_t blocks = blocks_of(s.queries, kBlock);
  parallel(s.batch * s.heads * blocks, [&](int64_t task) {
    const int64_t head = task / blocks, block = blocks - 1 - task % blocks;  // the longest rows first
    attend(s, head / s.heads, q + head * s.queries * s.key_width, k + head * s.keys * s.key_width,
           v + head * s.keys * s.value_width, block * kBlock, out + head * s.queries * s.value_width,
           log_sum + head * s.queries);
  });
  out.store();
}

struct Head {  // pointers to one head
  const float *q, *k, *v, *out, *dout, *log_sum;
  float *dq, *dk, *dv;
};

void attend_grad(const Shapes& s, int64_t b, const Head& h) {
  const int64_t width = s.value_width;
  const Scratch memory(2 * kBlock * kBlock + s.queries);
  float *p = memory.get(), *ds = p + kBlock * kBlock, *delta = ds + kBlock * kBlock;
  for (int64_t i = 0; i < s.queries; ++i) delta[i] = dot(h.out + i * width, h.dout + i * width, width);
  std::fill_n(h.dq, s.queries * s.key_width, 0.0f);
  std::fill_n(h.dk, s.keys * s.key_width, 0.0f);
  std::fill_n(h.dv, s.keys * width, 0.0f);
  for (int64_t query = 0; query < s.queries; query += kBlock) {
    const int64_t rows = std::min(kBlock, s.queries - query);
    for (int64_t key = 0, visible = visible_keys(s, query + rows); key < visible; key += kBlock) {
      const int64_t columns = std::min(kBlock, visible - key);
      score_block(s, b, h.q, h.k, query, rows, key, columns, p);
      multiply(rows, columns, width, {h.dout + query * width, width}, {h.v + key * width, width, true}, ds, kBlock);
      for (int64_t i = 0; i < rows; ++i) {
        float *prob = p + i * kBlock, *grad = ds + i * kBlock;
        const float log_sum = h.log_sum[query + i], d = delta[query + i];
        for (int64_t j = 0; j < columns; ++j) {
          prob[j] = exponential(prob[j] - log_sum);
          grad[j] = prob[j] * (grad[j] - d);
        }
      }
      multiply(columns, width, rows, {p, kBlock, true}, {h.dout + query * width, width}, h.dv + key * width, width, 1);
      multiply(rows, s.key_width, columns, {ds, kBlock}, {h.k + key * s.key_width, s.key_width},
               h.dq + query * s.key_width, s.key_width, 1.0f, s.scale);
      multiply(columns, s.key_width, rows, {ds, kBlock, true}, {h.q + query * s.key_width, s.key_width},
               h.dk + key * s.key_width, s.key_width, 1.0f, s.scale);
    }
  }
}

// Inputs dcontext, query, key, value, context, L and, unless causal, the mask; outputs dquery, dkey, dvalue.
void flash_attention_grad(const Call& call) {
  const bool masked = call.size() == 10;
  const Shapes s = shapes_of(call, 1, 2, 3, masked ? &call[6] : nullptr);
  const Input dout(call[0]), q(call[1]), k(call[2]), v(call[3]), out(call[4]), log_sum(call[5]);
  Output dq(call[call.size() - 3]), dk(call[call.size() - 2]), dv(call[call.size() - 1]);
  parallel(s.batch * s.heads, [&](int64_t head) {
    const int64_t query = head * s.queries * s.key_width, key = head * s.keys * s.key_width;
    const int64_t value = head * s.keys * s.value_width, context = head * s.queries * s.value_width;
    attend_grad(s, head / s.heads, {q + query, k + key, v + value, out + context, dout + context,
                                    log_sum + head * s.queries, dq + query, dk + key, dv + value});
  });
  dq.store();
  dk.store();
  dv.store();
}

// Inputs query, key, value and perhaps a mask; outputs softmax_max (B, N, Sq, 8), softmax_sum, softmax_out, context.
// softmax_max carries L in its first B*N*Sq values; the other two are not used.
void flash_attention_score(const Call& call) {
  const int inputs = call.size() - 4;
  std::vector<int> order = {0, 1, 2, inputs + 3, inputs};
  if (inputs == 4) order.insert(order.begin() + 3, 3);
  flash_attention(call.pick(order));
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(FlashAttention, cpu_kernels::flash_attention, "scale", "diagonal")
CPU_KERNEL(FlashAttentionGrad, cpu_kernels::flash_attention_grad, "scale", "diagonal")
CPU_KERNEL(FlashAttentionScore, cpu_kernels::flash_attention_score, "scale", "diagonal")
