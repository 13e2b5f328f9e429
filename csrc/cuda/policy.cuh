// Code shared by the kernels of the policy loss: the sums over the channels of a position, the terms of the loss that
// follow from its log-ratio and its advantage, and the factors of its gradient.
//
// Kernels are compiled for a Credit. The plain kernels keep one advantage in a register; the others read the advantages
// and weights of all phrases, or of the location, while the latents are read once, and support Flow-DPPO's threshold.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduction.cuh"
#include "policy_sums.h"

namespace star {
namespace cuda {
namespace {

enum class Credit {
  kPlain,    // one advantage for each sample
  kSeveral,  // advantages of phrases, or dense ones; or a threshold of the divergence
  kClipped,  // the same without such a threshold
};

template <Credit kCredit>
constexpr bool kMasks = kCredit == Credit::kSeveral;

// Whether ratios are GRPO-Guard's. Kernels without a threshold read the old output for nothing else.
template <Credit kCredit>
__device__ __forceinline__ bool is_guarded(const PolicyArguments& a) {
  return kMasks<kCredit> ? a.guarded : a.old_output.data != nullptr;
}

Latents policy_latents(const PolicyArguments& a, bool narrow = false) {
  Latents l(a, narrow);
  l.latent = a.sample.dtype;
  l.read_objective(a);
  l.read(a.old_output, l.output);
  l.read(a.sample, l.latent);
  l.read(a.prev_sample, l.latent);
  if (!a.old_is_scalar) l.read_row(a.old_log_prob, 4);
  if (a.dense) l.read_row(a.advantages, 4);
  return l;
}

// Sums over the channels of each position of a run: squared residuals, squared changes from the old output
// (GRPO-Guard, Flow-DPPO), squared differences from the reference model's output (the KL penalty).
template <typename Access>
struct Sums {
  float residual[Access::kSlots], change[Access::kSlots], kl[Access::kSlots];
};

struct Drop {
  template <typename Residuals>
  __device__ __forceinline__ void operator()(const Residuals&) const {}
};

// Calls keep(residuals) with the residuals of the gradient of each run, see guard_shift.
template <Credit kCredit, typename Access, typename Keep = Drop>
__device__ __forceinline__ Sums<Access> channel_sums(const Access& access, const PolicyArguments& a,
                                                     const Coefficients& k, const Tiling& t, unsigned b,
                                                     unsigned position, unsigned lane, bool active,
                                                     const View& ref_output, Keep keep = Keep()) {
  struct Runs {
    LatentRun<Access> x, prev;
    OutputRun<Access> v, old, ref;
  };
  const bool has_old = a.old_output.data, has_ref = ref_output.data;
  const auto load = [&](int c) {
    Runs runs;
    runs.x = load_latent(access, a.sample, b, position, c);
    runs.v = load_output(access, a.model_output, b, position, c);
    runs.prev = load_latent(access, a.prev_sample, b, position, c);
    if (has_old) runs.old = load_output(access, a.old_output, b, position, c);
    if (has_ref) runs.ref = load_output(access, ref_output, b, position, c);
    return runs;
  };
  Sums<Access> sums{};
  const auto use = [&](int, const Runs& runs) {
    float residuals[Access::kRun];
#pragma unroll
    for (int i = 0; i < Access::kRun; ++i) {
      const float r = residual(k, access.value(runs.x, i), access.value(runs.v, i), access.value(runs.prev, i));
      float& sum = sums.residual[Access::kPacked ? 0 : i];
      sum = add(sum, multiply(r, r));
      residuals[i] = r;
    }
    if (has_old) {
      add_squared_differences(access, runs.v, runs.old, sums.change);
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        const bool of_v = kMasks<kCredit> && !a.guarded;
        const float output = of_v ? access.value(runs.v, i) : access.value(runs.old, i);
        residuals[i] = residual(k, access.value(runs.x, i), output, access.value(runs.prev, i));
      }
    }
    keep(residuals);
    if (has_ref) add_squared_differences(access, runs.v, runs.ref, sums.kl);
  };
  constexpr bool kNarrow = Access::kVector && Access::kRun < 4;
  constexpr int kTogether = kNarrow && kCredit == Credit::kClipped ? kInFlight<Access> / 4 * 3 : kInFlight<Access>;
  if (active && kNarrow && (has_old || has_ref)) {  // more tensors would need too many registers
    for_each_run<Access, kInFlight<Access> / 2>(t, a.channels, lane, load, use);
  } else if (active) {
    for_each_run<Access, kTogether>(t, a.channels, lane, load, use);
  }
  add_lanes<Access>(t, sums.residual);
  if (has_old) add_lanes<Access>(t, sums.change);
  if (has_ref) add_lanes<Access>(t, sums.kl);
  return sums;
}

// The other inputs of the positions of a run, whose loads are independent of the latents'. The weights are those of the
// first phrase.
template <typename Access>
struct Rows {
  float weights[Access::kSlots];
  bool keep[Access::kSlots];
  Run<float, Access::kSlots> old_log_prob;

