// What the kernels have in common that write the loss, the metrics and the gradient in one launch. The gradient waits
// for sums over the sample, so the blocks of a sample are a cluster. Each keeps what the gradient needs of its latents
// in shared memory, exchanges its sums with the others, evaluates the sample, as all of them do, and writes its part of
// the gradient. Latents are read once.
//
// Runs along positions have 4 bytes of the narrowest dtype. A thread then has few positions and many loads in flight,
// and a small batch fills the device. Channels are added in the order of the other kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/cluster.cuh"
#include "cuda/latents.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduction.cuh"

namespace star {
namespace cuda {

constexpr int kFusedThreads = 512;  // the largest block

struct Fused : Tiling {            // the tiles of a sample are the blocks of its cluster
  unsigned sums;                   // number that the blocks of a sample exchange
  unsigned scratch, ratios, kept;  // offsets in shared memory
  bool cells;                      // whether phrases read the ratios
  unsigned bytes;
};

// The shared memory of a block.
struct Room {
  double *own, *total;  // sums of the block, and of the sample
  float *saved, *scratch, *ratios, *kept;
  unsigned* cells;

  __device__ __forceinline__ explicit Room(const Fused& f) {
    char* shared = dynamic_shared();
    own = reinterpret_cast<double*>(shared);
    total = own + f.sums;
    saved = reinterpret_cast<float*>(total + f.sums);
    scratch = reinterpret_cast<float*>(shared + f.scratch);
    ratios = reinterpret_cast<float*>(shared + f.ratios);
    cells = f.cells ? reinterpret_cast<unsigned*>(ratios + f.tile) : nullptr;
    kept = reinterpret_cast<float*>(shared + f.kept);
  }
};

// Values that a thread puts into shared memory and takes again in the same order.
template <int kRun>
class Kept {
 public:
  __device__ __forceinline__ Kept(float* memory, unsigned threads)
      : next_(memory + threadIdx.x * kWord), step_(threads * kWord) {}

  __device__ __forceinline__ void put(const float (&values)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun; i += kWord, next_ += step_) {
      Run<float, kWord> run;
#pragma unroll
      for (int j = 0; j < kWord; ++j) run.value[j] = values[i + j];
      store_run(next_, run);
    }
  }

  __device__ __forceinline__ void take(float (&values)[kRun]) {
#pragma unroll
    for (int i = 0; i < kRun; i += kWord, next_ += step_) {
      const typename Word<4 * kWord>::Type word = *reinterpret_cast<const typename Word<4 * kWord>::Type*>(next_);
      memcpy(values + i, &word, sizeof word);
    }
  }

 private:
  static constexpr int kWord = kRun < 4 ? kRun : 4;  // at most 16 bytes
  float* next_;
  unsigned step_;
};

// The sums of a thread, in shared memory because registers are for loads in flight; see has_sum.
template <typename Kind, int kTerms>
class ThreadSums {
 public:
  __device__ __forceinline__ ThreadSums(float* scratch, unsigned threads, int used, bool more)
      : own_(scratch + threadIdx.x), threads_(threads), used_(used), more_(more) {
    for_each([&](int, float& sum) { sum = 0.0f; });
  }

  __device__ __forceinline__ void add(const float (&terms)[kTerms]) const {
    for_each([&](int i, float& sum) { sum = i == Kind::kLargestSum ? maximum(sum, terms[i]) : sum + terms[i]; });
  }

 private:
  template <typename Body>
  __device__ __forceinline__ void for_each(Body body) const {
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      if (has_sum<Kind>(i, used_, more_)) body(i, own_[i * threads_]);
    }
  }

  float* own_;
  unsigned threads_;
  int used_;
  bool more_;
};

// As for_each_position, for tiles that are larger than a block.
template <typename Access, typename Body>
__device__ __forceinline__ void for_each_kept_position(const Fused& f, const Place& place, Body body) {
  if constexpr (kAlongPositions<Access>) {
#pragma unroll 1
    for (unsigned p = place.first + threadIdx.x * Access::kRun; p < place.end; p += f.threads * Access::kRun) {
      body(p, 0u, true);
    }
  } else {
    for_each_position<Access>(f, place, body);
  }
}

