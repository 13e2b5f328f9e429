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

struct Policy {
  using Arguments = PolicyArguments;
  // Sums over the positions of a tile or of a sample. The log-ratio (of the first phrase) and the loss are weighted,
  // the squared difference as the KL penalty is; the rest are plain sums over the ratios of locations. The first
  // kSampleSums are those that a ratio for each sample needs.
  enum Sum {
    kLogRatio,
    kSquaredDifference,
    kCount,
    kSampleSums,
    kLoss = kSampleSums,
    kRatio,
    kRatioMax,
    kClipped,
    kSquaredLogRatio,
    kSums
  };
  enum Metric { kMeanRatio, kMaxRatio, kClipFraction, kApproximateKl, kPolicyLoss, kKlLoss, kMetrics };
  static constexpr int kLargestSum = kRatioMax, kLargestMetric = kMaxRatio;

  // Sums of a tile after the kSums, for a ratio of each sample: the weighted log-ratios of the other phrases, or for
  // dense advantages the weighted sums of max(A, 0) and max(-A, 0).
  STAR_INLINE int64_t more_sums(const PolicyArguments& a) { return a.per_location ? 0 : (a.dense ? 2 : a.phrases - 1); }
  // Rows of what is saved for the backward pass: d loss / d log-ratio of each phrase, or for dense advantages of both
  // signs; then one over the count.
  STAR_INLINE int64_t slopes(const PolicyArguments& a) { return a.dense ? 2 : a.phrases; }
  STAR_INLINE int64_t saved_rows(const PolicyArguments& a) { return slopes(a) + 1; }
};

STAR_INLINE Coefficients coefficients_of(const float* table, int64_t columns, int64_t sample) {
  return load_coefficients(table, columns, columns == 1 ? 0 : sample);
}

// The terms of a location's ratio, without the loss. kSize is at least Policy::kSums.
template <typename Number, int kSize>
STAR_INLINE void add_ratio_metrics(Number (&sums)[kSize], float log_ratio, float ratio, const PolicyArguments& a) {
  sums[Policy::kRatio] += ratio;
  sums[Policy::kRatioMax] = maximum(sums[Policy::kRatioMax], static_cast<Number>(ratio));
  sums[Policy::kClipped] += ratio < a.clip_low || ratio > a.clip_high;
  sums[Policy::kSquaredLogRatio] += static_cast<Number>(log_ratio) * log_ratio;
}

// The terms of a location's ratio, with one advantage.
template <typename Number, int kSize>
STAR_INLINE void add_ratio(Number (&sums)[kSize], float log_ratio, float advantage, float weight,
                           const PolicyArguments& a) {
  const Surrogate s = clipped_surrogate(log_ratio, advantage, a.clip_low, a.clip_high);
  sums[Policy::kLoss] += weighted(static_cast<Number>(weight), s.loss);
  add_ratio_metrics(sums, log_ratio, s.ratio, a);
}

// The same with the weighted advantages of several phrases.
template <typename Number, int kSize>
STAR_INLINE void add_ratio(Number (&sums)[kSize], float log_ratio, const SignedAdvantage<float>& advantage,
                           const PolicyArguments& a) {
  const float ratio = expf(log_ratio);
  sums[Policy::kLoss] += signed_surrogate(ratio, advantage, a.clip_low, a.clip_high).loss;
  add_ratio_metrics(sums, log_ratio, ratio, a);
}

// Adds the metrics of a sample's ratio; several phrases have one each.
STAR_INLINE void add_sample_ratio(const PolicyArguments& a, double log_ratio, float ratio,
                                  double (&metrics)[Policy::kMetrics]) {
  metrics[Policy::kMeanRatio] += ratio;
  metrics[Policy::kMaxRatio] = maximum(metrics[Policy::kMaxRatio], static_cast<double>(ratio));
  metrics[Policy::kClipFraction] += ratio < a.clip_low || ratio > a.clip_high;
  metrics[Policy::kApproximateKl] += 0.5 * log_ratio * log_ratio;
}

// The ratios of a sample's phrases: writes their slopes and adds up their losses and metrics. more[i] are the sums
// after the kSums.
template <typename Sums>
STAR_INLINE void finish_phrases(const PolicyArguments& a, int64_t b, double log_ratio_sum, const Sums& more,
                                double inverse, double guard, const Saved& saved, double (&metrics)[Policy::kMetrics]) {
  const double step = step_weight(a, b), old = a.old_is_scalar ? a.old_log_prob[b] : 0.0f;
  for (int64_t g = 0; g < a.phrases; ++g) {
    const double log_ratio = ((g == 0 ? log_ratio_sum : more[g - 1]) * inverse - old) * guard;
    const float advantage = clamp_advantage(a.advantages[b * a.phrases + g], a.advantage_clip);
    const Surrogate s = clipped_surrogate(static_cast<float>(log_ratio), advantage, a.clip_low, a.clip_high);
    metrics[Policy::kPolicyLoss] += s.loss * step;
    saved[g] = static_cast<float>(step * guard * s.slope * share_of_sample(a));
    add_sample_ratio(a, log_ratio, s.ratio, metrics);
  }
  const double phrases = static_cast<double>(a.phrases);
  metrics[Policy::kMeanRatio] /= phrases;
  metrics[Policy::kClipFraction] /= phrases;
  metrics[Policy::kApproximateKl] /= phrases;
}

