// The clipped policy loss with a weight for each location: loss, metrics, and the numbers saved for the gradient.
#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/policy.cuh"
#include "cuda/reduction.cuh"

namespace star {
namespace cuda {
namespace {

// The log-ratios of a tile, which the phrases after the first add up when all threads have written theirs.
struct TileRatios {
  float log_ratio[4 * kThreads];
  unsigned cell[4 * kThreads];  // of the weights; kDropped if the mask drops the position
};
constexpr unsigned kDropped = 0xffffffffu;

// Whether phrases after the first have log-ratios of their own.
__device__ __forceinline__ bool has_phrase_ratios(const PolicyArguments& a) { return !a.per_location && a.phrases > 1; }

template <typename Access>
__device__ __forceinline__ void store_ratios(const PolicyArguments& a, const Place& place, unsigned position,
                                             const Rows<Access>& rows, const float (&log_ratio)[Access::kSlots],
                                             TileRatios& tile) {
#pragma unroll
  for (int i = 0; i < Access::kSlots; ++i) {
    tile.log_ratio[position - place.first + i] = log_ratio[i];
    tile.cell[position - place.first + i] = rows.keep[i] ? grid_position(a, position + i) : kDropped;
  }
}

// Writes the tile's sum of the weighted log-ratios of phrase g > 0 to partial[kSums + g - 1][block]; a warp for each.
__device__ __forceinline__ void store_phrases(const PolicyArguments& a, const Tiling& t, const Place& place,
                                              const TileRatios& tile) {
  __syncthreads();
  const unsigned lane = threadIdx.x % 32, phrases = static_cast<unsigned>(a.phrases);
  const int64_t cells = a.grid[0] * a.grid[1] * a.grid[2];
  for (unsigned g = 1 + threadIdx.x / 32; g < phrases; g += t.threads / 32) {
    const float* weights = a.weights + (place.b * phrases + g) * cells;
    float sum = 0.0f;
    for (unsigned i = lane; i < place.end - place.first; i += 32) {
      if (tile.cell[i] != kDropped) sum += __ldg(weights + tile.cell[i]) * tile.log_ratio[i];
    }
    double total[1] = {sum};
    merge_lanes<-1>(total, 32);
    if (lane == 0) a.partial[static_cast<int64_t>(Policy::kSums + g - 1) * t.blocks + blockIdx.x] = total[0];
  }
}

template <typename Access, Credit kCredit>
__global__ void __launch_bounds__(kThreads, 2)
    policy_forward_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Tiling t,
                          unsigned* counter) {
  constexpr bool kPlain = kCredit == Credit::kPlain;
  constexpr int kPositive = Policy::kSums, kNegative = kPositive + 1;  // the terms of dense advantages
  __shared__ std::conditional_t<kPlain, char, TileRatios> tile;
  const Place place = place_of(t, a.positions);
  const Coefficients k = coefficients_of(a.coefficients, a.columns, place.b);
  const float advantage = kPlain ? clamp_advantage(__ldg(a.advantages + place.b), a.advantage_clip) : 0.0f;
  const Access access(a.model_output);
  float terms[kPlain ? Policy::kSums : kNegative + 1] = {};
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    const Rows<Access> rows(a, place.b, active ? position : place.first, !a.old_is_scalar);
    const Sums<Access> sums = channel_sums(access, a, k, t, place.b, position, lane, active, a.ref_output);
    if (!active || lane != 0) return;
    float log_ratio[Access::kSlots];
    log_ratios(a, k, rows, sums, log_ratio);
    SignedAdvantage<float> advantages[Access::kSlots];
    if constexpr (!kPlain) {
      if (has_phrase_ratios(a)) {
        store_ratios<Access>(a, place, position, rows, log_ratio, tile);
      } else {
        signed_advantages<Access>(a, rows, place.b, position, advantages);
      }
    }
#pragma unroll
    for (int i = 0; i < Access::kSlots; ++i) {
      if (!rows.keep[i]) continue;
      terms[Policy::kCount] += 1.0f;
      if (!a.per_location) {
        terms[Policy::kLogRatio] += rows.weights[i] * log_ratio[i];
        if constexpr (!kPlain) {
          terms[kPositive] += a.dense ? advantages[i].positive : 0.0f;
          terms[kNegative] += a.dense ? advantages[i].negative : 0.0f;
        }
      } else if constexpr (kPlain) {
        add_ratio(terms, log_ratio[i], advantage, rows.weights[i], a);
      } else {
        add_ratio(terms, log_ratio[i], advantages[i], a);
      }
      const float kl_weight = a.weighted_kl ? rows.weights[i] : 1.0f;
      if (a.ref_output.data) terms[Policy::kSquaredDifference] += kl_weight * sums.kl[i];
    }
  });
  if constexpr (!kPlain) {
    if (has_phrase_ratios(a)) store_phrases(a, t, place, tile);
  }
  reduce<Policy>(t, a, terms, a.per_location ? Policy::kSums : Policy::kSampleSums, !kPlain && a.dense, counter);
}

}  // namespace

int64_t most_tiles(int64_t batch, int64_t positions) {
  const int64_t tile = tile_positions(batch, positions, true, 4 * kThreads);
  return batch * ((positions + tile - 1) / tile);
}

void policy_forward(const PolicyArguments& a, unsigned* counter, cudaStream_t stream) {
  const Latents latents = policy_latents(a);
  with_credit(a, [&](auto credit) {
    with_access<8>(latents, [&](auto type) {
      using Access = typename decltype(type)::type;
      launch(policy_forward_kernel<Access, credit>, tiling_of<Access>(latents), stream, a, counter);
    });
  });
}

}  // namespace cuda
}  // namespace star
