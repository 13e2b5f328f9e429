// The policy loss: how the ratios of locations or of samples become the loss, the metrics and the factors of the
// gradient.
#pragma once

#include <cstdint>

#include "flow_policy.h"

namespace star {

// Flow-DPPO (arXiv 2606.11025) has the loss -A rho, and 0 where the divergence from the old policy reaches a threshold
// and the gradient leads further away: where A > 0 and rho > 1, or A < 0 and rho < 1. PPO's loss with the bounds [1, 1]
// has its gradient where the divergence does, and without bounds elsewhere; the slope is the loss.
STAR_INLINE bool masks_divergence(const PolicyArguments& a) { return a.kl_mask_threshold > 0.0f; }

// The bounds of a ratio, and whether there is a threshold that the policy has reached.
struct Bounds {
  float low, high;
  bool masks, diverged;
};

STAR_INLINE Bounds clip_bounds(const PolicyArguments& a) { return {a.clip_low, a.clip_high, false, false}; }

// The bounds of a policy whose divergence is `divergence`, which is read if there is a threshold. A NaN is below it.
STAR_INLINE Bounds bounds_of(const PolicyArguments& a, double divergence) {
  if (!masks_divergence(a)) return clip_bounds(a);
  const bool diverged = divergence >= a.kl_mask_threshold;
  return {diverged ? 1.0f : a.clip_low, diverged ? 1.0f : a.clip_high, true, diverged};
}

STAR_INLINE Surrogate bounded_surrogate(float ratio, float advantage, const Bounds& bounds) {
  const Surrogate s = clipped_surrogate_of(ratio, advantage, bounds.low, bounds.high);
  return {ratio, bounds.masks ? s.slope : s.loss, s.slope};
}

// The same for advantages of both signs, of locations.
STAR_INLINE SignedSurrogate<float> bounded_surrogate(float ratio, const SignedAdvantage<float>& advantage,
                                                     const Bounds& bounds) {
  const SignedSurrogate<float> s = signed_surrogate(ratio, advantage, bounds.low, bounds.high);
  return {bounds.masks ? s.slope : s.loss, s.slope};
}

struct Policy {
  using Arguments = PolicyArguments;
  // Sums over the positions of a tile or of a sample. The log-ratio (of the first phrase) and the loss are weighted,
  // the squared difference as the KL penalty is; the rest are plain sums over the ratios of locations. The first
  // kSampleSums are those that a ratio for each sample needs. With a threshold of the divergence the sum of that takes
  // the place of one that the ratio does not need.
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
  enum Metric { kMeanRatio, kMaxRatio, kClipFraction, kApproximateKl, kDivergence, kPolicyLoss, kKlLoss, kMetrics };
  static constexpr int kLargestSum = kRatioMax, kLargestMetric = kMaxRatio;

  static constexpr int kLocationDivergence = kLogRatio, kSampleDivergence = kSampleSums;  // places of its sum
  // Sums of a tile after the kSums, for a ratio of each sample: the weighted log-ratios of the other phrases, or for
  // dense advantages the weighted sums of max(A, 0) and max(-A, 0).
  STAR_INLINE int64_t more_sums(const PolicyArguments& a) { return a.per_location ? 0 : (a.dense ? 2 : a.phrases - 1); }
  // Rows of what is saved for the backward pass: d loss / d log-ratio of each phrase, or for dense advantages of both
  // signs; then one over the count.
  STAR_INLINE int64_t slopes(const PolicyArguments& a) { return a.dense ? 2 : a.phrases; }
  STAR_INLINE int64_t saved_rows(const PolicyArguments& a) { return slopes(a) + 1; }
};

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
                           const Bounds& bounds, const PolicyArguments& a) {
  const float ratio = expf(log_ratio);
  sums[Policy::kLoss] += bounded_surrogate(ratio, advantage, bounds).loss;
  add_ratio_metrics(sums, log_ratio, ratio, a);
  sums[Policy::kClipped] += bounds.diverged;
}

