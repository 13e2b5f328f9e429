// The CUDA kernels' launchers. Every call is one launch on the given stream, with no wait for the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "arguments.h"

namespace star {
namespace cuda {

constexpr int kTilePositions = 256;  // one thread a position

// Tiles of a latent: `PolicyArguments::partial` holds that many sums for each sample.
int64_t tiles_of(int64_t positions);

// `counter` is one unsigned integer on the device that is 0 before the call and 0 again after it.
void policy_forward(const PolicyArguments& arguments, unsigned* counter, cudaStream_t stream);
void policy_backward(const PolicyArguments& arguments, cudaStream_t stream);
void sample_transition(const SampleArguments& arguments, cudaStream_t stream);

}  // namespace cuda
}  // namespace star
