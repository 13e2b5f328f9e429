// In place of csrc/cuda/half.h, whose conversions are instructions of the GPU.
#pragma once

#include "cpu/elements.h"

namespace star {
namespace cuda {

struct Half {
  unsigned short bits;
};

inline float widen(Half x, bool brain) { return brain ? from_bfloat16(x.bits) : from_float16(x.bits); }
inline Half narrow(float x, bool brain) { return {brain ? to_bfloat16(x) : to_float16(x)}; }

}  // namespace cuda
}  // namespace star
