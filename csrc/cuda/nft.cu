// DiffusionNFT's loss with a weight for each location, and its gradient; see nft_sums.h for the formulas.
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduction.cuh"

namespace star {
namespace cuda {
namespace {

Latents nft_latents(const NftArguments& a) {
  Latents l(a);
  l.latent = a.target.dtype;
  l.read_objective(a);
  l.read(a.old_output, l.output);
  l.read(a.target, l.latent);
  return l;
}

template <typename Access>
struct Runs {
  OutputRun<Access> v, old, ref;
  LatentRun<Access> target;
};

template <typename Access>
__device__ __forceinline__ Runs<Access> load_runs(const Access& access, const NftArguments& a, unsigned b,
                                                  unsigned position, int c) {
  Runs<Access> runs;
  runs.v = load_output(access, a.model_output, b, position, c);
  runs.old = load_output(access, a.old_output, b, position, c);
  runs.target = load_latent(access, a.target, b, position, c);
  if (a.ref_output.data) runs.ref = load_output(access, a.ref_output, b, position, c);
  return runs;
}

// The weights of the positions of a run in the loss and in the KL penalty, and whether they count.
template <typename Access>
struct Weights {
  float loss[Access::kSlots], kl[Access::kSlots];
  bool keep[Access::kSlots];

  __device__ __forceinline__ Weights(const NftArguments& a, unsigned b, unsigned position) {
    load_weights<Access::kSlots>(a, b, position, loss);
    load_mask<Access::kSlots>(a, b, position, keep);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) kl[i] = a.weighted_kl ? loss[i] : 1.0f;
  }
};

// Adds the terms of a run. All sums are linear, so positions and the lanes of a position share them.
template <typename Access>
__device__ __forceinline__ void add_terms(const Access& access, const NftArguments& a, const Runs<Access>& runs,
                                          const Weights<Access>& weights, float (&terms)[Nft::kSums]) {
  float sums[Nft::kCount] = {};
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) {
    const int slot = Access::kPacked ? 0 : i;
    const float old = access.value(runs.old, i);
    const float old_error = weights.keep[slot] ? old - access.value(runs.target, i) : 0.0f;
    const float change = weights.keep[slot] ? access.value(runs.v, i) - old : 0.0f;
    const NftErrors e = nft_errors(old_error, change, a.beta);
    sums[Nft::kPositive] += weights.loss[slot] * (e.positive * e.positive);
    sums[Nft::kNegative] += weights.loss[slot] * (e.negative * e.negative);
    sums[Nft::kPositiveAbsolute] += fabsf(e.positive);
    sums[Nft::kNegativeAbsolute] += fabsf(e.negative);
    sums[Nft::kDeviation] += change * change;
  }
  if (a.ref_output.data) {
#pragma unroll
    for (int i = 0; i < Access::kRun; ++i) {
      const int slot = Access::kPacked ? 0 : i;
      const float difference = access.value(runs.v, i) - access.value(runs.ref, i);
      sums[Nft::kSquaredDifference] += weights.keep[slot] ? weights.kl[slot] * (difference * difference) : 0.0f;
    }
  }
#pragma unroll
  for (int i = 0; i < Nft::kCount; ++i) terms[i] += sums[i];
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    nft_forward_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Tiling t, unsigned* counter) {
  const Place place = place_of(t, a.positions);
  const Access access(a.model_output);
  float terms[Nft::kSums] = {};
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    const Weights<Access> weights(a, place.b, position);
    const auto load = [&](int c) { return load_runs(access, a, place.b, position, c); };
    const auto use = [&](int, const Runs<Access>& runs) { add_terms(access, a, runs, weights, terms); };
    for_each_run<Access>(t, a.channels, lane, load, use);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) terms[Nft::kCount] += weights.keep[i] && lane == 0 ? 1.0f : 0.0f;
  });
  reduce<Nft>(t, a, terms, Nft::kSums, false, counter);
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    nft_backward_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Tiling t) {
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b;
  const NftFactors factors = gradient_factors(a, b);
  const Access access(a.model_output);
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    Weights<Access> weights(a, b, position);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) weights.kl[i] *= factors.kl;
    const auto load = [&](int c) { return load_runs(access, a, b, position, c); };
    const auto use = [&](int c, const Runs<Access>& runs) {
      float gradient[Access::kRun];
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        const float old = access.value(runs.old, i), change = access.value(runs.v, i) - old;
        const float sum = factors.old_error * (old - access.value(runs.target, i)) + factors.change * change;
        gradient[i] = weights.loss[Access::kPacked ? 0 : i] * sum;
      }
      if (a.ref_output.data) add_kl_gradient(access, runs.v, runs.ref, weights.kl, gradient);
      store_gradient(access, a, b, position, c, weights.keep, gradient);
    };
    for_each_run<Access>(t, a.channels, lane, load, use);
  });
}

}  // namespace

void nft_forward(const NftArguments& a, unsigned* counter, cudaStream_t stream) {
  const Latents latents = nft_latents(a);
  with_access<8>(latents, [&](auto type) {
    using Access = typename decltype(type)::type;
    launch(nft_forward_kernel<Access>, tiling_of<Access>(latents), stream, a, counter);
  });
}

void nft_backward(const NftArguments& a, cudaStream_t stream) {
  const Latents latents = nft_latents(a);
  with_access<8>(latents, [&](auto type) {
    using Access = typename decltype(type)::type;
    launch(nft_backward_kernel<Access>, tiling_of<Access>(latents), stream, a);
  });
}

}  // namespace cuda
}  // namespace star
