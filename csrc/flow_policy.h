// The mathematics of the objectives, for host and device code alike: the terms of one latent position, and how sums
// over tiles, samples and the batch become the loss, the metrics and the factors of the gradient.
//
// Every sampler of the family is linear-Gaussian: prev ~ N(a x + b v, std^2) with x the sample, v the model output,
// and log p = offset - scale * (prev - mean)^2, averaged over channels (Flow-GRPO, arXiv 2505.05470).
// The functions are written so that no compiler may contract them differently in two kernels: a log-probability
// recomputed from equal inputs is equal to the last bit, and an on-policy ratio is exactly one.
#pragma once

#include <cmath>
#include <cstdint>

#include "arguments.h"

#if defined(__CUDACC__)
#define STAR_INLINE_MEMBER __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define STAR_INLINE_MEMBER inline __attribute__((always_inline))
#else
#define STAR_INLINE_MEMBER inline
#endif
#define STAR_INLINE static STAR_INLINE_MEMBER

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

STAR_INLINE Coefficients coefficients_of(const float* table, int64_t columns, int64_t sample) {
  return load_coefficients(table, columns, columns == 1 ? 0 : sample);
}

// Product and sum, rounded separately: the compiler may not fuse them in device code.
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

// The Kullback-Leibler divergence from the old policy of a position, the mean over its channels.
STAR_INLINE float kl_divergence(const Coefficients& c, float sum_of_squares, float inverse_channels) {
  const float change = c.mean_output / c.std;
  return 0.5f * change * change * (sum_of_squares * inverse_channels);
}

STAR_INLINE float guard_factor(const Coefficients& c) { return 1.0f / (2.0f * c.scale * c.std); }

// d log_prob / d output, as a factor of the residual.
STAR_INLINE float log_prob_slope(const Coefficients& c, float inverse_channels) {
  return 2.0f * c.scale * c.mean_output * inverse_channels;
}

// The value, or 0 if it is infinite and has a weight of 0. A NaN stays visible.
template <typename Number>
STAR_INLINE float finite_if_zero(Number weight, float value) {
  const bool infinite = value > 3.402823466e38f || value < -3.402823466e38f;
  return weight == Number(0) && infinite ? 0.0f : value;
}

// weight * value, in which a weight of 0 cancels an infinite value.
template <typename Number>
STAR_INLINE Number weighted(Number weight, float value) {
  return weight * finite_if_zero(weight, value);
}

struct Surrogate {
  float ratio;
  float loss;   // max(-A rho, -A clip(rho, low, high)), PPO's pessimistic bound
  float slope;  // d loss / d log rho
};

STAR_INLINE Surrogate clipped_surrogate_of(float ratio, float advantage, float low, float high) {
  const float clipped = ratio < low ? low : (ratio > high ? high : ratio);
  const float free_loss = weighted(-advantage, ratio);
  const float clipped_loss = -advantage * clipped;
  const bool inside = clipped == ratio;
  const bool acts = inside || free_loss > clipped_loss;
  // Both comparisons are false for a NaN ratio, which must stay visible.
  const float loss = free_loss >= clipped_loss || free_loss != free_loss ? free_loss : clipped_loss;
  return {ratio, loss, acts || free_loss != free_loss ? free_loss : 0.0f};
}

STAR_INLINE Surrogate clipped_surrogate(float log_ratio, float advantage, float low, float high) {
  return clipped_surrogate_of(expf(log_ratio), advantage, low, high);
}

// Advantages of both signs that share a ratio: sums of W max(A, 0) and of W max(-A, 0), W not negative. Surrogates are
// positively homogeneous in A, so theirs add up to positive * surrogate(1) + negative * surrogate(-1).
template <typename Number>
struct SignedAdvantage {
  Number positive, negative;
};

// The parts of one advantage; a NaN stays in both.
STAR_INLINE SignedAdvantage<float> signed_advantage(float advantage) {
  return {advantage <= 0.0f ? 0.0f : advantage, advantage >= 0.0f ? 0.0f : -advantage};
}

template <typename Number>
struct SignedSurrogate {
  Number loss, slope;
};

