// The clipped policy loss with a weight for each location, its gradient, and the sampling step that feeds it.
//
// A thread owns a position and walks over its channels, in the order of the CPU kernel. The forward pass is one launch:
// a block leaves the sums of its tile, and the last block to finish (a counter that returns to zero by itself) adds
// them up in a fixed order, so that equal inputs give equal bits. The gradient is computed in the backward pass from
// the inputs, with nothing of the latent's size kept in between.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/kernels.h"
#include "flow_policy.h"
#include "policy_sums.h"

namespace star {
namespace cuda {
namespace {

constexpr int kThreads = kTilePositions;

__device__ float load(const View& view, int64_t offset) {
  switch (view.dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(view.data)[offset]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(view.data)[offset]);
    default:
      return static_cast<const float*>(view.data)[offset];
  }
}

// Stores a value in the view's dtype and returns what was stored.
__device__ float store(const View& view, int64_t offset, float value) {
  switch (view.dtype) {
    case DType::kFloat16:
      static_cast<__half*>(view.data)[offset] = __float2half_rn(value);
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(view.data)[offset] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<float*>(view.data)[offset] = value;
  }
  return load(view, offset);
}

__device__ int64_t offset_of(const View& view, int64_t b, int64_t position) {
  return b * view.batch + position * view.position;
}

__device__ float position_log_prob(const PolicyArguments& a, const Coefficients& k, int64_t b, int64_t position) {
  const int64_t x = offset_of(a.sample, b, position), v = offset_of(a.model_output, b, position);
  const int64_t prev = offset_of(a.prev_sample, b, position);
  float sum = 0.0f;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float r =
        residual(k, load(a.sample, x + c * a.sample.channel), load(a.model_output, v + c * a.model_output.channel),
                 load(a.prev_sample, prev + c * a.prev_sample.channel));
    sum = add(sum, multiply(r, r));
  }
  return log_prob(k, sum, 1.0f / static_cast<float>(a.channels));
}

__device__ float position_weight(const PolicyArguments& a, int64_t b, int64_t position) {
  if (!a.weights) return 1.0f;
  return a.weights[b * a.grid[0] * a.grid[1] * a.grid[2] + grid_position(a, position)];
}

// The sums of one position.
__device__ Sums position_sums(const PolicyArguments& a, int64_t b, int64_t position) {
  Sums sums{};
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  float log_ratio = position_log_prob(a, k, b, position);
  if (!a.old_is_scalar) log_ratio -= a.old_log_prob[b * a.positions + position];
  const float weight = position_weight(a, b, position);
  if (a.per_location) {
    add_ratio(sums, log_ratio, clamp_advantage(a.advantages[b], a.advantage_clip), weight, a);
  } else {
    sums.log_ratio = static_cast<double>(weight) * log_ratio;
  }
  if (a.reference.data) {
    const int64_t v = offset_of(a.model_output, b, position), reference = offset_of(a.reference, b, position);
    for (int64_t c = 0; c < a.channels; ++c) {
      const double difference =
          load(a.model_output, v + c * a.model_output.channel) - load(a.reference, reference + c * a.reference.channel);
      sums.squared_difference += difference * difference;
    }
  }
  return sums;
}

// The sum over a block's threads, in thread 0; a tree of fixed shape.
__device__ void reduce(Sums* shared) {
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(width)) merge(shared[threadIdx.x], shared[threadIdx.x + width]);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) forward_kernel(PolicyArguments a, unsigned* counter) {
  __shared__ Sums shared[kThreads];
  __shared__ bool last;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  shared[threadIdx.x] = position < a.positions ? position_sums(a, b, position) : Sums{};
  reduce(shared);
  if (threadIdx.x == 0) {
    a.partial[b * gridDim.x + blockIdx.x] = shared[0];
    __threadfence();
    const unsigned blocks = gridDim.x * gridDim.y;
    last = atomicInc(counter, blocks - 1) == blocks - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  Sums mine{};
  for (int64_t i = threadIdx.x; i < a.batch; i += kThreads) {
    Sums sample{};
    for (unsigned tile = 0; tile < gridDim.x; ++tile) merge(sample, a.partial[i * gridDim.x + tile]);
    finish_sample(a, i, sample);
    merge(mine, sample);
  }
  shared[threadIdx.x] = mine;
  reduce(shared);
  if (threadIdx.x == 0) finish_batch(a, shared[0]);
}

__global__ void __launch_bounds__(kThreads) backward_kernel(PolicyArguments a) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  if (position >= a.positions) return;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  float factor = position_weight(a, b, position) * gradient_factor(a, k);
  if (a.per_location) {
    const float log_ratio = position_log_prob(a, k, b, position) - a.old_log_prob[b * a.positions + position];
    const float advantage = clamp_advantage(a.advantages[b], a.advantage_clip);
    factor *= clipped_surrogate(log_ratio, advantage, a.clip_low, a.clip_high).slope / static_cast<float>(a.batch);
  } else {
    factor *= a.slope[b];
  }
  const float kl_factor = a.reference.data ? kl_gradient_factor(a, k) : 0.0f;
  const int64_t x = offset_of(a.sample, b, position), v = offset_of(a.model_output, b, position);
  const int64_t prev = offset_of(a.prev_sample, b, position), gradient = offset_of(a.gradient, b, position);
  const int64_t reference = offset_of(a.reference, b, position);
  for (int64_t c = 0; c < a.channels; ++c) {
    const float output = load(a.model_output, v + c * a.model_output.channel);
    const float r = residual(k, load(a.sample, x + c * a.sample.channel), output,
                             load(a.prev_sample, prev + c * a.prev_sample.channel));
    float value = factor * r;
    if (a.reference.data) value += kl_factor * (output - load(a.reference, reference + c * a.reference.channel));
    store(a.gradient, gradient + c * a.gradient.channel, value);
  }
}

