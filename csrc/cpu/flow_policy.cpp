// The clipped policy loss with a weight for each location, its gradient, and the sampling step before it.
//
// Each pass reads the latents once, whatever the number of phrases. The gradient for an upstream gradient of one can be
// written in the forward pass, one tile after the other; otherwise it is computed in the backward pass from the inputs
// and a few saved numbers, and rounded once.
#include <cstdint>

#include "cpu/tiles.h"
#include "policy_sums.h"

namespace star {
namespace STAR_ISA {
namespace {

struct Buffers {
  float x[kRun], v[kRun], prev[kRun], other[kRun];
};

inline void add_squares(const Coefficients& k, const float* x, const float* v, const float* prev, int64_t n,
                        bool packed, float* sums) {
  add_run(n, packed, sums, [=](int64_t i) {
    const float r = residual(k, x[i], v[i], prev[i]);
    return r * r;
  });
}

// Log-probabilities of a tile's positions: the mean over channels.
inline void tile_log_prob(const PolicyArguments& a, const Coefficients& k, const Tile& tile, Buffers& buffers,
                          float* out) {
  fill(out, tile.n, 0.0f);
  for_each_run(tile, a.channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, buffers.x);
    const float* v = load_tile_run(a.model_output, tile, p, c, n, buffers.v);
    const float* prev = load_tile_run(a.prev_sample, tile, p, c, n, buffers.prev);
    add_squares(k, x, v, prev, n, tile.packed, out + p);
  });
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  for (int64_t i = 0; i < tile.n; ++i) out[i] = log_prob(k, out[i], inverse_channels);
}

// The divergences of a tile's positions, if there is a threshold; zero where the mask drops a position.
struct Divergences {
  float values[kTile];
  bool given = false;

  Divergences(const PolicyArguments& a, const Coefficients& k, const Tile& tile) : given(masks_divergence(a)) {
    if (!given) return;
    squared_differences(a.model_output, a.old_output, a.channels, tile, values);
    const float inverse_channels = 1.0f / static_cast<float>(a.channels);
    for (int64_t i = 0; i < tile.n; ++i) values[i] = kl_divergence(k, values[i], inverse_channels);
    drop(tile_mask(a, tile), values, tile.n);
  }
};

// Log-ratios of a tile's positions, normalised if locations have ratios; zero where the mask drops a position.
void tile_log_ratio(const PolicyArguments& a, const Coefficients& k, const Tile& tile, Buffers& buffers, float* out) {
  tile_log_prob(a, k, tile, buffers, out);
  if (!a.old_is_scalar) {
    const float* old = a.old_log_prob + tile.b * a.positions + tile.first;
    for (int64_t i = 0; i < tile.n; ++i) out[i] -= old[i];
  }
  if (a.guarded) {
    float squares[kTile];
    squared_differences(a.model_output, a.old_output, a.channels, tile, squares);
    const float inverse_channels = 1.0f / static_cast<float>(a.channels);
    const float factor = a.per_location ? guard_factor(k) : 1.0f;
    for (int64_t i = 0; i < tile.n; ++i) out[i] = (out[i] + guard_shift(k, squares[i], inverse_channels)) * factor;
  }
  drop(tile_mask(a, tile), out, tile.n);
}

// The advantage of each of a tile's positions; of dense ones zero where the mask drops a position.
void tile_advantages(const PolicyArguments& a, const Tile& tile, float* out) {
  if (!a.dense) {
    fill(out, tile.n, clamp_advantage(a.advantages[tile.b], a.advantage_clip));
    return;
  }
  const float* advantages = a.advantages + tile.b * a.positions + tile.first;
  for (int64_t i = 0; i < tile.n; ++i) out[i] = clamp_advantage(advantages[i], a.advantage_clip);
  drop(tile_mask(a, tile), out, tile.n);
}

// The weighted advantages at each of a tile's positions, of several phrases or dense, by sign.
struct SignedAdvantages {
  float positive[kTile], negative[kTile];

