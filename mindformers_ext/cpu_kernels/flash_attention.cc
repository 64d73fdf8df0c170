// Attention of queries, keys and values that lie by heads, or by tokens with their documents' lengths; the mathematics
// stand in attention.h. FlashAttentionScore and PackedAttention have the tensors of Ascend's operator in its layouts
// BNSD and TND, for the graphs of ranks.
#include <limits>

#include "attention.h"

namespace cpu_kernels {
namespace {

AttentionRule rule_of(const Call& call, int query, int key, int value) {
  const auto &q = call[query].shape, &k = call[key].shape;
  return {q.at(2), k.at(2), q.at(3), call[value].shape.at(3), static_cast<float>(call.number("scale")),
          static_cast<int64_t>(call.number("diagonal")), call[value].shape.at(3)};
}

// Head `index` = b * N + n. K^T is written into `k_turned`.
Head head_of(const AttentionRule& rule, const float* q, const float* k, const float* v, const uint8_t* mask,
             int64_t index, float* k_turned) {
  const Head head = {q + index * rule.queries * rule.key_width, k + index * rule.keys * rule.key_width,
                     v + index * rule.keys * rule.value_width, k_turned, rule.turned_stride(), mask};
  turn_keys(rule, head.k, k_turned);
  return head;
}

// Inputs query (B, N, Sq, Dk), key (B, N, Sk, Dk), value (B, N, Sk, Dv) and, unless causal, what is visible (attention.h);
// outputs context (B, N, Sq, Dv), L and the largest scores (B, N, Sq) float32. Attributes scale, diagonal.
void flash_attention(const Call& call) {
  const AttentionRule rule = rule_of(call, 0, 1, 2);
  const Visible visible(rule, call.size() == 7 ? &call[3] : nullptr, call[0].shape.at(0));
  const Input q(call[0]), k(call[1]), v(call[2]);
  Output out(call[call.size() - 3]), log_sum(call[call.size() - 2]), largest(call[call.size() - 1]);
  const int64_t heads = call[0].shape.at(1), count = call[0].shape.at(0) * heads;
  const Scratch k_turned(count * rule.turned_keys());
  std::vector<Head> prepared(count);
  std::vector<std::pair<int64_t, QueryBlock>> blocks;  // with their heads
  parallel(count, [&](int64_t index) {
    prepared[index] = head_of(rule, q, k, v, visible.mask(index / heads), index,
                              k_turned.get() + index * rule.turned_keys());
  });
  for (int64_t index = 0; index < count; ++index) {
    for (const QueryBlock& block : query_blocks(visible.pieces(index / heads))) blocks.emplace_back(index, block);
  }
  parallel(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    const auto& [index, block] = blocks[task];
    const int64_t row = index * rule.queries;
    attend(rule, prepared[index], block, out + row * rule.value_width, log_sum + row, largest + row);
  });
}

// Inputs dcontext, query, key, value, context, L and, unless causal, what is visible; outputs dquery, dkey,
// dvalue.
void flash_attention_grad(const Call& call) {
  const AttentionRule rule = rule_of(call, 1, 2, 3);
  const Visible visible(rule, call.size() == 10 ? &call[6] : nullptr, call[1].shape.at(0));
  const Input dout(call[0]), q(call[1]), k(call[2]), v(call[3]), out(call[4]), log_sum(call[5]);
  Output dq(call[call.size() - 3]), dk(call[call.size() - 2]), dv(call[call.size() - 1]);
  const bool exact = call[4].type == DType::kFloat32;
  const int64_t heads = call[1].shape.at(1);
  parallel(call[1].shape.at(0) * heads, [&](int64_t index) {
    const int64_t query = index * rule.queries * rule.key_width, key = index * rule.keys * rule.key_width;
    const int64_t context = index * rule.queries * rule.value_width;
    const Scratch k_turned(rule.turned_keys());
    const Head head = head_of(rule, q, k, v, visible.mask(index / heads), index, k_turned.get());
    attend_grad(rule, head, visible.pieces(index / heads), exact ? out + context : nullptr,
                log_sum + index * rule.queries, dout + context, dq + query, dk + key,
                dv + index * rule.keys * rule.value_width);
  });
}

// Inputs query, key, value and perhaps a mask; outputs softmax_max (B, N, Sq, 8), softmax_sum, softmax_out, context.
// softmax_max has each row's largest score 8 times, as Ascend's; softmax_sum carries L in its first B*N*Sq values. The
// rest of it and softmax_out are not used and NaN: Ascend's operator writes no softmax_out either.
void flash_attention_score(const Call& call) {
  const int inputs = call.size() - 4;
  for (int i = inputs + 1; i < inputs + 3; ++i) {
    Output unused(call[i]);
    std::fill_n(static_cast<float*>(unused), call[i].count(), std::numeric_limits<float>::quiet_NaN());
  }
  std::vector<int> order = {0, 1, 2, inputs + 3, inputs + 1, inputs};
  if (inputs == 4) order.insert(order.begin() + 3, 3);
  flash_attention(call.pick(order));
  Output largest(call[inputs]);
  float* values = largest;
  const int64_t copies = call[inputs].shape.at(3);
  for (int64_t row = call[inputs].count() / copies - 1; row >= 0; --row) {
    std::fill_n(values + row * copies, copies, values[row]);
  }
}

// Attention of packed tokens (T, N, D), as Ascend's layout TND: `query`, `key`, `value` and the two inputs `ends` say
// where each document's queries and keys end, counted over all tokens. With to_last, a document's last query attends to
// its last key (a rank of context parallelism has a part of the queries), else its first one to its first.
struct Packed {
  int64_t heads;
  AttentionRule rule;
  std::vector<Piece> pieces;

