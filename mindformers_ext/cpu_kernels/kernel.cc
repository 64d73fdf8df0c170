// Tensors, scratch memory and attributes: the seam between MindSpore's AOT Custom operators and the kernels.
#include "kernel.h"

#include <malloc.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "mindspore/ccsrc/utils/custom_aot_extra.h"
#include "vector_math.h"

namespace mindspore {
// The header declares Attr<T> over private virtual functions and leaves the specialisations to its user.
template <>
inline std::string AotExtra::Attr<std::string>(std::string name) const {
  return const_cast<AotExtra*>(this)->GetAttrStr(std::move(name));
}
}  // namespace mindspore

namespace cpu_kernels {
namespace {

struct Settings : mindspore::AotKernelData {
  std::map<std::string, std::string> attributes;
};

DType parse(const std::string& name) {
  static const std::map<std::string, DType> kinds = {
      {"float32", DType::kFloat32}, {"float", DType::kFloat32}, {"bfloat16", DType::kBFloat16},
      {"int32", DType::kInt32},     {"int", DType::kInt32},     {"int64", DType::kInt64},
      {"uint8", DType::kByte},      {"bool", DType::kByte},     {"int8", DType::kByte}};
  const auto found = kinds.find(name);
  if (found == kinds.end()) throw std::invalid_argument("type " + name + " is not float32, bfloat16, int or bool");
  return found->second;
}

std::mutex free_mutex;
std::multimap<int64_t, float*> free_memory;  // by capacity

}  // namespace

int64_t Tensor::count() const {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

Scratch::Scratch(int64_t floats) : capacity_(std::max<int64_t>(floats, 16)) {
  const std::lock_guard<std::mutex> lock(free_mutex);
  const auto fit = free_memory.lower_bound(capacity_);
  if (fit != free_memory.end()) {
    capacity_ = fit->first;
    data_ = fit->second;
    free_memory.erase(fit);
    return;
  }
  if (!free_memory.empty()) {  // grow the largest free piece instead of adding one
    std::free(free_memory.rbegin()->second);
    free_memory.erase(std::prev(free_memory.end()));
  }
  capacity_ = (capacity_ + 1023) / 1024 * 1024;
  data_ = static_cast<float*>(std::aligned_alloc(64, capacity_ * sizeof(float)));
  if (data_ == nullptr) throw std::bad_alloc();
}

Scratch::~Scratch() {
  const std::lock_guard<std::mutex> lock(free_mutex);
  free_memory.emplace(capacity_, data_);
}

double Call::number(const std::string& name) const { return std::stod(attributes_.at(name)); }

Call Call::pick(const std::vector<int>& order) const {
  std::vector<Tensor> picked;
  for (const int index : order) picked.push_back(tensors_.at(index));
  return Call(std::move(picked), attributes_);
}

Input::Input(const Tensor& tensor) : data_(static_cast<const float*>(tensor.data)) {
  if (tensor.type == DType::kFloat32) return;
  check(tensor.type == DType::kBFloat16, "a floating-point input must be float32 or bfloat16");
  copy_ = std::make_unique<Scratch>(tensor.count());
  float* copy = copy_->get();
  const auto* source = static_cast<const uint16_t*>(tensor.data);
  parallel_ranges(tensor.count(), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) copy[i] = from_bfloat16(source[i]);
  });
  data_ = copy;
}

Output::Output(const Tensor& tensor) : tensor_(tensor), data_(static_cast<float*>(tensor.data)) {
  if (tensor.type == DType::kFloat32) return;
  check(tensor.type == DType::kBFloat16, "a floating-point output must be float32 or bfloat16");
  scratch_ = std::make_unique<Scratch>(tensor.count());
  data_ = scratch_->get();
}

Output::~Output() {
  if (scratch_ == nullptr) return;
  auto* target = static_cast<uint16_t*>(tensor_.data);
  parallel_ranges(tensor_.count(), 1 << 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) target[i] = to_bfloat16(data_[i]);
  });
}

std::vector<int32_t> integers(const Tensor& tensor) {
  std::vector<int32_t> values(tensor.count());
  if (tensor.type == DType::kInt64) {
    const auto* source = static_cast<const int64_t*>(tensor.data);
    std::transform(source, source + values.size(), values.begin(), [](int64_t x) { return static_cast<int32_t>(x); });
  } else {
    check(tensor.type == DType::kInt32, "an index input must be int32 or int64");
    if (!values.empty()) std::memcpy(values.data(), tensor.data, values.size() * sizeof(int32_t));
  }
  return values;
}

void check(bool holds, const char* sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

int run(Function function, int count, void** data, int* dimensions, int64_t** shapes, const char** types, void* extra) {
  // The small pieces that compiling the graph has left free go back once, before a step takes its memory beside them.
  static const int trimmed = malloc_trim(0);
  (void)trimmed;
  try {
    const auto* settings = static_cast<const Settings*>(static_cast<mindspore::AotExtra*>(extra)->KernelData());
    std::vector<Tensor> tensors(count);
    for (int i = 0; i < count; ++i) {
      tensors[i] = {data[i], std::vector<int64_t>(shapes[i], shapes[i] + dimensions[i]), parse(types[i])};
    }
    function(Call(std::move(tensors), settings->attributes));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "cpu_kernels: %s\n", error.what());
    return 1;
  }
}

int initialize(void* extra, std::initializer_list<const char*> attributes) {
  auto* aot = static_cast<mindspore::AotExtra*>(extra);
  auto* settings = new Settings;
  for (const char* name : attributes) settings->attributes[name] = aot->Attr<std::string>(name);
  aot->SetKernelData(settings);
  return 0;
}

}  // namespace cpu_kernels
