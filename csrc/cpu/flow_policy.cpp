// The clipped policy loss with a weight for each location, its gradient, and the sampling step that feeds it.
//
// Work is cut into tiles of kTilePositions positions with all their channels. A tile's sums go to a slot of their own
// and are added up in order, so that the result does not depend on the number of threads. The gradient is computed in
// the backward pass from the inputs: one read of the latents, nothing of their size kept in between, one rounding.
#include "flow_policy.h"

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "policy_sums.h"

namespace star {
namespace STAR_ISA {
namespace {

constexpr int64_t kTile = kTilePositions;
constexpr int64_t kRun = 1024;  // channels read at a time where channels are innermost
constexpr int64_t kLanes = 8;

int64_t tiles_of(int64_t positions) { return (positions + kTile - 1) / kTile; }

struct Tile {
  int64_t b, first, n;

  Tile(int64_t i, int64_t positions) : b(i / tiles_of(positions)), first(i % tiles_of(positions) * kTile) {
    n = first + kTile <= positions ? kTile : positions - first;
  }
};

// Walks a tile in runs of innermost elements: along positions for [C, P] latents, along channels for packed [P, C].
// `visit(p, c, n)` gets a run's first position (within the tile), first channel and length.
template <typename Visit>
inline void for_each_run(const Tile& tile, int64_t channels, bool packed, Visit visit) {
  if (!packed) {
    for (int64_t c = 0; c < channels; ++c) visit(int64_t{0}, c, tile.n);
  } else {
    for (int64_t p = 0; p < tile.n; ++p) {
      for (int64_t c = 0; c < channels; c += kRun) visit(p, c, channels - c < kRun ? channels - c : kRun);
    }
  }
}

bool is_packed(const View& view, int64_t channels) { return channels > 1 && view.channel < view.position; }

int64_t run_stride(const View& view, bool packed) { return packed ? view.channel : view.position; }

const float* load_tile_run(const View& view, const Tile& tile, int64_t p, int64_t c, int64_t n, bool packed,
                           float* scratch) {
  const int64_t offset = tile.b * view.batch + c * view.channel + (tile.first + p) * view.position;
  return load_run(view, offset, run_stride(view, packed), n, scratch);
}

void store_tile_run(const View& view, const Tile& tile, int64_t p, int64_t c, int64_t n, bool packed,
                    const float* values) {
  const int64_t offset = tile.b * view.batch + c * view.channel + (tile.first + p) * view.position;
  store_run(view, offset, run_stride(view, packed), n, values);
}

// Adds the squared residuals of a run to `sums`, one element a position, or all to one where channels are innermost.
inline void add_squares(const Coefficients& k, const float* x, const float* v, const float* prev, int64_t n,
                        bool packed, float* sums) {
  if (!packed) {
    for (int64_t i = 0; i < n; ++i) {
      const float r = residual(k, x[i], v[i], prev[i]);
      sums[i] += r * r;
    }
    return;
  }
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const float r = residual(k, x[i + j], v[i + j], prev[i + j]);
      lane[j] += r * r;
    }
  }
  for (; i < n; ++i) {
    const float r = residual(k, x[i], v[i], prev[i]);
    lane[i % kLanes] += r * r;
  }
  for (int64_t j = 0; j < kLanes; ++j) sums[0] += lane[j];
}

struct Buffers {
  float x[kRun], v[kRun], prev[kRun], reference[kRun];
};

// Log-probabilities of a tile's positions: the mean over channels.
inline void tile_log_prob(const PolicyArguments& a, const Coefficients& k, const Tile& tile, bool packed,
                          Buffers& buffers, float* out) {
  for (int64_t i = 0; i < tile.n; ++i) out[i] = 0.0f;
  for_each_run(tile, a.channels, packed, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, packed, buffers.x);
    const float* v = load_tile_run(a.model_output, tile, p, c, n, packed, buffers.v);
    const float* prev = load_tile_run(a.prev_sample, tile, p, c, n, packed, buffers.prev);
    add_squares(k, x, v, prev, n, packed, out + p);
  });
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  for (int64_t i = 0; i < tile.n; ++i) out[i] = log_prob(k, out[i], inverse_channels);
}

