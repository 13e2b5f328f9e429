// What the kernels are given, on a CPU and on a GPU. unpack.h fills these in from tensors and checks them.
#pragma once

#include <cstdint>

namespace star {

enum class DType : int { kFloat32, kFloat16, kBFloat16 };

// A tensor seen as [batch, channels or heads, positions, ...]; strides in elements.
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t channel = 0;
  int64_t position = 0;
};

// What the objectives share.
struct Objective {
  int64_t batch, channels, positions;
  int64_t location[3];  // positions = their product
  int64_t grid[3];      // of the weights; each divides the location's
  View model_output;
  View reference;             // data null: no KL term
  const float* advantages;    // [B]
  const float* weights;       // [B, grid] or null
  const uint8_t* mask;        // [B, P], 0 where a location does not count, or null
  const float* step_weights;  // [B] or null
  bool weighted_kl;
  bool per_sample;  // each sample keeps its own loss, and no mean over the batch is taken
  float advantage_clip, kl_coef;
  double* partial;         // the sums of the tiles, forward
  float* loss;             // [B] when per_sample, else [1]; forward
  float* metrics;          // forward
  float* statistics;       // [rows, B]: what the backward pass needs of a sample; written forward
  const float* grad_loss;  // like the loss; backward
  View gradient;           // backward
  int threads;             // of a CPU
};

struct PolicyArguments : Objective {
  View sample, prev_sample;
  View old_output;            // data null: no GRPO-Guard
  const float* coefficients;  // [6, columns]
  int64_t columns;            // batch or 1
  const float* old_log_prob;  // [B, P], or [B] when old_is_scalar
  bool old_is_scalar;
  bool per_location;
  float clip_low, clip_high;
};

struct NftArguments : Objective {
  View old_output, target;
  const float* sigma;  // [B]
  bool adaptive;
  float beta;
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
