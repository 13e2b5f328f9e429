// The parts of the attention kernel for Hopper: its shared memory, waits, masks, selected tokens and results.
#pragma once

#include "cuda/attention_arguments.h"
#include "cuda/hopper.cuh"

namespace star {
namespace cuda {
namespace {

constexpr int kTokens = 16;          // selected tokens of a product, the narrowest one of two registers of k
constexpr int kTokenStages = 2;      // chunks of selected tokens in shared memory
constexpr unsigned kFirstTurn = 1;   // named barriers of the groups' turns; 0 is that of the block
constexpr float kLowest = -3.0e38f;  // below any score but finite: (-inf) - kLowest is -inf, (-inf) - (-inf) NaN
constexpr float kLn2 = 0.6931471805599453f;

// A shape of the kernel: sizes of tiles, stages and registers.
template <typename T, int kD, int kGroups, int kN, int kBuffers, bool kOverlapped>
struct Shape {
  using Type = T;
  static constexpr int kHeadDim = kD, kConsumers = kGroups, kKeys = kN, kStages = kBuffers;
  static constexpr bool kOverlap = kOverlapped, kTurns = kOverlapped;
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kColumns = kD / 64;  // a tile in shared memory has rows of 128 bytes: 64 elements
  static constexpr int kQueryBytes = 64 * kD * 2, kKeyBytes = kN * kD * 2, kTokenBytes = kTokens * kD * 2;
  static constexpr int kMaskWords = (kN + 31) / 32;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = kGroups == 2 ? 232 : 152;
  static_assert(kD % 64 == 0 && kN % 16 == 0 && kN <= 256 && (kGroups == 2 || kGroups == 3));
};

// The shared memory of a block. Tiles start at multiples of 1024 bytes.
template <typename S>
struct Memory {
  static constexpr int kKeyOffset = S::kConsumers * S::kQueryBytes;
  static constexpr int kValueOffset = kKeyOffset + S::kStages * S::kKeyBytes;
  static constexpr int kTokenOffset = kValueOffset + S::kStages * S::kKeyBytes;
  static constexpr int kBarrierOffset = kTokenOffset + kTokenStages * S::kTokenBytes;
  static constexpr int kBarriers = 2 * S::kConsumers + 4 * S::kStages + 2 * kTokenStages;
  static constexpr int kMaskOffset = kBarrierOffset + 8 * kBarriers;
  static constexpr int kWordOffset = kMaskOffset + 4 * S::kStages * S::kMaskWords;
  static constexpr int kSumOffset = kWordOffset + 4 * kTokenStages;
  static constexpr int kBytes = kSumOffset + 4 * 128 * S::kConsumers;
  static_assert(kBytes <= 227 * 1024, "more shared memory than a block has");

  char* const base;
  uint64_t* const barriers;
  uint64_t* const query_full;
  uint64_t* const query_free;
  uint64_t* const key_full;
  uint64_t* const key_free;
  uint64_t* const value_full;
  uint64_t* const value_free;
  uint64_t* const token_full;
  uint64_t* const token_free;
  unsigned* const token_words;  // of each chunk: which of its slots count

  __device__ __forceinline__ explicit Memory(char* shared)
      : base(shared),
        barriers(reinterpret_cast<uint64_t*>(shared + kBarrierOffset)),
        query_full(barriers),
        query_free(query_full + S::kConsumers),
        key_full(query_free + S::kConsumers),
        key_free(key_full + S::kStages),
        value_full(key_free + S::kStages),
        value_free(value_full + S::kStages),
        token_full(value_free + S::kStages),
        token_free(token_full + kTokenStages),
        token_words(reinterpret_cast<unsigned*>(shared + kWordOffset)) {}

  __device__ __forceinline__ char* query(int group) const { return base + group * S::kQueryBytes; }
  __device__ __forceinline__ char* key(int stage) const { return base + kKeyOffset + stage * S::kKeyBytes; }
  __device__ __forceinline__ char* value(int stage) const { return base + kValueOffset + stage * S::kKeyBytes; }
  __device__ __forceinline__ char* tokens(int stage) const { return base + kTokenOffset + stage * S::kTokenBytes; }
  __device__ __forceinline__ unsigned* mask_words(int stage) const {
    return reinterpret_cast<unsigned*>(base + kMaskOffset) + stage * S::kMaskWords;
  }

  // A place for the sums of each thread, which nothing reads: ptxas moves a wait for products before arithmetic, but
  // not before a store, so that the exponentials of a step run while its product with the values does.
  __device__ __forceinline__ volatile float* sums(unsigned thread) const {
    return reinterpret_cast<volatile float*>(base + kSumOffset) + thread;
  }

