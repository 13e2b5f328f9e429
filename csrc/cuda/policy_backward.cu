// The gradient of the policy loss, recomputed from the inputs and a few saved numbers per sample: nothing of the
// latents' size is stored between the passes.
//
// With a ratio for each location, the gradient needs the sum over all channels first. Latents [C, P] then have a kernel
// of their own, in which a thread keeps its residuals of kKept channels in registers. The other channels, and packed
// latents, are read a second time, from the cache.
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "cuda/policy.cuh"

namespace star {
namespace cuda {
namespace {

constexpr int kKept = 16;

// Whether the general kernel is also used for ratios of locations.
template <typename Access>
constexpr bool kTakesLocations = Access::kPacked || !Access::kVector;

template <typename Access, Credit kCredit>
__global__ void __launch_bounds__(kThreads, 2)
    policy_backward_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Tiling t) {
  struct Runs {
    LatentRun<Access> x, prev;
    OutputRun<Access> v, output, ref;
  };
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b;
  if (is_written(a, b)) return;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const View& output = is_guarded<kCredit>(a) ? a.old_output : a.model_output;  // of the residual, see guard_shift
  const Access access(a.model_output);
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    Sums<Access> sums{};
    if constexpr (kTakesLocations<Access>) {
      if (a.per_location) sums = channel_sums<kCredit>(access, a, k, t, b, position, lane, active, View());
    }
    if (!active) return;
    const Rows<Access> rows(a, b, position, a.per_location);
    float log_ratio[Access::kSlots];
    if (a.per_location) log_ratios<kCredit>(a, k, rows, sums, log_ratio);
    const Saved saved = saved_of(a, b);
    const Factors<Access> factors = factors_of<Access, kCredit>(a, k, b, position, rows, log_ratio, sums.change, saved);
    const auto load = [&](int c) {
      Runs runs;
      runs.x = load_latent(access, a.sample, b, position, c);
      runs.v = load_output(access, output, b, position, c);
      runs.prev = load_latent(access, a.prev_sample, b, position, c);
      if (a.ref_output.data) {
        runs.output = load_output(access, a.model_output, b, position, c);
        runs.ref = load_output(access, a.ref_output, b, position, c);
      }
      return runs;
    };
    const auto use = [&](int c, const Runs& runs) {
      float gradient[Access::kRun];
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        gradient[i] = factors.residual[Access::kPacked ? 0 : i] *
                      residual(k, access.value(runs.x, i), access.value(runs.v, i), access.value(runs.prev, i));
      }
      if (a.ref_output.data) add_kl_gradient(access, runs.output, runs.ref, factors.kl, gradient);
      store_gradient(access, a, b, position, c, factors.keep, gradient);
    };
    for_each_run<Access>(t, a.channels, lane, load, use);
  });
}

// A ratio for each location, latents [C, P].
template <typename Access, Credit kCredit>
__global__ void __launch_bounds__(kThreads / 2, 3)
    policy_location_backward_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Tiling t) {
  constexpr int kRun = Access::kRun, kTogether = kInFlight<Access>;
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b, position = place.first + threadIdx.x * kRun;
  if (position >= place.end || is_written(a, b)) return;
  const int channels = static_cast<int>(a.channels);
  const bool has_old = a.old_output.data;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const Access access(a.model_output);
  struct Runs {
    LatentRun<Access> x, prev;
    OutputRun<Access> v, old;
  };
  const auto load = [&](int c) {
    Runs runs;
    runs.x = load_latent(access, a.sample, b, position, c);
    runs.v = load_output(access, a.model_output, b, position, c);
    runs.prev = load_latent(access, a.prev_sample, b, position, c);
    if (has_old) runs.old = load_output(access, a.old_output, b, position, c);
    return runs;
  };
  Sums<Access> sums{};
  // The residual of the gradient, see guard_shift.
  const auto add_run = [&](const Runs& runs, float (&residuals)[kRun]) {
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      const float r = residual(k, access.value(runs.x, j), access.value(runs.v, j), access.value(runs.prev, j));
      sums.residual[j] = add(sums.residual[j], multiply(r, r));
      residuals[j] = r;
    }
    if (has_old) add_squared_differences(access, runs.v, runs.old, sums.change);
    if (!is_guarded<kCredit>(a)) return;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
      residuals[j] = residual(k, access.value(runs.x, j), access.value(runs.old, j), access.value(runs.prev, j));
    }
  };
  float kept[kKept][kRun], again[kRun];
#pragma unroll
  for (int first = 0; first < kKept; first += kTogether) {
    if (first >= channels) break;
    Runs runs[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      runs[i] = load(first + i < channels ? first + i : channels - 1);  // a branch would keep the loads apart
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < channels) add_run(runs[i], kept[first + i]);
    }
  }
#pragma unroll 1
  for (int c = kKept; c < channels; ++c) add_run(load(c), again);

  const Rows<Access> rows(a, b, position, true);
  float log_ratio[kRun];
  log_ratios<kCredit>(a, k, rows, sums, log_ratio);
  const Saved saved = saved_of(a, b);
  const Factors<Access> factors = factors_of<Access, kCredit>(a, k, b, position, rows, log_ratio, sums.change, saved);
  const auto store = [&](int c, const float (&residuals)[kRun]) {
    float gradient[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) gradient[j] = factors.residual[j] * residuals[j];
    if (a.ref_output.data) {
      const OutputRun<Access> v = load_output(access, a.model_output, b, position, c);
      add_kl_gradient(access, v, load_output(access, a.ref_output, b, position, c), factors.kl, gradient);
    }
    store_gradient(access, a, b, position, c, factors.keep, gradient);
  };
#pragma unroll
  for (int c = 0; c < kKept; ++c) {
    if (c < channels) store(c, kept[c]);
  }
#pragma unroll 1
  for (int c = kKept; c < channels; ++c) {
    add_run(load(c), again);
    store(c, again);
  }
}

}  // namespace

void policy_backward(const PolicyArguments& a, cudaStream_t stream) {
  const Latents latents = policy_latents(a);
  with_credit(a, [&](auto credit) {
    const auto run = [&](auto type) {
      using Access = typename decltype(type)::type;
      launch(policy_backward_kernel<Access, credit>, tiling_of<Access>(latents), stream, a);
    };
    if (!a.per_location || latents.packed) return with_access<8>(latents, run);
    with_types<false, 4>(latents, [&](auto type) {
      using Access = typename decltype(type)::type;
      if constexpr (Access::kVector) {
        const Tiling tiling = tiling_of<Access>(latents, 2 * kThreads);
        launch(policy_location_backward_kernel<Access, credit>, tiling, stream, a);
      } else {
        run(type);
      }
    });
  });
}

}  // namespace cuda
}  // namespace star
