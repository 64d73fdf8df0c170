// Multi-head latent attention from its projections to the context (arXiv 2405.04434, eq. 10-19), without the tensors
// that operators for heads, slices, rotation and concatenation would make. With R_t the rotation at position t:
//   q_tn = [q_tn^nope ; R_t q_tn^pe],  k_tn = [k_tn^nope ; R_t k_t^pe],  k^pe shared by the heads
//   o_tn = attention of head n (attention.h)
// Backward: what attention.h gives for q, k and v, turned back; dk_t^pe is the sum over heads.
#include "attention.h"
#include "rotary.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kTokens = 64;  // of a task
constexpr int64_t kAhead = 4;    // tokens whose part of a head is fetched before its turn

struct Sizes {
  int64_t batch, heads, length, nope, rope, value;
  int64_t key() const { return nope + rope; }
  int64_t query_row() const { return heads * key(); }         // floats of a token's queries,
  int64_t kv_row() const { return heads * (nope + value); }   // keys and values,
  int64_t out_row() const { return heads * value; }           // and context
  int64_t kv_place(int64_t token, int64_t n) const { return token * kv_row() + n * (nope + value); }
};

Sizes sizes_of(const Call& call, int first) {
  const int64_t heads = static_cast<int64_t>(call.number("heads")), length = call[first + 3].shape.at(2);
  const int64_t rope = call[first + 2].columns(), nope = call[first].columns() / heads - rope;
  return {call[first].rows() / length, heads, length, nope, rope, call[first + 1].columns() / heads - nope};
}

AttentionRule rule_of(const Call& call, const Sizes& s) {
  return {s.length, s.length, s.key(), s.value, static_cast<float>(call.number("scale")), 0, s.out_row()};
}

// Where positions are turned to: tables (1 or B, 1, S, rope).
struct Tables {
  Input cos, sin;
  bool per_sequence;

  Tables(const Call& call, int first)
      : cos(call[first]), sin(call[first + 1]), per_sequence(call[first].shape.at(0) > 1) {}

  void turn(const float* x, const Sizes& s, int64_t sequence, int64_t t, float direction, float* y) const {
    const int64_t place = ((per_sequence ? sequence * s.length : 0) + t) * s.rope;
    turn_row(x, cos + place, sin + place, direction, s.rope, y);
  }
};

// Floats of a head's own queries, keys (twice) and values.
int64_t head_memory(const AttentionRule& rule) {
  return rule.keys * (2 * rule.key_width + rule.value_width) + rule.turned_keys();
}

// Head n of a sequence, written into `memory`.
Head prepare(const Sizes& s, const AttentionRule& rule, const Tables& tables, const float* query, const float* kv,
             const float* k_pe, const Visible& visible, int64_t sequence, int64_t n, float* memory) {
  float *q = memory, *k = q + s.length * s.key(), *v = k + s.length * s.key();
  float* k_turned = v + s.length * s.value;
  const Head head = {q, k, v, k_turned, rule.turned_stride(), visible.mask(sequence)};
  for (int64_t t = 0; t < s.length; ++t, q += s.key(), k += s.key(), v += s.value) {
    const int64_t token = sequence * s.length + t;
    const float *own = query + token * s.query_row() + n * s.key(), *own_kv = kv + s.kv_place(token, n);
    if (t + kAhead < s.length) {
      prefetch(own + kAhead * s.query_row(), s.key());
      prefetch(own_kv + kAhead * s.kv_row(), s.nope + s.value);
    }
    std::copy_n(own, s.nope, q);
    tables.turn(own + s.nope, s, sequence, t, 1.0f, q + s.nope);
    std::copy_n(own_kv, s.nope, k);
    tables.turn(k_pe + token * s.rope, s, sequence, t, 1.0f, k + s.nope);
    std::copy_n(own_kv + s.nope, s.value, v);
  }
  turn_keys(rule, head.k, k_turned);
  return head;
}

