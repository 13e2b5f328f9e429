// What the objectives share beyond their arguments, for host and device code alike: where the weight of a location
// lies, and how sums over tiles, samples and the batch are merged and become the loss and the metrics.
#pragma once

#include "arguments.h"
#include "flow_policy.h"

namespace star {

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

// The larger of two numbers; a NaN is larger than any.
template <typename Number>
STAR_INLINE Number maximum(Number x, Number y) {
  return y > x || y != y ? y : x;
}

// Adds sums to sums, but keeps the larger of those at kMaximum (negative: of none).
template <int kMaximum, int kSize>
STAR_INLINE void merge(double (&into)[kSize], const double (&from)[kSize]) {
  for (int i = 0; i < kSize; ++i) into[i] = i == kMaximum ? maximum(into[i], from[i]) : into[i] + from[i];
}

// One over the locations of a sample that count; 0 where none does.
STAR_INLINE double inverse_count(const Objective& a, double kept) {
  const double count = a.mask ? kept : static_cast<double>(a.positions);
  return count > 0.0 ? 1.0 / count : 0.0;
}

// What a sample's loss weighs in the loss that is differentiated.
STAR_INLINE double share_of_sample(const Objective& a) {
  return a.per_sample ? 1.0 : 1.0 / static_cast<double>(a.batch);
}

STAR_INLINE float upstream_gradient(const Objective& a, int64_t b) { return a.grad_loss[a.per_sample ? b : 0]; }

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
  if (!a.per_sample) a.loss[0] = total_loss(a, metrics, share);
  for (int i = 0; i < kMetrics; ++i) {
    a.metrics[i] = static_cast<float>(i == kMaximum ? metrics[i] : metrics[i] * share);
  }
}

}  // namespace star
