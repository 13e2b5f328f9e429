// DiffusionNFT's loss with a weight for each location, and its gradient; see nft_sums.h for the formulas.
#include <cstdint>

#include "cuda/fused.cuh"
#include "cuda/kernels.h"

namespace star {
namespace cuda {
namespace {

Latents nft_latents(const NftArguments& a, bool narrow = false) {
  Latents l(a, narrow);
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

// The two differences of which the gradient is made, at the elements of a run.
template <typename Access>
struct Differences {
  float old_error[Access::kRun], change[Access::kRun];
};

// Adds the terms of a run. All sums are linear, so positions and the lanes of a position share them.
template <typename Access>
__device__ __forceinline__ Differences<Access> add_terms(const Access& access, const NftArguments& a,
                                                         const Runs<Access>& runs, const Weights<Access>& weights,
                                                         float (&terms)[Nft::kSums]) {
  Differences<Access> differences;
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
    differences.old_error[i] = old_error;
    differences.change[i] = change;
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
  return differences;
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
  const auto store = [&](int sum, double value) {
    a.partial[static_cast<int64_t>(sum) * t.blocks + blockIdx.x] = value;
  };
  reduce<Nft>(t, a, terms, Nft::kSums, false, counter, store);
}

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    nft_backward_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Tiling t) {
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b;
  if (is_written(a, b)) return;
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

template <typename Access>
__global__ void __launch_bounds__(kFusedThreads, 1)
    nft_fused_kernel(const __grid_constant__ NftArguments a, const __grid_constant__ Fused f, unsigned* counter) {
#if STAR_CLUSTERS
  constexpr int kRun = Access::kRun;
  const Place place = place_of(f, a.positions);
  const unsigned b = place.b;
  const Access access(a.model_output);
  const Room room(f);
  Kept<kRun> kept(room.kept, f.threads), again = kept;
  ThreadSums<Nft, Nft::kSums> sums(room.scratch, f.threads, Nft::kSums, false);
  for_each_kept_position<Access>(f, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    const Weights<Access> weights(a, b, position);
    const auto load = [&](int c) { return load_runs(access, a, b, position, c); };
    float terms[Nft::kSums] = {};
    const auto use = [&](int, const Runs<Access>& runs) {
      const Differences<Access> differences = add_terms(access, a, runs, weights, terms);
      kept.put(differences.old_error);
      kept.put(differences.change);
    };
    for_each_run<Access>(f, a.channels, lane, load, use);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) terms[Nft::kCount] += weights.keep[i] && lane == 0 ? 1.0f : 0.0f;
    sums.add(terms);
  });
  const auto store = [&](int sum, double value) { room.own[sum] = value; };
  add_threads<Nft, Nft::kSums>(f, room.scratch, Nft::kSums, false, store);
  finish_sums<Nft>(f, a, b, Nft::kSums, counter);

  const NftFactors factors = gradient_factors(a, b, Saved{room.saved, 1});
  for_each_kept_position<Access>(f, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    Weights<Access> weights(a, b, position);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) weights.kl[i] *= factors.kl;
    struct Penalty {
      OutputRun<Access> output, ref;
    };
    const auto load = [&](int c) {
      Penalty runs;
      if (a.ref_output.data) {
        runs.output = load_output(access, a.model_output, b, position, c);
        runs.ref = load_output(access, a.ref_output, b, position, c);
      }
      return runs;
    };
    const auto use = [&](int c, const Penalty& runs) {
      float old_error[kRun], change[kRun], gradient[kRun];
      again.take(old_error);
      again.take(change);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float sum = factors.old_error * old_error[i] + factors.change * change[i];
        gradient[i] = weights.loss[Access::kPacked ? 0 : i] * sum;
      }
      if (a.ref_output.data) add_kl_gradient(access, runs.output, runs.ref, weights.kl, gradient);
      store_gradient(access, a, b, position, c, weights.keep, gradient);
    };
    for_each_run<Access>(f, a.channels, lane, load, use);
  });
  cluster_wait();
#else
  __trap();
#endif
}

}  // namespace

void nft_forward(const NftArguments& a, unsigned* counter, cudaStream_t stream) {
  const Latents latents = nft_latents(a);
  with_access<8>(latents, [&](auto type) {
    using Access = typename decltype(type)::type;
    launch(nft_forward_kernel<Access>, tiling_of<Access>(latents), stream, a, counter);
  });
}

bool nft_fused(const NftArguments& a, unsigned* counter, cudaStream_t stream) {
  const Latents latents = nft_latents(a, true);
  const Demand demand{Nft::kSums, Nft::saved_rows(a), Nft::kSums, 2, false, false};
  return with_fused_access(latents, [&](auto type) {
    using Access = typename decltype(type)::type;
    return launch_fused<Access>(nft_fused_kernel<Access>, latents, demand, a, counter, stream);
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
