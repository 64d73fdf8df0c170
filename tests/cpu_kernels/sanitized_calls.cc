// Calls every kernel on small and awkward shapes, for a build with address and undefined-behaviour sanitizers.
// Inputs are random, outputs have exactly their size: a read or write beside a tensor stops the program.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mindspore/ccsrc/utils/custom_aot_extra.h"

namespace {

// Attributes of an operator without MindSpore's primitive behind them.
class Attributes : public mindspore::AotExtra {
 public:
  explicit Attributes(std::map<std::string, std::string> values) : values_(std::move(values)) {}
  ~Attributes() override { DestructKernelData(); }
  bool HasAttr(std::string name) override { return values_.count(name) > 0; }

 private:
  bool GetAttrBool(std::string) override { std::abort(); }
  int64_t GetAttrInt(std::string) override { std::abort(); }
  float GetAttrFloat(std::string) override { std::abort(); }
  std::string GetAttrStr(std::string name) override { return values_.at(name); }
  std::vector<int64_t> GetAttrIntVec(std::string) override { std::abort(); }
  std::vector<float> GetAttrFloatVec(std::string) override { std::abort(); }
  std::vector<std::vector<int64_t>> GetAttrInt2DVec(std::string) override { std::abort(); }
  std::vector<std::vector<float>> GetAttrFloat2DVec(std::string) override { std::abort(); }
  std::map<std::string, std::string> values_;
};

struct Tensor {
  std::vector<int64_t> shape;
  const char* type = "float32";
  int64_t below = 0;  // integers lie in [0, below), or ascend to it when negative
  std::unique_ptr<char[]> data;

  Tensor(std::vector<int64_t> s, const char* t = "float32", int64_t b = 0) : shape(std::move(s)), type(t), below(b) {
    int64_t count = 1;
    for (const int64_t size : shape) count *= size;
    const std::string name = type;
    const int64_t width = name == "int64" ? 8 : name == "bfloat16" ? 2 : name == "uint8" ? 1 : 4;
    data.reset(new char[count * width]);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t number = below < 0 ? -below * (i + 1) / count : std::rand() % std::max<int64_t>(below, 1);
      const float value = std::rand() / static_cast<float>(RAND_MAX) - 0.5f;
      if (name == "float32") reinterpret_cast<float*>(data.get())[i] = value;
      if (name == "int32") reinterpret_cast<int32_t*>(data.get())[i] = static_cast<int32_t>(number);
      if (name == "int64") reinterpret_cast<int64_t*>(data.get())[i] = number;
      if (name == "uint8") data[i] = static_cast<char>(number);
      if (name == "bfloat16") reinterpret_cast<uint16_t*>(data.get())[i] = 0x3F00 + std::rand() % 128;
    }
  }
};

using Init = int (*)(int*, int64_t**, const char**, void*);
using Run = int (*)(int, void**, int*, int64_t**, const char**, void*, void*);

using Values = std::map<std::string, std::string>;

void call(const char* name, Init init, Run run, std::vector<Tensor> tensors, Values values) {
  Attributes attributes(std::move(values));
  mindspore::AotExtra* extra = &attributes;
  std::vector<void*> data;
  std::vector<int> dimensions;
  std::vector<int64_t*> shapes;
  std::vector<const char*> types;
  for (Tensor& tensor : tensors) {
    data.push_back(tensor.data.get());
    dimensions.push_back(static_cast<int>(tensor.shape.size()));
    shapes.push_back(tensor.shape.data());
    types.push_back(tensor.type);
  }
  init(nullptr, nullptr, nullptr, extra);
  if (run(static_cast<int>(data.size()), data.data(), dimensions.data(), shapes.data(), types.data(), nullptr, extra)) {
    std::printf("%s failed\n", name);
    std::exit(1);
  }
}

}  // namespace

#define KERNEL(name)                                                                  \
  extern "C" int name##Init(int*, int64_t**, const char**, void*);                    \
  extern "C" int name(int, void**, int*, int64_t**, const char**, void*, void*);
