// The end of a forward kernel: each block stores the sums of its tile, and the last block to finish (found by a
// counter, which it leaves at zero) adds them up in a fixed order, so that equal inputs give equal bits.
//
// A thread's sums are float32 over a few positions. From there on sums are float64, one warp for each: about ten
// additions per block, whose cost is negligible even on devices with float64 at 1/64 of the float32 rate.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/latents.cuh"
#include "flow_policy.h"

namespace star {
namespace cuda {

constexpr int kWarps = kThreads / 32;

// Adds up `width` neighbouring lanes; the first of them gets the sum. Every lane of the warp must call this.
template <int kLargest, int kSize>
__device__ __forceinline__ void merge_lanes(double (&sums)[kSize], unsigned width) {
  for (unsigned distance = width / 2; distance > 0; distance /= 2) {
    double other[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) other[i] = __shfl_down_sync(kAllLanes, sums[i], distance);
    merge<kLargest>(sums, other);
  }
}

// The same for one sum, of which the largest is kept if `largest`.
__device__ __forceinline__ void merge_chosen(double (&sum)[1], unsigned width, bool largest) {
  if (largest) {
    merge_lanes<0>(sum, width);
  } else {
    merge_lanes<-1>(sum, width);
  }
}

// Whether a thread has sum i: the first `used`, and with `more` those from kSums on.
template <typename Kind>
__device__ __forceinline__ bool has_sum(int i, int used, bool more) {
  return i < used || (i >= Kind::kSums && more);
}

// Calls store(i, sum) with the sums over the block's threads, of which scratch[i * threads + thread] is in shared
// memory.
template <typename Kind, int kTerms, typename Store>
__device__ __forceinline__ void add_threads(const Tiling& t, const float* scratch, int used, bool more, Store store) {
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  for (int i = static_cast<int>(threadIdx.x / 32); i < kTerms; i += static_cast<int>(t.threads / 32)) {
    if (!has_sum<Kind>(i, used, more)) continue;
    double sum[1] = {scratch[i * t.threads + lane]};
    const bool largest = i == Kind::kLargestSum;
    for (unsigned thread = lane + 32; thread < t.threads; thread += 32) {
      const double other = scratch[i * t.threads + thread];
      sum[0] = largest ? maximum(sum[0], other) : sum[0] + other;
    }
    merge_chosen(sum, 32, largest);
    if (lane == 0) store(i, sum[0]);
  }
}

// Whether this block is the last to get here. The other blocks' earlier stores are then visible to it.
__device__ __forceinline__ bool is_last_block(const Tiling& t, unsigned* counter) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, t.blocks - 1) == t.blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// The sums of a sample after the kSums, each in the place of its first tile.
struct MoreSums {
  double* first;
  int64_t stride;
  __device__ __forceinline__ double operator[](int64_t i) const { return first[i * stride]; }
};

// Adds up the tiles of a sample for `count` such sums.
__device__ __forceinline__ void add_tiles(const Tiling& t, const MoreSums& more, int64_t count, bool active,
                                          unsigned member) {
  for (int64_t i = 0; i < count; ++i) {
    double* tiles = more.first + i * more.stride;
    double sum[1] = {};
    for (unsigned tile = member; active && tile < t.tiles; tile += t.finish) sum[0] += tiles[tile];
    merge_lanes<-1>(sum, t.finish);
    if (active && member == 0) tiles[0] = sum[0];
  }
}

// The last block's work: a few threads for each sample add up its tiles, and the block adds up the samples. Not
// inlined: it is long, and the same for every access.
template <typename Kind>
__device__ __noinline__ void finish_forward(const Tiling& t, const typename Kind::Arguments& a, int used) {
  double total[Kind::kMetrics] = {};
  const unsigned member = threadIdx.x & (t.finish - 1), group = threadIdx.x / t.finish;
  for (int64_t base = 0; base < a.batch; base += t.threads / t.finish) {
    const int64_t b = base + group;
    double sums[Kind::kSums] = {};
    for (unsigned tile = member; b < a.batch && tile < t.tiles; tile += t.finish) {
      double other[Kind::kSums];
#pragma unroll
      for (int i = 0; i < Kind::kSums; ++i) {
        other[i] = i < used ? a.partial[i * static_cast<int64_t>(t.blocks) + b * t.tiles + tile] : 0.0;
      }
      merge<Kind::kLargestSum>(sums, other);
    }
    merge_lanes<Kind::kLargestSum>(sums, t.finish);
    const MoreSums more{a.partial + static_cast<int64_t>(Kind::kSums) * t.blocks + b * t.tiles, t.blocks};
    add_tiles(t, more, Kind::more_sums(a), b < a.batch, member);
    if (b < a.batch && member == 0) {
      double metrics[Kind::kMetrics];
      finish_sample(a, b, sums, more, metrics);
      merge<Kind::kLargestMetric>(total, metrics);
    }
  }
  __shared__ double shared[kWarps][Kind::kMetrics];
  merge_lanes<Kind::kLargestMetric>(total, 32);
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < Kind::kMetrics; ++i) shared[threadIdx.x / 32][i] = total[i];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 1; warp < t.threads / 32; ++warp) merge<Kind::kLargestMetric>(total, shared[warp]);
  finish_batch<Kind::kLargestMetric>(a, total);
}

// The end of a forward kernel; `used` and `more` as in has_sum.
template <typename Kind, int kTerms, typename Store>
__device__ __forceinline__ void reduce(const Tiling& t, const typename Kind::Arguments& a, const float (&terms)[kTerms],
                                       int used, bool more, unsigned* counter, Store store) {
  __shared__ float scratch[kTerms * kThreads];
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
    if (has_sum<Kind>(i, used, more)) scratch[i * t.threads + threadIdx.x] = terms[i];
  }
  add_threads<Kind, kTerms>(t, scratch, used, more, store);
  if (is_last_block(t, counter)) finish_forward<Kind>(t, a, used);
}

}  // namespace cuda
}  // namespace star