// Inputs query (T, N*(nope+rope)), kv (T, N*(nope+Dv)), k_pe (T, rope), cos and sin (1 or B, 1, S, rope), each angle
// twice, and, unless causal, what is visible (attention.h); outputs context (T, N*Dv), L and the
// largest scores (B, N, S) float32.
// Attributes heads, scale.
void latent_attention(const Call& call) {
  const Sizes s = sizes_of(call, 0);
  const AttentionRule rule = rule_of(call, s);
  const Visible visible(rule, call.size() == 9 ? &call[5] : nullptr, s.batch);
  const Input query(call[0]), kv(call[1]), k_pe(call[2]);
  const Tables tables(call, 3);
  Output out(call[call.size() - 3]), log_sum(call[call.size() - 2]), largest(call[call.size() - 1]);
  const int64_t count = s.batch * s.heads, size = head_memory(rule);
  const Scratch memory(count * size);
  std::vector<Head> heads(count);
  parallel(count, [&](int64_t i) {
    heads[i] = prepare(s, rule, tables, query, kv, k_pe, visible, i / s.heads, i % s.heads, memory.get() + i * size);
  });
  std::vector<std::pair<int64_t, QueryBlock>> blocks;  // with their heads
  for (int64_t i = 0; i < count; ++i) {
    for (const QueryBlock& block : query_blocks(visible.pieces(i / s.heads))) blocks.emplace_back(i, block);
  }
  parallel(static_cast<int64_t>(blocks.size()), [&](int64_t task) {
    const auto& [i, block] = blocks[task];
    const int64_t token = i / s.heads * s.length, n = i % s.heads;
    attend(rule, heads[i], block, out + token * s.out_row() + n * s.value, log_sum + i * s.length,
           largest + i * s.length);
  });
}

// dquery and dkv of one head from its own dq, dk and dv.
void write_gradients(const Sizes& s, const Tables& tables, const float* dq, const float* dk, const float* dv,
                     int64_t sequence, int64_t n, float* dquery, float* dkv) {
  for (int64_t t = 0; t < s.length; ++t, dq += s.key(), dk += s.key(), dv += s.value) {
    const int64_t token = sequence * s.length + t;
    float *own = dquery + token * s.query_row() + n * s.key(), *own_kv = dkv + s.kv_place(token, n);
    std::copy_n(dq, s.nope, own);
    tables.turn(dq + s.nope, s, sequence, t, -1.0f, own + s.nope);
    std::copy_n(dk, s.nope, own_kv);
    std::copy_n(dv, s.value, own_kv + s.nope);
  }
}

// Inputs dcontext, then the forward's first five, context, L and, unless causal, what is visible; outputs dquery,
// dkv, dk_pe.
void latent_attention_grad(const Call& call) {
  const Sizes s = sizes_of(call, 1);
  const AttentionRule rule = rule_of(call, s);
  const Visible visible(rule, call.size() == 12 ? &call[8] : nullptr, s.batch);
  const Input dout(call[0]), query(call[1]), kv(call[2]), k_pe(call[3]), out(call[6]), log_sum(call[7]);
  const Tables tables(call, 4);
  Output dquery(call[call.size() - 3]), dkv(call[call.size() - 2]), dk_pe(call[call.size() - 1]);
  const bool exact = call[6].type == DType::kFloat32;
  const int64_t count = s.batch * s.heads, size = s.length * s.key();
  const Scratch dk(count * size);
  parallel(count, [&](int64_t i) {
    const int64_t sequence = i / s.heads, n = i % s.heads;
    const int64_t context = sequence * s.length * s.out_row() + n * s.value;
    const Scratch own(head_memory(rule) + size + s.length * s.value);
    float *dq = own.get() + head_memory(rule), *dv = dq + size, *own_dk = dk.get() + i * size;
    const Head head = prepare(s, rule, tables, query, kv, k_pe, visible, sequence, n, own.get());
    attend_grad(rule, head, visible.pieces(sequence), exact ? out + context : nullptr, log_sum + i * s.length,
                dout + context, dq, own_dk, dv);
    write_gradients(s, tables, dq, own_dk, dv, sequence, n, dquery, dkv);
  });
  parallel_ranges(s.batch * s.length, kTokens, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(s.rope);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t sequence = token / s.length, t = token % s.length;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t n = 0; n < s.heads; ++n) {
        const float* row = dk.get() + ((sequence * s.heads + n) * s.length + t) * s.key();
        add_scaled(sum.data(), row + s.nope, 1.0f, s.rope);
      }
      tables.turn(sum.data(), s, sequence, t, -1.0f, dk_pe + token * s.rope);
    }
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(LatentAttention, cpu_kernels::latent_attention, "heads", "scale")
CPU_KERNEL(LatentAttentionGrad, cpu_kernels::latent_attention_grad, "heads", "scale")