#define CALL(name, attributes, ...) call(#name, name##Init, name, make(__VA_ARGS__), attributes)

KERNEL(RmsNorm) KERNEL(RmsNormGrad) KERNEL(SwiGlu) KERNEL(SwiGluGrad) KERNEL(SwiGluHalves) KERNEL(SwiGluHalvesGrad)
KERNEL(Rotary) KERNEL(FlashAttention) KERNEL(FlashAttentionGrad) KERNEL(FlashAttentionScore) KERNEL(GlobalNorm)
KERNEL(AdamW) KERNEL(TokenPermute) KERNEL(TokenPermuteGrad) KERNEL(TokenUnpermute) KERNEL(TokenUnpermuteGrad)
KERNEL(GroupedMatmul) KERNEL(GroupedMatmulInputGrad) KERNEL(GroupedMatmulWeightGrad) KERNEL(RoutedExperts)
KERNEL(RoutedExpertsGrad) KERNEL(TopkRouter) KERNEL(TopkRouterGrad) KERNEL(LinearCrossEntropy) KERNEL(Linear)
KERNEL(LinearGrad) KERNEL(Embedding) KERNEL(EmbeddingGrad) KERNEL(FeedForward) KERNEL(FeedForwardGrad)
KERNEL(LatentAttention) KERNEL(LatentAttentionGrad) KERNEL(SplitColumns) KERNEL(JoinColumns)
KERNEL(MatMul) KERNEL(MaskedRows) KERNEL(PickColumn) KERNEL(PickLogSoftmax)
KERNEL(SplitCrossEntropyGrad) KERNEL(WeightedSquareSum) KERNEL(PackedAttention) KERNEL(PackedAttentionGrad)
extern "C" void cpu_kernels_set_threads(int);

template <class... T>
std::vector<Tensor> make(T... tensors) {
  std::vector<Tensor> made;
  (made.push_back(std::move(tensors)), ...);
  return made;
}

using T = Tensor;

void dense(int64_t n, int64_t d, const char* t) {
  const Values none, eps = {{"eps", "1e-6"}}, turn = {{"direction", "1"}, {"halves", "0"}};
  const Values turn_halves = {{"direction", "-1"}, {"halves", "1"}};
  CALL(RmsNorm, eps, T({n, d}, t), T({d}, t), T({n, d}, t), T({n}));
  CALL(RmsNormGrad, none, T({n, d}, t), T({n, d}, t), T({n}), T({d}, t), T({n, d}, t), T({d}, t));
  CALL(SwiGlu, none, T({n, d}, t), T({n, d}, t), T({n, d}, t));
  CALL(SwiGluGrad, none, T({n, d}, t), T({n, d}, t), T({n, d}, t), T({n, d}, t), T({n, d}, t));
  CALL(SwiGluHalves, none, T({n, 2 * d}, t), T({n, d}, t));
  CALL(SwiGluHalvesGrad, none, T({n, d}, t), T({n, 2 * d}, t), T({n, 2 * d}, t));
  CALL(Rotary, turn, T({2, 3, n, 2 * d}, t), T({2, 1, n, 2 * d}), T({2, 1, n, 2 * d}), T({2, 3, n, 2 * d}, t));
  CALL(Rotary, turn_halves, T({2, 3, n, 2 * d}, t), T({2, 1, n, 2 * d}), T({2, 1, n, 2 * d}), T({2, 3, n, 2 * d}, t));
  CALL(Linear, none, T({n, d}, t), T({7, d}, t), T({n, 7}, t));
  CALL(LinearGrad, none, T({n, 7}, t), T({n, d}, t), T({7, d}, t), T({n, d}, t), T({7, d}, t));
  CALL(FeedForward, none, T({n, d}, t), T({7, d}, t), T({7, d}, t), T({d, 7}, t), T({n, d}, t), T({n, 14}));
  CALL(FeedForwardGrad, none, T({n, d}, t), T({n, d}, t), T({7, d}, t), T({7, d}, t), T({d, 7}, t), T({n, 14}),
       T({n, d}, t), T({7, d}, t), T({7, d}, t), T({d, 7}, t));
  CALL(SplitColumns, none, T({n, d + 2}, t), T({n, d}, t), T({n, 2}, t));
  CALL(JoinColumns, none, T({n, d}, t), T({n, 2}, t), T({n, d + 2}, t));
  CALL(Embedding, none, T({9, d}, t), T({n}, "int32", 9), T({n, d}, t));
  CALL(EmbeddingGrad, none, T({n, d}, t), T({n}, "int32", 9), T({9, d}, t), T({9, d}, t));
  CALL(LinearCrossEntropy, none, T({n, d}, t), T({9, d}, t), T({n}, "int32", 9), T({n}), T({1}), T({n, d}, t),
       T({9, d}, t));
  CALL(GlobalNorm, none, T({n, d}, t), T({1}), T({1}));
  const Values adam = {{"beta1", "0.9"}, {"beta2", "0.95"}, {"eps", "1e-8"}};
  CALL(AdamW, adam, T({1}, "int32", 1), T({1}), T({1}), T({1}), T({n, d}, t), T({n, d}), T({n, d}), T({n, d}, t),
       T({1}));
}

