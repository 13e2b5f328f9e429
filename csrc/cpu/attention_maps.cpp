// Token-aggregated attention maps from a given log-sum-exp: P = exp(scale * q k - lse), in one read of the rows.
//
// A thread computes all heads of a tile of rows, so the mean over heads needs no second pass, and every sum has a fixed
// order for any number of threads. The selected tokens are packed once, lanes innermost, so that the dot products of a
// row with a chunk of tokens take one vector multiply-add for each dimension of the head.
#include <cstdint>
#include <cstring>

#include "cpu/vectors.h"

namespace star {
namespace STAR_ISA {
namespace {

int64_t chunks_of(const MapsArguments& a) { return (a.slots + kLanes - 1) / kLanes; }

// The scratch: packed tokens [B, H, chunks, D, lanes], their lse [B, H, chunks, lanes], weights [B, G, chunks, lanes],
// and for each thread the accumulated probabilities [chunks, rows, lanes].
struct Scratch {
  float *tokens, *token_lse, *weights, *accumulator;
  int64_t tokens_size, lse_size, weights_size, accumulator_size;

  explicit Scratch(const MapsArguments& a) {
    const int64_t padded = chunks_of(a) * kLanes;
    tokens_size = a.batch * a.heads * a.head_dim * padded;
    lse_size = a.batch * a.heads * padded;
    weights_size = a.batch * a.phrases * padded;
    accumulator_size = padded * kTileRows;
    tokens = a.scratch;
    token_lse = tokens + tokens_size;
    weights = token_lse + lse_size;
    accumulator = weights + weights_size;
  }
  int64_t floats(int threads) const { return tokens_size + lse_size + weights_size + threads * accumulator_size; }
};

// Whether slot t of sequence b counts: it is filled, and its token is not a masked key.
bool counts(const MapsArguments& a, int64_t b, int64_t t) {
  const int64_t position = a.index[b * a.slots + t];
  return position >= 0 && (a.text_to_image || !a.key_mask || a.key_mask[b * a.gathered_length + position]);
}

bool any_counts(const MapsArguments& a, int64_t b) {
  for (int64_t t = 0; t < a.slots; ++t) {
    if (counts(a, b, t)) return true;
  }
  return false;
}

void pack_tokens(const MapsArguments& a, const Scratch& scratch, int64_t b, int64_t h) {
  const int64_t padded = chunks_of(a) * kLanes;
  float* tokens = scratch.tokens + (b * a.heads + h) * a.head_dim * padded;
  float* token_lse = scratch.token_lse + (b * a.heads + h) * padded;
  float buffer[kMaxHeadDim];
  std::memset(tokens, 0, static_cast<size_t>(a.head_dim * padded) * sizeof(float));
  std::memset(token_lse, 0, static_cast<size_t>(padded) * sizeof(float));
  for (int64_t t = 0; t < a.slots; ++t) {
    if (!counts(a, b, t)) continue;
    float* lane = tokens + (t / kLanes) * a.head_dim * kLanes + t % kLanes;
    const int64_t position = a.index[b * a.slots + t];
    const int64_t offset = b * a.gathered.batch + h * a.gathered.channel + position * a.gathered.position;
    const float* source = load_run(a.gathered, offset, 1, a.head_dim, buffer);
    for (int64_t d = 0; d < a.head_dim; ++d) lane[d * kLanes] = source[d] * a.scale;
    if (a.text_to_image) {
      const int64_t at = b * a.lse.batch + h * a.lse.channel + position * a.lse.position;
      token_lse[t] = without_keys(static_cast<const float*>(a.lse.data)[at]);
    }
  }
}

void pack_weights(const MapsArguments& a, const Scratch& scratch, int64_t b) {
  const int64_t padded = chunks_of(a) * kLanes;
  for (int64_t g = 0; g < a.phrases; ++g) {
    float* weights = scratch.weights + (b * a.phrases + g) * padded;
    for (int64_t t = 0; t < padded; ++t) {
      weights[t] = t < a.slots && counts(a, b, t) ? a.weight[(b * a.phrases + g) * a.slots + t] : 0.0f;
    }
  }
}

struct Tile {
  int64_t b, first, n_rows;  // first: within the range of rows
};

// The rows of the next head are far away in memory, beyond the reach of hardware prefetchers.
void prefetch_row(const MapsArguments& a, int64_t offset) {
  const int64_t size = a.dense.dtype == DType::kFloat32 ? 4 : 2;
  const char* row = static_cast<const char*>(a.dense.data) + offset * size;
  for (int64_t i = 0; i < a.head_dim * size; i += 64) __builtin_prefetch(row + i);
}

// P of a row and a chunk of tokens, zero for the pairs that the mask by query excludes.
Vec masked_pairs(const MapsArguments& a, int64_t b, int64_t h, int64_t position, int64_t chunk, Vec p) {
  const uint8_t* row = a.pairs.data + b * a.pairs.batch + h * a.pairs.head + position * a.pairs.row;
  for (int64_t lane = 0; lane < kLanes && chunk * kLanes + lane < a.slots; ++lane) {
    const int64_t token = a.index[b * a.slots + chunk * kLanes + lane];
    if (token >= 0 && !row[token * a.pairs.token]) p[lane] = 0.0f;
  }
  return p;
}

// Adds (or, for the first head, writes) P of one head to accumulator [chunks, kTileRows, lanes].
template <bool kPairs>
void one_head(const MapsArguments& a, const Scratch& scratch, const Tile& tile, int64_t h, bool add,
              float* accumulator) {
  const int64_t chunks = chunks_of(a);
  const float* tokens = scratch.tokens + (tile.b * a.heads + h) * a.head_dim * chunks * kLanes;
  const float* token_lse = scratch.token_lse + (tile.b * a.heads + h) * chunks * kLanes;
  const float* lse = static_cast<const float*>(a.lse.data) + tile.b * a.lse.batch + h * a.lse.channel;
  float buffer[kBlock][kMaxHeadDim];
  for (int64_t block = 0; block < tile.n_rows; block += kBlock) {
    const float* row[kBlock];
    float row_lse[kBlock];
    bool masked[kBlock];
    for (int r = 0; r < kBlock; ++r) {  // a short block repeats its last row
      const int64_t in_tile = block + r < tile.n_rows ? block + r : tile.n_rows - 1;
      const int64_t position = a.start + tile.first + in_tile;
      const int64_t offset = tile.b * a.dense.batch + h * a.dense.channel + position * a.dense.position;
      if (h + 1 < a.heads) prefetch_row(a, offset + a.dense.channel);
      row[r] = load_run(a.dense, offset, 1, a.head_dim, buffer[r]);
      row_lse[r] = a.text_to_image ? 0.0f : without_keys(lse[position * a.lse.position]);
      masked[r] = a.text_to_image && a.key_mask && !a.key_mask[tile.b * a.dense_length + position];
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* packed = tokens + chunk * a.head_dim * kLanes;
      Vec score[kBlock] = {};
      for (int64_t d = 0; d < a.head_dim; ++d) {
        const Vec token = load(packed + d * kLanes);
        for (int r = 0; r < kBlock; ++r) score[r] += row[r][d] * token;
      }
      const Vec by_token = load(token_lse + chunk * kLanes);
      for (int r = 0; r < kBlock && block + r < tile.n_rows; ++r) {
        Vec p = masked[r] ? Vec{} : exponential(score[r] - (by_token + row_lse[r]));
        if (kPairs) p = masked_pairs(a, tile.b, h, a.start + tile.first + block + r, chunk, p);
        float* target = accumulator + (chunk * kTileRows + block + r) * kLanes;
        store(target, add ? load(target) + p : p);
      }
    }
  }
}

// maps[r] = factor * sum over tokens of weight * accumulated P. In a lane without weight P may have any value, inf too.
void aggregate(const MapsArguments& a, const float* weights, const float* accumulator, int64_t n_rows, float factor,
               float* maps) {
  const int64_t chunks = chunks_of(a);
  for (int64_t r = 0; r < n_rows; ++r) {
    float sum = 0.0f;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Vec weight = load(weights + chunk * kLanes);
      const Vec p = load(accumulator + (chunk * kTileRows + r) * kLanes);
      const Vec product = weight == Vec{} ? Vec{} : weight * p;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum += product[lane];
    }
    maps[r] = sum * factor;
  }
}

}  // namespace

int64_t maps_scratch_floats(const MapsArguments& a) { return Scratch(a).floats(a.threads); }

void attention_maps(const MapsArguments& a) {
  const Scratch scratch(a);
  const int64_t padded = chunks_of(a) * kLanes;
  const int64_t tiles = (a.n_rows + kTileRows - 1) / kTileRows;
  parallel_for(a.batch * a.heads, a.threads, [&](int64_t bh, int) {
    pack_tokens(a, scratch, bh / a.heads, bh % a.heads);
    if (bh % a.heads == 0) pack_weights(a, scratch, bh / a.heads);
  });
  parallel_for(a.batch * tiles, a.threads, [&](int64_t i, int thread) {
    float* accumulator = scratch.accumulator + thread * scratch.accumulator_size;
    const int64_t first = i % tiles * kTileRows;
    const Tile tile{i / tiles, first, first + kTileRows <= a.n_rows ? kTileRows : a.n_rows - first};
    const bool empty = !any_counts(a, tile.b);  // as in half of a batch that is doubled for guidance
    for (int64_t h = 0; h < a.heads; ++h) {
      if (!empty) {
        const auto head = a.pairs.data ? one_head<true> : one_head<false>;
        head(a, scratch, tile, h, a.reduce_heads && h > 0, accumulator);
      }
      if (a.reduce_heads && h + 1 < a.heads) continue;
      const float factor = a.reduce_heads ? 1.0f / static_cast<float>(a.heads) : 1.0f;
      for (int64_t g = 0; g < a.phrases; ++g) {
        const int64_t bg = tile.b * a.phrases + g;
        const int64_t map = a.reduce_heads ? bg : bg * a.heads + h;
        float* maps = a.maps + map * a.n_rows + first;
        if (empty) {
          std::memset(maps, 0, static_cast<size_t>(tile.n_rows) * sizeof(float));
        } else {
          aggregate(a, scratch.weights + bg * padded, accumulator, tile.n_rows, factor, maps);
        }
      }
    }
  });
}

}  // namespace STAR_ISA
}  // namespace star
