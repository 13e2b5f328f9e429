// Statistics of attention over all pairs of a row and a key, without the matrix of probabilities.
//
// Of each row the log-sum-exp of its scores and the entropy of its probabilities, by one online pass over the keys:
// with the maximum m of the scores, Z = sum exp(s - m) and U = sum exp(s - m) (s - m), the log-sum-exp is m + log Z and
// the entropy log Z - U / Z. Of each key the sum of its probabilities over the rows. Keys are packed as the tokens of
// attention_maps.cpp are, and every sum has a fixed order for any number of threads.
#include <algorithm>
#include <cmath>

#include "cpu/vectors.h"

namespace star {
namespace STAR_ISA {
namespace {

constexpr int64_t kSpan = 16;         // chunks of keys between two updates of a row's maximum
constexpr int64_t kGroup = 4;         // chunks of keys for which a row is loaded once, in sums over rows
constexpr int64_t kPartialRows = 64;  // rows whose probabilities are summed before they are added to the total
constexpr float kInfinity = __builtin_inff();

int64_t chunks_of(const StatisticsArguments& a) { return (a.keys + kLanes - 1) / kLanes; }

// Packs the keys of a head: [chunks, D, lanes], scaled.
void pack_keys(const StatisticsArguments& a, int64_t bh) {
  float* packed = a.scratch + bh * chunks_of(a) * kLanes * a.head_dim;
  float buffer[kMaxHeadDim];
  for (int64_t k = 0; k < chunks_of(a) * kLanes; ++k) {
    float* lane = packed + k / kLanes * a.head_dim * kLanes + k % kLanes;
    const int64_t offset = bh / a.heads * a.key.batch + bh % a.heads * a.key.channel + k * a.key.position;
    const float* source = k < a.keys ? load_run(a.key, offset, 1, a.head_dim, buffer) : nullptr;
    for (int64_t d = 0; d < a.head_dim; ++d) lane[d * kLanes] = source ? source[d] * a.scale : 0.0f;
  }
}

// Up to kBlock rows of a head; a short block repeats its last row.
struct Rows {
  float buffer[kBlock][kMaxHeadDim];
  const float* row[kBlock];
  const uint8_t* mask[kBlock];  // of the first key, or null
  int64_t count;

