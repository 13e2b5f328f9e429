// Code shared by the forward and the backward kernel of the policy loss: the sums over the channels of a position, and
// the terms of the loss that follow from its log-ratio and its advantage.
//
// Kernels are compiled for a Credit. The plain kernels keep one advantage in a register; the others read the advantages
// and weights of all phrases, or of the location, while the latents are read once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "flow_policy.h"

namespace star {
namespace cuda {
namespace {

enum class Credit {
  kPlain,    // one advantage for each sample
  kSeveral,  // advantages of phrases, or dense ones
};

Latents policy_latents(const PolicyArguments& a) {
  Latents l(a);
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
// (GRPO-Guard), squared differences from the reference model's output (the KL penalty).
template <typename Access>
struct Sums {
  float residual[Access::kSlots], change[Access::kSlots], kl[Access::kSlots];
};

template <typename Access>
__device__ __forceinline__ Sums<Access> channel_sums(const Access& access, const PolicyArguments& a,
                                                     const Coefficients& k, const Tiling& t, unsigned b,
                                                     unsigned position, unsigned lane, bool active,
                                                     const View& ref_output) {
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
#pragma unroll
    for (int i = 0; i < Access::kRun; ++i) {
      const float r = residual(k, access.value(runs.x, i), access.value(runs.v, i), access.value(runs.prev, i));
      float& sum = sums.residual[Access::kPacked ? 0 : i];
      sum = add(sum, multiply(r, r));
    }
    if (has_old) add_squared_differences(access, runs.v, runs.old, sums.change);
    if (has_ref) add_squared_differences(access, runs.v, runs.ref, sums.kl);
  };
  if (active) for_each_run<Access>(t, a.channels, lane, load, use);
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

// The log-ratios of the positions of a run, normalised if they are those of locations.
template <typename Access>
__device__ __forceinline__ void log_ratios(const PolicyArguments& a, const Coefficients& k, const Rows<Access>& rows,
                                           const Sums<Access>& sums, float (&out)[Access::kSlots]) {
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    out[i] = log_prob(k, sums.residual[i], inverse_channels) - rows.old_log_prob.value[i];
    if (!a.old_output.data) continue;
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

// Calls run(credit) with the Credit of the arguments as an integral constant.
template <typename Run>
void with_credit(const PolicyArguments& a, Run run) {
  if (a.dense || a.phrases > 1) return run(std::integral_constant<Credit, Credit::kSeveral>{});
  return run(std::integral_constant<Credit, Credit::kPlain>{});
}

}  // namespace
}  // namespace cuda
}  // namespace star
