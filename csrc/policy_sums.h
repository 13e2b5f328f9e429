// How the terms of ratios add up to the loss and the metrics, for host and device code alike.
#pragma once

#include "arguments.h"
#include "flow_policy.h"

namespace star {

constexpr int kMetrics = 6;

STAR_INLINE Coefficients coefficients_of(const float* table, int64_t columns, int64_t sample) {
  return load_coefficients(table, columns, columns == 1 ? 0 : sample);
}

// Where the weight of a location lies on the patch grid that divides the latent's.
STAR_INLINE int64_t grid_position(const PolicyArguments& a, int64_t position) {
  const int64_t column = position % a.location[2], row = position / a.location[2] % a.location[1];
  const int64_t frame = position / (a.location[1] * a.location[2]);
  const int64_t grid_row = row / (a.location[1] / a.grid[1]), grid_column = column / (a.location[2] / a.grid[2]);
  return (frame / (a.location[0] / a.grid[0]) * a.grid[1] + grid_row) * a.grid[2] + grid_column;
}

// The larger of two numbers; a NaN is larger than any.
STAR_INLINE double maximum(double x, double y) { return y > x || y != y ? y : x; }

// The terms of one ratio: a location's, or a whole sample's.
STAR_INLINE Surrogate add_ratio(Sums& sums, float log_ratio, float advantage, float weight, const PolicyArguments& a) {
  const Surrogate s = clipped_surrogate(log_ratio, advantage, a.clip_low, a.clip_high);
  sums.loss += static_cast<double>(weight) * s.loss;
  sums.ratio += s.ratio;
  sums.ratio_max = maximum(sums.ratio_max, s.ratio);
  sums.clipped += s.ratio < a.clip_low || s.ratio > a.clip_high;
  sums.squared_log_ratio += static_cast<double>(log_ratio) * log_ratio;
  return s;
}

STAR_INLINE void merge(Sums& into, const Sums& from) {
  into.log_ratio += from.log_ratio;
  into.loss += from.loss;
  into.ratio += from.ratio;
  into.ratio_max = maximum(into.ratio_max, from.ratio_max);
  into.clipped += from.clipped;
  into.squared_log_ratio += from.squared_log_ratio;
  into.squared_difference += from.squared_difference;
}

// Turns the tiles' sums of a sample into what it adds to the batch, and writes its slope.
STAR_INLINE void finish_sample(const PolicyArguments& a, int64_t b, Sums& sums) {
  if (!a.per_location) {
    const double mean =
        sums.log_ratio / static_cast<double>(a.positions) - (a.old_is_scalar ? a.old_log_prob[b] : 0.0f);
    const float advantage = clamp_advantage(a.advantages[b], a.advantage_clip);
    const Surrogate s = add_ratio(sums, static_cast<float>(mean), advantage, 1.0f, a);
    a.slope[b] = static_cast<float>(s.slope / static_cast<double>(a.batch));
  }
  if (a.per_location) a.slope[b] = 0.0f;  // not read, but not left unwritten
  if (a.reference.data) {
    const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
    const double elements = static_cast<double>(a.positions) * static_cast<double>(a.channels);
    sums.squared_difference *= static_cast<double>(k.mean_output) * k.mean_output * k.kl_scale / elements;
  }
}

// Writes the loss and the metrics from the sums over all samples.
STAR_INLINE void finish_batch(const PolicyArguments& a, const Sums& sums) {
  const double batch = static_cast<double>(a.batch);
  const double ratios = a.per_location ? batch * static_cast<double>(a.positions) : batch;
  const double policy_loss = sums.loss / ratios, kl_loss = sums.squared_difference / batch;
  a.loss[0] = static_cast<float>(a.reference.data ? policy_loss + a.kl_coef * kl_loss : policy_loss);
  const double metrics[kMetrics] = {sums.ratio / ratios,   sums.ratio_max,
                                    sums.clipped / ratios, 0.5 * sums.squared_log_ratio / ratios,
                                    policy_loss,           kl_loss};
  for (int i = 0; i < kMetrics; ++i) a.metrics[i] = static_cast<float>(metrics[i]);
}

// d loss / d output = factor * residual: what is common to the positions of a sample.
STAR_INLINE float gradient_factor(const PolicyArguments& a, const Coefficients& k) {
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  return a.grad_loss[0] * log_prob_slope(k, inverse_channels) / static_cast<float>(a.positions);
}

// d loss / d output = factor * (output - reference), of the KL penalty.
STAR_INLINE float kl_gradient_factor(const PolicyArguments& a, const Coefficients& k) {
  const float elements = static_cast<float>(a.batch) * static_cast<float>(a.channels) * static_cast<float>(a.positions);
  return a.grad_loss[0] * a.kl_coef * 2.0f * k.kl_scale * k.mean_output * k.mean_output / elements;
}

}  // namespace star
