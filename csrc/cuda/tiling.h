// How a kernel cuts a batch into blocks of positions, and how a thread walks its share of them.
//
// Latents [C, P]: a thread owns kRun consecutive positions and walks over the channels, with the loads of a few of them
// under way together. Packed latents [P, C]: a few lanes of a warp own a position, each with every n-th run of
// channels, and combine their sums in a tree of fixed shape. The number of lanes depends on the number of channels
// alone, so that the sampling step and the loss add up in the same order, whatever the dtypes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/access.h"
#include "flow_policy.h"

namespace star {
namespace cuda {

constexpr int kThreads = 256;  // of a block, at most
constexpr unsigned kAllLanes = 0xffffffffu;

struct Tiling {
  unsigned tile;    // positions of a block
  unsigned tiles;   // of a sample
  unsigned blocks;  // of the grid: samples times tiles
  unsigned threads;
  unsigned lanes;   // that share a position; a power of two
  unsigned finish;  // threads that add up the tiles of one sample; a power of two
};

// What a block works on.
struct Place {
  unsigned b, first, end;  // sample; positions
};

__device__ __forceinline__ Place place_of(const Tiling& t, int64_t positions) {
  const unsigned b = blockIdx.x / t.tiles, first = (blockIdx.x - b * t.tiles) * t.tile;
  const unsigned rest = static_cast<unsigned>(positions) - first;
  return {b, first, first + (rest < t.tile ? rest : t.tile)};
}

// Calls body(position, lane, active) for this thread's share of a tile, as often in every thread of the block, so that
// body may combine the lanes of a warp; a thread that is not active has no position.
template <typename Access, typename Body>
__device__ __forceinline__ void for_each_position(const Tiling& t, const Place& place, Body body) {
  if constexpr (Access::kVector && !Access::kPacked) {
    const unsigned position = place.first + threadIdx.x * Access::kRun;
    body(position, 0u, position < place.end);
  } else {
    const unsigned start = threadIdx.x / t.lanes, step = t.threads / t.lanes;
    for (unsigned base = place.first; base < place.end; base += step) {
      body(base + start, threadIdx.x & (t.lanes - 1), base + start < place.end);
    }
  }
}

// Calls use(c, load(c)) for the runs of channels of a lane. Along positions, the loads of a few channels are issued
// before the first of them is used: 192 bytes a thread, of three float32 tensors.
template <typename Access, typename Load, typename Use>
__device__ __forceinline__ void for_each_run(const Tiling& t, int64_t channels, unsigned lane, Load load, Use use) {
  const int count = static_cast<int>(channels);
  if constexpr (Access::kVector && !Access::kPacked) {
    constexpr int kInFlight = 16 / Access::kRun;
    int c = 0;
    for (; c + kInFlight <= count; c += kInFlight) {
      decltype(load(0)) runs[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) runs[i] = load(c + i);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) use(c + i, runs[i]);
    }
#pragma unroll 1
    for (; c < count; ++c) use(c, load(c));
  } else {
    const int step = kPackedRun * static_cast<int>(t.lanes);
#pragma unroll 1
    for (int first = kPackedRun * static_cast<int>(lane); first < count; first += step) {
#pragma unroll 1
      for (int c = first; c < first + kPackedRun && c < count; c += Access::kRun) use(c, load(c));
    }
  }
}

__device__ __forceinline__ int64_t offset_of(const View& view, unsigned b, unsigned position, int c) {
  return b * view.batch + position * view.position + c * view.channel;
}

template <typename Access>
__device__ __forceinline__ OutputRun<Access> load_output(const Access& access, const View& view, unsigned b,
                                                         unsigned position, int c) {
  return access.template load<typename Access::Output>(view, offset_of(view, b, position, c));
}

template <typename Access>
__device__ __forceinline__ LatentRun<Access> load_latent(const Access& access, const View& view, unsigned b,
                                                         unsigned position, int c) {
  return access.template load<typename Access::Latent>(view, offset_of(view, b, position, c));
}

template <typename Access>
__device__ __forceinline__ void add_squared_differences(const Access& access, const OutputRun<Access>& x,
                                                        const OutputRun<Access>& y, float (&sums)[Access::kSlots]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) {
    const float difference = access.value(x, i) - access.value(y, i);
    sums[Access::kPacked ? 0 : i] += difference * difference;
  }
}

// The sum over the lanes that share a position, in each of them. Every lane of the warp takes part.
template <typename Access>
__device__ __forceinline__ void add_lanes(const Tiling& t, float (&sums)[Access::kSlots]) {
  if constexpr (!Access::kVector || Access::kPacked) {
    for (unsigned width = t.lanes / 2; width > 0; width /= 2) {
      sums[0] = add(sums[0], __shfl_xor_sync(kAllLanes, sums[0], width));
    }
  }
}

}  // namespace cuda
}  // namespace star