  // Full barriers take the arrival of the copying thread or of the gathering warp; free ones that of each warp.
  __device__ __forceinline__ void init() const {
    constexpr unsigned kWarps = 4 * S::kConsumers;
    for (int i = 0; i < S::kConsumers; i++) {
      mbarrier_init(query_full + i, 1);
      mbarrier_init(query_free + i, 4);
    }
    for (int i = 0; i < S::kStages; i++) {
      mbarrier_init(key_full + i, 1);
      mbarrier_init(key_free + i, kWarps);
      mbarrier_init(value_full + i, 1);
      mbarrier_init(value_free + i, kWarps);
    }
    for (int i = 0; i < kTokenStages; i++) {
      mbarrier_init(token_full + i, 32);
      mbarrier_init(token_free + i, kWarps);
    }
  }
};

// A place in a ring of stages. Its parity is that of the phase in which the stage becomes full; the producer waits for
// the opposite one of the free barrier, which is over at the start.
template <int kStages>
struct Ring {
  static_assert(kStages == 2 || kStages == 4);
  unsigned count = 0;

  __device__ __forceinline__ int stage() const { return static_cast<int>(count % kStages); }
  __device__ __forceinline__ unsigned parity() const { return count / kStages % 2; }
  __device__ __forceinline__ void next() { count++; }
};

// The head and the first row of a tile.
struct Place {
  int batch, head, row;

  __device__ __forceinline__ Place(const AttentionArguments& a, int tile, int rows) {
    const int of_head = tile / a.row_tiles;
    row = (tile - of_head * a.row_tiles) * rows;
    batch = of_head / a.heads;
    head = of_head - batch * a.heads;
  }

  __device__ __forceinline__ bool has_maps(const AttentionArguments& a, int rows) const {
    return a.maps && row < a.row_start + a.n_rows && row + rows > a.row_start;
  }
};

// Waits for a barrier, as a whole warp. If that never ends, leaves a record and ends the kernel.
template <typename S>
__device__ __forceinline__ void wait(const Memory<S>& memory, uint64_t* barrier, unsigned parity,
                                     const AttentionArguments& a, int tile, int step) {
  if (mbarrier_wait(barrier, parity)) return;
  if (a.status) {
    volatile unsigned* record =
        a.status + (blockIdx.x * (S::kThreads / 32) + threadIdx.x / 32) * static_cast<unsigned>(kStatusWords);
    record[1] = parity;
    record[2] = tile;
    record[3] = step;
    record[0] = static_cast<unsigned>(barrier - memory.barriers) + 1;
    __threadfence_system();
  }
  stop_kernel();
}

// Writes which of the keys from `first` count, a bit for each. Keys past the end do not. Called by a whole warp.
__device__ __forceinline__ void write_mask_words(unsigned* words, const AttentionArguments& a, int batch, int first,
                                                 int count) {
  const unsigned lane = threadIdx.x % 32;
  const uint8_t* mask = a.key_mask + static_cast<int64_t>(batch) * a.keys;
  for (int i = 0; 32 * i < count; i++) {
    const int key = first + 32 * i + static_cast<int>(lane);
    const unsigned word = __ballot_sync(0xffffffffu, key < a.keys && mask[key] != 0);
    if (lane == 0) words[i] = word;
  }
}

// Scores of keys that do not count become -inf: those whose bit is 0, or without words those from `remaining` on.
template <int N>
__device__ __forceinline__ void mask_scores(float (&s)[N], const unsigned* words, int remaining) {
  const int column = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < (N + 15) / 16; i++) {  // 32 keys
    const int left = remaining - 32 * i;
    unsigned word = left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1;
    if (words) word = words[i];
    word >>= column;
#pragma unroll
    for (int j = 0; j < 16 && 16 * i + j < N; j++) {
      if (!(word >> (8 * (j / 4) + j % 2) & 1)) s[16 * i + j] = -INFINITY;
    }
  }
}

// The keys of selected tokens from slot `token` on, in the pattern of bulk copies; zeros in slots that do not count:
// empty ones, positions past the sequence and masked keys. Called by a whole warp.
template <typename S>
__device__ __forceinline__ void gather_chunk(char* tokens, unsigned* word, const AttentionArguments& a, const Place& at,
                                             int token) {
  const int lane = threadIdx.x % 32;
  int position = -1;
  if (lane < kTokens && token + lane < a.slots)
    position = a.index[static_cast<int64_t>(at.batch) * a.slots + token + lane];
  bool valid = position >= 0 && position < a.keys;
  if (valid && a.key_mask) valid = a.key_mask[static_cast<int64_t>(at.batch) * a.keys + position] != 0;
  const unsigned counted = __ballot_sync(0xffffffffu, valid);
  if (lane == 0) *word = counted;
  const typename S::Type* key =
      static_cast<const typename S::Type*>(a.key.data) + at.batch * a.key.batch + at.head * a.key.channel;
  constexpr int kUnits = S::kHeadDim / 8;  // of 16 bytes in a row
#pragma unroll 1
  for (int i = 0; i < kTokens * kUnits / 32; i++) {
    const int unit = lane % kUnits, row = i * (32 / kUnits) + lane / kUnits;
    const bool counts = counted >> row & 1;
    const int from = __shfl_sync(0xffffffffu, position, row);
    char* to = tokens + unit / 8 * kTokens * 128 + row * 128 + ((unit ^ row) % 8) * 16;
    copy_16(to, key + (counts ? from * a.key.position : 0) + unit * 8, counts);
  }
}

// The largest and the sum of the values of four neighbouring threads, which have the columns of a row.
__device__ __forceinline__ float of_quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float of_quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

// This thread's first row among the 64 of its group; the other one is 8 rows further.
__device__ __forceinline__ int own_row() {
  return static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
}

// The slot of this thread's i-th column in a chunk of selected tokens.
__device__ __forceinline__ int own_slot(int i) { return i / 2 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2; }

// This thread's weights of a chunk of selected tokens in a phrase.
struct Weights {
  float value[4];