  SignedAdvantages(const PolicyArguments& a, const Tile& tile) {
    fill(positive, tile.n, 0.0f);
    fill(negative, tile.n, 0.0f);
    float buffer[kTile];
    if (a.dense) {
      add_dense(a, tile, buffer);
      return;
    }
    for (int64_t g = 0; g < a.phrases; ++g) {
      const float* weights = tile_weights(a, tile, g, buffer);
      const auto [up, down] = signed_advantage(clamp_advantage(a.advantages[tile.b * a.phrases + g], a.advantage_clip));
      for (int64_t i = 0; i < tile.n; ++i) positive[i] += weights[i] * up;
      for (int64_t i = 0; i < tile.n; ++i) negative[i] += weights[i] * down;
    }
  }
  SignedAdvantage<float> operator[](int64_t i) const { return {positive[i], negative[i]}; }

 private:
  void add_dense(const PolicyArguments& a, const Tile& tile, float* buffer) {
    float advantages[kTile];
    tile_advantages(a, tile, advantages);
    const float* weights = tile_weights(a, tile, 0, buffer);
    for (int64_t i = 0; i < tile.n; ++i) {
      const auto [up, down] = signed_advantage(advantages[i]);
      positive[i] = weights[i] * up;
      negative[i] = weights[i] * down;
    }
  }
};

// The weighted surrogates of a tile's locations with a threshold of the divergence, which are their slopes too.
void masked_surrogates(const PolicyArguments& a, const Tile& tile, const float* ratio, const Divergences& divergences,
                       float* out) {
  const SignedAdvantages advantages(a, tile);
  for (int64_t i = 0; i < tile.n; ++i) {
    out[i] = bounded_surrogate(ratio[i], advantages[i], bounds_of(a, divergences.values[i])).slope;
  }
}

// Adds the divergences to the sums over ratios of locations; those of dropped positions are below every threshold.
void add_divergences(const PolicyArguments& a, const Tile& tile, const Divergences& divergences, double* sums) {
  sums[a.per_location ? Policy::kLocationDivergence : Policy::kSampleDivergence] =
      plain_sum(divergences.values, tile.n);
  if (!a.per_location) return;
  for (int64_t i = 0; i < tile.n; ++i) sums[Policy::kClipped] += bounds_of(a, divergences.values[i]).diverged;
}

// Ratios of a tile's locations, in a loop of its own: the compiler then vectorises the arithmetic after it.
void exponentiate(const float* log_ratio, int64_t n, float* ratio) {
  for (int64_t i = 0; i < n; ++i) ratio[i] = expf(log_ratio[i]);
}

// Sums over the ratios of a tile's locations.
void add_locations(const PolicyArguments& a, const Tile& tile, const float* log_ratio, const float* ratio,
                   const float* weights, const Divergences& divergences, double (&sums)[Policy::kSums]) {
  float loss[kTile], advantages[kTile];
  const bool with_weights = divergences.given || a.phrases > 1;
  if (divergences.given) {
    masked_surrogates(a, tile, ratio, divergences, loss);
    add_divergences(a, tile, divergences, sums);
  } else if (with_weights) {
    const SignedAdvantages signed_advantages(a, tile);
    for (int64_t i = 0; i < tile.n; ++i) {
      loss[i] = signed_surrogate(ratio[i], signed_advantages[i], a.clip_low, a.clip_high).loss;
    }
  } else {
    tile_advantages(a, tile, advantages);
    for (int64_t i = 0; i < tile.n; ++i) {
      loss[i] = finite_if_zero(weights[i], clipped_surrogate_of(ratio[i], advantages[i], a.clip_low, a.clip_high).loss);
    }
  }
  const uint8_t* mask = tile_mask(a, tile);
  for (int64_t i = 0; i < tile.n; ++i) {
    if (mask && !mask[i]) continue;
    sums[Policy::kLoss] += with_weights ? loss[i] : static_cast<double>(weights[i]) * loss[i];
    add_ratio_metrics(sums, log_ratio[i], ratio[i], a);
  }
}

// The sums after the kSums that ratios of samples need.
void add_more(const PolicyArguments& a, const Tile& tile, const float* log_ratio, const float* weights, double* more) {
  float values[kTile], advantages[kTile];
  for (int64_t g = 1; g < a.phrases; ++g) {
    more[g - 1] = weighted_sum(tile_weights(a, tile, g, values), log_ratio, tile.n);
  }
  if (!a.dense) return;
  tile_advantages(a, tile, advantages);
  for (int64_t i = 0; i < tile.n; ++i) values[i] = signed_advantage(advantages[i]).positive;
  more[0] = weighted_sum(weights, values, tile.n);
  for (int64_t i = 0; i < tile.n; ++i) values[i] = signed_advantage(advantages[i]).negative;
  more[1] = weighted_sum(weights, values, tile.n);
}

void forward_tile(const PolicyArguments& a, const Tile& tile, double* sums) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float log_ratio[kTile], buffer[kTile];
  tile_log_ratio(a, k, tile, buffers, log_ratio);
  const float* weights = tile_weights(a, tile, 0, buffer);
  sums[Policy::kCount] = static_cast<double>(count_kept(tile_mask(a, tile), tile.n));
  const Divergences divergences(a, k, tile);
  if (a.per_location) {
    float ratio[kTile];
    exponentiate(log_ratio, tile.n, ratio);
    add_locations(a, tile, log_ratio, ratio, weights, divergences, *reinterpret_cast<double (*)[Policy::kSums]>(sums));
  } else {
    if (divergences.given) add_divergences(a, tile, divergences, sums);
    sums[Policy::kLogRatio] = weighted_sum(weights, log_ratio, tile.n);
    add_more(a, tile, log_ratio, weights, sums + Policy::kSums);
  }
  if (a.ref_output.data) sums[Policy::kSquaredDifference] = kl_sum(a, tile, weights);
}

