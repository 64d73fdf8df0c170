// DeepSeek's router after its matrix product (arXiv 2412.19437, section 2.1.2; facts as in mindformers_ext/layers/router.py).
//   s = sigmoid(z) or softmax(z);  choose the K largest of s + bias, with groups only among the experts of the best
//   groups (a group counts its best score, with bias the sum of its two best);  w = s / (sum of chosen s + 1e-20) c
// Backward through w and s only; the choice has no gradient.
#include <limits>

#include "kernel.h"
#include "vector_math.h"

namespace cpu_kernels {
namespace {

constexpr int64_t kTokens = 32;  // of a task
constexpr float kTiny = 1e-20f;
constexpr float kLeftOut = -std::numeric_limits<float>::infinity();

// The `count` largest of `size` values, largest first, the lower index first among equals; a NaN counts as -inf.
void largest(const float* values, int64_t size, int64_t count, int32_t* ids) {
  const auto value = [values](int64_t i) { return values[i] == values[i] ? values[i] : kLeftOut; };
  for (int64_t i = 0; i < size; ++i) {
    int64_t place = std::min(i, count);  // among those before i
    while (place > 0 && value(i) > value(ids[place - 1])) --place;
    if (place == count) continue;
    std::copy_backward(ids + place, ids + std::min(i, count - 1), ids + std::min(i + 1, count));
    ids[place] = static_cast<int32_t>(i);
  }
}

// Leave only the experts of the best `kept` groups.
void mask_losing_groups(std::vector<float>& choice, int64_t groups, int64_t kept, bool two_best) {
  const int64_t size = choice.size() / groups;
  std::vector<float> scores(groups);
  for (int64_t g = 0; g < groups; ++g) {
    float best = kLeftOut, second = kLeftOut;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      second = std::max(second, std::min(best, choice[i]));
      best = std::max(best, choice[i]);
    }
    scores[g] = two_best && size > 1 ? best + second : best;
  }
  std::vector<int32_t> winners(kept);
  largest(scores.data(), groups, kept, winners.data());
  std::vector<bool> wins(groups, false);
  for (const int32_t g : winners) wins[g] = true;
  for (size_t i = 0; i < choice.size(); ++i) choice[i] = wins[i / size] ? choice[i] : kLeftOut;
}

void score_row(const float* z, float* s, int64_t experts, bool is_sigmoid) {
  if (is_sigmoid) {
    for (int64_t e = 0; e < experts; ++e) s[e] = sigmoid(z[e]);
    return;
  }
  const float best = *std::max_element(z, z + experts);
  float sum = 0;
  for (int64_t e = 0; e < experts; ++e) sum += s[e] = exponential(z[e] - best);
  for (int64_t e = 0; e < experts; ++e) s[e] /= sum;
}

void mark(const int32_t* ids, int64_t count, float* row, int64_t experts) {
  std::fill_n(row, experts, 0.0f);
  for (int64_t k = 0; k < count; ++k) row[ids[k]] = 1.0f;
}

// Inputs z (T, E), bias (E,); outputs w (T, K), ids (T, K) int32, s (T, E), chosen (T, E): 1 where a token uses an
// expert, and unbiased (T, E): the same for the K largest s. Attributes groups (1: no limit), topk_group, sigmoid,
// two_best (the router has a bias), normalize, scaling.
void topk_router(const Call& call) {
  const Input z(call[0]), bias(call[1]);
  Output w(call[2]), s(call[4]), chosen(call[5]), unbiased(call[6]);
  auto* ids = static_cast<int32_t*>(call[3].data);
  const int64_t experts = call[0].columns(), topk = call[2].columns();
  const auto groups = static_cast<int64_t>(call.number("groups"));
  const auto kept = static_cast<int64_t>(call.number("topk_group"));
  const bool is_sigmoid = call.number("sigmoid") > 0, two_best = call.number("two_best") > 0;
  const bool normalize = call.number("normalize") > 0;
  const float scaling = static_cast<float>(call.number("scaling"));
  parallel_ranges(call[0].rows(), kTokens, [&](int64_t begin, int64_t end) {
    std::vector<float> choice(experts);
    std::vector<int32_t> plain(topk);
    for (int64_t t = begin; t < end; ++t) {
      float *row = s + t * experts, *weights = w + t * topk;
      int32_t* own = ids + t * topk;
      score_row(z + t * experts, row, experts, is_sigmoid);
      for (int64_t e = 0; e < experts; ++e) choice[e] = row[e] + bias[e];
      if (groups > 1) mask_losing_groups(choice, groups, kept, two_best);
      largest(choice.data(), experts, topk, own);
      float sum = 0;
      for (int64_t k = 0; k < topk; ++k) sum += weights[k] = row[own[k]];
      for (int64_t k = 0; k < topk; ++k) weights[k] = (normalize ? weights[k] / (sum + kTiny) : weights[k]) * scaling;
      mark(own, topk, chosen + t * experts, experts);
      largest(row, experts, topk, plain.data());
      mark(plain.data(), topk, unbiased + t * experts, experts);
    }
  });
}

// Inputs dw (T, K), ds (T, E), s (T, E), ids (T, K); output dz (T, E). Attributes sigmoid, normalize, scaling.
//   normalised: d s_k = c / S (dw_k - sum_j dw_j s_j / S), S = sum of chosen s;  else d s_k = c dw_k
//   sigmoid: dz = ds s (1 - s);  softmax: dz = s (ds - sum ds s)
void topk_router_grad(const Call& call) {
  const Input dw(call[0]), ds(call[1]), s(call[2]);
  const auto* ids = static_cast<const int32_t*>(call[3].data);
  Output dz(call[4]);
  const int64_t experts = call[1].columns(), topk = call[0].columns();
  const bool is_sigmoid = call.number("sigmoid") > 0, normalize = call.number("normalize") > 0;
  const float scaling = static_cast<float>(call.number("scaling"));
  parallel_ranges(call[0].rows(), kTokens, [&](int64_t begin, int64_t end) {
    std::vector<float> total(experts);
    for (int64_t t = begin; t < end; ++t) {
      const float *row = s + t * experts, *gradient = dw + t * topk;
      const int32_t* own = ids + t * topk;
      float sum = 0, weighted = 0;
      for (int64_t k = 0; k < topk; ++k) sum += row[own[k]];
      sum += kTiny;
      for (int64_t k = 0; k < topk; ++k) weighted += gradient[k] * row[own[k]] / sum;
      std::copy_n(ds + t * experts, experts, total.begin());
      for (int64_t k = 0; k < topk; ++k) {
        total[own[k]] += scaling * (normalize ? (gradient[k] - weighted) / sum : gradient[k]);
      }
      float mean = 0;
      if (!is_sigmoid) mean = dot(total.data(), row, experts);
      for (int64_t e = 0; e < experts; ++e) {
        dz[t * experts + e] = row[e] * (is_sigmoid ? total[e] * (1.0f - row[e]) : total[e] - mean);
      }
    }
  });
}

}  // namespace
}  // namespace cpu_kernels

CPU_KERNEL(TopkRouter, cpu_kernels::topk_router, "groups", "topk_group", "sigmoid", "two_best", "normalize", "scaling")
CPU_KERNEL(TopkRouterGrad, cpu_kernels::topk_router_grad, "sigmoid", "normalize", "scaling")
