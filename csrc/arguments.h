// What the kernels are given, on a CPU and on a GPU. exports.cpp fills these in from tensors and checks them.
#pragma once

#include <cstdint>

namespace star {

// What the positions of a tile, a sample and a batch add up to. The log-ratio is weighted, the loss too; the others are
// plain sums over ratios: one for each sample, or one for each location.
struct Sums {
  double log_ratio, loss, ratio, ratio_max, clipped, squared_log_ratio, squared_difference;
};

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// A tensor seen as [batch, channels or heads, positions, ...]; strides in elements.
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t channel = 0;
  int64_t position = 0;
};

struct PolicyArguments {
  int64_t batch, channels, positions;
  int64_t location[3];  // positions = their product
  int64_t grid[3];      // of the weights; each divides the location's
  View model_output, sample, prev_sample;
  View reference;             // data null: no KL term
  const float* coefficients;  // [6, columns]
  int64_t columns;            // batch or 1
  const float* old_log_prob;  // [B, P], or [B] when old_is_scalar
  bool old_is_scalar;
  const float* advantages;  // [B]
  const float* weights;     // [B, grid] or null
  bool per_location;
  float clip_low, clip_high, advantage_clip, kl_coef;
  float* loss;             // [1], forward
  float* metrics;          // [6], forward
  float* slope;            // [B] d loss / d mean log-ratio: written forward, read backward (unused per location)
  Sums* partial;           // [B, tiles], forward
  const float* grad_loss;  // [1], backward
  View gradient;           // backward
  int threads;
};

struct SampleArguments {
  int64_t batch, channels, positions;
  View model_output, sample, noise, prev_sample;
  const float* coefficients;
  int64_t columns;
  float* log_prob;  // [B, P]
  int threads;
};

}  // namespace star
