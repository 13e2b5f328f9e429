// The mathematics of one latent position of the flow policy, for host and device code alike.
//
// Every sampler of the family is linear-Gaussian: prev ~ N(a x + b v, std^2) with x the sample, v the model output,
// and log p = offset - scale * (prev - mean)^2, averaged over channels (Flow-GRPO, arXiv 2505.05470).
// The functions are written so that no compiler may contract them differently in two kernels: a log-probability
// recomputed from equal inputs is equal to the last bit, and an on-policy ratio is exactly one.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define STAR_INLINE static __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define STAR_INLINE static inline __attribute__((always_inline))
#else
#define STAR_INLINE static inline
#endif

namespace star {

// Rows of the coefficient tensor [6, B] that star_kernels.Transition carries.
enum CoefficientRow : int64_t { kMeanSample, kMeanOutput, kStd, kScale, kOffset, kKlScale, kCoefficientRows };

struct Coefficients {
  float mean_sample;  // a
  float mean_output;  // b
  float std;
  float scale;
  float offset;
  float kl_scale;
};

// One column of the table, which has `columns` of them.
STAR_INLINE Coefficients load_coefficients(const float* table, int64_t columns, int64_t column) {
  const float* p = table + column;
  return {p[kMeanSample * columns], p[kMeanOutput * columns], p[kStd * columns],
          p[kScale * columns],      p[kOffset * columns],     p[kKlScale * columns]};
}

// Separately rounded product and sum: device code would otherwise fuse them as it sees fit.
STAR_INLINE float multiply(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

STAR_INLINE float add(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(x, y);
#else
  return x + y;
#endif
}

STAR_INLINE float transition_mean(const Coefficients& c, float sample, float output) {
  return add(multiply(c.mean_sample, sample), multiply(c.mean_output, output));
}

STAR_INLINE float residual(const Coefficients& c, float sample, float output, float prev) {
  return add(prev, -transition_mean(c, sample, output));
}

STAR_INLINE float log_prob(const Coefficients& c, float sum_of_squares, float inverse_channels) {
  return add(c.offset, -multiply(c.scale, multiply(sum_of_squares, inverse_channels)));
}

// GRPO-Guard (arXiv 2510.22319) adds scale * mean over channels of (mean - mean_old)^2 to a log-ratio, which takes out
// its expectation, and multiplies it by 1 / (2 scale std), which takes out its dependence on the noise scale. With r
// the residual and v_old the old output, d/dv [scale b^2 (v - v_old)^2 - scale r^2] = 2 scale b (r + b (v - v_old)):
// the gradient is that of the log-probability with the residual of v_old in place of r.
STAR_INLINE float guard_shift(const Coefficients& c, float sum_of_squares, float inverse_channels) {
  return c.scale * c.mean_output * c.mean_output * (sum_of_squares * inverse_channels);
}

STAR_INLINE float guard_factor(const Coefficients& c) { return 1.0f / (2.0f * c.scale * c.std); }

// d log_prob / d output, as a factor of the residual.
STAR_INLINE float log_prob_slope(const Coefficients& c, float inverse_channels) {
  return 2.0f * c.scale * c.mean_output * inverse_channels;
}

struct Surrogate {
  float ratio;
  float loss;   // max(-A rho, -A clip(rho, low, high)), PPO's pessimistic bound
  float slope;  // d loss / d log rho
};

STAR_INLINE Surrogate clipped_surrogate(float log_ratio, float advantage, float low, float high) {
  const float ratio = expf(log_ratio);
  const float clipped = ratio < low ? low : (ratio > high ? high : ratio);
  const float free_loss = -advantage * ratio;
  const float clipped_loss = -advantage * clipped;
  const bool inside = clipped == ratio;
  const bool acts = inside || free_loss > clipped_loss;
  // A NaN ratio takes the second branch of neither test and must stay visible.
  const float loss = free_loss >= clipped_loss || free_loss != free_loss ? free_loss : clipped_loss;
  return {ratio, loss, acts || free_loss != free_loss ? free_loss : 0.0f};
}

}  // namespace star
