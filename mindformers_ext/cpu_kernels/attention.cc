// The core of attention; its mathematics stand in attention.h.
#include "attention.h"

#include <cmath>
#include <limits>

#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kScores = kQueryBlock * kKeyBlock;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Number of keys that queries before `last` may attend to at most.
int64_t visible_keys(const AttentionRule& s, const Head& h, int64_t last) {
  return h.mask != nullptr ? s.keys : std::max<int64_t>(0, std::min(s.keys, last + s.diagonal));
}

// scores (rows, columns), stride kKeyBlock: scale Q K^T with -inf where masked.
void score_block(const AttentionRule& s, const Head& h, int64_t query, int64_t rows, int64_t key, int64_t columns,
                 float* scores) {
  multiply(rows, columns, s.key_width, {h.q + query * s.key_width, s.key_width},
           {h.k_turned + key, h.turned_stride}, scores, kKeyBlock, 0.0f, s.scale);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = scores + i * kKeyBlock;
    if (h.mask == nullptr) {
      const int64_t allowed = query + i + 1 + s.diagonal - key;
      for (int64_t j = std::max<int64_t>(0, allowed); j < columns; ++j) row[j] = kMasked;
    } else {
      const uint8_t* masked = h.mask + (query + i) * s.keys + key;
      for (int64_t j = 0; j < columns; ++j) row[j] = masked[j] ? kMasked : row[j];
    }
  }
}

// What the backward of one head reads, and its memory: p and ds (kQueryBlock, kKeyBlock), delta (Sq,) = rowsum(dO O).
struct Backward {
  const AttentionRule& rule;
  const Head& head;
  const float *v_turned, *log_sum, *dout;  // V^T (Dv, Sk)
  float *p, *ds, *delta;
};

// p = P and ds = P (dO V^T - delta) of one block.
void gradient_block(const Backward& b, int64_t query, int64_t rows, int64_t key, int64_t columns) {
  const int64_t width = b.rule.value_width;
  score_block(b.rule, b.head, query, rows, key, columns, b.p);
  multiply(rows, columns, width, {b.dout + query * b.rule.context_stride, b.rule.context_stride},
           {b.v_turned + key, b.rule.turned_stride()}, b.ds, kKeyBlock);
  for (int64_t i = 0; i < rows; ++i) {
    float *p = b.p + i * kKeyBlock, *ds = b.ds + i * kKeyBlock;
    const float shift = b.log_sum[query + i], delta = b.delta[query + i];
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      p[j] = exponential(p[j] - shift);
      ds[j] = p[j] * (ds[j] - delta);
    }
  }
}

// Run block(query, rows, key, columns) for all blocks with something to attend to, the blocks of a key block in turn:
// what belongs to its keys stays in the cache.
template <class Block>
void for_each_block(const AttentionRule& s, const Head& h, const Block& block) {
  for (int64_t key = 0; key < s.keys; key += kKeyBlock) {
    for (int64_t query = 0; query < s.queries; query += kQueryBlock) {
      const int64_t rows = std::min(kQueryBlock, s.queries - query);
      const int64_t columns = std::min(kKeyBlock, visible_keys(s, h, query + rows) - key);
      if (columns > 0) block(query, rows, key, columns);
    }
  }
}

// delta; without an exact O it is rowsum(P dO V^T), the same number.
void row_deltas(const Backward& b, const float* out) {
  const AttentionRule& s = b.rule;
  for (int64_t i = 0; i < s.queries; ++i) {
    const int64_t at = i * s.context_stride;
    b.delta[i] = out == nullptr ? 0.0f : dot(out + at, b.dout + at, s.value_width);
  }
  if (out != nullptr) return;
  std::vector<float> sums(s.queries);
  for_each_block(s, b.head, [&](int64_t query, int64_t rows, int64_t key, int64_t columns) {
    gradient_block(b, query, rows, key, columns);
    for (int64_t i = 0; i < rows; ++i) {
      const float* ds = b.ds + i * kKeyBlock;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < columns; ++j) sum += ds[j];
      sums[query + i] += sum;
    }
  });
  std::copy(sums.begin(), sums.end(), b.delta);
}

