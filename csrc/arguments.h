// The arguments of the kernels, on a CPU and on a GPU. binding.h fills them in from tensors and checks them.
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
  int64_t phrases;      // G: fields of weights of a sample
  View model_output;
  View ref_output;            // data null: no KL term
  const float* advantages;    // [B, phrases], or [B, P] if dense
  const float* weights;       // [B, phrases, grid] or null
  const uint8_t* mask;        // [B, P], 0 if a location does not count, or null
  const float* step_weights;  // [B] or null
  bool weighted_kl;
  bool unreduced;  // the loss of each sample is written, not the mean over the batch
  float advantage_clip, kl_coef;
  double* partial;         // the sums of the tiles, forward
  float* loss;             // [B] if unreduced, else [1]; forward
  float* metrics;          // forward
  float* saved;            // [saved_rows, B]; written forward, read backward
  const float* grad_loss;  // like the loss, or null for ones; backward
  View gradient;           // backward; forward, data null unless it is wanted, for an upstream gradient of ones
  bool written;            // backward: the gradient is that of the forward pass, to be kept if grad_loss is all ones
  int threads;             // of a CPU
};

struct PolicyArguments : Objective {
  View sample, prev_sample;
  View old_output;            // of GRPO-Guard, or of the divergence; or data null
  const float* coefficients;  // [6, columns]
  int64_t columns;            // batch or 1
  const float* old_log_prob;  // [B, P], or [B] if old_is_scalar
  bool old_is_scalar;
  bool dense;  // an advantage for each location; phrases is 1
  bool per_location;
  bool guarded;  // GRPO-Guard's ratio
  float clip_low, clip_high;
  float kl_mask_threshold;  // Flow-DPPO's, of the divergence from old_output; 0 without it
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