  __device__ __forceinline__ Rows(const PolicyArguments& a, unsigned b, unsigned position, bool with_old)
      : old_log_prob{} {
    if (with_old) old_log_prob = load_row<Access::kSlots>(a.old_log_prob, b, a.positions, position);
    load_weights<Access::kSlots>(a, b * static_cast<unsigned>(a.phrases), position, weights);
    load_mask<Access::kSlots>(a, b, position, keep);
  }
};

// The log-ratios of the positions of a run, normalised if they are those of locations. With a threshold the divergences
// take the place of the squared changes.
template <Credit kCredit, typename Access>
__device__ __forceinline__ void log_ratios(const PolicyArguments& a, const Coefficients& k, const Rows<Access>& rows,
                                           Sums<Access>& sums, float (&out)[Access::kSlots]) {
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    out[i] = log_prob(k, sums.residual[i], inverse_channels) - rows.old_log_prob.value[i];
    if (kMasks<kCredit> && masks_divergence(a)) sums.change[i] = kl_divergence(k, sums.change[i], inverse_channels);
    if (!is_guarded<kCredit>(a)) continue;
    out[i] += guard_shift(k, sums.change[i], inverse_channels);
    if (a.per_location) out[i] *= guard_factor(k);
  }
}

// The weighted advantages of the positions of a run, by sign: sums over phrases, or dense advantages.
template <typename Access>
__device__ __forceinline__ void signed_advantages(const PolicyArguments& a, const Rows<Access>& rows, unsigned b,
                                                  unsigned position, SignedAdvantage<float> (&out)[Access::kSlots]) {
  const auto add = [&](int i, float weight, float advantage) {
    const SignedAdvantage<float> parts = signed_advantage(clamp_advantage(advantage, a.advantage_clip));
    out[i].positive += weight * parts.positive;
    out[i].negative += weight * parts.negative;
  };
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) out[i] = {0.0f, 0.0f};
  if (a.dense) {
    const auto advantages = load_row<Access::kSlots>(a.advantages, b, a.positions, position);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) add(i, rows.weights[i], advantages.value[i]);
    return;
  }
  const unsigned phrases = static_cast<unsigned>(a.phrases);
#pragma unroll 1
  for (unsigned g = b * phrases; g < (b + 1) * phrases; ++g) {
    float weights[Access::kSlots];
    load_weights<Access::kSlots>(a, g, position, weights);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) add(i, weights[i], __ldg(a.advantages + g));
  }
}

// The number of sums of each thread, and of those that the arguments need. Dense advantages have two after the kSums.
template <Credit kCredit>
constexpr int kTerms = Policy::kSums + (kCredit == Credit::kPlain ? 0 : 2);

__device__ __forceinline__ int policy_sums(const PolicyArguments& a) {
  return a.per_location ? Policy::kSums : Policy::kSampleSums + masks_divergence(a);
}

// The bounds of a location's ratio.
template <Credit kCredit>
__device__ __forceinline__ Bounds location_bounds(const PolicyArguments& a, float divergence) {
  return kMasks<kCredit> ? bounds_of(a, divergence) : clip_bounds(a);
}

