// DiffusionNFT's loss with a weight for each location, and its gradient; see nft_sums.h for the formulas.
#include <cstdint>

#include "cpu/tiles.h"
#include "nft_sums.h"

namespace star {
namespace STAR_ISA {
namespace {

struct Buffers {
  float v[kRun], old[kRun], target[kRun], ref_output[kRun];
};

// Sums over channels at each of a tile's positions.
struct PositionSums {
  float positive[kTile], negative[kTile], positive_absolute[kTile], negative_absolute[kTile], deviation[kTile];
};

inline float absolute(float x) { return x < 0.0f ? -x : x; }

// Adds a run's errors to the sums at position p of the tile, or from there on, one element a position.
inline void add_errors(const float* v, const float* old, const float* target, float beta, int64_t p, int64_t n,
                       bool packed, PositionSums& sums) {
  if (!packed) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const float change = v[i] - old[i];
      const NftErrors e = nft_errors(old[i] - target[i], change, beta);
      sums.positive[i] += e.positive * e.positive;
      sums.negative[i] += e.negative * e.negative;
      sums.positive_absolute[i] += absolute(e.positive);
      sums.negative_absolute[i] += absolute(e.negative);
      sums.deviation[i] += change * change;
    }
    return;
  }
  const auto errors = [=](int64_t i) { return nft_errors(old[i] - target[i], v[i] - old[i], beta); };
  add_run(n, true, sums.positive + p, [=](int64_t i) { return errors(i).positive * errors(i).positive; });
  add_run(n, true, sums.negative + p, [=](int64_t i) { return errors(i).negative * errors(i).negative; });
  add_run(n, true, sums.positive_absolute + p, [=](int64_t i) { return absolute(errors(i).positive); });
  add_run(n, true, sums.negative_absolute + p, [=](int64_t i) { return absolute(errors(i).negative); });
  add_run(n, true, sums.deviation + p, [=](int64_t i) { return (v[i] - old[i]) * (v[i] - old[i]); });
}

void forward_tile(const NftArguments& a, const Tile& tile, double* sums) {
  const uint8_t* mask = tile_mask(a, tile);
  Buffers buffers;
  PositionSums positions;
  float* every[] = {positions.positive, positions.negative, positions.positive_absolute, positions.negative_absolute,
                    positions.deviation};
  for (float* values : every) fill(values, tile.n, 0.0f);
  for_each_run(tile, a.channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* v = load_tile_run(a.model_output, tile, p, c, n, buffers.v);
    const float* old = load_tile_run(a.old_output, tile, p, c, n, buffers.old);
    const float* target = load_tile_run(a.target, tile, p, c, n, buffers.target);
    add_errors(v, old, target, a.beta, p, n, tile.packed, positions);
  });
  for (float* values : every) drop(mask, values, tile.n);
  float buffer[kTile];
  const float* weights = tile_weights(a, tile, 0, buffer);
  sums[Nft::kPositive] = weighted_sum(weights, positions.positive, tile.n);
  sums[Nft::kNegative] = weighted_sum(weights, positions.negative, tile.n);
  sums[Nft::kPositiveAbsolute] = plain_sum(positions.positive_absolute, tile.n);
  sums[Nft::kNegativeAbsolute] = plain_sum(positions.negative_absolute, tile.n);
  sums[Nft::kDeviation] = plain_sum(positions.deviation, tile.n);
  sums[Nft::kCount] = static_cast<double>(count_kept(mask, tile.n));
  if (a.ref_output.data) sums[Nft::kSquaredDifference] = kl_sum(a, tile, weights);
}

void backward_tile(const NftArguments& a, const Tile& tile) {
  const NftFactors factors = gradient_factors(a, tile.b);
  Buffers buffers;
  float buffer[kTile], gradient[kRun];
  const float* weights = tile_weights(a, tile, 0, buffer);
  for_each_run(tile, a.channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* v = load_tile_run(a.model_output, tile, p, c, n, buffers.v);
    const float* old = load_tile_run(a.old_output, tile, p, c, n, buffers.old);
    const float* target = load_tile_run(a.target, tile, p, c, n, buffers.target);
    for (int64_t i = 0; i < n; ++i) {
      gradient[i] = factors.old_error * (old[i] - target[i]) + factors.change * (v[i] - old[i]);
    }
    if (tile.packed) {
      for (int64_t i = 0; i < n; ++i) gradient[i] *= weights[p];
    } else {
      for (int64_t i = 0; i < n; ++i) gradient[i] *= weights[i];
    }
    if (a.ref_output.data) {
      const float* ref_output = load_tile_run(a.ref_output, tile, p, c, n, buffers.ref_output);
      add_kl_gradient(a, weights, factors.kl, v, ref_output, p, n, tile.packed, gradient);
    }
    if (a.mask) drop_run(tile_mask(a, tile), gradient, p, n, tile.packed);
    store_tile_run(a.gradient, tile, p, c, n, gradient);
  });
}

}  // namespace

void nft_forward(const NftArguments& a) {
  const auto tile_sums = [&](const Tile& tile, double* sums) { forward_tile(a, tile, sums); };
  if (a.gradient.data) {
    forward_with_gradient<Nft>(a, tile_sums, [&](const Tile& tile) { backward_tile(a, tile); });
  } else {
    forward<Nft>(a, tile_sums);
  }
}

void nft_backward(const NftArguments& a) {
  for_each_tile(a, [&](int64_t, const Tile& tile) { backward_tile(a, tile); });
}

}  // namespace STAR_ISA
}  // namespace star
