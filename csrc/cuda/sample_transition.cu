// The sampling step: prev = mean + std * noise, stored in its dtype, and the log-probability of the stored value.
#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/latents.cuh"
#include "cuda/launch.cuh"

namespace star {
namespace cuda {
namespace {

template <typename Access>
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(const __grid_constant__ SampleArguments a, const __grid_constant__ Tiling t) {
  struct Runs {
    LatentRun<Access> x;
    OutputRun<Access> v;
    Run<float, Access::kRun> noise;
  };
  const Place place = place_of(t, a.positions);
  const unsigned b = place.b;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const Access access(a.model_output);
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    float squares[Access::kSlots] = {};
    const auto load = [&](int c) {
      Runs runs;
      runs.x = load_latent(access, a.sample, b, position, c);
      runs.v = load_output(access, a.model_output, b, position, c);
      runs.noise = access.template load<float>(a.noise, offset_of(a.noise, b, position, c));
      return runs;
    };
    const auto use = [&](int c, const Runs& runs) {
      float x[Access::kRun], v[Access::kRun], drawn[Access::kRun];
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        x[i] = access.value(runs.x, i);
        v[i] = access.value(runs.v, i);
        drawn[i] = add(transition_mean(k, x[i], v[i]), multiply(k.std, runs.noise.value[i]));
      }
      const int64_t offset = offset_of(a.prev_sample, b, position, c);
      const LatentRun<Access> prev = access.template store<typename Access::Latent>(a.prev_sample, offset, drawn);
#pragma unroll
      for (int i = 0; i < Access::kRun; ++i) {
        const float r = residual(k, x[i], v[i], access.value(prev, i));
        float& sum = squares[Access::kPacked ? 0 : i];
        sum = add(sum, multiply(r, r));
      }
    };
    if (active) for_each_run<Access>(t, a.channels, lane, load, use);
    add_lanes<Access>(t, squares);
    if (!active || lane != 0) return;
    Run<float, Access::kSlots> log_probs;
    const float inverse_channels = 1.0f / static_cast<float>(a.channels);
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) log_probs.value[i] = log_prob(k, squares[i], inverse_channels);
    store_run(a.log_prob + b * a.positions + position, log_probs);
  });
}

}  // namespace

void sample_transition(const SampleArguments& a, cudaStream_t stream) {
  Latents latents(a);
  latents.latent = a.sample.dtype;
  latents.read(a.model_output, latents.output);
  latents.read(a.sample, latents.latent);
  latents.read(a.prev_sample, latents.latent);
  latents.read(a.noise, DType::kFloat32);
  latents.read_row(a.log_prob, 4);
  with_access<4>(latents, [&](auto type) {  // the noise is float32
    using Access = typename decltype(type)::type;
    launch(sample_kernel<Access>, tiling_of<Access>(latents), stream, a);
  });
}

}  // namespace cuda
}  // namespace star