  __device__ __forceinline__ void load(const AttentionArguments& a, int batch, int phrase, int token) {
    const float* weight = a.weight + (static_cast<int64_t>(batch) * a.phrases + phrase) * a.slots;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int slot = token + own_slot(i);
      value[i] = slot < a.slots ? weight[slot] : 0.0f;
    }
  }
};

// Writes the maps of a chunk of selected tokens for this thread's rows, or adds them if the chunk is not the first.
// `lse` is in base 2; `weights` are those of the first phrase.
__device__ __forceinline__ void store_maps(float (&scores)[kTokens / 2], const float (&lse)[2], unsigned valid,
                                           Weights& weights, const AttentionArguments& a, const Place& at, int row,
                                           int token) {
#pragma unroll
  for (int i = 0; i < kTokens / 2; i++) {
    const float normaliser = lse[i / 2 % 2] == -INFINITY ? INFINITY : lse[i / 2 % 2];  // of a row without any key
    const bool counts = valid >> own_slot(i / 4 * 2 + i % 2) & 1;
    scores[i] = counts ? exp2_approximate(fmaf(scores[i], a.scale_log2, -normaliser)) : 0.0f;
  }
  const int lane = threadIdx.x % 4, r = row + 8 * lane - a.row_start;  // the first two threads of a quad store
  const bool stores = lane < 2 && r >= 0 && r < a.n_rows && row + 8 * lane < a.queries;
  float* map = a.maps + (static_cast<int64_t>(at.batch) * a.phrases * a.heads + at.head) * a.n_rows + r;
  for (int phrase = 0; phrase < a.phrases; phrase++) {
    const Weights now = weights;
    if (phrase + 1 < a.phrases) weights.load(a, at.batch, phrase + 1, token);
    float sums[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; i++) sum = fmaf(scores[i / 2 * 4 + 2 * half + i % 2], now.value[i], sum);
      sums[half] = of_quad_sum(sum);
    }
    if (stores) *map = (lane == 0 ? sums[0] : sums[1]) + (token > 0 ? *map : 0.0f);
    map += static_cast<int64_t>(a.heads) * a.n_rows;
  }
}

// One thread of each quad writes the log-sum-exp of a row, which is given in base 2.
__device__ __forceinline__ void store_lse(const AttentionArguments& a, const Place& at, int row, float lse) {
  if (threadIdx.x % 4 != 0 || row >= a.queries) return;
  a.lse[(static_cast<int64_t>(at.batch) * a.heads + at.head) * a.queries + row] = lse * kLn2;
}

// Thread t of a pair of threads, whose numbers differ in one bit, gives its second word for the first one of the other
// if the bit is 0: a transposition.
__device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second, unsigned bit, unsigned lane) {
  const bool upper = lane & bit;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? first : second, bit);
  (upper ? first : second) = other;
}

// Writes this thread's rows of the output. The threads of a quad exchange words so that each has whole units of 16
// bytes.
template <typename S>
__device__ __forceinline__ void store_output(const float (&o)[S::kHeadDim / 2], const float (&sum)[2],
                                             const AttentionArguments& a, const Place& at, int row) {
  using T = typename S::Type;
  const unsigned lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float factor = sum[half] == 0.0f ? 0.0f : 1.0f / sum[half];  // a row without any key attends to nothing
    T* out = static_cast<T*>(a.out.data) + at.batch * a.out.batch + at.head * a.out.channel +
             (row + 8 * half) * a.out.position;
#pragma unroll
    for (int i = 0; i < S::kHeadDim / 32; i++) {
      uint32_t words[4];  // of columns 32 i + 8 j + 2 lane
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int place = 16 * i + 4 * j + 2 * half;
        words[j] = pack<T>(o[place] * factor, o[place + 1] * factor);
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) exchange(words[j], words[j + 1], 1, lane);
#pragma unroll
      for (int j = 0; j < 2; j++) exchange(words[j], words[j + 2], 2, lane);
      if (row + 8 * half < a.queries) {
        *reinterpret_cast<uint4*>(out + 32 * i + 8 * lane) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace star
