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

template <typename Access, Credit kCredit>
__global__ void __launch_bounds__(kThreads, 2)
    policy_forward_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Tiling t,
                          unsigned* counter) {
  constexpr bool kPlain = kCredit == Credit::kPlain;
  constexpr int kMost = kPlain ? 1 : 4 * kThreads;  // positions of a tile
  __shared__ float ratios[kMost];
  __shared__ unsigned cells[kMost];
  const TileRatios tile{ratios, cells};
  const Place place = place_of(t, a.positions);
  const Coefficients k = coefficients_of(a.coefficients, a.columns, place.b);
  const Access access(a.model_output);
  float terms[kTerms<kCredit>] = {};
  for_each_position<Access>(t, place, [&](unsigned position, unsigned lane, bool active) {
    const Rows<Access> rows(a, place.b, active ? position : place.first, !a.old_is_scalar);
    Sums<Access> sums = channel_sums<kCredit>(access, a, k, t, place.b, position, lane, active, a.ref_output);
    if (!active || lane != 0) return;
    float log_ratio[Access::kSlots];
    log_ratios<kCredit>(a, k, rows, sums, log_ratio);
    if (!kPlain && has_phrase_ratios(a)) store_ratios(a, place, position, rows, log_ratio, tile);
    add_terms<Access, kCredit>(a, place.b, position, rows, sums, log_ratio, terms);
  });
  const auto store = [&](int64_t sum, double value) { a.partial[sum * t.blocks + blockIdx.x] = value; };
  if (!kPlain && has_phrase_ratios(a)) add_phrases(a, t, place, tile, store);
  reduce<Policy>(t, a, terms, policy_sums(a), !kPlain && a.dense, counter, store);
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