// The first warp of a sample's first block writes what is saved of it, and after the last sample the metrics.
template <typename Kind>
__device__ __forceinline__ void publish_sample(const Fused& f, const typename Kind::Arguments& a, unsigned b,
                                               const float* saved, unsigned* counter) {
  const unsigned lane = threadIdx.x, batch = static_cast<unsigned>(a.batch);
  for (int64_t i = lane; i < Kind::saved_rows(a); i += 32) a.saved[i * a.batch + b] = saved[i];
  __threadfence();
  unsigned finished = lane == 0 ? atomicInc(counter, batch - 1) : 0;
  finished = __shfl_sync(kAllLanes, finished, 0);
  if (finished != batch - 1) return;
  __threadfence();
  double total[Kind::kMetrics] = {};
  for (unsigned sample = lane; sample < batch; sample += 32) {
    double metrics[Kind::kMetrics];
#pragma unroll
    for (int i = 0; i < Kind::kMetrics; ++i) metrics[i] = a.partial[int64_t{sample} * Kind::kMetrics + i];
    merge<Kind::kLargestMetric>(total, metrics);
  }
  merge_lanes<Kind::kLargestMetric>(total, 32);
  if (lane == 0) finish_batch<Kind::kLargestMetric>(a, total);
}

// Adds up the sums of the sample's blocks, of which the first `used` and those from kSums on are written, and leaves in
// Room::saved what its gradient needs. Other blocks may read this one's sums until cluster_wait() is called once more.
template <typename Kind>
__device__ __noinline__ void finish_sums(const Fused& f, const typename Kind::Arguments& a, unsigned b, int used,
                                         unsigned* counter) {
  const Room room(f);
  const unsigned lane = threadIdx.x % 32, rank = blockIdx.x - b * f.tiles;
  cluster_arrive();
  cluster_wait();
  for (unsigned i = threadIdx.x / 32; i < f.sums; i += f.threads / 32) {
    if (i >= static_cast<unsigned>(used) && i < Kind::kSums) continue;
    double sum[1] = {lane < f.tiles ? cluster_read(room.own + i, lane) : 0.0};
    merge_chosen(sum, f.tiles, static_cast<int>(i) == Kind::kLargestSum);
    if (lane == 0) room.total[i] = sum[0];
  }
  cluster_arrive();
  __syncthreads();
  if (threadIdx.x == 0) {
    double sums[Kind::kSums], metrics[Kind::kMetrics];
#pragma unroll
    for (int i = 0; i < Kind::kSums; ++i) sums[i] = i < used ? room.total[i] : 0.0;
    const double* more = room.total + Kind::kSums;
    evaluate_sample(a, b, sums, more, Saved{room.saved, 1}, metrics);
    if (rank == 0) {
      for (int i = 0; i < Kind::kMetrics; ++i) a.partial[int64_t{b} * Kind::kMetrics + i] = metrics[i];
      if (a.unreduced) a.loss[b] = total_loss(a, metrics, 1.0);
    }
  }
  __syncthreads();
  if (rank == 0 && threadIdx.x < 32) publish_sample<Kind>(f, a, b, room.saved, counter);
}

