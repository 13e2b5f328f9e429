// Flash attention for Hopper (Shah et al., arXiv 2407.08608) whose epilogue computes token-aggregated attention maps.
//
// A block has a group of four producer warps and two or three groups of consumer warps, and takes one tile of query
// rows after another. Warp 0 of the producers copies queries, keys and values to shared memory; warp 1 gathers the keys
// of the selected tokens. A consumer group has 64 rows: it computes their scores, the online softmax in registers, and
// the product with the values. While one group computes exponentials, another one multiplies: they take turns in
// starting products. A group starts the scores of the next keys before it computes the softmax of the last ones.
//
// Keys are visited from the end, so that the only partial tile is the first one. Behind the last tile, one product of
// 64 x 16 with the selected keys runs beside the last product with the values: the maps add no wait for memory.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace star {
namespace cuda {
namespace {

// Copies queries, keys and values of the block's tiles to shared memory: one warp.
template <typename S>
__device__ __forceinline__ void copy_tiles(const TensorMap* query_map, const TensorMap* key_map,
                                           const TensorMap* value_map, const AttentionArguments& a, char* shared) {
  const Memory<S> memory(shared);
  const unsigned lane = threadIdx.x % 32;
  Ring<S::kStages> ring;
  unsigned round = 0;
  for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, round++) {
    const Place at(a, tile, S::kRows);
    for (int step = 0; step < a.key_tiles; step++, ring.next()) {
      const int first = (a.key_tiles - 1 - step) * S::kKeys;
      wait(memory, memory.key_free + ring.stage(), ring.parity() ^ 1, a, tile, step);
      if (a.key_mask) write_mask_words(memory.mask_words(ring.stage()), a, at.batch, first, S::kKeys);
      if (lane == 0) {
        mbarrier_expect(memory.key_full + ring.stage(), S::kKeyBytes);
#pragma unroll 1
        for (int column = 0; column < S::kColumns; column++) {
          load_tile(memory.key(ring.stage()) + column * S::kKeys * 128, key_map, memory.key_full + ring.stage(),
                    64 * column, first, at.head, at.batch);
        }
      }
      if (step == 0) {
#pragma unroll 1
        for (int group = 0; group < S::kConsumers; group++) {
          wait(memory, memory.query_free + group, (round & 1) ^ 1, a, tile, step);
          if (lane == 0) {
            mbarrier_expect(memory.query_full + group, S::kQueryBytes);
#pragma unroll 1
            for (int column = 0; column < S::kColumns; column++) {
              load_tile(memory.query(group) + column * 64 * 128, query_map, memory.query_full + group, 64 * column,
                        at.row + 64 * group, at.head, at.batch);
            }
          }
        }
      }
      wait(memory, memory.value_free + ring.stage(), ring.parity() ^ 1, a, tile, step);
      if (lane == 0) {
        mbarrier_expect(memory.value_full + ring.stage(), S::kKeyBytes);
#pragma unroll 1
        for (int column = 0; column < S::kColumns; column++) {
          load_tile(memory.value(ring.stage()) + column * S::kKeys * 128, value_map, memory.value_full + ring.stage(),
                    64 * column, first, at.head, at.batch);
        }
      }
      __syncwarp();
    }
  }
}

// Gathers the keys of the selected tokens of the block's tiles, in chunks of 16: one warp.
template <typename S>
__device__ __forceinline__ void gather_tokens(const AttentionArguments& a, char* shared) {
  const Memory<S> memory(shared);
  Ring<kTokenStages> ring;
  for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const Place at(a, tile, S::kRows);
    if (!at.has_maps(a, S::kRows)) continue;
    for (int token = 0; token < a.slots; token += kTokens, ring.next()) {
      wait(memory, memory.token_free + ring.stage(), ring.parity() ^ 1, a, tile, token);
      gather_chunk<S>(memory.tokens(ring.stage()), memory.token_words + ring.stage(), a, at, token);
      copy_wait();
      shared_fence();
      mbarrier_arrive(memory.token_full + ring.stage());
    }
  }
}

// The softmax of the scores of a tile of keys: scores become exponentials; maxima and sums are those of this thread's
// two rows. `decay` is the factor of what was summed before.
template <int N>
__device__ __forceinline__ void softmax(float (&s)[N], float (&maximum)[2], float (&sum)[2], float (&decay)[2],
                                        float scale) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float largest = fmaxf(s[2 * half], s[2 * half + 1]);
