// The CUDA kernels' launchers. Every call is one launch on the given stream and does not synchronise with the device.
// Those of fused kernels, which also write the gradient, return false without a launch if they cannot.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "nft_sums.h"

namespace star {
namespace cuda {

// The largest number of tiles of a batch in a forward pass; `Objective::partial` stores the sums of each.
int64_t most_tiles(int64_t batch, int64_t positions);

// `counter` is one unsigned integer on the device that is 0 before the call and 0 again after it.
void policy_forward(const PolicyArguments& arguments, unsigned* counter, cudaStream_t stream);
bool policy_fused(const PolicyArguments& arguments, unsigned* counter, cudaStream_t stream);
void policy_backward(const PolicyArguments& arguments, cudaStream_t stream);
void nft_forward(const NftArguments& arguments, unsigned* counter, cudaStream_t stream);
bool nft_fused(const NftArguments& arguments, unsigned* counter, cudaStream_t stream);
void nft_backward(const NftArguments& arguments, cudaStream_t stream);
void sample_transition(const SampleArguments& arguments, cudaStream_t stream);

}  // namespace cuda
}  // namespace star
