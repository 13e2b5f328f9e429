// The clipped policy loss with a weight for each location: loss, metrics, and what the gradient needs of each sample.
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/policy.cuh"
#include "cuda/reduction.cuh"

namespace star {
namespace cuda {
namespace {

// Adds the terms of the positions of a run.
template <typename Access>
__device__ __forceinline__ void add_terms(const PolicyArguments& a, const Coefficients& k, float advantage,
                                          const Rows<Access>& rows, const Sums<Access>& sums,
                                          float (&terms)[Policy::kSums]) {
  float log_ratio[Access::kSlots];
  log_ratios(a, k, rows, sums, log_ratio);
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    if (!rows.keep[i]) continue;
    terms[Policy::kCount] += 1.0f;
    if (a.per_location) {
      add_ratio(terms, log_ratio[i], advantage, rows.weights[i], a);
    } else {
      terms[Policy::kLogRatio] += rows.weights[i] * log_ratio[i];
    }
    const float kl_weight = a.weighted_kl ? rows.weights[i] : 1.0f;
    if (a.ref_output.data) terms[Policy::kSquaredDifference] += kl_weight * sums.kl[i];
  }
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    policy_forward_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Tiling t,
                          unsigned* counter) {
  const Place place = place_of(t, a.positions);
  const Coefficients k = coefficients_of(a.coefficients, a.columns, place.b);
  const float advantage = clamp_advantage(__ldg(a.advantages + place.b), a.advantage_clip);
  const Access access(a.model_output);
  float terms[Policy::kSums] = {};
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    const Rows<Access> rows(a, place.b, active ? position : place.first, !a.old_is_scalar);
    const Sums<Access> sums = channel_sums(access, a, k, t, place.b, position, lane, active, a.ref_output);
    if (active && lane == 0) add_terms(a, k, advantage, rows, sums, terms);
  });
  reduce<Policy>(t, a, terms, a.per_location ? Policy::kSums : Policy::kSampleSums, counter);
}

}  // namespace

int64_t most_tiles(int64_t batch, int64_t positions) {
  const int64_t tile = tile_positions(batch, positions, true, 4 * kThreads);
  return batch * ((positions + tile - 1) / tile);
}

void policy_forward(const PolicyArguments& a, unsigned* counter, cudaStream_t stream) {
  const Latents latents = policy_latents(a);
  with_access<8>(latents, [&](auto type) {
    using Access = typename decltype(type)::type;
    launch(policy_forward_kernel<Access>, tiling_of<Access>(latents), stream, a, counter);
  });
}

}  // namespace cuda
}  // namespace star
