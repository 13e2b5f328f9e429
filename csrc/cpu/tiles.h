// How the latent kernels walk: tiles of kTilePositions positions with all their channels, in runs of consecutive
// elements. Each tile has its own slot for its sums, and slots are added up in order, so that no result depends on the
// number of threads. Internal linkage: compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "cpu/elements.h"
#include "cpu/kernels.h"
#include "flow_policy.h"

namespace star {
namespace {

constexpr int64_t kTile = kTilePositions;
constexpr int64_t kRun = 1024;  // channels read at a time where channels are innermost
constexpr int64_t kSumLanes = 8;

int64_t tiles_of(int64_t positions) { return (positions + kTile - 1) / kTile; }

struct Tile {
  int64_t b, first, n;
  bool packed;  // channels are innermost

  Tile(int64_t i, int64_t positions, bool packed)
      : b(i / tiles_of(positions)), first(i % tiles_of(positions) * kTile), packed(packed) {
    n = first + kTile <= positions ? kTile : positions - first;
  }
};

bool is_packed(const View& view, int64_t channels) { return channels > 1 && view.channel < view.position; }

template <typename Arguments, typename Body>
void for_each_tile(const Arguments& a, Body body) {
  const bool packed = is_packed(a.model_output, a.channels);
  parallel_for(a.batch * tiles_of(a.positions), a.threads,
               [&](int64_t i, int) { body(i, Tile(i, a.positions, packed)); });
}

// Walks a tile in runs of innermost elements: along positions for [C, P] latents, along channels for packed [P, C].
// `visit(p, c, n)` gets a run's first position (within the tile), first channel and length.
template <typename Visit>
inline void for_each_run(const Tile& tile, int64_t channels, Visit visit) {
  if (!tile.packed) {
    for (int64_t c = 0; c < channels; ++c) visit(int64_t{0}, c, tile.n);
  } else {
    for (int64_t p = 0; p < tile.n; ++p) {
      for (int64_t c = 0; c < channels; c += kRun) visit(p, c, channels - c < kRun ? channels - c : kRun);
    }
  }
}

int64_t run_stride(const View& view, const Tile& tile) { return tile.packed ? view.channel : view.position; }

int64_t run_offset(const View& view, const Tile& tile, int64_t p, int64_t c) {
  return tile.b * view.batch + c * view.channel + (tile.first + p) * view.position;
}

const float* load_tile_run(const View& view, const Tile& tile, int64_t p, int64_t c, int64_t n, float* scratch) {
  return load_run(view, run_offset(view, tile, p, c), run_stride(view, tile), n, scratch);
}

void store_tile_run(const View& view, const Tile& tile, int64_t p, int64_t c, int64_t n, const float* values) {
  store_run(view, run_offset(view, tile, p, c), run_stride(view, tile), n, values);
}

// Adds term(i) for i below n: one element a position, or all to one sum where channels are innermost.
template <typename Term>
inline void add_run(int64_t n, bool packed, float* sums, Term term) {
  if (!packed) {
    for (int64_t i = 0; i < n; ++i) sums[i] += term(i);
    return;
  }
  float lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int64_t j = 0; j < kSumLanes; ++j) lane[j] += term(i + j);
  }
  for (; i < n; ++i) lane[i % kSumLanes] += term(i);
  for (int64_t j = 0; j < kSumLanes; ++j) sums[0] += lane[j];
}

inline void fill(float* values, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) values[i] = value;
}

// The sum over channels of (x - y)^2 at each of a tile's positions.
void squared_differences(const View& x, const View& y, int64_t channels, const Tile& tile, float* sums) {
  float x_buffer[kRun], y_buffer[kRun];
  fill(sums, tile.n, 0.0f);
  for_each_run(tile, channels, [&](int64_t p, int64_t c, int64_t n) {
    const float* xs = load_tile_run(x, tile, p, c, n, x_buffer);
    const float* ys = load_tile_run(y, tile, p, c, n, y_buffer);
    add_run(n, tile.packed, sums + p, [&](int64_t i) { return (xs[i] - ys[i]) * (xs[i] - ys[i]); });
  });
}

// Weights of a tile's positions for one phrase, read from the patch grid that divides the latent's: in place if the
// grid is the latent's own, else copied to `out`.
const float* tile_weights(const Objective& a, const Tile& tile, int64_t phrase, float* out) {
  if (!a.weights) {
    fill(out, tile.n, 1.0f);
    return out;
  }
  const int64_t grid = a.grid[0] * a.grid[1] * a.grid[2];
  const float* weights = a.weights + (tile.b * a.phrases + phrase) * grid;
  if (grid == a.positions) return weights + tile.first;
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
  return out;
}

// Which of a tile's positions count, or null if all do.
const uint8_t* tile_mask(const Objective& a, const Tile& tile) {
  return a.mask ? a.mask + tile.b * a.positions + tile.first : nullptr;
}

int64_t count_kept(const uint8_t* mask, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; mask && i < n; ++i) count += mask[i] != 0;
  return mask ? count : n;
}

// Zeros where the mask drops a position: NaN times a weight of zero would be NaN.
void drop(const uint8_t* mask, float* values, int64_t n) {
  for (int64_t i = 0; mask && i < n; ++i) values[i] = mask[i] ? values[i] : 0.0f;
}

// The same for a run of a gradient, of one element a position or of one position.
void drop_run(const uint8_t* mask, float* values, int64_t p, int64_t n, bool packed) {
  if (!packed) {
    drop(mask, values, n);
  } else if (mask && !mask[p]) {
    fill(values, n, 0.0f);
  }
}

