// What a kernel reads for the positions of a run: numbers of [B, P], the mask, and weights on a grid of patches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/access.h"
#include "flow_policy.h"

namespace star {
namespace cuda {

// A number for each position of a run.
template <int kSlots>
__device__ __forceinline__ Run<float, kSlots> load_row(const float* row, unsigned b, int64_t positions,
                                                       unsigned position) {
  return load_run<float, kSlots>(row + b * positions + position);
}

template <int kSlots>
__device__ __forceinline__ void load_mask(const Objective& a, unsigned b, unsigned position, bool (&keep)[kSlots]) {
  Run<unsigned char, kSlots> run;
  if (a.mask) run = load_run<unsigned char, kSlots>(a.mask + b * a.positions + position);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) keep[i] = !a.mask || run.value[i] != 0;
}

// Weights of the positions of a run, read from the patch grid that divides the latent's.
template <int kSlots>
__device__ __forceinline__ void load_weights(const Objective& a, unsigned b, unsigned position,
                                             float (&weights)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) weights[i] = 1.0f;
  if (!a.weights) return;
  const int64_t cells = a.grid[0] * a.grid[1] * a.grid[2];
  if (cells == a.positions) {
    const Run<float, kSlots> run = load_row<kSlots>(a.weights, b, cells, position);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) weights[i] = run.value[i];
    return;
  }
  const float* grid = a.weights + b * cells;
  const unsigned columns = static_cast<unsigned>(a.location[2]), patch = columns / static_cast<unsigned>(a.grid[2]);
  unsigned column = position % columns, used = column % patch;
  const float* cell = grid + grid_position(a, position);
  const float* below = cell;  // where the run goes on if it ends in the next row of the latent
  if (column + kSlots > columns) below = grid + grid_position(a, position - column + columns);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    weights[i] = __ldg(cell);
    if (++column == columns) {
      used = 0;
      cell = below;
    } else if (++used == patch) {
      used = 0;
      ++cell;
    }
  }
}

}  // namespace cuda
}  // namespace star
