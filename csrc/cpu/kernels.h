// The CPU kernels' arguments. Each kernel is compiled once for every instruction set, in a namespace of that name;
// exports.cpp checks the arguments, chooses the instruction set and calls. No other header knows about both sides.
#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#define STAR_THREAD() omp_get_thread_num()
#else
#define STAR_THREAD() 0
#endif

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

struct MapsArguments {
  int64_t batch, heads, rows, head_dim, slots, groups, dense_length, gathered_length;
  View dense, gathered;  // [B, H, S, D], unit stride in D; rows are read from dense, tokens from gathered
  int64_t start;         // first row
  float scale;
  bool text_to_image;  // tokens are queries (lse per token), else keys (lse per row)
  bool reduce_heads;
  View lse;                  // float32 [B, H, S]
  const int32_t* index;      // [B, T]
  const float* weight;       // [B, G, T]
  const uint8_t* key_mask;   // [B, Sk] or null
  float* maps;               // [B, G, R] or [B, G, H, R]
  float* scratch;            // maps_scratch_floats(...) floats
  int threads;
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
  float* loss;        // [1], forward
  float* metrics;     // [6], forward
  float* slope;       // [B] d loss / d mean log-ratio: written forward, read backward (unused per location)
  double* partial;    // [B, tiles, kPartials], forward
  float grad_loss;    // backward
  View gradient;      // backward
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

constexpr int64_t kTilePositions = 512;  // fixed, so that sums do not depend on the number of threads
constexpr int64_t kTileRows = 32;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kPartials = 7;

#define STAR_DECLARE_KERNELS(isa)                                \
  namespace isa {                                                \
  int64_t maps_scratch_floats(const MapsArguments& arguments);   \
  void attention_maps(const MapsArguments& arguments);           \
  void policy_forward(const PolicyArguments& arguments);         \
  void policy_backward(const PolicyArguments& arguments);        \
  void sample_transition(const SampleArguments& arguments);      \
  }

STAR_DECLARE_KERNELS(baseline)
STAR_DECLARE_KERNELS(avx2)
STAR_DECLARE_KERNELS(avx512)

#undef STAR_DECLARE_KERNELS

}  // namespace star