// The factor of the residual at each of a tile's positions, if samples have ratios.
void sample_factors(const PolicyArguments& a, const Coefficients& k, const Tile& tile, const float* weights,
                    float* out) {
  const float first = gradient_factor(a, k, tile.b);
  if (a.dense) {
    float advantages[kTile];
    tile_advantages(a, tile, advantages);
    const float negative = gradient_factor(a, k, tile.b, 1);
    for (int64_t i = 0; i < tile.n; ++i) {
      const float slope = advantages[i] > 0.0f ? advantages[i] * first : weighted(-advantages[i], negative);
      out[i] = weighted(weights[i], slope);
    }
    return;
  }
  for (int64_t i = 0; i < tile.n; ++i) out[i] = weights[i] * first;
  float buffer[kTile];
  for (int64_t g = 1; g < a.phrases; ++g) {
    const float* others = tile_weights(a, tile, g, buffer);
    const float factor = gradient_factor(a, k, tile.b, g);
    for (int64_t i = 0; i < tile.n; ++i) out[i] += others[i] * factor;
  }
}

// The same if locations have ratios.
void location_factors(const PolicyArguments& a, const Coefficients& k, const Tile& tile, const float* weights,
                      const float* ratio, const Divergences& divergences, float* out) {
  const float common = gradient_factor(a, k, tile.b);
  float advantages[kTile];
  if (divergences.given) {
    masked_surrogates(a, tile, ratio, divergences, out);
    for (int64_t i = 0; i < tile.n; ++i) out[i] *= common;
    return;
  }
  if (a.phrases > 1) {
    const SignedAdvantages signed_advantages(a, tile);
    for (int64_t i = 0; i < tile.n; ++i) {
      out[i] = common * signed_surrogate(ratio[i], signed_advantages[i], a.clip_low, a.clip_high).slope;
    }
    return;
  }
  tile_advantages(a, tile, advantages);
  for (int64_t i = 0; i < tile.n; ++i) {
    const Surrogate s = clipped_surrogate_of(ratio[i], advantages[i], a.clip_low, a.clip_high);
    out[i] = weighted(weights[i] * common, s.slope);
  }
}

// Writes the gradient of a tile from the factors of its residuals.
void write_gradient(const PolicyArguments& a, const Coefficients& k, const Tile& tile, const float* weights,
                    const float* factor, Buffers& buffers) {
  const View& residual_output = a.guarded ? a.old_output : a.model_output;
  float gradient[kRun];
  const float kl = a.ref_output.data ? kl_gradient_factor(a, k, tile.b, saved_of(a, tile.b)) : 0.0f;
  for_each_run(tile, a.channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, buffers.x);
    const float* v = load_tile_run(residual_output, tile, p, c, n, buffers.v);
    const float* prev = load_tile_run(a.prev_sample, tile, p, c, n, buffers.prev);
    if (tile.packed) {
      for (int64_t i = 0; i < n; ++i) gradient[i] = factor[p] * residual(k, x[i], v[i], prev[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) gradient[i] = factor[i] * residual(k, x[i], v[i], prev[i]);
    }
    if (a.ref_output.data) {
      const float* ref_output = load_tile_run(a.ref_output, tile, p, c, n, buffers.other);
      if (a.guarded) v = load_tile_run(a.model_output, tile, p, c, n, buffers.v);
      add_kl_gradient(a, weights, kl, v, ref_output, p, n, tile.packed, gradient);
    }
    if (a.mask) drop_run(tile_mask(a, tile), gradient, p, n, tile.packed);
    store_tile_run(a.gradient, tile, p, c, n, gradient);
  });
}

