#pragma once

#include "cpu/elements.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half value) { return star::from_float16(value.bits); }
inline __half __float2half_rn(float value) { return {star::to_float16(value)}; }