#pragma unroll
    for (int i = 4; i < N; i += 4) largest = fmaxf(largest, fmaxf(s[i + 2 * half], s[i + 2 * half + 1]));
    largest = fmaxf(maximum[half], of_quad_max(largest) * scale);
    decay[half] = exp2_approximate(maximum[half] - largest);
    maximum[half] = largest;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      float& first = s[i + 2 * half];
      float& second = s[i + 2 * half + 1];
      first = exp2_approximate(fmaf(first, scale, -largest));
      second = exp2_approximate(fmaf(second, scale, -largest));
      total += first + second;
    }
    sum[half] = fmaf(sum[half], decay[half], total);
  }
}

// What a consumer group does: 64 rows of each of the block's tiles.
template <typename S>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const AttentionArguments& arguments, char* shared, int group)
      : a_(arguments), memory_(shared), group_(group) {}

  __device__ __forceinline__ void run() {
    if constexpr (S::kTurns) {
      if (group_ == S::kConsumers - 1) named_arrive(kFirstTurn, 256);
    }
    for (tile_ = blockIdx.x; tile_ < a_.tiles; tile_ += gridDim.x, round_++) attend();
    if constexpr (S::kTurns) {
      if (group_ == 0) named_sync(kFirstTurn, 256);  // the arrival of the last group, which no turn follows
    }
  }

 private:
  using T = typename S::Type;
  static constexpr int kKeys = S::kKeys, kHeadDim = S::kHeadDim;

  __device__ __forceinline__ void attend() {
    const Place at(a_, tile_, S::kRows);
    float s[kKeys / 2], o[kHeadDim / 2], decay[2];
    uint32_t p[kKeys / 16][4];
    float maximum[2] = {kLowest, kLowest}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; i++) o[i] = 0.0f;

    wait_for(memory_.query_full + group_, round_ & 1, 0);
    wait_for(memory_.key_full + keys_.stage(), keys_.parity(), 0);
    take_turn();
    multiply_fence();
    start_scores(s, memory_.key(keys_.stage()));
    multiply_commit();
    pass_turn();
    finish_scores<0>(s, a_.key_tiles - 1);
    softmax(s, maximum, sum, decay, a_.scale_log2);
    pack_probabilities(p, s);

    for (int step = 1; step < a_.key_tiles; step++) {
      wait_for(memory_.key_full + keys_.stage(), keys_.parity(), step);
      take_turn();
      pin_all(o, p);
      if constexpr (S::kOverlap) {
        multiply_fence();
        start_scores(s, memory_.key(keys_.stage()));
        multiply_commit();
        wait_for(memory_.value_full + values_.stage(), values_.parity(), step);
        multiply_fence();
        start_values(o, p);
        multiply_commit();
        pass_turn();
        finish_scores<1>(s, a_.key_tiles - 1 - step);
        softmax(s, maximum, sum, decay, a_.scale_log2);
        *memory_.sums(threadIdx.x - 128) = sum[0] + sum[1];
        finish_values(o, p);
      } else {
        wait_for(memory_.value_full + values_.stage(), values_.parity(), step);
        multiply_fence();
        start_values(o, p);
        multiply_commit();
        start_scores(s, memory_.key(keys_.stage()));
        multiply_commit();
        pass_turn();
        multiply_wait<0>();
        finish_values(o, p);
        finish_scores<0>(s, a_.key_tiles - 1 - step);
        softmax(s, maximum, sum, decay, a_.scale_log2);
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; i++) o[i] *= decay[i / 2 % 2];
      pack_probabilities(p, s);
    }

    const bool maps = at.has_maps(a_, S::kRows);
    float scores[kTokens / 2];
    Weights weights;
    if (maps) {
      weights.load(a_, at.batch, 0, 0);
      wait_for(memory_.token_full + tokens_.stage(), tokens_.parity(), 0);
    }
    wait_for(memory_.value_full + values_.stage(), values_.parity(), a_.key_tiles);
    pin_all(o, p);
    if (maps) {
      multiply_fence();
      start_scores(scores, memory_.tokens(tokens_.stage()));
      multiply_commit();
    }
    multiply_fence();
    start_values(o, p);
    multiply_commit();
    multiply_wait<1>();
    pin(scores);
    if (!maps || a_.slots <= kTokens) release(memory_.query_free + group_);
    finish_values(o, p);

    const int row = at.row + 64 * group_ + own_row();
    float lse[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      sum[half] = of_quad_sum(sum[half]);
      lse[half] = maximum[half] + log2f(sum[half]);
      store_lse(a_, at, row + 8 * half, lse[half]);
    }
    if (maps) store_all_maps(scores, lse, weights, at, row);
    store_output<S>(o, sum, a_, at, row);
  }

  // Maps of all chunks of tokens. The scores and the weights of the first one are given.
  __device__ __forceinline__ void store_all_maps(float (&scores)[kTokens / 2], const float (&lse)[2], Weights& weights,
                                                 const Place& at, int row) {
    for (int token = 0;;) {
      const unsigned valid = memory_.token_words[tokens_.stage()];
      release(memory_.token_free + tokens_.stage());
      tokens_.next();
      store_maps(scores, lse, valid, weights, a_, at, row, token);
      token += kTokens;
      if (token >= a_.slots) break;
      weights.load(a_, at.batch, 0, token);
      wait_for(memory_.token_full + tokens_.stage(), tokens_.parity(), token);
      multiply_fence();
      start_scores(scores, memory_.tokens(tokens_.stage()));
      multiply_commit();
      multiply_wait<0>();
      pin(scores);
      if (token + kTokens >= a_.slots) release(memory_.query_free + group_);
    }
  }

  // Starts the scores of keys: a tile of them, or those of a chunk of selected tokens.
  template <int N>
  __device__ __forceinline__ void start_scores(float (&s)[N], const char* keys) {
    constexpr int kCount = 2 * N;
    pin(s);
    const uint64_t q = shared_descriptor(memory_.query(group_), 16, 1024);
    const uint64_t k = shared_descriptor(keys, 16, 1024);
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; i++) {
      multiply_shared<T, kCount, false>(s, advance(q, i / 4 * 64 * 128 + i % 4 * 32),
                                        advance(k, i / 4 * kCount * 128 + i % 4 * 32), i > 0);
    }
  }

  __device__ __forceinline__ void start_values(float (&o)[kHeadDim / 2], uint32_t (&p)[kKeys / 16][4]) {
    const uint64_t v = shared_descriptor(memory_.value(values_.stage()), kKeys * 128, 1024);
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++) {
      multiply_registers<T, kHeadDim, true>(o, p[i], advance(v, i * 16 * 128), true);
    }
  }

  // Waits for scores, frees the keys, and masks the scores of keys that do not count.
  template <int kPending>
  __device__ __forceinline__ void finish_scores(float (&s)[kKeys / 2], int key_tile) {
    multiply_wait<kPending>();
    pin(s);
    const int remaining = a_.keys - key_tile * kKeys;
    if (a_.key_mask || remaining < kKeys) {
      mask_scores(s, a_.key_mask ? memory_.mask_words(keys_.stage()) : nullptr, remaining);
    }
    release(memory_.key_free + keys_.stage());
    keys_.next();
  }

  __device__ __forceinline__ void finish_values(float (&o)[kHeadDim / 2], uint32_t (&p)[kKeys / 16][4]) {
    multiply_wait<0>();
    pin_all(o, p);
    release(memory_.value_free + values_.stage());
    values_.next();
  }

  __device__ __forceinline__ void pin_all(float (&o)[kHeadDim / 2], uint32_t (&p)[kKeys / 16][4]) {
    pin(o);
#pragma unroll
    for (int i = 0; i < kKeys / 16; i++) pin(p[i]);
  }

  __device__ __forceinline__ void pack_probabilities(uint32_t (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 4; i++) p[i / 4][i % 4] = pack<T>(s[2 * i], s[2 * i + 1]);
  }

  __device__ __forceinline__ void take_turn() {
    if constexpr (S::kTurns) named_sync(kFirstTurn + group_, 256);
  }

  __device__ __forceinline__ void pass_turn() {
    if constexpr (S::kTurns) named_arrive(kFirstTurn + (group_ + 1) % S::kConsumers, 256);
  }

  // Each warp arrives when all its threads have finished reading.
  __device__ __forceinline__ void release(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  }

  __device__ __forceinline__ void wait_for(uint64_t* barrier, unsigned parity, int step) {
    wait(memory_, barrier, parity, a_, tile_, step);
  }

  const AttentionArguments& a_;
  const Memory<S> memory_;
  const int group_;
  int tile_ = 0;
  unsigned round_ = 0;
  Ring<S::kStages> keys_, values_;
  Ring<kTokenStages> tokens_;
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    attention_kernel(const __grid_constant__ TensorMap query_map, const __grid_constant__ TensorMap key_map,
                     const __grid_constant__ TensorMap value_map, const __grid_constant__ AttentionArguments a) {
#if STAR_HOPPER
  char* shared = aligned_shared();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&query_map);
    prefetch_tensor_map(&key_map);
    prefetch_tensor_map(&value_map);
    Memory<S>(shared).init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const int group = static_cast<int>(threadIdx.x / 128) - 1;
  if (group < 0) {
    fewer_registers<S::kProducerRegisters>();
    const unsigned warp = threadIdx.x / 32;
    if (warp == 0) copy_tiles<S>(&query_map, &key_map, &value_map, a, shared);
    if (warp == 1 && a.maps) gather_tokens<S>(a, shared);
  } else {
    more_registers<S::kConsumerRegisters>();
    Consumer<S>(a, shared, group).run();
  }
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace star