// Weights of a tile's positions, read from the patch grid that divides the latent's.
void tile_weights(const PolicyArguments& a, const Tile& tile, float* out) {
  if (!a.weights) {
    for (int64_t i = 0; i < tile.n; ++i) out[i] = 1.0f;
    return;
  }
  const int64_t grid = a.grid[0] * a.grid[1] * a.grid[2];
  const float* weights = a.weights + tile.b * grid;
  if (grid == a.positions) {
    for (int64_t i = 0; i < tile.n; ++i) out[i] = weights[tile.first + i];
    return;
  }
  const int64_t columns = a.location[2], patch = columns / a.grid[2];
  for (int64_t i = 0; i < tile.n;) {  // one row of the latent at a time
    const int64_t position = tile.first + i, column = position % columns;
    const int64_t end = i + columns - column < tile.n ? i + columns - column : tile.n;
    const float* row = weights + grid_position(a, position - column);
    int64_t cell = column / patch, used = column % patch;
    for (; i < end; ++i) {
      out[i] = row[cell];
      if (++used == patch) {
        used = 0;
        ++cell;
      }
    }
  }
}

double sum_squared_difference(const PolicyArguments& a, const Tile& tile, bool packed, Buffers& buffers) {
  double sum = 0.0;
  for_each_run(tile, a.channels, packed, [&](int64_t p, int64_t c, int64_t n) {
    const float* v = load_tile_run(a.model_output, tile, p, c, n, packed, buffers.v);
    const float* reference = load_tile_run(a.reference, tile, p, c, n, packed, buffers.reference);
    double lane[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const double difference = v[i] - reference[i];
      lane[i % kLanes] += difference * difference;
    }
    for (int64_t j = 0; j < kLanes; ++j) sum += lane[j];
  });
  return sum;
}

void forward_tile(const PolicyArguments& a, const Tile& tile, bool packed, Sums& sums) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float log_ratio[kTile], weights[kTile];
  tile_log_prob(a, k, tile, packed, buffers, log_ratio);
  tile_weights(a, tile, weights);
  if (!a.old_is_scalar) {
    const float* old = a.old_log_prob + tile.b * a.positions + tile.first;
    for (int64_t i = 0; i < tile.n; ++i) log_ratio[i] -= old[i];
  }
  if (a.per_location) {
    const float advantage = clamp_advantage(a.advantages[tile.b], a.advantage_clip);
    for (int64_t i = 0; i < tile.n; ++i) add_ratio(sums, log_ratio[i], advantage, weights[i], a);
  } else {
    double lane[kLanes] = {};
    for (int64_t i = 0; i < tile.n; ++i) lane[i % kLanes] += static_cast<double>(weights[i]) * log_ratio[i];
    for (int64_t j = 0; j < kLanes; ++j) sums.log_ratio += lane[j];
  }
  if (a.reference.data) sums.squared_difference = sum_squared_difference(a, tile, packed, buffers);
}

// Adds up the tiles in order and writes the loss, the metrics and each sample's slope.
void finish_forward(const PolicyArguments& a) {
  const int64_t tiles = tiles_of(a.positions);
  Sums total{};
  for (int64_t b = 0; b < a.batch; ++b) {
    Sums sample{};
    for (int64_t t = 0; t < tiles; ++t) merge(sample, a.partial[b * tiles + t]);
    finish_sample(a, b, sample);
    merge(total, sample);
  }
  finish_batch(a, total);
}

