// The core of attention; its mathematics stand in attention.h.
#include "attention.h"

#include <cmath>
#include <limits>

#include "matrix.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kBlock = kAttentionBlock;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Number of keys that queries before `last` may attend to at most.
int64_t visible_keys(const AttentionRule& s, const Head& h, int64_t last) {
  return h.mask != nullptr ? s.keys : std::max<int64_t>(0, std::min(s.keys, last + s.diagonal));
}

// scores (rows, columns), stride kBlock: scale Q K^T with -inf where masked.
void score_block(const AttentionRule& s, const Head& h, int64_t query, int64_t rows, int64_t key, int64_t columns,
                 float* scores) {
  multiply(rows, columns, s.key_width, {h.q + query * s.key_width, s.key_width},
           {h.k + key * s.key_width, s.key_width, true}, scores, kBlock, 0.0f, s.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kBlock;
    if (h.mask == nullptr) {
      const int64_t allowed = query + i + 1 + s.diagonal - key;
      for (int64_t j = std::max<int64_t>(0, allowed); j < columns; ++j) row[j] = kMasked;
    } else {
      const uint8_t* masked = h.mask + (query + i) * s.keys + key;
      for (int64_t j = 0; j < columns; ++j) row[j] = masked[j] ? kMasked : row[j];
    }
  }
}

void fill_rows(float* rows, int64_t count, int64_t width, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) std::fill_n(rows + i * stride, width, 0.0f);
}

// p = P and dp = dO V^T of one block.
void probability_block(const AttentionRule& s, const Head& h, const float* log_sum, const float* dout, int64_t query,
                       int64_t rows, int64_t key, int64_t columns, float* p, float* dp) {
  score_block(s, h, query, rows, key, columns, p);
  multiply(rows, columns, s.value_width, {dout + query * s.out_stride, s.out_stride},
           {h.v + key * s.value_stride, s.value_stride, true}, dp, kBlock);
  for (int64_t i = 0; i < rows; ++i) {
    const float shift = log_sum[query + i];
    for (int64_t j = 0; j < columns; ++j) p[i * kBlock + j] = exponential(p[i * kBlock + j] - shift);
  }
}

// delta = rowsum(dO O) of a block of queries; without an exact O it is rowsum(P dO V^T), the same number.
void row_deltas(const AttentionRule& s, const Head& h, const float* out, const float* log_sum, const float* dout,
                int64_t query, int64_t rows, float* p, float* dp, float* delta) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (query + i) * s.out_stride;
    delta[i] = out == nullptr ? 0.0f : dot(out + at, dout + at, s.value_width);
  }
  if (out != nullptr) return;
  for (int64_t key = 0, visible = visible_keys(s, h, query + rows); key < visible; key += kBlock) {
    const int64_t columns = std::min(kBlock, visible - key);
    probability_block(s, h, log_sum, dout, query, rows, key, columns, p, dp);
    for (int64_t i = 0; i < rows; ++i) delta[i] += dot(p + i * kBlock, dp + i * kBlock, columns);
  }
}

}  // namespace

void attend(const AttentionRule& s, const Head& h, int64_t query, float* out, float* log_sum) {
  const int64_t rows = std::min(kBlock, s.queries - query), width = s.value_width;
  const Scratch memory(kBlock * kBlock + 2 * kBlock);
  float *scores = memory.get(), *maximum = scores + kBlock * kBlock, *sum = maximum + kBlock;
  float* block = out + query * s.out_stride;
  std::fill_n(maximum, rows, kMasked);
  std::fill_n(sum, rows, 0.0f);
  fill_rows(block, rows, width, s.out_stride);
  for (int64_t key = 0, visible = visible_keys(s, h, query + rows); key < visible; key += kBlock) {
    const int64_t columns = std::min(kBlock, visible - key);
    score_block(s, h, query, rows, key, columns, scores);
    for (int64_t i = 0; i < rows; ++i) {
      float *row = scores + i * kBlock, *o = block + i * s.out_stride;
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
    multiply(rows, width, columns, {scores, kBlock}, {h.v + key * s.value_stride, s.value_stride}, block, s.out_stride,
             1.0f);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float scale = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
    for (int64_t j = 0; j < width; ++j) block[i * s.out_stride + j] *= scale;
    log_sum[query + i] = sum[i] > 0 ? maximum[i] + std::log(sum[i]) : std::numeric_limits<float>::infinity();
  }
}

void attend_grad(const AttentionRule& s, const Head& h, const float* out, const float* log_sum, const float* dout,
                 float* dq, float* dk, float* dv) {
  const int64_t width = s.value_width;
  const Scratch memory(2 * kBlock * kBlock + kBlock);
  float *p = memory.get(), *ds = p + kBlock * kBlock, *delta = ds + kBlock * kBlock;
  std::fill_n(dq, s.queries * s.key_width, 0.0f);
  std::fill_n(dk, s.keys * s.key_width, 0.0f);
  fill_rows(dv, s.keys, width, s.value_stride);
  for (int64_t query = 0; query < s.queries; query += kBlock) {
    const int64_t rows = std::min(kBlock, s.queries - query);
    const Matrix dout_block = {dout + query * s.out_stride, s.out_stride};
    row_deltas(s, h, out, log_sum, dout, query, rows, p, ds, delta);
    for (int64_t key = 0, visible = visible_keys(s, h, query + rows); key < visible; key += kBlock) {
      const int64_t columns = std::min(kBlock, visible - key);
      probability_block(s, h, log_sum, dout, query, rows, key, columns, p, ds);
      for (int64_t i = 0; i < rows; ++i) {
        const float* prob = p + i * kBlock;
        const float d = delta[i];
        float* grad = ds + i * kBlock;
        for (int64_t j = 0; j < columns; ++j) grad[j] = prob[j] * (grad[j] - d);
      }
      multiply(columns, width, rows, {p, kBlock, true}, dout_block, dv + key * s.value_stride, s.value_stride, 1.0f);
      multiply(rows, s.key_width, columns, {ds, kBlock}, {h.k + key * s.key_width, s.key_width},
               dq + query * s.key_width, s.key_width, 1.0f, s.scale);
      multiply(columns, s.key_width, rows, {ds, kBlock, true}, {h.q + query * s.key_width, s.key_width},
               dk + key * s.key_width, s.key_width, 1.0f, s.scale);
    }
  }
}

}  // namespace cpu_kernels
