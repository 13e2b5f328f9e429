// Conversions of the 16-bit dtypes, which both travel as their bits. CUDA's own headers for them cost more time to
// compile than these kernels do.
#pragma once

#include <cuda_runtime.h>

namespace star {
namespace cuda {

struct Half {  // float16 or bfloat16
  unsigned short bits;
};

// `brain`: the bits are those of a bfloat16.
__device__ __forceinline__ float widen(Half x, bool brain) {
  float half;
  asm("cvt.f32.f16 %0, %1;" : "=f"(half) : "h"(x.bits));
  return brain ? __uint_as_float(static_cast<unsigned>(x.bits) << 16) : half;
}

// The nearest, ties to even.
__device__ __forceinline__ Half narrow(float x, bool brain) {
  unsigned short bfloat, half;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(x));
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
  return {brain ? bfloat : half};
}

}  // namespace cuda
}  // namespace star