// Adds the terms of the positions of a run to the sums of a thread.
template <typename Access, Credit kCredit>
__device__ __forceinline__ void add_terms(const PolicyArguments& a, unsigned b, unsigned position,
                                          const Rows<Access>& rows, const Sums<Access>& sums,
                                          const float (&log_ratio)[Access::kSlots], float (&terms)[kTerms<kCredit>]) {
  constexpr bool kPlain = kCredit == Credit::kPlain;
  constexpr int kPositive = Policy::kSums, kNegative = kPositive + 1;
  const float advantage = kPlain ? clamp_advantage(__ldg(a.advantages + b), a.advantage_clip) : 0.0f;
  SignedAdvantage<float> advantages[Access::kSlots];
  if (!kPlain && (a.per_location || a.dense)) signed_advantages<Access>(a, rows, b, position, advantages);
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    if (!rows.keep[i]) continue;
    terms[Policy::kCount] += 1.0f;
    if (!a.per_location) {
      terms[Policy::kLogRatio] += rows.weights[i] * log_ratio[i];
      if constexpr (!kPlain) {
        terms[kPositive] += a.dense ? advantages[i].positive : 0.0f;
        terms[kNegative] += a.dense ? advantages[i].negative : 0.0f;
      }
    } else if constexpr (kPlain) {
      add_ratio(terms, log_ratio[i], advantage, rows.weights[i], a);
    } else {
      add_ratio(terms, log_ratio[i], advantages[i], location_bounds<kCredit>(a, sums.change[i]), a);
    }
    if (kMasks<kCredit> && masks_divergence(a)) {
      terms[Policy::kLocationDivergence] += a.per_location ? sums.change[i] : 0.0f;
      terms[Policy::kSampleDivergence] += a.per_location ? 0.0f : sums.change[i];
    }
    const float kl_weight = a.weighted_kl ? rows.weights[i] : 1.0f;
    if (a.ref_output.data) terms[Policy::kSquaredDifference] += kl_weight * sums.kl[i];
  }
}

// The log-ratios of a tile in shared memory, which the phrases after the first add up when all threads have written
// theirs.
struct TileRatios {
  float* log_ratio;
  unsigned* cell;  // of the weights; kDropped if the mask drops the position. Null if no phrase reads it
};
constexpr unsigned kDropped = 0xffffffffu;

// Whether phrases after the first have log-ratios of their own.
__device__ __forceinline__ bool has_phrase_ratios(const PolicyArguments& a) { return !a.per_location && a.phrases > 1; }

template <typename Access>
__device__ __forceinline__ void store_ratios(const PolicyArguments& a, const Place& place, unsigned position,
                                             const Rows<Access>& rows, const float (&log_ratio)[Access::kSlots],
                                             const TileRatios& tile) {
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    tile.log_ratio[position - place.first + i] = log_ratio[i];
    if (tile.cell) tile.cell[position - place.first + i] = rows.keep[i] ? grid_position(a, position + i) : kDropped;
  }
}

// Calls store(kSums + g - 1, sum) with the tile's sum of the weighted log-ratios of each phrase g > 0; a warp for each.
template <typename Store>
__device__ __forceinline__ void add_phrases(const PolicyArguments& a, const Tiling& t, const Place& place,
                                            const TileRatios& tile, Store store) {
  __syncthreads();
  const unsigned lane = threadIdx.x % 32, phrases = static_cast<unsigned>(a.phrases);
  const int64_t cells = a.grid[0] * a.grid[1] * a.grid[2];
  for (unsigned g = 1 + threadIdx.x / 32; g < phrases; g += t.threads / 32) {
    const float* weights = a.weights + (place.b * phrases + g) * cells;
    float sum = 0.0f;
    for (unsigned i = lane; i < place.end - place.first; i += 32) {
      if (tile.cell[i] != kDropped) sum += __ldg(weights + tile.cell[i]) * tile.log_ratio[i];
    }
    double total[1] = {sum};
    merge_lanes<-1>(total, 32);
    if (lane == 0) store(Policy::kSums + g - 1, total[0]);
  }
}

