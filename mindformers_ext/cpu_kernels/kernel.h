// What every kernel of this folder is written with: tensors as MindSpore's AOT Custom operators pass them, scratch
// memory, the thread pool and matrix products.
//
// All arithmetic is float32. A bfloat16 tensor is converted to float32 when a kernel reads it, and a bfloat16 result is
// rounded once (to nearest even) when it is written. Work is cut into tasks whose size depends on shapes only, so
// results have the same bits with any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpu_kernels {

enum class DType { kFloat32, kBFloat16, kInt32, kInt64, kByte };

// A tensor of MindSpore; `data` is contiguous.
struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;
  DType type = DType::kFloat32;

  int64_t count() const;
  int64_t rows() const { return columns() == 0 ? 0 : count() / columns(); }  // product of all axes but the last
  int64_t columns() const { return shape.empty() ? 1 : shape.back(); }
};

// Memory that lives as long as the object and is kept for the next one.
class Scratch {
 public:
  explicit Scratch(int64_t floats);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
  int64_t capacity_;
};

// The inputs, outputs and attributes of one run of an operator.
class Call {
 public:
  Call(std::vector<Tensor> tensors, const std::map<std::string, std::string>& attributes)
      : tensors_(std::move(tensors)), attributes_(attributes) {}
  int size() const { return static_cast<int>(tensors_.size()); }
  const Tensor& operator[](int index) const { return tensors_.at(index); }
  double number(const std::string& name) const;
  // The same call with these tensors, in this order.
  Call pick(const std::vector<int>& order) const;

 private:
  std::vector<Tensor> tensors_;
  const std::map<std::string, std::string>& attributes_;
};

// A floating-point input as float32: the tensor's own memory, or a converted copy.
class Input {
 public:
  explicit Input(const Tensor& tensor);
  operator const float*() const { return data_; }

 private:
  std::unique_ptr<Scratch> copy_;
  const float* data_;
};

// A floating-point output that is written as float32; rounded into a bfloat16 tensor when the kernel leaves it.
class Output {
 public:
  explicit Output(const Tensor& tensor);
  ~Output();
  operator float*() const { return data_; }

 private:
  Tensor tensor_;
  std::unique_ptr<Scratch> scratch_;
  float* data_;
};

// Integer input as 32 bits (int32 or int64 tensors).
std::vector<int32_t> integers(const Tensor& tensor);

void check(bool holds, const char* sentence);

// Run task(0) ... task(count - 1) on the threads of the pool; returns when all are done.
void parallel(int64_t count, const std::function<void(int64_t)>& task);

// The same for ranges [begin, end) of at most `grain` of `count` items.
void parallel_ranges(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& task);

// row(i) for each of `count` rows, `grain` of them a task.
template <class Row>
void parallel_rows(int64_t count, int64_t grain, const Row& row) {
  parallel_ranges(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i);
  });
}

inline int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

using Function = void (*)(const Call&);
int run(Function function, int count, void** data, int* dimensions, int64_t** shapes, const char** types, void* extra);
int initialize(void* extra, std::initializer_list<const char*> attributes);

}  // namespace cpu_kernels

// Export `function` as the AOT Custom operator `name` with the given attributes (numbers written as strings).
#define CPU_KERNEL(name, function, ...)                                                                       \
  extern "C" int name##Init(int*, int64_t**, const char**, void* extra) {                                     \
    return cpu_kernels::initialize(extra, {__VA_ARGS__});                                                     \
  }                                                                                                           \
  extern "C" int name(int count, void** data, int* dimensions, int64_t** shapes, const char** types, void*,   \
                      void* extra) {                                                                          \
    return cpu_kernels::run(function, count, data, dimensions, shapes, types, extra);                         \
  }
