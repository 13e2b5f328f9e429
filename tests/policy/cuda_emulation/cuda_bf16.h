#pragma once

#include "cpu/elements.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return star::from_bfloat16(value.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {star::to_bfloat16(value)}; }
