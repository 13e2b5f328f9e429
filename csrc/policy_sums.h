// How the terms of ratios add up to the policy loss and its metrics, for host and device code alike.
#pragma once

#include "objective.h"

namespace star {

struct Policy {
  using Arguments = PolicyArguments;
  // What the positions of a tile and of a sample add up to. The log-ratio and the loss are weighted, the squared
  // difference as the KL penalty is; the rest are plain sums over the ratios of locations. The first kSampleSums are
  // those that a ratio for each sample needs.
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
  static constexpr int kStatistics = 2;  // rows: d loss / d log-ratio; one over the count
};

STAR_INLINE Coefficients coefficients_of(const float* table, int64_t columns, int64_t sample) {
  return load_coefficients(table, columns, columns == 1 ? 0 : sample);
}

// The terms of a location's ratio.
template <typename Number>
STAR_INLINE void add_ratio(Number (&sums)[Policy::kSums], float log_ratio, float advantage, float weight,
                           const PolicyArguments& a) {
  const Surrogate s = clipped_surrogate(log_ratio, advantage, a.clip_low, a.clip_high);
  sums[Policy::kLoss] += static_cast<Number>(weight) * s.loss;
  sums[Policy::kRatio] += s.ratio;
  sums[Policy::kRatioMax] = maximum(sums[Policy::kRatioMax], static_cast<Number>(s.ratio));
  sums[Policy::kClipped] += s.ratio < a.clip_low || s.ratio > a.clip_high;
  sums[Policy::kSquaredLogRatio] += static_cast<Number>(log_ratio) * log_ratio;
}

// Turns the sums of a sample into what it adds to the metrics, and writes its statistics and, where samples keep
// theirs, its loss. A sample without a location that counts contributes nothing.
STAR_INLINE void finish_sample(const PolicyArguments& a, int64_t b, const double (&sums)[Policy::kSums],
                               double (&metrics)[Policy::kMetrics]) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const double inverse = inverse_count(a, sums[Policy::kCount]), guard = a.old_output.data ? guard_factor(k) : 1.0f;
  const double step = step_weight(a, b);
  double slope = step * guard;  // d loss / d log-ratio, but for the surrogate's own where locations have ratios
  for (int i = 0; i < Policy::kMetrics; ++i) metrics[i] = 0.0;
  if (a.per_location) {
    metrics[Policy::kMeanRatio] = sums[Policy::kRatio] * inverse;
    metrics[Policy::kMaxRatio] = sums[Policy::kRatioMax];
    metrics[Policy::kClipFraction] = sums[Policy::kClipped] * inverse;
    metrics[Policy::kApproximateKl] = 0.5 * sums[Policy::kSquaredLogRatio] * inverse;
    metrics[Policy::kPolicyLoss] = sums[Policy::kLoss] * inverse * step;
  } else if (inverse > 0.0) {
    const double old = a.old_is_scalar ? a.old_log_prob[b] : 0.0f;
    const double log_ratio = (sums[Policy::kLogRatio] * inverse - old) * guard;
    const float advantage = clamp_advantage(a.advantages[b], a.advantage_clip);
    const Surrogate s = clipped_surrogate(static_cast<float>(log_ratio), advantage, a.clip_low, a.clip_high);
    metrics[Policy::kMeanRatio] = metrics[Policy::kMaxRatio] = s.ratio;
    metrics[Policy::kClipFraction] = s.ratio < a.clip_low || s.ratio > a.clip_high;
    metrics[Policy::kApproximateKl] = 0.5 * log_ratio * log_ratio;
    metrics[Policy::kPolicyLoss] = s.loss * step;
    slope *= s.slope;
  } else {
    slope = 0.0;
  }
  if (a.reference.data) {
    const double mean = sums[Policy::kSquaredDifference] * inverse / static_cast<double>(a.channels);
    metrics[Policy::kKlLoss] = mean * k.mean_output * k.mean_output * k.kl_scale;
  }
  a.statistics[b] = static_cast<float>(slope * share_of_sample(a));
  a.statistics[a.batch + b] = static_cast<float>(inverse);
  if (a.per_sample) a.loss[b] = total_loss(a, metrics, 1.0);
}

// d loss / d output = factor * weight * residual, times the slope of the location's surrogate where it has a ratio.
STAR_INLINE float gradient_factor(const PolicyArguments& a, const Coefficients& k, int64_t b) {
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  const float mean = upstream_gradient(a, b) * a.statistics[a.batch + b];
  return mean * log_prob_slope(k, inverse_channels) * a.statistics[b];
}

// d loss / d output = factor * (output - reference), of the KL penalty, times the weight where that acts on it.
STAR_INLINE float kl_gradient_factor(const PolicyArguments& a, const Coefficients& k, int64_t b) {
  const float mean = upstream_gradient(a, b) * a.statistics[a.batch + b] / static_cast<float>(a.channels);
  const float share = static_cast<float>(share_of_sample(a));
  return mean * share * a.kl_coef * 2.0f * k.kl_scale * k.mean_output * k.mean_output;
}

}  // namespace star