// Factors of the residual and of the KL penalty's difference in the gradient at the positions of a run.
template <typename Access>
struct Factors {
  float residual[Access::kSlots], kl[Access::kSlots];
  bool keep[Access::kSlots];
};

// Adds up the slopes of phrases, weighted, for the positions of a run.
template <typename Access>
__device__ __forceinline__ void add_phrase_slopes(const PolicyArguments& a, unsigned b, unsigned position,
                                                  const Saved& saved, float (&slopes)[Access::kSlots]) {
  const unsigned phrases = static_cast<unsigned>(a.phrases);
#pragma unroll 1
  for (unsigned g = 0; g < phrases; ++g) {
    float weights[Access::kSlots];
    load_weights<Access::kSlots>(a, b * phrases + g, position, weights);
    const float slope = saved[g];
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) slopes[i] += weights[i] * slope;
  }
}

// Weight times d loss / d log-ratio for the positions of a run, with advantages of phrases or dense ones.
// `divergence` is read if locations have ratios and there is a threshold.
template <typename Access, Credit kCredit>
__device__ __forceinline__ void split_slopes(const PolicyArguments& a, const Rows<Access>& rows, unsigned b,
                                             unsigned position, const float (&log_ratio)[Access::kSlots],
                                             const float (&divergence)[Access::kSlots], const Saved& saved,
                                             float (&slopes)[Access::kSlots]) {
  if (!a.per_location && !a.dense) return add_phrase_slopes<Access>(a, b, position, saved, slopes);
  SignedAdvantage<float> advantages[Access::kSlots];
  signed_advantages<Access>(a, rows, b, position, advantages);
  const float up = saved[0], down = saved[1];
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    if (a.per_location) {
      slopes[i] =
          bounded_surrogate(expf(log_ratio[i]), advantages[i], location_bounds<kCredit>(a, divergence[i])).slope * up;
    } else {
      slopes[i] = weighted(advantages[i].positive, up) + weighted(advantages[i].negative, down);
    }
  }
}

// `log_ratio` is read if locations have ratios, and `divergence` if there is a threshold too.
template <typename Access, Credit kCredit>
__device__ __forceinline__ Factors<Access> factors_of(const PolicyArguments& a, const Coefficients& k, unsigned b,
                                                      unsigned position, const Rows<Access>& rows,
                                                      const float (&log_ratio)[Access::kSlots],
                                                      const float (&divergence)[Access::kSlots], const Saved& saved) {
  constexpr bool kPlain = kCredit == Credit::kPlain;
  const float common = gradient_factor_of_slope(a, k, b, saved);
  const float kl = a.ref_output.data ? kl_gradient_factor(a, k, b, saved) : 0.0f;
  const float advantage = kPlain ? clamp_advantage(__ldg(a.advantages + b), a.advantage_clip) : 0.0f;
  float slopes[Access::kSlots] = {};
  if constexpr (!kPlain) split_slopes<Access, kCredit>(a, rows, b, position, log_ratio, divergence, saved, slopes);
  Factors<Access> factors;
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    factors.kl[i] = a.weighted_kl ? rows.weights[i] * kl : kl;
    factors.keep[i] = rows.keep[i];
    if (!kPlain) {
      factors.residual[i] = slopes[i] * common;
    } else {
      factors.residual[i] = rows.weights[i] * (common * saved[0]);
      if (a.per_location) {
        const Surrogate s = clipped_surrogate(log_ratio[i], advantage, a.clip_low, a.clip_high);
        factors.residual[i] = weighted(factors.residual[i], s.slope);
      }
    }
  }
  return factors;
}

// Returns run(credit) with the Credit of the arguments as an integral constant.
template <typename Run>
auto with_credit(const PolicyArguments& a, Run run) {
  if (a.dense || a.phrases > 1 || masks_divergence(a)) return run(std::integral_constant<Credit, Credit::kSeveral>{});
  return run(std::integral_constant<Credit, Credit::kPlain>{});
}

}  // namespace
}  // namespace cuda
}  // namespace star
