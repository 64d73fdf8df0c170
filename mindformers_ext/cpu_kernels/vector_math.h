// Functions that the compiler turns into vector code inside simple loops: no branches, no library calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace cpu_kernels {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays a NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet : rounded);
}

// e^x for float32, relative error below 2e-7; 0 below -87.3 and e^88 above 88; a NaN stays a NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r, e^r by its Taylor polynomial of degree 7.
inline float exponential(float x) {
  const float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to an integer
  const float kept = x < -87.3f ? -87.3f : (x > 88.0f ? 88.0f : x);
  const float n = (kept * kLog2E + kRound) - kRound;
  const float r = (kept - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.3f ? 0.0f : p * power;
}

inline float sigmoid(float x) {
  // Through e^-|x|, so that neither side overflows.
  const float e = exponential(x < 0 ? x : -x);
  const float small = e / (1.0f + e);
  return x < 0 ? small : 1.0f / (1.0f + e);
}

// Bring values into the cache; a place outside memory does no harm.
inline void prefetch(const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + i);
}

inline float dot(const float* a, const float* b, int64_t count) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// The largest of `start` and the values.
inline float maximum_of(const float* x, int64_t count, float start) {
  float best = start;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < count; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

// y += scale * x
inline void add_scaled(float* y, const float* x, float scale, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] += scale * x[i];
}

}  // namespace cpu_kernels
