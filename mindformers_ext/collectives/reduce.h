// Element types and reductions of the collectives.
//
// Contributions are added in rank order, whoever adds them, so every rank gets the same bits. float16 and bfloat16 are
// accumulated in float32 and rounded once (to nearest even).
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpu_parallel {

enum DType : int32_t { kF16, kBF16, kF32, kF64, kI8, kU8, kI16, kI32, kI64, kBool };
enum Reduce : int32_t { kSum, kProd, kMax, kMin };

inline DType ParseDType(const std::string& name) {
  static const char* const names[] = {"float16", "bfloat16", "float32", "float64", "int8",
                                      "uint8",   "int16",    "int32",   "int64",   "bool"};
  for (int32_t i = 0; i < 10; ++i) {
    if (name == names[i]) return static_cast<DType>(i);
  }
  throw std::invalid_argument("element type '" + name + "' is not supported by the CPU collectives");
}

inline Reduce ParseReduce(const std::string& name) {
  static const char* const names[] = {"sum", "prod", "max", "min"};
  for (int32_t i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<Reduce>(i);
  }
  throw std::invalid_argument("reduction '" + name + "' is not one of sum, prod, max, min");
}

inline size_t SizeOf(DType type) {
  static const size_t sizes[] = {2, 2, 4, 8, 1, 1, 2, 4, 8, 1};
  return sizes[type];
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
  static float Widen(BFloat16 value) {
    const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof(result));
    return result;
  }
  static BFloat16 Narrow(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof(wide));
    const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    return BFloat16{static_cast<uint16_t>(nan ? (wide >> 16) | 0x40u : rounded)};
  }
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
      switch (how) {
        case kSum:
          for (int64_t i = 0; i < length; ++i) sum[i] = sum[i] + Convert::Widen(next[i]);
          break;
        case kProd:
          for (int64_t i = 0; i < length; ++i) sum[i] = sum[i] * Convert::Widen(next[i]);
          break;
        case kMax:  // a NaN of either side stays
          for (int64_t i = 0; i < length; ++i) {
            const Acc value = Convert::Widen(next[i]);
            sum[i] = value > sum[i] || value != value ? value : sum[i];
          }
          break;
        case kMin:
          for (int64_t i = 0; i < length; ++i) {
            const Acc value = Convert::Widen(next[i]);
            sum[i] = value < sum[i] || value != value ? value : sum[i];
          }
          break;
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

// Reduces `count` elements of every part, in the order of the parts, into out (which may be one of the parts).
inline void ReduceParts(DType type, Reduce how, const std::vector<const char*>& parts, char* out, int64_t count) {
  switch (type) {
    case kF16:
      return ReduceF16(how, parts, out, count);
    case kBF16:
      return ReduceBF16(how, parts, out, count);
    case kF32:
      return ReduceF32(how, parts, out, count);
    case kF64:
      return ReduceF64(how, parts, out, count);
    case kI8:
      return ReduceI8(how, parts, out, count);
    case kU8:
      return ReduceU8(how, parts, out, count);
    case kI16:
      return ReduceI16(how, parts, out, count);
    case kI32:
      return ReduceI32(how, parts, out, count);
    case kI64:
      return ReduceI64(how, parts, out, count);
    case kBool:
      break;
  }
  if (how != kMax && how != kMin) throw std::invalid_argument("bool can be reduced with max and min only");
  ReduceU8(how, parts, out, count);
}

}  // namespace cpu_parallel
