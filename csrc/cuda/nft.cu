// DiffusionNFT's loss with a weight for each location, and its gradient; see nft_sums.h for the formulas.
#include <cstdint>

#include "cuda/gradient.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/reduction.h"
#include "cuda/rows.h"

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
  OutputRun<Access> v, old, reference;
  LatentRun<Access> target;
};

template <typename Access>
__device__ __forceinline__ Runs<Access> load_runs(const Access& access, const NftArguments& a, unsigned b,
                                                  unsigned position, int c) {
  Runs<Access> runs;
  runs.v = load_output(access, a.model_output, b, position, c);
  runs.old = load_output(access, a.old_output, b, position, c);
  runs.target = load_latent(access, a.target, b, position, c);
  if (a.reference.data) runs.reference = load_output(access, a.reference, b, position, c);
  return runs;
}

// Sums over a lane's channels at each position of a run. The lanes of a position need not meet: all sums are linear.
template <typename Access>
struct Sums {
  float positive[Access::kSlots], negative[Access::kSlots], kl[Access::kSlots];
  float positive_absolute[Access::kSlots], negative_absolute[Access::kSlots], deviation[Access::kSlots];
};

template <typename Access>
__device__ __forceinline__ Sums<Access> channel_sums(const Access& access, const NftArguments& a, const Tiling& t,
                                                     unsigned b, unsigned position, unsigned lane) {
  Sums<Access> sums{};
  const auto load = [&](int c) { return load_runs(access, a, b, position, c); };
  const auto use = [&](int, const Runs<Access>& runs) {
#pragma unroll
    for (int i = 0; i < Access::kRun; ++i) {
      const int slot = Access::kPacked ? 0 : i;
      const float old = access.value(runs.old, i), change = access.value(runs.v, i) - old;
      const NftErrors e = nft_errors(old - access.value(runs.target, i), change, a.beta);
      sums.positive[slot] += e.positive * e.positive;
      sums.negative[slot] += e.negative * e.negative;
      sums.positive_absolute[slot] += fabsf(e.positive);
      sums.negative_absolute[slot] += fabsf(e.negative);
      sums.deviation[slot] += change * change;
    }
    if (a.reference.data) add_squared_differences(access, runs.v, runs.reference, sums.kl);
  };
  for_each_run<Access>(t, a.channels, lane, load, use);
  return sums;
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    nft_forward_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Tiling t, unsigned* counter) {
  constexpr int kSlots = Access::kSlots;
  const Place place = place_of(t, a.positions);
  const Access access(a.model_output);
  float terms[Nft::kSums] = {};
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    const Sums<Access> sums = channel_sums(access, a, t, place.b, position, lane);
    float weights[kSlots];
    bool keep[kSlots];
    load_weights<kSlots>(a, place.b, position, weights);
    load_mask<kSlots>(a, place.b, position, keep);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (!keep[i]) continue;
      terms[Nft::kPositive] += weights[i] * sums.positive[i];
      terms[Nft::kNegative] += weights[i] * sums.negative[i];
      terms[Nft::kSquaredDifference] += a.weighted_kl ? weights[i] * sums.kl[i] : sums.kl[i];
      terms[Nft::kPositiveAbsolute] += sums.positive_absolute[i];
      terms[Nft::kNegativeAbsolute] += sums.negative_absolute[i];
      terms[Nft::kDeviation] += sums.deviation[i];
      terms[Nft::kCount] += lane == 0 ? 1.0f : 0.0f;
    }
  });
  reduce<Nft>(t, a, terms, Nft::kSums, counter);
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    nft_backward_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Tiling t) {
  constexpr int kSlots = Access::kSlots;
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b;
  const NftFactors factors = gradient_factors(a, b);
  const Access access(a.model_output);
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    float weights[kSlots], kl[kSlots];
    bool keep[kSlots];
    load_weights<kSlots>(a, b, position, weights);
    load_mask<kSlots>(a, b, position, keep);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) kl[i] = a.weighted_kl ? weights[i] * factors.kl : factors.kl;
    const auto load = [&](int c) { return load_runs(access, a, b, position, c); };
    const auto use = [&](int c, const Runs<Access>& runs) {
      float gradient[Access::kRun];
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        const float old = access.value(runs.old, i), change = access.value(runs.v, i) - old;
        const float sum = factors.old_error * (old - access.value(runs.target, i)) + factors.change * change;
        gradient[i] = weights[Access::kPacked ? 0 : i] * sum;
      }
      if (a.reference.data) add_kl_gradient(access, runs.v, runs.reference, kl, gradient);
      store_gradient(access, a, b, position, c, keep, gradient);
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