template <typename Number>
STAR_INLINE SignedSurrogate<Number> signed_surrogate(float ratio, const SignedAdvantage<Number>& advantage, float low,
                                                     float high) {
  const Surrogate up = clipped_surrogate_of(ratio, 1.0f, low, high);
  const Surrogate down = clipped_surrogate_of(ratio, -1.0f, low, high);
  return {weighted(advantage.positive, up.loss) + weighted(advantage.negative, down.loss),
          weighted(advantage.positive, up.slope) + weighted(advantage.negative, down.slope)};
}

// Where the weight of a location lies on the patch grid that divides the latent's.
template <typename Integer>
STAR_INLINE Integer grid_position(const Objective& a, Integer position) {
  const Integer rows = static_cast<Integer>(a.location[1]), columns = static_cast<Integer>(a.location[2]);
  const Integer grid_rows = static_cast<Integer>(a.grid[1]), grid_columns = static_cast<Integer>(a.grid[2]);
  const Integer patch_frames = static_cast<Integer>(a.location[0]) / static_cast<Integer>(a.grid[0]);
  const Integer line = position / columns, column = position % columns;
  const Integer frame = line / rows, row = line % rows;
  const Integer grid_row = frame / patch_frames * grid_rows + row / (rows / grid_rows);
  return grid_row * grid_columns + column / (columns / grid_columns);
}

// The larger of two numbers; a NaN counts as the largest.
template <typename Number>
STAR_INLINE Number maximum(Number x, Number y) {
  return y > x || y != y ? y : x;
}

// Adds sums to sums; of those at kMaximum keeps the larger (kMaximum negative: none).
template <int kMaximum, int kSize>
STAR_INLINE void merge(double (&into)[kSize], const double (&from)[kSize]) {
  for (int i = 0; i < kSize; ++i) into[i] = i == kMaximum ? maximum(into[i], from[i]) : into[i] + from[i];
}

// One over the number of a sample's locations that count; 0 if none does.
STAR_INLINE double inverse_count(const Objective& a, double kept) {
  const double count = a.mask ? kept : static_cast<double>(a.positions);
  return count > 0.0 ? 1.0 / count : 0.0;
}

// The weight of a sample's loss in the loss that is differentiated.
STAR_INLINE double share_of_sample(const Objective& a) {
  return a.unreduced ? 1.0 : 1.0 / static_cast<double>(a.batch);
}

STAR_INLINE float upstream_gradient(const Objective& a, int64_t b) {
  return a.grad_loss ? a.grad_loss[a.unreduced ? b : 0] : 1.0f;
}

// What is saved of one sample for its gradient.
struct Saved {
  float* first;
  int64_t stride;
  STAR_INLINE_MEMBER float& operator[](int64_t row) const { return first[row * stride]; }
};

STAR_INLINE Saved saved_of(const Objective& a, int64_t b) { return {a.saved + b, a.batch}; }

STAR_INLINE double step_weight(const Objective& a, int64_t b) { return a.step_weights ? a.step_weights[b] : 1.0; }

STAR_INLINE float clamp_advantage(float advantage, float limit) {
  return advantage < -limit ? -limit : (advantage > limit ? limit : advantage);
}

// The last two metrics of every objective are the policy loss and the KL loss.
template <int kMetrics>
STAR_INLINE float total_loss(const Objective& a, const double (&metrics)[kMetrics], double scale) {
  return static_cast<float>((metrics[kMetrics - 2] + static_cast<double>(a.kl_coef) * metrics[kMetrics - 1]) * scale);
}

// Writes the metrics, and the loss if it is one number, from the sums over all samples.
template <int kMaximum, int kMetrics>
STAR_INLINE void finish_batch(const Objective& a, const double (&metrics)[kMetrics]) {
  const double share = 1.0 / static_cast<double>(a.batch);
  if (!a.unreduced) a.loss[0] = total_loss(a, metrics, share);
  for (int i = 0; i < kMetrics; ++i) {
    a.metrics[i] = static_cast<float>(i == kMaximum ? metrics[i] : metrics[i] * share);
  }
}

// Turns the sums of a sample into its part of the metrics and what is saved of it, in its place; also writes the loss
// of an unreduced sample.
template <typename Arguments, typename Sums, int kSums, int kMetrics>
STAR_INLINE void finish_sample(const Arguments& a, int64_t b, const double (&sums)[kSums], const Sums& more,
                               double (&metrics)[kMetrics]) {
  evaluate_sample(a, b, sums, more, saved_of(a, b), metrics);
  if (a.unreduced) a.loss[b] = total_loss(a, metrics, 1.0);
}

}  // namespace star