void of_ranks(int64_t n, int64_t d, const char* t) {
  const Values none;
  const Values turn_a = {{"transpose_a", "1"}, {"transpose_b", "0"}};
  const Values turn_b = {{"transpose_a", "0"}, {"transpose_b", "1"}};
  CALL(SplitColumns, none, T({2, n, d + 2}, t), T({2, n, d}, t), T({2, n, 2}, t));
  CALL(EmbeddingGrad, none, T({n, d}, t), T({n}, "int32", 9), T({9, d}, t));
  CALL(MatMul, turn_a, T({d, n}, t), T({d, 7}, t), T({n, 7}, t));
  CALL(MatMul, turn_b, T({n, d}, t), T({7, d}, t), T({n, 7}, t));
  CALL(MaskedRows, none, T({n, d}, t), T({n, 1}, "uint8", 2), T({}, t), T({n, d}, t));
  CALL(PickLogSoftmax, none, T({n, d}, t), T({n, 1}, "int32", d), T({n, 1}, t));
  CALL(PickColumn, none, T({n, d}, t), T({n, 1}, "int32", d), T({n, 1}, t));
  CALL(SplitCrossEntropyGrad, none, T({n, d}, t), T({n, 1}, t), T({n, 1}, "int32", d), T({n, 1}, t),
       T({n, d}, t));
  CALL(WeightedSquareSum, none, T({2}), T({n, d}, t), T({1}), T({1}));
}

void attention(int64_t n, int64_t d, const char* t) {
  const Values rule = {{"scale", "0.3"}, {"diagonal", "0"}};
  const std::vector<int64_t> q = {1, 2, n, d}, v = {1, 2, n, d + 1}, l = {1, 2, n}, m = {1, 1, n, n};
  CALL(FlashAttention, rule, T(q, t), T(q, t), T(v, t), T(v, t), T(l));
  CALL(FlashAttention, rule, T(q, t), T(q, t), T(v, t), T(m, "uint8", 2), T(v, t), T(l));
  CALL(FlashAttentionGrad, rule, T(v, t), T(q, t), T(q, t), T(v, t), T(v, t), T(l), T(q, t), T(q, t), T(v, t));
  const Values latent = {{"scale", "0.3"}, {"heads", "3"}};
  const std::vector<int64_t> query = {n, 3 * (d + 4)}, kv = {n, 3 * (d + 5)}, turn = {1, 1, n, 4};
  const std::vector<int64_t> context = {n, 15}, sums = {1, 3, n}, pe = {n, 4};
  CALL(LatentAttention, latent, T(query, t), T(kv, t), T(pe, t), T(turn), T(turn), T(context, t), T(sums));
  CALL(LatentAttentionGrad, latent, T(context, t), T(query, t), T(kv, t), T(pe, t), T(turn), T(turn), T(context, t),
       T(sums), T(m, "uint8", 2), T(query, t), T(kv, t), T(pe, t));
  CALL(FlashAttentionScore, rule, T(q, t), T(q, t), T(v, t), T({1, 2, n, 8}), T({1, 2, n, 8}), T({1}), T(v, t));
  const Values packed = {{"scale", "0.3"}, {"to_last", "1"}};
  const std::vector<int64_t> rows = {n, 2, d}, values = {n, 2, d + 1}, sum = {n, 2, 8};
  CALL(PackedAttention, packed, T(rows, t), T(rows, t), T(values, t), T({3}, "int32", -n), T({3}, "int32", -n), T(sum),
       T(sum), T({1}), T(values, t));
  CALL(PackedAttentionGrad, packed, T(values, t), T(rows, t), T(rows, t), T(values, t), T(values, t), T(sum),
       T({3}, "int32", -n), T({3}, "int32", -n), T(rows, t), T(rows, t), T(values, t));
}