double weighted_sum(const float* weights, const float* values, int64_t n) {
  double lane[kSumLanes] = {}, sum = 0.0;
  for (int64_t i = 0; i < n; ++i) lane[i % kSumLanes] += static_cast<double>(weights[i]) * values[i];
  for (int64_t j = 0; j < kSumLanes; ++j) sum += lane[j];
  return sum;
}

double plain_sum(const float* values, int64_t n) {
  double lane[kSumLanes] = {}, sum = 0.0;
  for (int64_t i = 0; i < n; ++i) lane[i % kSumLanes] += values[i];
  for (int64_t j = 0; j < kSumLanes; ++j) sum += lane[j];
  return sum;
}

// The KL penalty's sum over a tile, of (output - ref_output)^2.
double kl_sum(const Objective& a, const Tile& tile, const float* weights) {
  float squares[kTile];
  squared_differences(a.model_output, a.ref_output, a.channels, tile, squares);
  drop(tile_mask(a, tile), squares, tile.n);
  return a.weighted_kl ? weighted_sum(weights, squares, tile.n) : plain_sum(squares, tile.n);
}

// Adds the gradient of the KL penalty to a run: factor * (output - ref_output), times the weight if that acts on it.
inline void add_kl_gradient(const Objective& a, const float* weights, float factor, const float* output,
                            const float* ref_output, int64_t p, int64_t n, bool packed, float* gradient) {
  if (!a.weighted_kl) {
    for (int64_t i = 0; i < n; ++i) gradient[i] += factor * (output[i] - ref_output[i]);
  } else if (packed) {
    for (int64_t i = 0; i < n; ++i) gradient[i] += factor * weights[p] * (output[i] - ref_output[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) gradient[i] += factor * weights[i] * (output[i] - ref_output[i]);
  }
}

// Doubles of a tile's sums.
template <typename Kind>
int64_t sums_of(const typename Kind::Arguments& a) {
  return Kind::kSums + Kind::more_sums(a);
}

// The slot of a tile's sums. When its sample is finished, the first tile's has the sample's metrics instead.
template <typename Kind>
double* slot_of(const typename Kind::Arguments& a, int64_t i) {
  return a.partial + i * sums_of<Kind>(a);
}

// Adds up a sample's tiles in order, and writes what is saved of it and its part of the metrics.
template <typename Kind>
void finish_tiles(const typename Kind::Arguments& a, int64_t b) {
  static_assert(int{Kind::kMetrics} <= int{Kind::kSums}, "metrics fit into a slot");
  const int64_t tiles = tiles_of(a.positions), width = sums_of<Kind>(a);
  double* sums = slot_of<Kind>(a, b * tiles);
  for (int64_t t = 1; t < tiles; ++t) {
    const double* tile = sums + t * width;
    for (int64_t i = 0; i < width; ++i) {
      sums[i] = i == Kind::kLargestSum ? maximum(sums[i], tile[i]) : sums[i] + tile[i];
    }
  }
  double metrics[Kind::kMetrics];
  finish_sample(a, b, *reinterpret_cast<const double (*)[Kind::kSums]>(sums), sums + Kind::kSums, metrics);
  for (int64_t i = 0; i < Kind::kMetrics; ++i) sums[i] = metrics[i];
}

// Writes the loss and the metrics from those of the finished samples.
template <typename Kind>
void finish_samples(const typename Kind::Arguments& a) {
  double total[Kind::kMetrics] = {};
  for (int64_t b = 0; b < a.batch; ++b) {
    const double* metrics = slot_of<Kind>(a, b * tiles_of(a.positions));
    merge<Kind::kLargestMetric>(total, *reinterpret_cast<const double (*)[Kind::kMetrics]>(metrics));
  }
  finish_batch<Kind::kLargestMetric>(a, total);
}

// Runs `tile_sums(tile, sums)` for every tile, with sums that are zero before, and finishes.
template <typename Kind, typename TileSums>
void forward(const typename Kind::Arguments& a, TileSums tile_sums) {
  const int64_t width = sums_of<Kind>(a);
  for_each_tile(a, [&](int64_t i, const Tile& tile) {
    double* sums = slot_of<Kind>(a, i);
    for (int64_t j = 0; j < width; ++j) sums[j] = 0.0;
    tile_sums(tile, sums);
  });
  for (int64_t b = 0; b < a.batch; ++b) finish_tiles<Kind>(a, b);
  finish_samples<Kind>(a);
}

// The same, and `tile_gradient(tile)` for every tile of a sample whose sums are complete: at once, while its latents
// are in the cache, if there are enough samples for the threads.
template <typename Kind, typename TileSums, typename TileGradient>
void forward_with_gradient(const typename Kind::Arguments& a, TileSums tile_sums, TileGradient tile_gradient) {
  const int64_t tiles = tiles_of(a.positions), width = sums_of<Kind>(a);
  const bool packed = is_packed(a.model_output, a.channels);
  if (a.batch < a.threads) {
    forward<Kind>(a, tile_sums);
    for_each_tile(a, [&](int64_t, const Tile& tile) { tile_gradient(tile); });
    return;
  }
  parallel_for(a.batch, a.threads, [&](int64_t b, int) {
    for (int64_t i = b * tiles; i < (b + 1) * tiles; ++i) {
      double* sums = slot_of<Kind>(a, i);
      for (int64_t j = 0; j < width; ++j) sums[j] = 0.0;
      tile_sums(Tile(i, a.positions, packed), sums);
    }
    finish_tiles<Kind>(a, b);
    for (int64_t i = b * tiles; i < (b + 1) * tiles; ++i) tile_gradient(Tile(i, a.positions, packed));
  });
  finish_samples<Kind>(a);
}

}  // namespace
}  // namespace star