// O, L and the largest scores of the block of a piece's queries that begins at `query`; outputs begin at its first row.
void attend_block(const AttentionRule& s, const Head& h, int64_t query, float* out, float* log_sum, float* largest) {
  const int64_t rows = std::min(kQueryBlock, s.queries - query), width = s.value_width;
  const Scratch memory(kScores + 2 * kQueryBlock);
  float *scores = memory.get(), *maximum = scores + kScores, *sum = maximum + kQueryBlock;
  std::fill_n(maximum, rows, kMasked);
  std::fill_n(sum, rows, 0.0f);
  for (int64_t i = 0; i < rows; ++i) std::fill_n(out + i * s.context_stride, width, 0.0f);
  for (int64_t key = 0, visible = visible_keys(s, h, query + rows); key < visible; key += kKeyBlock) {
    const int64_t columns = std::min(kKeyBlock, visible - key);
    score_block(s, h, query, rows, key, columns, scores);
    for (int64_t i = 0; i < rows; ++i) {
      float *row = scores + i * kKeyBlock, *o = out + i * s.context_stride;
      const float best = maximum_of(row, columns, maximum[i]);
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
    multiply(rows, width, columns, {scores, kKeyBlock}, {h.v + key * width, width}, out, s.context_stride, 1.0f);
  }
  for (int64_t i = 0; i < rows; ++i) {
    float *o = out + i * s.context_stride, scale = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
    for (int64_t j = 0; j < width; ++j) o[j] *= scale;
    largest[i] = maximum[i];
    log_sum[i] = sum[i] > 0 ? maximum[i] + std::log(sum[i]) : std::numeric_limits<float>::infinity();
  }
}

// Adds to dQ, dK and dV of a piece, of which all arguments are the first rows.
void attend_piece_grad(const AttentionRule& s, const Head& h, const float* out, const float* log_sum,
                       const float* dout, float* dq, float* dk, float* dv) {
  const int64_t width = s.value_width, stride = s.turned_stride();
  const Scratch memory(2 * kScores + s.queries + width * stride);
  float *p = memory.get(), *ds = p + kScores, *v_turned = ds + kScores, *delta = v_turned + width * stride;
  write_transposed(h.v, s.keys, width, width, v_turned, stride);
  const Backward backward = {s, h, v_turned, log_sum, dout, p, ds, delta};
  row_deltas(backward, out);
  for_each_block(s, h, [&](int64_t query, int64_t rows, int64_t key, int64_t columns) {
    gradient_block(backward, query, rows, key, columns);
    multiply(columns, width, rows, {p, kKeyBlock, true}, {dout + query * s.context_stride, s.context_stride},
             dv + key * width, width, 1.0f);
    multiply(rows, s.key_width, columns, {ds, kKeyBlock}, {h.k + key * s.key_width, s.key_width},
             dq + query * s.key_width, s.key_width, 1.0f, s.scale);
    multiply(columns, s.key_width, rows, {ds, kKeyBlock, true}, {h.q + query * s.key_width, s.key_width},
             dk + key * s.key_width, s.key_width, 1.0f, s.scale);
  });
}

}  // namespace

AttentionRule Piece::rule(AttentionRule whole) const {
  whole.queries = queries;
  whole.keys = keys;
  whole.diagonal = diagonal;
  return whole;
}

Head Piece::head(const AttentionRule& whole, const Head& h) const {
  return {h.q + query * whole.key_width, h.k + key * whole.key_width, h.v + key * whole.value_width, h.k_turned + key,
          h.turned_stride, h.mask};
}

Visible::Visible(const AttentionRule& rule, const Tensor* tensor, int64_t sequences) : rule_(rule), mask_(nullptr) {
  if (tensor == nullptr || tensor->type == DType::kByte) {
    mask_ = tensor;
    pieces_.push_back({{0, rule.queries, 0, rule.keys, rule.diagonal}});
    return;
  }
  const std::vector<int32_t> ends = integers(*tensor);
  const int64_t count = tensor->columns();
  check(tensor->rows() == sequences, "the ends of documents must be (B, L)");
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    std::vector<Piece> pieces;
    int64_t begin = 0;
    for (int64_t i = 0; i <= count; ++i) {
      const int64_t end = i < count ? ends[sequence * count + i] : rule.keys;
      check(begin <= end && end <= rule.keys, "the ends of documents must not decrease, nor lie behind the sequence");
      if (begin < end) pieces.push_back({begin, end - begin, begin, end - begin, rule.diagonal});
      begin = end;
    }
    pieces_.push_back(std::move(pieces));
  }
}

const uint8_t* Visible::mask(int64_t sequence) const {
  if (mask_ == nullptr) return nullptr;
  return static_cast<const uint8_t*>(mask_->data) + sequence % mask_->shape.at(0) * rule_.queries * rule_.keys;
}

std::vector<QueryBlock> query_blocks(const std::vector<Piece>& pieces) {
  std::vector<QueryBlock> blocks;
  for (const Piece& piece : pieces) {
    for (int64_t first = 0; first < piece.queries; first += kQueryBlock) blocks.push_back({piece, first});
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const QueryBlock& a, const QueryBlock& b) { return a.first > b.first; });
  return blocks;
}

void turn_keys(const AttentionRule& s, const float* k, float* k_turned) {
  write_transposed(k, s.keys, s.key_width, s.key_width, k_turned, s.turned_stride());
}

void attend(const AttentionRule& s, const Head& h, const QueryBlock& block, float* out, float* log_sum,
            float* largest) {
  const int64_t row = block.piece.query + block.first;
  attend_block(block.piece.rule(s), block.piece.head(s, h), block.first, out + row * s.context_stride, log_sum + row,
               largest + row);
}

void attend_grad(const AttentionRule& s, const Head& h, const std::vector<Piece>& pieces, const float* out,
                 const float* log_sum, const float* dout, float* dq, float* dk, float* dv) {
  std::fill_n(dq, s.queries * s.key_width, 0.0f);
  std::fill_n(dk, s.keys * s.key_width, 0.0f);
  std::fill_n(dv, s.keys * s.value_width, 0.0f);
  for (const Piece& piece : pieces) {
    const int64_t row = piece.query * s.context_stride;
    attend_piece_grad(piece.rule(s), piece.head(s, h), out == nullptr ? nullptr : out + row, log_sum + piece.query,
                      dout + row, dq + piece.query * s.key_width, dk + piece.key * s.key_width,
                      dv + piece.key * s.value_width);
  }
}

}  // namespace cpu_kernels