namespace {

// What an objective puts into shared memory.
struct Demand {
  int64_t sums, saved_rows;
  int terms;           // sums of a thread
  int kept;            // numbers of each element
  bool ratios, cells;  // of each position
};

struct FusedLimits {
  unsigned cluster, threads;
};

// The largest cluster and block, or those that STAR_KERNELS_FUSED names for comparison, such as "8x512"; "0" has none.
inline FusedLimits fused_limits() {
  FusedLimits limits{kLargestCluster, kThreads};
  if (const char* chosen = std::getenv("STAR_KERNELS_FUSED"))
    std::sscanf(chosen, "%ux%u", &limits.cluster, &limits.threads);
  return limits;
}

int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Chooses the smallest cluster in which a thread has one run of positions. Returns whether a block's shared memory
// suffices.
template <typename Access>
bool plan(const Latents& l, const Demand& demand, const FusedLimits& limits, Fused& f) {
  constexpr int64_t kRun = Access::kRun, kPositions = kAlongPositions<Access> ? kRun : 1;  // of a run
  constexpr int64_t kUnit = kAlongPositions<Access> ? 8 * kRun : 1;
  f.lanes = lanes_of(l);
  const auto threads = [&](int64_t positions) { return divide_up(positions, kPositions) * f.lanes; };
  f.tiles = 1;
  while (2 * f.tiles <= limits.cluster && threads(divide_up(l.positions, f.tiles)) > limits.threads) f.tiles *= 2;
  int64_t tile = 0;
  for (;; f.tiles /= 2) {  // until no block is empty
    tile = divide_up(divide_up(l.positions, f.tiles), kUnit) * kUnit;
    if ((f.tiles - 1) * tile < l.positions) break;
  }
  const int64_t needed = divide_up(threads(tile), 32) * 32;
  f.threads = static_cast<unsigned>(needed < limits.threads ? needed : limits.threads);
  const int64_t of_lane = divide_up(l.channels, kPackedRun * f.lanes) * kPackedRun;  // channels
  const int64_t of_position = kAlongPositions<Access> ? l.channels * kRun : of_lane;
  const int64_t elements = divide_up(threads(tile), f.threads) * f.threads * of_position;
  const auto aligned = [](int64_t bytes) { return divide_up(bytes, 16) * 16; };
  const int64_t scratch = aligned(2 * demand.sums * int64_t{sizeof(double)} + demand.saved_rows * 4);
  const int64_t ratios = aligned(scratch + demand.terms * int64_t{f.threads} * 4);
  const int64_t kept = aligned(ratios + (demand.ratios + demand.cells) * tile * 4);
  const int64_t bytes = kept + elements * demand.kept * 4;
  if (bytes > kSharedBytes || l.batch * f.tiles > 2147483647) return false;
  f.tile = static_cast<unsigned>(tile);
  f.blocks = static_cast<unsigned>(l.batch * f.tiles);
  f.sums = static_cast<unsigned>(demand.sums);
  f.scratch = static_cast<unsigned>(scratch);
  f.ratios = static_cast<unsigned>(ratios);
  f.kept = static_cast<unsigned>(kept);
  f.cells = demand.cells;
  f.bytes = static_cast<unsigned>(bytes);
  return true;
}

// Returns false, without a launch, if the sample is too large or the device has no such clusters.
template <typename Access, typename Kernel, typename Arguments>
bool launch_fused(Kernel kernel, const Latents& l, const Demand& demand, const Arguments& a, unsigned* counter,
                  cudaStream_t stream) {
  FusedLimits limits = fused_limits();
  for (; limits.cluster > 0; limits.cluster = limits.cluster > kPortableCluster ? kPortableCluster : 0) {
    Fused f{};
    if (!plan<Access>(l, demand, limits, f)) continue;
    if (launch_clusters(kernel, {f.blocks, f.tiles, f.threads, f.bytes}, stream, a, f, counter)) return true;
  }
  return false;
}

template <bool kPacked, int kSingle, int kHalf, typename Run>
bool with_fused_types(const Latents& l, Run run) {
  const bool wide = l.latent == DType::kFloat32;
  if (!l.aligned || !(wide || l.latent == l.output)) return run(Type<Scalar>{});
  if (l.output == DType::kFloat32) return run(Type<Vector<float, float, kPacked, kSingle>>{});
  if (wide) return run(Type<Vector<Half, float, kPacked, kHalf>>{});
  return run(Type<Vector<Half, Half, kPacked, kHalf>>{});
}

// Returns run(type) with the Access that fits, as a Type<Access>.
template <typename Run>
bool with_fused_access(const Latents& l, Run run) {
  if (l.packed) return with_fused_types<true, kPackedRun, kPackedRun>(l, run);
  return with_fused_types<false, 1, 2>(l, run);
}

}  // namespace
}  // namespace cuda
}  // namespace star