void backward_tile(const PolicyArguments& a, const Tile& tile, bool packed) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float factor[kTile];  // of the residual, for each position
  tile_weights(a, tile, factor);
  const float common = gradient_factor(a, k);
  if (a.per_location) {
    float log_ratio[kTile];
    tile_log_prob(a, k, tile, packed, buffers, log_ratio);
    const float* old = a.old_log_prob + tile.b * a.positions + tile.first;
    const float advantage = clamp_advantage(a.advantages[tile.b], a.advantage_clip);
    for (int64_t i = 0; i < tile.n; ++i) {
      const Surrogate s = clipped_surrogate(log_ratio[i] - old[i], advantage, a.clip_low, a.clip_high);
      factor[i] *= common * s.slope / static_cast<float>(a.batch);
    }
  } else {
    for (int64_t i = 0; i < tile.n; ++i) factor[i] *= common * a.slope[tile.b];
  }
  const float kl = a.reference.data ? kl_gradient_factor(a, k) : 0.0f;
  float gradient[kRun];
  for_each_run(tile, a.channels, packed, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, packed, buffers.x);
    const float* v = load_tile_run(a.model_output, tile, p, c, n, packed, buffers.v);
    const float* prev = load_tile_run(a.prev_sample, tile, p, c, n, packed, buffers.prev);
    if (packed) {
      for (int64_t i = 0; i < n; ++i) gradient[i] = factor[p] * residual(k, x[i], v[i], prev[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) gradient[i] = factor[i] * residual(k, x[i], v[i], prev[i]);
    }
    if (a.reference.data) {
      const float* reference = load_tile_run(a.reference, tile, p, c, n, packed, buffers.reference);
      for (int64_t i = 0; i < n; ++i) gradient[i] += kl * (v[i] - reference[i]);
    }
    store_tile_run(a.gradient, tile, p, c, n, packed, gradient);
  });
}

// prev = mean + std * noise, stored in its dtype; the log-probability is that of the stored value.
void sample_tile(const SampleArguments& a, const Tile& tile, bool packed) {
  const Coefficients k = coefficients_of(a.coefficients, a.columns, tile.b);
  Buffers buffers;
  float noise_buffer[kRun];
  float* out = a.log_prob + tile.b * a.positions + tile.first;
  for (int64_t j = 0; j < tile.n; ++j) out[j] = 0.0f;
  for_each_run(tile, a.channels, packed, [&](int64_t p, int64_t c, int64_t n) {
    const float* x = load_tile_run(a.sample, tile, p, c, n, packed, buffers.x);
    const float* v = load_tile_run(a.model_output, tile, p, c, n, packed, buffers.v);
    const float* noise = load_tile_run(a.noise, tile, p, c, n, packed, noise_buffer);
    float* prev = buffers.prev;
    for (int64_t j = 0; j < n; ++j) prev[j] = add(transition_mean(k, x[j], v[j]), multiply(k.std, noise[j]));
    store_tile_run(a.prev_sample, tile, p, c, n, packed, prev);
    const float* stored = load_tile_run(a.prev_sample, tile, p, c, n, packed, buffers.reference);
    add_squares(k, x, v, stored, n, packed, out + p);
  });
  const float inverse_channels = 1.0f / static_cast<float>(a.channels);
  for (int64_t j = 0; j < tile.n; ++j) out[j] = log_prob(k, out[j], inverse_channels);
}

}  // namespace

void policy_forward(const PolicyArguments& a) {
  const bool packed = is_packed(a.model_output, a.channels);
  parallel_for(a.batch * tiles_of(a.positions), a.threads, [&](int64_t i, int) {
    a.partial[i] = Sums{};
    forward_tile(a, Tile(i, a.positions), packed, a.partial[i]);
  });
  finish_forward(a);
}

void policy_backward(const PolicyArguments& a) {
  const bool packed = is_packed(a.model_output, a.channels);
  parallel_for(a.batch * tiles_of(a.positions), a.threads,
               [&](int64_t i, int) { backward_tile(a, Tile(i, a.positions), packed); });
}

void sample_transition(const SampleArguments& a) {
  const bool packed = is_packed(a.model_output, a.channels);
  parallel_for(a.batch * tiles_of(a.positions), a.threads,
               [&](int64_t i, int) { sample_tile(a, Tile(i, a.positions), packed); });
}

}  // namespace STAR_ISA
}  // namespace star
