// The arguments of the attention kernel for Hopper, and its launchers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "arguments.h"

namespace star {
namespace cuda {

constexpr int kStatusWords = 4;  // of a warp: barrier + 1, parity, tile, step; zeros if no wait of it has failed

// Tensors of 16 bits are [B, H, S, D]; D is contiguous and the other strides are multiples of 8 elements.
struct AttentionArguments {
  int batch, heads, queries, keys, head_dim;
  int row_start, n_rows;  // rows with maps
  int slots, phrases;
  int row_tiles, key_tiles, tiles;  // of a head; of a head; in all. The launcher fills them in
  float scale_log2;                 // positive
  View query, key, value, out;
  const int* index;         // [B, T]
  const float* weight;      // [B, G, T]
  const uint8_t* key_mask;  // [B, Sk], or null
  float* lse;               // [B, H, Sq], natural
  float* maps;              // [B, G, H, R], or null
  unsigned* status;         // [blocks, warps, kStatusWords] in memory that the host can read, or null
};

// A shape of the kernel: groups of consumers, keys of a tile, stages of keys and values, and whether the scores of the
// next keys start before the softmax of the last ones. Zeros are the default of the head dimension.
struct AttentionVariant {
  int consumers, keys, stages, overlap;

  bool operator==(const AttentionVariant& other) const {
    return consumers == other.consumers && keys == other.keys && stages == other.stages && overlap == other.overlap;
  }
};

// One launch. Returns null, or what prevents it.
const char* attention_forward(const AttentionArguments& arguments, const AttentionVariant& variant,
                              cudaStream_t stream);

// The same for variants that are to be compared, of bfloat16 alone.
const char* attention_variants(const AttentionArguments& arguments, const AttentionVariant& variant,
                               cudaStream_t stream);

}  // namespace cuda
}  // namespace star