void backward_tile(const PolicyArguments& a, const Tile& tile) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float buffer[kTile], factor[kTile];
  const float* weights = tile_weights(a, tile, 0, buffer);
  if (a.per_location) {
    float ratio[kTile];
    tile_log_ratio(a, k, tile, buffers, factor);
    exponentiate(factor, tile.n, ratio);
    location_factors(a, k, tile, weights, ratio, Divergences(a, k, tile), factor);
  } else {
    sample_factors(a, k, tile, weights, factor);
  }
  write_gradient(a, k, tile, weights, factor, buffers);
}

// Both passes of a tile whose locations have ratios; what is saved of its sample is complete.
void location_tile(const PolicyArguments& a, const Tile& tile, double* sums) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float log_ratio[kTile], ratio[kTile], buffer[kTile], factor[kTile];
  tile_log_ratio(a, k, tile, buffers, log_ratio);
  exponentiate(log_ratio, tile.n, ratio);
  const float* weights = tile_weights(a, tile, 0, buffer);
  sums[Policy::kCount] = static_cast<double>(count_kept(tile_mask(a, tile), tile.n));
  const Divergences divergences(a, k, tile);
  add_locations(a, tile, log_ratio, ratio, weights, divergences, *reinterpret_cast<double (*)[Policy::kSums]>(sums));
  if (a.ref_output.data) sums[Policy::kSquaredDifference] = kl_sum(a, tile, weights);
  location_factors(a, k, tile, weights, ratio, divergences, factor);
  write_gradient(a, k, tile, weights, factor, buffers);
}

// What is saved of every sample, if locations have ratios: it does not depend on the latents.
void save_all_locations(const PolicyArguments& a) {
  for (int64_t b = 0; b < a.batch; ++b) {
    const uint8_t* mask = a.mask ? a.mask + b * a.positions : nullptr;
    const double kept = static_cast<double>(count_kept(mask, a.positions));
    save_locations(a, coefficients_of(a.coefficients, a.columns, b), b, inverse_count(a, kept), saved_of(a, b));
  }
}

// prev = mean + std * noise, stored in its dtype; the log-probability is that of the stored value.
void sample_tile(const SampleArguments& a, const Tile& tile) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float drawn[kRun];
  float* out = a.log_prob + tile.b * a.positions + tile.first;
  fill(out, tile.n, 0.0f);
  for_each_run(tile, a.channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, buffers.x);
    const float* v = load_tile_run(a.model_output, tile, p, c, n, buffers.v);
    const float* noise = load_tile_run(a.noise, tile, p, c, n, buffers.other);
    for (int64_t j = 0; j < n; ++j) drawn[j] = add(transition_mean(k, x[j], v[j]), multiply(k.std, noise[j]));
    store_tile_run(a.prev_sample, tile, p, c, n, drawn);
    const float* stored = load_tile_run(a.prev_sample, tile, p, c, n, buffers.prev);
    add_squares(k, x, v, stored, n, tile.packed, out + p);
  });
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  for (int64_t j = 0; j < tile.n; ++j) out[j] = log_prob(k, out[j], inverse_channels);
}

}  // namespace

void policy_forward(const PolicyArguments& a) {
  const auto tile_sums = [&](const Tile& tile, double* sums) { forward_tile(a, tile, sums); };
  if (!a.gradient.data) {
    forward<Policy>(a, tile_sums);
  } else if (a.per_location) {
    save_all_locations(a);
    forward<Policy>(a, [&](const Tile& tile, double* sums) { location_tile(a, tile, sums); });
  } else {
    forward_with_gradient<Policy>(a, tile_sums, [&](const Tile& tile) { backward_tile(a, tile); });
  }
}

void policy_backward(const PolicyArguments& a) {
  for_each_tile(a, [&](int64_t, const Tile& tile) { backward_tile(a, tile); });
}

void sample_transition(const SampleArguments& a) {
  for_each_tile(a, [&](int64_t, const Tile& tile) { sample_tile(a, tile); });
}

}  // namespace STAR_ISA
}  // namespace star
