// The arguments of the attention kernel for Hopper.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace star {
namespace cuda {

constexpr int kStatusWords = 4;  // of a warp: barrier + 1, parity, tile, step; zeros if no wait of it has failed

struct AttentionArguments {
  int batch, heads, queries, keys;
  int row_start, n_rows;  // rows with maps
  int slots, phrases;
  int row_tiles, key_tiles, tiles;  // of a head; of a head; in all. The launcher fills them in
  float scale_log2;                 // positive
  const void* key;                  // [B, H, Sk, D], as in the tensor map
  int64_t key_strides[3];           // elements
  const int* index;                 // [B, T], or null: no maps
  const float* weight;              // [B, G, T]
  const uint8_t* key_mask;          // [B, Sk], or null
  void* out;                        // [B, H, Sq, D], rows start at multiples of 16 bytes
  int64_t out_strides[3];           // elements
  float* lse;                       // [B, H, Sq], natural
  float* maps;                      // [B, G, H, R], or null
  unsigned* status;                 // [blocks, warps, kStatusWords] in memory that the host can read, or null
};

// A variant of the kernel; zeros are the defaults of the head dimension.
struct AttentionVariant {
  int consumers, keys, stages, overlap;
};

}  // namespace cuda
}  // namespace star