// Adds the metrics of a sample's ratio; several phrases have one each.
STAR_INLINE void add_sample_ratio(const PolicyArguments& a, double log_ratio, float ratio, bool diverged,
                                  double (&metrics)[Policy::kMetrics]) {
  metrics[Policy::kMeanRatio] += ratio;
  metrics[Policy::kMaxRatio] = maximum(metrics[Policy::kMaxRatio], static_cast<double>(ratio));
  metrics[Policy::kClipFraction] += ratio < a.clip_low || ratio > a.clip_high || diverged;
  metrics[Policy::kApproximateKl] += 0.5 * log_ratio * log_ratio;
}

// The ratios of a sample's phrases: writes their slopes and adds up their losses and metrics. more[i] are the sums
// after the kSums.
template <typename Sums>
STAR_INLINE void finish_phrases(const PolicyArguments& a, int64_t b, double log_ratio_sum, const Sums& more,
                                double inverse, double guard, const Bounds& bounds, const Saved& saved,
                                double (&metrics)[Policy::kMetrics]) {
  const double step = step_weight(a, b), old = a.old_is_scalar ? a.old_log_prob[b] : 0.0f;
  for (int64_t g = 0; g < a.phrases; ++g) {
    const double log_ratio = ((g == 0 ? log_ratio_sum : more[g - 1]) * inverse - old) * guard;
    const float advantage = clamp_advantage(a.advantages[b * a.phrases + g], a.advantage_clip);
    const Surrogate s = bounded_surrogate(expf(static_cast<float>(log_ratio)), advantage, bounds);
    metrics[Policy::kPolicyLoss] += s.loss * step;
    saved[g] = static_cast<float>(step * guard * s.slope * share_of_sample(a));
    add_sample_ratio(a, log_ratio, s.ratio, bounds.diverged, metrics);
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
                              double inverse, double guard, const Bounds& bounds, const Saved& saved,
                              double (&metrics)[Policy::kMetrics]) {
  const double step = step_weight(a, b), old = a.old_is_scalar ? a.old_log_prob[b] : 0.0f;
  const double log_ratio = (log_ratio_sum * inverse - old) * guard, share = share_of_sample(a);
  const float ratio = expf(static_cast<float>(log_ratio));
  const Surrogate up = bounded_surrogate(ratio, 1.0f, bounds);
  const Surrogate down = bounded_surrogate(ratio, -1.0f, bounds);
  const double loss = weighted(more[0] * inverse, up.loss) + weighted(more[1] * inverse, down.loss);
  metrics[Policy::kPolicyLoss] = loss * step;
  saved[0] = static_cast<float>(step * guard * up.slope * share);
  saved[1] = static_cast<float>(step * guard * down.slope * share);
  add_sample_ratio(a, log_ratio, ratio, bounds.diverged, metrics);
}

// Writes what is saved of a sample whose locations have ratios, which follows from the number of those that count: the
// slopes without those of the surrogates.
STAR_INLINE void save_locations(const PolicyArguments& a, const Coefficients& k, int64_t b, double inverse,
                                const Saved& saved) {
  const double guard = a.guarded ? guard_factor(k) : 1.0f;
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
  const double inverse = inverse_count(a, sums[Policy::kCount]), guard = a.guarded ? guard_factor(k) : 1.0f;
  const double step = step_weight(a, b);
  for (int i = 0; i < Policy::kMetrics; ++i) metrics[i] = 0.0;
  saved[Policy::slopes(a)] = static_cast<float>(inverse);
  if (masks_divergence(a)) {
    const double sum = a.per_location ? sums[Policy::kLocationDivergence] : sums[Policy::kSampleDivergence];
    metrics[Policy::kDivergence] = sum * inverse;
  }
  const Bounds bounds = bounds_of(a, metrics[Policy::kDivergence]);  // of ratios of samples
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
    finish_dense(a, b, sums[Policy::kLogRatio], more, inverse, guard, bounds, saved, metrics);
  } else {
    finish_phrases(a, b, sums[Policy::kLogRatio], more, inverse, guard, bounds, saved, metrics);
  }
  if (a.ref_output.data) {
    const double mean = sums[Policy::kSquaredDifference] * inverse / static_cast<double>(a.channels);
    metrics[Policy::kKlLoss] = mean * k.mean_output * k.mean_output * k.kl_scale;
  }
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