  Packed(const Call& call, int query, int ends) : heads(call[query].shape.at(1)) {
    const auto &q = call[query].shape, &k = call[query + 1].shape, &v = call[query + 2].shape;
    rule = {q.at(0), k.at(0), q.at(2), v.at(2), static_cast<float>(call.number("scale")), 0, heads * v.at(2)};
    const std::vector<int32_t> queries = integers(call[ends]), keys = integers(call[ends + 1]);
    check(queries.size() == keys.size(), "a document must have an end in the queries and in the keys");
    int64_t query_begin = 0, key_begin = 0;
    for (size_t i = 0; i < queries.size(); ++i) {
      const int64_t rows = queries[i] - query_begin, columns = keys[i] - key_begin;
      check(rows >= 0 && columns >= 0 && queries[i] <= rule.queries && keys[i] <= rule.keys,
            "the ends of documents must not decrease, nor lie behind the tokens");
      const int64_t diagonal = call.number("to_last") ? columns - rows : 0;
      if (rows > 0) pieces.push_back({query_begin, rows, key_begin, columns, diagonal});
      query_begin = queries[i];
      key_begin = keys[i];
    }
  }

  int64_t memory() const { return (rule.queries + rule.keys) * rule.key_width + rule.keys * rule.value_width; }

  // Head n, its rows side by side in `memory`, which has turned_keys() more.
  Head head(const float* q, const float* k, const float* v, int64_t n, float* memory) const {
    float *own_q = memory, *own_k = own_q + rule.queries * rule.key_width, *own_v = own_k + rule.keys * rule.key_width;
    float* k_turned = own_v + rule.keys * rule.value_width;
    take(q, rule.queries, rule.key_width, n, own_q);
    take(k, rule.keys, rule.key_width, n, own_k);
    take(v, rule.keys, rule.value_width, n, own_v);
    turn_keys(rule, own_k, k_turned);
    return {own_q, own_k, own_v, k_turned, rule.turned_stride(), nullptr};
  }

  void take(const float* x, int64_t rows, int64_t width, int64_t n, float* own) const {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(x + (i * heads + n) * width, width, own + i * width);
  }

