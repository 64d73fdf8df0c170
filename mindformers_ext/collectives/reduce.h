// Element types and reductions of the collectives.
//
// Contributions are added in rank order, whoever adds them, so every rank gets the same bits. float16 and bfloat16 are
// accumulated in float32 and rounded once (to nearest even).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu_kernels/vector_math.h"

namespace cpu_parallel {

enum DType : int32_t { kF16, kBF16, kF32, kF64, kI8, kU8, kI16, kI32, kI64, kBool };
enum Reduce : int32_t { kSum, kProd, kMax, kMin };

inline Reduce ParseReduce(const std::string& name) {
  static const char* const names[] = {"sum", "prod", "max", "min"};
  for (int32_t i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Reduce>(i);
  }
  throw std::invalid_argument("reduction '" + name + "' is not one of sum, prod, max, min");
}

// Vector code for new processors, plain code for the others, chosen when the library is loaded.
#if defined(CPU_PARALLEL_CLONES)  // chosen by the build
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CPU_PARALLEL_CLONES __attribute__((target_clones("arch=haswell", "default")))
#else
#define CPU_PARALLEL_CLONES
#endif

struct BFloat16 {
  uint16_t bits;
  static float Widen(BFloat16 value) { return cpu_kernels::from_bfloat16(value.bits); }
  static BFloat16 Narrow(float value) { return BFloat16{cpu_kernels::to_bfloat16(value)}; }
};

struct Float16 {
  _Float16 value;
  static float Widen(Float16 half) { return static_cast<float>(half.value); }
  static Float16 Narrow(float value) { return Float16{static_cast<_Float16>(value)}; }
};

template <class T>
struct Plain {
  static T Widen(T value) { return value; }
  static T Narrow(T value) { return value; }
};

template <class T, class Acc, class Convert>
__attribute__((always_inline)) inline void ReduceBlocks(Reduce how, const std::vector<const char*>& parts, char* out,
                                                        int64_t count) {
  constexpr int64_t kBlock = 512;  // the accumulator stays in the first-level cache
  Acc sum[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    const T* first = reinterpret_cast<const T*>(parts[0]) + start;
    for (int64_t i = 0; i < length; ++i) sum[i] = Convert::Widen(first[i]);
    for (size_t part = 1; part < parts.size(); ++part) {
      const T* next = reinterpret_cast<const T*>(parts[part]) + start;
      const auto fold = [&](auto combine) {
        for (int64_t i = 0; i < length; ++i) sum[i] = combine(sum[i], Convert::Widen(next[i]));
      };
      switch (how) {  // a NaN of either side stays
        case kSum: fold([](Acc own, Acc value) { return own + value; }); break;
        case kProd: fold([](Acc own, Acc value) { return own * value; }); break;
        case kMax: fold([](Acc own, Acc value) { return value > own || value != value ? value : own; }); break;
        case kMin: fold([](Acc own, Acc value) { return value < own || value != value ? value : own; }); break;
      }
    }
    T* target = reinterpret_cast<T*>(out) + start;
    for (int64_t i = 0; i < length; ++i) target[i] = Convert::Narrow(sum[i]);
  }
}

#define CPU_PARALLEL_REDUCE(NAME, T, ACC, CONVERT)                                                                    \
  CPU_PARALLEL_CLONES inline void NAME(Reduce how, const std::vector<const char*>& parts, char* out, int64_t count) { \
    ReduceBlocks<T, ACC, CONVERT>(how, parts, out, count);                                                            \
  }
CPU_PARALLEL_REDUCE(ReduceF16, Float16, float, Float16)
CPU_PARALLEL_REDUCE(ReduceBF16, BFloat16, float, BFloat16)
CPU_PARALLEL_REDUCE(ReduceF32, float, float, Plain<float>)
CPU_PARALLEL_REDUCE(ReduceF64, double, double, Plain<double>)
CPU_PARALLEL_REDUCE(ReduceI8, int8_t, int8_t, Plain<int8_t>)
CPU_PARALLEL_REDUCE(ReduceU8, uint8_t, uint8_t, Plain<uint8_t>)
CPU_PARALLEL_REDUCE(ReduceI16, int16_t, int16_t, Plain<int16_t>)
CPU_PARALLEL_REDUCE(ReduceI32, int32_t, int32_t, Plain<int32_t>)
CPU_PARALLEL_REDUCE(ReduceI64, int64_t, int64_t, Plain<int64_t>)
#undef CPU_PARALLEL_REDUCE

struct Type {
  const char* name;
  size_t size;
  void (*reduce)(Reduce how, const std::vector<const char*>& parts, char* out, int64_t count);
};

inline const Type kTypes[] = {{"float16", 2, ReduceF16}, {"bfloat16", 2, ReduceBF16}, {"float32", 4, ReduceF32},
                              {"float64", 8, ReduceF64}, {"int8", 1, ReduceI8},       {"uint8", 1, ReduceU8},
                              {"int16", 2, ReduceI16},   {"int32", 4, ReduceI32},     {"int64", 8, ReduceI64},
                              {"bool", 1, ReduceU8}};  // as DType

inline size_t SizeOf(DType type) { return kTypes[type].size; }

inline DType ParseDType(const std::string& name) {
  for (const Type& type : kTypes) {
    if (name == type.name) return static_cast<DType>(&type - kTypes);
  }
  throw std::invalid_argument("element type '" + name + "' is not supported by the CPU collectives");
}

// Reduces `count` elements of every part, in the order of the parts, into out (which may be one of the parts).
inline void ReduceParts(DType type, Reduce how, const std::vector<const char*>& parts, char* out, int64_t count) {
  if (type == kBool && how != kMax && how != kMin)
    throw std::invalid_argument("bool can be reduced with max and min only");
  kTypes[type].reduce(how, parts, out, count);
}

}  // namespace cpu_parallel