  void read(const StatisticsArguments& a, int64_t bh, int64_t first) {
    const int64_t b = bh / a.heads, h = bh % a.heads;
    count = std::min<int64_t>(kBlock, a.rows - first);
    for (int64_t r = 0; r < kBlock; ++r) {
      const int64_t position = first + std::min(r, count - 1);
      const int64_t offset = b * a.query.batch + h * a.query.channel + position * a.query.position;
      row[r] = load_run(a.query, offset, 1, a.head_dim, buffer[r]);
      mask[r] = a.pairs.data ? a.pairs.data + b * a.pairs.batch + h * a.pairs.head + position * a.pairs.row : nullptr;
    }
  }
};

// Scores of the rows and a chunk of keys, -inf for pairs that do not take part.
inline __attribute__((always_inline)) void scores_of(const StatisticsArguments& a, int64_t bh, int64_t chunk,
                                                     const Rows& rows, Vec (&score)[kBlock]) {
  const float* packed = a.scratch + (bh * chunks_of(a) + chunk) * kLanes * a.head_dim;
  for (int r = 0; r < kBlock; ++r) score[r] = Vec{};
  for (int64_t d = 0; d < a.head_dim; ++d) {
    const Vec key = load(packed + d * kLanes);
    for (int r = 0; r < kBlock; ++r) score[r] += rows.row[r][d] * key;
  }
  if (!a.pairs.data && (chunk + 1) * kLanes <= a.keys) return;
  for (int r = 0; r < kBlock; ++r) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t k = chunk * kLanes + lane;
      if (k >= a.keys || (rows.mask[r] && !rows.mask[r][k * a.pairs.token])) score[r][lane] = -kInfinity;
    }
  }
}

float sum_of(Vec v) {
  float sum = 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

float max_of(Vec v) {
  float largest = v[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) largest = std::max(largest, v[lane]);
  return largest;
}

struct Softmax {
  float max = -kInfinity, sum = 0.0f, moment = 0.0f;  // m, Z and U

  void add(const Vec* score, int64_t chunks) {  // of chunk c at score[c * kBlock]
    Vec largest = score[0];
    for (int64_t c = 1; c < chunks; ++c) {
      largest = score[c * kBlock] > largest ? score[c * kBlock] : largest;
    }
    const float next = std::max(max, max_of(largest));
    if (next == -kInfinity) return;
    if (max != -kInfinity && next != max) {
      const float change = max - next, decay = std::exp(change);
      moment = (moment + sum * change) * decay;
      sum *= decay;
    }
    max = next;
    Vec sums{}, moments{};
    for (int64_t c = 0; c < chunks; ++c) {
      const Vec shifted = score[c * kBlock] - next, e = exponential(shifted);
      sums += e;
      moments += e == Vec{} ? Vec{} : e * shifted;  // 0 * -inf would be NaN
    }
    sum += sum_of(sums);
    moment += sum_of(moments);
  }
};

}  // namespace

int64_t statistics_scratch_floats(const StatisticsArguments& a) {
  return a.batch * a.heads * chunks_of(a) * kLanes * a.head_dim;
}

void attention_rows(const StatisticsArguments& a) {
  const int64_t tiles = (a.rows + kTileRows - 1) / kTileRows, chunks = chunks_of(a);
  parallel_for(a.batch * a.heads, a.threads, [&](int64_t bh, int) { pack_keys(a, bh); });
  parallel_for(a.batch * a.heads * tiles, a.threads, [&](int64_t i, int) {
    const int64_t bh = i / tiles, end = std::min(a.rows, (i % tiles + 1) * kTileRows);
    Rows rows;
    Vec score[kSpan][kBlock];
    for (int64_t first = i % tiles * kTileRows; first < end; first += kBlock) {
      rows.read(a, bh, first);
      Softmax softmax[kBlock];
      for (int64_t from = 0; from < chunks; from += kSpan) {
        const int64_t count = std::min(kSpan, chunks - from);
        for (int64_t c = 0; c < count; ++c) scores_of(a, bh, from + c, rows, score[c]);
        for (int64_t r = 0; r < rows.count; ++r) softmax[r].add(&score[0][r], count);
      }
      for (int64_t r = 0; r < rows.count; ++r) {
        const Softmax& s = softmax[r];
        const bool any = s.max != -kInfinity;
        a.lse[bh * a.rows + first + r] = any ? s.max + std::log(s.sum) : -kInfinity;
        a.entropy[bh * a.rows + first + r] = any ? std::log(s.sum) - s.moment / s.sum : 0.0f;
      }
    }
  });
}

void attention_columns(const StatisticsArguments& a) {
  const int64_t chunks = chunks_of(a), groups = (chunks + kGroup - 1) / kGroup;
  parallel_for(a.batch * a.heads, a.threads, [&](int64_t bh, int) { pack_keys(a, bh); });
  parallel_for(a.batch * a.heads * groups, a.threads, [&](int64_t i, int) {
    const int64_t bh = i / groups, from = i % groups * kGroup, count = std::min(kGroup, chunks - from);
    Rows rows;
    Vec total[kGroup] = {}, partial[kGroup] = {};
    for (int64_t first = 0; first < a.rows; first += kBlock) {
      rows.read(a, bh, first);
      const float* lse = a.lse + bh * a.rows + first;
      for (int64_t c = 0; c < count; ++c) {
        Vec score[kBlock];
        scores_of(a, bh, from + c, rows, score);
        for (int64_t r = 0; r < rows.count; ++r) partial[c] += exponential(score[r] - without_keys(lse[r]));
      }
      if ((first + kBlock) % kPartialRows && first + kBlock < a.rows) continue;
      for (int64_t c = 0; c < count; ++c) {
        total[c] += partial[c];
        partial[c] = Vec{};
      }
    }
    for (int64_t k = from * kLanes; k < std::min(a.keys, (from + count) * kLanes); ++k) {
      a.sums[bh * a.keys + k] = total[k / kLanes - from][k % kLanes];
    }
  });
}

}  // namespace STAR_ISA
}  // namespace star