void experts(int64_t n, int64_t d, const char* t) {
  const Values none;
  const int64_t k = 2, e = 3, f = 5, r = n * k;
  const auto ids = [&] { return T({n, k}, "int32", e + 1); };
  CALL(TokenPermute, none, T({n, d}, t), ids(), T({r, d}, t), T({r}, "int32"));
  CALL(TokenPermuteGrad, none, T({r, d}, t), T({r}, "int32", r), T({n, d}, t));
  CALL(TokenUnpermute, none, T({r, d}, t), T({r}, "int32", r + 1), T({n, k}), T({n, d}, t));
  CALL(TokenUnpermuteGrad, none, T({n, d}, t), T({r, d}, t), T({r}, "int32", r + 1), T({n, k}), T({r, d}, t),
       T({n, k}));
  CALL(GroupedMatmul, none, T({n, d}, t), T({e, d, f}, t), T({e}, "int64", -n), T({n, f}, t));
  CALL(GroupedMatmulInputGrad, none, T({n, f}, t), T({e, d, f}, t), T({e}, "int64", -n), T({n, d}, t));
  CALL(GroupedMatmulWeightGrad, none, T({n, d}, t), T({n, f}, t), T({e}, "int64", -n), T({e, d, f}, t));
  CALL(RoutedExperts, none, T({n, d}, t), T({n, k}), ids(), T({e, d, 2 * f}, t), T({e, f, d}, t), T({n, d}, t),
       T({r, 2 * f}));
  CALL(RoutedExpertsGrad, none, T({n, d}, t), T({n, d}, t), T({n, k}), ids(), T({e, d, 2 * f}, t), T({e, f, d}, t),
       T({r, 2 * f}), T({n, d}, t), T({n, k}), T({e, d, 2 * f}, t), T({e, f, d}, t));
  const Values router = {{"groups", "4"},   {"topk_group", "2"}, {"sigmoid", "1"},
                         {"two_best", "1"}, {"normalize", "1"},  {"scaling", "2.5"}};
  CALL(TopkRouter, router, T({n, 8}), T({8}), T({n, k}), T({n, k}, "int32"), T({n, 8}), T({n, 8}), T({n, 8}));
  CALL(TopkRouterGrad, router, T({n, k}), T({n, 8}), T({n, 8}), T({n, k}, "int32", 8), T({n, 8}));
}

int main() {
  cpu_kernels_set_threads(3);
  for (const char* type : {"float32", "bfloat16"}) {
    for (const int64_t n : {1, 5, 130, 300}) {
      for (const int64_t d : {1, 7, 33}) {
        dense(n, d, type);
        attention(n, d, type);
        experts(n, d, type);
        of_ranks(n, d, type);
      }
    }
  }
  std::puts("all kernels ran");
  return 0;
}