// The ratio of a sample with dense advantages: the value of a location's ratio is the sample's, its gradient the
// location's own (GSPO-token, arXiv 2507.18071).
template <typename Sums>
STAR_INLINE void finish_dense(const PolicyArguments& a, int64_t b, double log_ratio_sum, const Sums& more,
                              double inverse, double guard, const Saved& saved, double (&metrics)[Policy::kMetrics]) {
  const double step = step_weight(a, b), old = a.old_is_scalar ? a.old_log_prob[b] : 0.0f;
  const double log_ratio = (log_ratio_sum * inverse - old) * guard, share = share_of_sample(a);
  const float ratio = expf(static_cast<float>(log_ratio));
  const Surrogate up = clipped_surrogate_of(ratio, 1.0f, a.clip_low, a.clip_high);
  const Surrogate down = clipped_surrogate_of(ratio, -1.0f, a.clip_low, a.clip_high);
  const double loss = weighted(more[0] * inverse, up.loss) + weighted(more[1] * inverse, down.loss);
  metrics[Policy::kPolicyLoss] = loss * step;
  saved[0] = static_cast<float>(step * guard * up.slope * share);
  saved[1] = static_cast<float>(step * guard * down.slope * share);
  add_sample_ratio(a, log_ratio, ratio, metrics);
}

// Writes what is saved of a sample whose locations have ratios, which follows from the number of those that count: the
// slopes without those of the surrogates.
STAR_INLINE void save_locations(const PolicyArguments& a, const Coefficients& k, int64_t b, double inverse,
                                const Saved& saved) {
  const double guard = a.old_output.data ? guard_factor(k) : 1.0f;
  const float slope = static_cast<float>(step_weight(a, b) * guard * share_of_sample(a));
  for (int64_t g = 0; g < Policy::slopes(a); ++g) saved[g] = slope;
  saved[Policy::slopes(a)] = static_cast<float>(inverse);
}

// Turns the sums of a sample into its part of the metrics and what is saved of it. A sample without a location that
// counts contributes nothing.
template <typename Sums>
STAR_INLINE void evaluate_sample(const PolicyArguments& a, int64_t b, const double (&sums)[Policy::kSums],
                                 const Sums& more, const Saved& saved, double (&metrics)[Policy::kMetrics]) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const double inverse = inverse_count(a, sums[Policy::kCount]), guard = a.old_output.data ? guard_factor(k) : 1.0f;
  const double step = step_weight(a, b);
  for (int i = 0; i < Policy::kMetrics; ++i) metrics[i] = 0.0;
  saved[Policy::slopes(a)] = static_cast<float>(inverse);
  if (a.per_location) {
    save_locations(a, k, b, inverse, saved);
    metrics[Policy::kMeanRatio] = sums[Policy::kRatio] * inverse;
    metrics[Policy::kMaxRatio] = sums[Policy::kRatioMax];
    metrics[Policy::kClipFraction] = sums[Policy::kClipped] * inverse;
    metrics[Policy::kApproximateKl] = 0.5 * sums[Policy::kSquaredLogRatio] * inverse;
    metrics[Policy::kPolicyLoss] = sums[Policy::kLoss] * inverse * step;
  } else if (inverse == 0.0) {
    for (int64_t g = 0; g < Policy::slopes(a); ++g) saved[g] = 0.0f;
  } else if (a.dense) {
    finish_dense(a, b, sums[Policy::kLogRatio], more, inverse, guard, saved, metrics);
  } else {
    finish_phrases(a, b, sums[Policy::kLogRatio], more, inverse, guard, saved, metrics);
  }
  if (a.ref_output.data) {
    const double mean = sums[Policy::kSquaredDifference] * inverse / static_cast<double>(a.channels);
    metrics[Policy::kKlLoss] = mean * k.mean_output * k.mean_output * k.kl_scale;
  }
}

// The same, with what is saved in its place; also writes the loss of an unreduced sample.
template <typename Arguments, typename Sums, int kSums, int kMetrics>
STAR_INLINE void finish_sample(const Arguments& a, int64_t b, const double (&sums)[kSums], const Sums& more,
                               double (&metrics)[kMetrics]) {
  evaluate_sample(a, b, sums, more, saved_of(a, b), metrics);
  if (a.unreduced) a.loss[b] = total_loss(a, metrics, 1.0);
}

// The upstream gradient of a sample's mean over locations.
STAR_INLINE float upstream_mean(const PolicyArguments& a, int64_t b, const Saved& saved) {
  return upstream_gradient(a, b) * saved[Policy::slopes(a)];
}

// d loss / d output = factor * slope * weight * residual.
STAR_INLINE float gradient_factor_of_slope(const PolicyArguments& a, const Coefficients& k, int64_t b,
                                           const Saved& saved) {
  return upstream_mean(a, b, saved) * log_prob_slope(k, 1.0f / static_cast<float>(a.channels));
}

// d loss / d output = factor * weight * residual, times the slope of the location's surrogate if it has a ratio. `row`
// is that of the slope: the phrase, or for dense advantages 0 where they are positive and 1 where they are negative,
// which then multiply the factor by their absolute value.
STAR_INLINE float gradient_factor(const PolicyArguments& a, const Coefficients& k, int64_t b, int64_t row = 0) {
  const Saved saved = saved_of(a, b);
  return gradient_factor_of_slope(a, k, b, saved) * saved[row];
}

// d loss / d output = factor * (output - ref_output), of the KL penalty, times the weight if that acts on it.
STAR_INLINE float kl_gradient_factor(const PolicyArguments& a, const Coefficients& k, int64_t b, const Saved& saved) {
  const float mean = upstream_mean(a, b, saved) / static_cast<float>(a.channels);
  const float share = static_cast<float>(share_of_sample(a));
  return mean * share * a.kl_coef * 2.0f * k.kl_scale * k.mean_output * k.mean_output;
}

}  // namespace star
