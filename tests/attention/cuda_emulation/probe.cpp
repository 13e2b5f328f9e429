// The parts of the emulation alone: a kernel of one product, and what can be wrong with it.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

#include "cuda/attention_arguments.h"
#include "cuda/hopper.cuh"

using namespace star::cuda;
using tvm::ffi::TensorView;

enum Fault : int64_t {
  kNone,
  kWrongStride,
  kWrongLeading,
  kReadsBeforeWait,
  kNeverWaits,
  kNoFence,
  kWritesAfterFence,
  kWritesOperand,
  kWritesAccumulators,
  kThreadsDiffer,
  kOneWarpMissing,
  kWrongParity,
  kNoWaitForCopy,
  kNoInitFence,
  kTooManyArrivals,
  kTooManyBytes,
  kReusesEarly,
  kMisalignedTile,
  kSkipsPhase,
  kNoSharedFence,
  kNoCopyWait,
  kMissingAtNamed,
  kTwiceAtNamed,
  kTooManyRegisters,
  kDifferentRegisters,
};

constexpr int kK = 64, kBytesOfA = 64 * 128, kBytesOfB = 256 * 128;

struct Problem {
  const uint16_t* a;  // [64, kK]
  float* d;           // [64, N]
  int first;          // row of the tensor b with which its tile starts
  bool bfloat16;
  bool gathered;  // the tile of a comes by copies of 16 bytes
  Fault fault;
};

