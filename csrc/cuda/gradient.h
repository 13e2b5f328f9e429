// How a backward kernel ends a run of the gradient, whatever the objective.
#pragma once

#include <cuda_runtime.h>

#include "cuda/tiling.h"

namespace star {
namespace cuda {

// The KL penalty's part, factors[position] * (output - reference).
template <typename Access>
__device__ __forceinline__ void add_kl_gradient(const Access& access, const OutputRun<Access>& output,
                                                const OutputRun<Access>& reference,
                                                const float (&factors)[Access::kSlots],
                                                float (&gradient)[Access::kRun]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) {
    gradient[i] += factors[Access::kPacked ? 0 : i] * (access.value(output, i) - access.value(reference, i));
  }
}

// Zero where the mask drops a position, whatever was computed from what lies there.
template <typename Access>
__device__ __forceinline__ void store_gradient(const Access& access, const Objective& a, unsigned b, unsigned position,
                                               int c, const bool (&keep)[Access::kSlots],
                                               float (&gradient)[Access::kRun]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) gradient[i] = keep[Access::kPacked ? 0 : i] ? gradient[i] : 0.0f;
  access.template store<typename Access::Output>(a.gradient, offset_of(a.gradient, b, position, c), gradient);
}

}  // namespace cuda
}  // namespace star
