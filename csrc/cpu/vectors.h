// Vectors of float32 and their exponential. As elements.h: internal linkage, compiled for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/elements.h"

namespace star {
namespace {

constexpr int64_t kLanes = STAR_LANES;
constexpr int kBlock = 8;  // rows that share one load of the packed tokens or keys

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline __attribute__((always_inline)) Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline __attribute__((always_inline)) void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Cephes' exponential: n = round(x / ln 2), a degree-6 polynomial on the remainder, 2^n put in through the exponent.
// Below -87.3 the result would be denormal and is 0; above 88.4, beyond any probability, it is inf; NaN stays NaN.
inline __attribute__((always_inline)) Vec exponential(Vec x) {
  const Vec low = Vec{} - 87.33f, high = Vec{} + 88.73f;  // at high, n is 128: the exponent of infinity
  Vec y = x > high ? high : x;
  y = y < low ? low : y;
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  const Vec shifted = y * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = y - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IntVec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  const Vec result = x < low ? Vec{} : p * power;
  return x == x ? result : x;
}

// Of a row without any key the log-sum-exp is -inf: with inf instead, its probabilities are 0.
inline float without_keys(float lse) { return lse == -__builtin_inff() ? __builtin_inff() : lse; }

}  // namespace
}  // namespace star
