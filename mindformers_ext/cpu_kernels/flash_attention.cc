// Attention of queries, keys and values that lie by heads; the mathematics stand in attention.h. FlashAttentionScore
// has the tensors of Ascend's operator, for the graphs of ranks.
#include <limits>

#include "attention.h"

namespace cpu_kernels {
namespace {

AttentionRule rule_of(const Call& call, int query, int key, int value) {
  const auto &q = call[query].shape, &k = call[key].shape;
  return {q.at(2), k.at(2), q.at(3), call[value].shape.at(3), static_cast<float>(call.number("scale")),
          static_cast<int64_t>(call.number("diagonal")), call[value].shape.at(3)};
}

// Head `index` = b * N + n, with the mask (1 or B, 1, Sq, Sk) of its sequence; causal where `mask` is null. K^T is
// written into `k_turned`.
Head head_of(const AttentionRule& rule, const float* q, const float* k, const float* v, const Tensor* mask,
             int64_t index, int64_t heads, float* k_turned) {
  const Head head = {q + index * rule.queries * rule.key_width, k + index * rule.keys * rule.key_width,
                     v + index * rule.keys * rule.value_width, k_turned, mask_of(rule, mask, index / heads)};
  turn_keys(rule, head.k, k_turned);
  return head;
}

// Inputs query (B, N, Sq, Dk), key (B, N, Sk, Dk), value (B, N, Sk, Dv) and, unless causal, a mask (1 or B, 1, Sq, Sk);
// outputs context (B, N, Sq, Dv), L and the largest scores (B, N, Sq) float32. Attributes scale, diagonal.
void flash_attention(const Call& call) {
  const Tensor* mask = call.size() == 7 ? &call[3] : nullptr;
  const AttentionRule rule = rule_of(call, 0, 1, 2);
  const Input q(call[0]), k(call[1]), v(call[2]);
  Output out(call[call.size() - 3]), log_sum(call[call.size() - 2]), largest(call[call.size() - 1]);
  const int64_t heads = call[0].shape.at(1), count = call[0].shape.at(0) * heads;
  const int64_t blocks = blocks_of(rule.queries, kQueryBlock);
  const Scratch k_turned(count * rule.turned_keys());
  std::vector<Head> prepared(count);
  parallel(count, [&](int64_t index) {
    prepared[index] = head_of(rule, q, k, v, mask, index, heads, k_turned.get() + index * rule.turned_keys());
  });
  parallel(count * blocks, [&](int64_t task) {
    const int64_t index = task / blocks;
    const int64_t query = (blocks - 1 - task % blocks) * kQueryBlock;  // the longest rows first
    const int64_t row = index * rule.queries + query;
    attend(rule, prepared[index], query, out + row * rule.value_width, log_sum + row, largest + row);
  });
}

// Inputs dcontext, query, key, value, context, L and, unless causal, the mask; outputs dquery, dkey, dvalue.
void flash_attention_grad(const Call& call) {
  const Tensor* mask = call.size() == 10 ? &call[6] : nullptr;
  const AttentionRule rule = rule_of(call, 1, 2, 3);
  const Input dout(call[0]), q(call[1]), k(call[2]), v(call[3]), out(call[4]), log_sum(call[5]);
  Output dq(call[call.size() - 3]), dk(call[call.size() - 2]), dv(call[call.size() - 1]);
  const bool exact = call[4].type == DType::kFloat32;
  const int64_t heads = call[1].shape.at(1);
  parallel(call[1].shape.at(0) * heads, [&](int64_t index) {
    const int64_t query = index * rule.queries * rule.key_width, key = index * rule.keys * rule.key_width;
    const int64_t context = index * rule.queries * rule.value_width;
    const Scratch k_turned(rule.turned_keys());
    attend_grad(rule, head_of(rule, q, k, v, mask, index, heads, k_turned.get()), exact ? out + context : nullptr,
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

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(FlashAttention, cpu_kernels::flash_attention, "scale", "diagonal")
CPU_KERNEL(FlashAttentionGrad, cpu_kernels::flash_attention_grad, "scale", "diagonal")
CPU_KERNEL(FlashAttentionScore, cpu_kernels::flash_attention_score, "scale", "diagonal")