// As the attention kernel, products of queries and keys take a from shared memory, those with values from registers.
// Threads 0 to 127 multiply, thread 128 copies. The next tile of b comes when the group has released the first one.
template <int N, bool kTransposed>
void probe_kernel(const TensorMap map_a, const TensorMap map_b, Problem p) {
  constexpr int kColumns = kTransposed ? (N + 63) / 64 : 1, kRows = kTransposed ? kK : N;
  constexpr unsigned kBytes = kColumns * kRows * 128;
  const Fault fault = p.fault;
  const unsigned t = threadIdx.x;
  char* const tile_a = aligned_shared();
  char* const tile_b = tile_a + kBytesOfA + (fault == kMisalignedTile ? 128 : 0);
  uint64_t* const full = reinterpret_cast<uint64_t*>(tile_a + kBytesOfA + kBytesOfB);
  uint64_t* const free = full + 1;
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(free, 4);
    if (fault != kNoInitFence) mbarrier_init_fence();
  }
  __syncthreads();
  if (t >= 128) {
    if (fault != kTooManyRegisters) fewer_registers<40>();
    if (fault == kDifferentRegisters && t >= 160) fewer_registers<24>();
    if (t > 128) return;
    for (int round = 0; round < 2; ++round) {
      if (fault != kSkipsPhase) mbarrier_wait(free, round % 2 ^ 1);
      const unsigned bytes = kBytes + (round == 0 && !p.gathered ? kBytesOfA : 0);
      mbarrier_expect(full, fault == kTooManyBytes ? bytes + 16 : bytes);
      if (fault == kTooManyArrivals) mbarrier_arrive(full);
      if (round == 0 && !p.gathered) load_tile(tile_a, &map_a, full, 0, 0, 0, 0);
      for (int column = 0; column < kColumns; ++column) {
        load_tile(tile_b + column * kRows * 128, &map_b, full, 64 * column, round ? 1000 : p.first, 0, 0);
      }
    }
    return;
  }
  more_registers<256>();
  if (p.gathered) {
    const int row = t / 2, half = t % 2 * 4;
    for (int unit = half; unit < half + 4; ++unit) {
      copy_16(tile_a + row * 128 + ((unit ^ row) % 8) * 16, p.a + row * kK + unit * 8, true);
    }
    if (fault != kNoCopyWait) copy_wait();
    if (fault != kNoSharedFence) shared_fence();
    if (!(fault == kMissingAtNamed && t < 32)) named_sync(2, 128);
    if (fault == kTwiceAtNamed && t >= 32) named_arrive(2, 128);
    if (fault == kTwiceAtNamed && t >= 64) named_arrive(2, 128);
  }
  if (fault != kNoWaitForCopy) mbarrier_wait(full, fault == kWrongParity ? 1 : 0);

  float d[N / 2];
  uint32_t a[kK / 16][4];
  const auto row_of_a = [&](int i) { return t / 32 * 16 + t % 32 / 4 + i % 2 * 8; };
  for (int k = 0; k < kK / 16; ++k) {
    for (int i = 0; i < 4; ++i) {
      const uint16_t* pair = p.a + row_of_a(i) * kK + 16 * k + i / 2 * 8 + t % 4 * 2;
      a[k][i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
  for (float& x : d) x = 0.0f;
  if (fault != kNoFence) multiply_fence();
  const uint64_t in_a = shared_descriptor(tile_a, 16, 1024);
  const uint64_t in_b =
      shared_descriptor(tile_b, fault == kWrongLeading ? 1024 : kRows * 128, fault == kWrongStride ? 512 : 1024);
  if (!(fault == kOneWarpMissing && t < 32)) {
    for (int k = 0; k < kK / 16; ++k) {
      const uint64_t b = advance(in_b, kTransposed ? k * 16 * 128 : k * 32) + (fault == kThreadsDiffer && t == 7);
      if constexpr (kTransposed) {
        p.bfloat16 ? multiply_registers<__nv_bfloat16, N, true>(d, a[k], b, true)
                   : multiply_registers<__half, N, true>(d, a[k], b, true);
      } else {
        p.bfloat16 ? multiply_shared<__nv_bfloat16, N, false>(d, advance(in_a, k * 32), b, k > 0)
                   : multiply_shared<__half, N, false>(d, advance(in_a, k * 32), b, k > 0);
      }
    }
  }
  multiply_commit();
  if (fault == kWritesOperand) a[1][2] ^= 1;
  if (fault == kWritesAccumulators) d[3] = 1.0f;
  const auto release = [&] {
    __syncwarp();
    if (t % 32 == 0) mbarrier_arrive(free);
  };
  const auto store = [&] {
    for (int i = 0; i < N / 2; ++i) {
      p.d[(t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + t % 4 * 2 + i % 2] = d[i];
    }
  };
  if (fault == kReusesEarly) release();
  if (fault == kReadsBeforeWait) store();
  if (fault != kNeverWaits) multiply_wait<0>();
  if (fault != kReadsBeforeWait) store();
  if (fault == kWritesAfterFence) {
    multiply_fence();
    d[0] = 1.0f;
    multiply_registers<__half, N, kTransposed>(d, a[0], in_b, true);
    multiply_commit();
    multiply_wait<0>();
  }
  if (fault != kReusesEarly) release();
  mbarrier_wait(full, 1);
}

template <int N, bool kTransposed>
void launch(const TensorView& b, const Problem& problem) {
  using star::cuda::encode_tile;
  TensorMap map_a, map_b;
  const char* wrong = encode_tile(&map_a, {problem.a, {kK, 64, 1, 1}, {kK * 2, 16, 16}, problem.bfloat16}, 64);
  const TileSource source{b.data_ptr(), {b.size(1), b.size(0), 1, 1}, {b.stride(0) * 2, 16, 16}, problem.bfloat16};
  if (!wrong) wrong = encode_tile(&map_b, source, kTransposed ? kK : N);
  if (wrong) throw std::runtime_error(wrong);
  emulation::launch_hopper(probe_kernel<N, kTransposed>, 1, 256, kBytesOfA + kBytesOfB + 64, nullptr)(map_a, map_b,
                                                                                                      problem);
}

// Multiplies a [64, 64] by the N rows of b from `first` on, or, transposed, by the 64 rows of b [K, N] from there.
static void product(TensorView a, TensorView b, TensorView d, int64_t first, bool transposed, bool gathered,
                    bool bfloat16, int64_t fault) {
  const Problem problem{static_cast<const uint16_t*>(a.data_ptr()),
                        static_cast<float*>(d.data_ptr()),
                        static_cast<int>(first),
                        bfloat16,
                        gathered,
                        static_cast<Fault>(fault)};
  switch (transposed ? -d.size(1) : d.size(1)) {
    case -64:
      return launch<64, true>(b, problem);
    case -128:
      return launch<128, true>(b, problem);
    case 16:
      return launch<16, false>(b, problem);
    case 96:
      return launch<96, false>(b, problem);
    case 112:
      return launch<112, false>(b, problem);
    case 128:
      return launch<128, false>(b, problem);
    case 160:
      return launch<160, false>(b, problem);
    case 176:
      return launch<176, false>(b, problem);
    default:
      throw std::runtime_error("the probe has no product of this width");
  }
}

// Tests compile the variants of the kernel only where they run them.
__attribute__((weak)) const char* star::cuda::attention_variants(const AttentionArguments&, const AttentionVariant&,
                                                                 cudaStream_t) {
  return "the variants are not compiled";
}

static void set_seed(int64_t seed) { emulation::seed = static_cast<uint64_t>(seed); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(product, product);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_seed, set_seed);
