// Reading and writing runs of float32, float16 and bfloat16 elements as float32.
//
// Written with integer operations that every compiler vectorises. All functions have internal linkage: this header
// is compiled once for each instruction set, and the linker must not replace one version by another.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace star {
namespace {

inline __attribute__((always_inline)) float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __attribute__((always_inline)) uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline __attribute__((always_inline)) float from_bfloat16(uint16_t h) { return from_bits(uint32_t{h} << 16); }

inline __attribute__((always_inline)) uint16_t to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

inline __attribute__((always_inline)) float from_float16(uint16_t h) {
  const uint32_t sign = uint32_t{h & 0x8000u} << 16;
  const uint32_t magnitude = h & 0x7fffu;
  // Moves the exponent's bias by a multiplication, which is exact for normal and subnormal numbers.
  const uint32_t finite = to_bits(from_bits(magnitude << 13) * 0x1p112f);
  const uint32_t special = 0x7f800000u | (magnitude << 13);  // inf and NaN
  return from_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

inline __attribute__((always_inline)) uint16_t to_float16(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;  // the adder rounds
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));
}

// n elements from `offset` with `stride`, as float32: in place if possible, else copied to `scratch`.
inline const float* load_run(const View& view, int64_t offset, int64_t stride, int64_t n, float* scratch) {
  if (view.dtype == DType::kFloat32) {
    const float* source = static_cast<const float*>(view.data) + offset;
    if (stride == 1) return source;
    for (int64_t i = 0; i < n; ++i) scratch[i] = source[i * stride];
    return scratch;
  }
  const uint16_t* source = static_cast<const uint16_t*>(view.data) + offset;
  const bool half = view.dtype == DType::kFloat16;
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = half ? from_float16(source[i * stride]) : from_bfloat16(source[i * stride]);
    }
  } else if (half) {
    for (int64_t i = 0; i < n; ++i) scratch[i] = from_float16(source[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) scratch[i] = from_bfloat16(source[i]);
  }
  return scratch;
}

inline void store_run(const View& view, int64_t offset, int64_t stride, int64_t n, const float* values) {
  if (view.dtype == DType::kFloat32) {
    float* target = static_cast<float*>(view.data) + offset;
    for (int64_t i = 0; i < n; ++i) target[i * stride] = values[i];
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(view.data) + offset;
  if (view.dtype == DType::kFloat16) {
    for (int64_t i = 0; i < n; ++i) target[i * stride] = to_float16(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i * stride] = to_bfloat16(values[i]);
  }
}

}  // namespace
}  // namespace star
