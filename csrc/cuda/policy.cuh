// What the forward and the backward kernel of the policy loss share: the sums over the channels of a position.
#pragma once

#include <cstdint>

<<<<<<< HEAD:csrc/cuda/policy.cuh
#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "policy_sums.h"
=======
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/tiling.h"
#include "flow_policy.h"
>>>>>>> policy:csrc/cuda/policy.h

namespace star {
namespace cuda {
namespace {

Latents policy_latents(const PolicyArguments& a) {
  Latents l(a);
  l.latent = a.sample.dtype;
  l.read_objective(a);
  l.read(a.old_output, l.output);
  l.read(a.sample, l.latent);
  l.read(a.prev_sample, l.latent);
  if (!a.old_is_scalar) l.read_row(a.old_log_prob, 4);
  return l;
}

// Sums over the channels of each position of a run: squared residuals, squared changes from the old output
// (GRPO-Guard), squared differences from the reference (the KL penalty).
template <typename Access>
struct Sums {
  float residual[Access::kSlots], change[Access::kSlots], kl[Access::kSlots];
};

template <typename Access>
__device__ __forceinline__ Sums<Access> channel_sums(const Access& access, const PolicyArguments& a,
                                                     const Coefficients& k, const Tiling& t, unsigned b,
                                                     unsigned position, unsigned lane, bool active,
                                                     const View& reference) {
  struct Runs {
    LatentRun<Access> x, prev;
    OutputRun<Access> v, old, reference;
  };
  const bool has_old = a.old_output.data, has_reference = reference.data;
  const auto load = [&](int c) {
    Runs runs;
    runs.x = load_latent(access, a.sample, b, position, c);
    runs.v = load_output(access, a.model_output, b, position, c);
    runs.prev = load_latent(access, a.prev_sample, b, position, c);
    if (has_old) runs.old = load_output(access, a.old_output, b, position, c);
    if (has_reference) runs.reference = load_output(access, reference, b, position, c);
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
    if (has_reference) add_squared_differences(access, runs.v, runs.reference, sums.kl);
  };
  if (active) for_each_run<Access>(t, a.channels, lane, load, use);
  add_lanes<Access>(t, sums.residual);
  if (has_old) add_lanes<Access>(t, sums.change);
  if (has_reference) add_lanes<Access>(t, sums.kl);
  return sums;
}

// What else is read for the positions of a run. None of it waits for the latents, nor they for it.
template <typename Access>
struct Rows {
  float weights[Access::kSlots];
  bool keep[Access::kSlots];
  Run<float, Access::kSlots> old_log_prob;

  __device__ __forceinline__ Rows(const PolicyArguments& a, unsigned b, unsigned position, bool with_old)
      : old_log_prob{} {
    if (with_old) old_log_prob = load_row<Access::kSlots>(a.old_log_prob, b, a.positions, position);
    load_weights<Access::kSlots>(a, b, position, weights);
    load_mask<Access::kSlots>(a, b, position, keep);
  }
};

// The log-ratios of the positions of a run, normalised where they are those of locations.
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

}  // namespace
}  // namespace cuda
}  // namespace star
