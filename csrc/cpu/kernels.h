// The CPU kernels. Each is compiled once for every instruction set, in a namespace of that name; exports.cpp selects
// one. Tiles have a fixed size, so that no sum depends on the number of threads.
#pragma once

#include <cstdint>

#include "arguments.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace star {
namespace {

// Calls body(i, thread) for i below n. A single thread does not use OpenMP, which would rebuild its team of threads for
// this call and again for PyTorch's next operation.
template <typename Body>
inline void parallel_for(int64_t n, int threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(i, 0);
}

}  // namespace

// A mask by query, [B, H, Sq, Sk]; strides in elements, 0 where it is expanded.
struct PairMask {
  const uint8_t* data = nullptr;  // null: none
  int64_t batch = 0, head = 0, row = 0, token = 0;
};

struct MapsArguments {
  int64_t batch, heads, n_rows, head_dim, slots, phrases, dense_length, gathered_length;
  View dense, gathered;  // [B, H, S, D], unit stride in D; rows are read from dense, tokens from gathered
  int64_t start;         // first row with a map
  float scale;
  bool text_to_image;  // tokens are queries (lse per token), else keys (lse per row)
  bool reduce_heads;
  View lse;                 // float32 [B, H, S]
  const int32_t* index;     // [B, T]
  const float* weight;      // [B, G, T]
  const uint8_t* key_mask;  // [B, Sk] or null
  PairMask pairs;           // of a row and a token
  float* maps;              // [B, G, R] or [B, G, H, R]
  float* scratch;           // maps_scratch_floats(...) floats
  int threads;
};

// Of all pairs of a row and a key.
struct StatisticsArguments {
  int64_t batch, heads, rows, keys, head_dim;
  View query, key;  // [B, H, R, D] and [B, H, Sk, D], unit stride in D
  PairMask pairs;
  float scale;
  float* lse;      // [B, H, R]; written by attention_rows, read by attention_columns
  float* entropy;  // [B, H, R]; attention_rows
  float* sums;     // [B, H, Sk]; attention_columns
  float* scratch;  // statistics_scratch_floats(...) floats
  int threads;
};

struct AllocateArguments {
  int64_t batch, steps, phrases,
      positions;        // weights have mean one over the steps and positions of a sample and phrase
  const float* maps;    // [B, Steps, G, P]
  const float* signal;  // [B, Steps, G], or [B, Steps] for all phrases, or null
  bool signal_of_phrases;
  double strength;
  double cap;      // infinity: none
  float* weights;  // [B, Steps, G, P]
  int threads;
};

constexpr int64_t kTileRows = 64;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kTilePositions = 512;

#define STAR_DECLARE_KERNELS(isa)                                          \
  namespace isa {                                                          \
  int64_t statistics_scratch_floats(const StatisticsArguments& arguments); \
  void attention_rows(const StatisticsArguments& arguments);               \
  void attention_columns(const StatisticsArguments& arguments);            \
  int64_t maps_scratch_floats(const MapsArguments& arguments);             \
  void attention_maps(const MapsArguments& arguments);                     \
  void allocate(const AllocateArguments& arguments);                       \
  void policy_forward(const PolicyArguments& arguments);                   \
  void policy_backward(const PolicyArguments& arguments);                  \
  void nft_forward(const NftArguments& arguments);                         \
  void nft_backward(const NftArguments& arguments);                        \
  void sample_transition(const SampleArguments& arguments);                \
  }

STAR_DECLARE_KERNELS(baseline)
STAR_DECLARE_KERNELS(avx2)
STAR_DECLARE_KERNELS(avx512)

#undef STAR_DECLARE_KERNELS

}  // namespace star