// prev = mean + std * noise, stored in its dtype; the log-probability is that of the stored value.
__global__ void __launch_bounds__(kThreads) sample_kernel(SampleArguments a) {
  const int64_t position = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, b = blockIdx.y;
  if (position >= a.positions) return;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const int64_t x = offset_of(a.sample, b, position), v = offset_of(a.model_output, b, position);
  const int64_t noise = offset_of(a.noise, b, position), prev = offset_of(a.prev_sample, b, position);
  float sum = 0.0f;
  for (int64_t c = 0; c < a.channels; ++c) {
    const float sample = load(a.sample, x + c * a.sample.channel);
    const float output = load(a.model_output, v + c * a.model_output.channel);
    const float drawn =
        add(transition_mean(k, sample, output), multiply(k.std, load(a.noise, noise + c * a.noise.channel)));
    const float r = residual(k, sample, output, store(a.prev_sample, prev + c * a.prev_sample.channel, drawn));
    sum = add(sum, multiply(r, r));
  }
  a.log_prob[b * a.positions + position] = log_prob(k, sum, 1.0f / static_cast<float>(a.channels));
}

dim3 grid_of(int64_t positions, int64_t batch) {
  return dim3(static_cast<unsigned>(tiles_of(positions)), static_cast<unsigned>(batch));
}

}  // namespace

int64_t tiles_of(int64_t positions) { return (positions + kThreads - 1) / kThreads; }

void policy_forward(const PolicyArguments& a, unsigned* counter, cudaStream_t stream) {
  forward_kernel<<<grid_of(a.positions, a.batch), kThreads, 0, stream>>>(a, counter);
}

void policy_backward(const PolicyArguments& a, cudaStream_t stream) {
  backward_kernel<<<grid_of(a.positions, a.batch), kThreads, 0, stream>>>(a);
}

void sample_transition(const SampleArguments& a, cudaStream_t stream) {
  sample_kernel<<<grid_of(a.positions, a.batch), kThreads, 0, stream>>>(a);
}

}  // namespace cuda
}  // namespace star