  void give(const float* own, int64_t rows, int64_t width, int64_t n, float* x) const {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(own + i * width, width, x + (i * heads + n) * width);
  }
};

// Inputs query, key (T, N, Dk), value (T, N, Dv), ends of queries and of keys (L,); outputs as flash_attention_score.
// L lies by heads in softmax_sum.
void packed_attention(const Call& call) {
  const Packed packed(call, 0, 3);
  const Input q(call[0]), k(call[1]), v(call[2]);
  Output maxima(call[5]), log_sum(call[6]), unused(call[7]), out(call[8]);
  std::fill_n(static_cast<float*>(unused), call[7].count(), std::numeric_limits<float>::quiet_NaN());
  std::fill_n(static_cast<float*>(log_sum), call[6].count(), std::numeric_limits<float>::infinity());
  std::fill_n(static_cast<float*>(out), call[8].count(), 0.0f);
  const AttentionRule& rule = packed.rule;
  const std::vector<QueryBlock> blocks = query_blocks(packed.pieces);
  const int64_t size = packed.memory() + rule.turned_keys(), count = static_cast<int64_t>(blocks.size());
  const Scratch memory(packed.heads * size), largest(packed.heads * rule.queries);
  std::fill_n(largest.get(), packed.heads * rule.queries, -std::numeric_limits<float>::infinity());
  std::vector<Head> heads(packed.heads);
  parallel(packed.heads, [&](int64_t n) { heads[n] = packed.head(q, k, v, n, memory.get() + n * size); });
  parallel(packed.heads * count, [&](int64_t task) {
    const int64_t n = task / count;
    attend(rule, heads[n], blocks[task % count], out + n * rule.value_width, log_sum + n * rule.queries,
           largest.get() + n * rule.queries);
  });
  const int64_t copies = call[5].shape.at(2);
  for (int64_t row = 0; row < rule.queries * packed.heads; ++row) {
    std::fill_n(maxima + row * copies, copies, largest.get()[row % packed.heads * rule.queries + row / packed.heads]);
  }
}

// Inputs dcontext, query, key, value, context, L, ends of queries and of keys; outputs dquery, dkey, dvalue.
void packed_attention_grad(const Call& call) {
  const Packed packed(call, 1, 6);
  const Input dout(call[0]), q(call[1]), k(call[2]), v(call[3]), out(call[4]), log_sum(call[5]);
  Output dq(call[8]), dk(call[9]), dv(call[10]);
  const bool exact = call[4].type == DType::kFloat32;
  const AttentionRule& rule = packed.rule;
  parallel(packed.heads, [&](int64_t n) {
    const int64_t size = packed.memory() + rule.turned_keys(), context = n * rule.value_width;
    const Scratch memory(size + packed.memory());
    float *own_dq = memory.get() + size, *own_dk = own_dq + rule.queries * rule.key_width;
    float* own_dv = own_dk + rule.keys * rule.key_width;
    attend_grad(rule, packed.head(q, k, v, n, memory.get()), packed.pieces, exact ? out + context : nullptr,
                log_sum + n * rule.queries, dout + context, own_dq, own_dk, own_dv);
    packed.give(own_dq, rule.queries, rule.key_width, n, dq);
    packed.give(own_dk, rule.keys, rule.key_width, n, dk);
    packed.give(own_dv, rule.keys, rule.value_width, n, dv);
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(FlashAttention, cpu_kernels::flash_attention, "scale", "diagonal")
CPU_KERNEL(FlashAttentionGrad, cpu_kernels::flash_attention_grad, "scale", "diagonal")
CPU_KERNEL(FlashAttentionScore, cpu_kernels::flash_attention_score, "scale", "diagonal")
CPU_KERNEL(PackedAttention, cpu_kernels::packed_attention, "scale", "to_last")
CPU_KERNEL(PackedAttentionGrad, cpu_kernels::packed_attention_grad, "scale", "to_last")
