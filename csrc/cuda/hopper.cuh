// The instructions of Hopper (sm_90a) that CUDA C++ has no functions for: barriers in shared memory, bulk copies of
// tiles, matrix products of warp groups. No other file has PTX of this kind. Names are those of the PTX manual,
// sections "mbarrier", "cp.async.bulk.tensor" and "wgmma.mma_async".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/tensor_map.cuh"

// Whether this code is compiled for Hopper's own instructions.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STAR_HOPPER 1
#else
#define STAR_HOPPER 0
#endif

namespace star {
namespace cuda {

constexpr long long kWaitCycles = 1LL << 34;  // some ten seconds: a wait that takes longer never ends

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The shared memory whose size is given at the launch, aligned as the bulk copies' pattern of 1024 bytes needs it.
__device__ __forceinline__ char* aligned_shared() {
  extern __shared__ __align__(1024) char star_aligned_shared[];
  return star_aligned_shared;
}

// Barriers in shared memory. A phase ends when `arrivals` threads have arrived and all expected bytes have come.

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to bulk copies; a barrier of the block must follow.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and adds bytes that the phase waits for.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ bool mbarrier_try(uint64_t* barrier, unsigned parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits for the end of the phase of this parity (0 is the first). Returns false if it has not ended after kWaitCycles.
__device__ __forceinline__ bool mbarrier_wait(uint64_t* barrier, unsigned parity) {
  if (mbarrier_try(barrier, parity)) return true;
  const long long start = clock64();
  while (!mbarrier_try(barrier, parity)) {
    if (clock64() - start > kWaitCycles) return false;
  }
  return true;
}

// Ends the kernel with an error, in all blocks, some milliseconds later: other threads notice that they wait in vain
// too.
__device__ __forceinline__ void stop_kernel() {
  asm volatile("nanosleep.u32 1000000;\nnanosleep.u32 1000000;\nnanosleep.u32 1000000;\ntrap;");
}

// Bulk copies of a tile. One thread issues them; coordinates are elements, the innermost dimension first. Elements
// outside the tensor are zeros in shared memory.

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

__device__ __forceinline__ void load_tile(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2,
                                          int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Asynchronous copies of 16 bytes by ordinary threads, zeros where not valid. The address must be one that can be read.

__device__ __forceinline__ void copy_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Waits for this thread's copies of 16 bytes.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to matrix products and bulk copies that start after a barrier.
__device__ __forceinline__ void shared_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Warp groups: four warps, the first of which has a number divisible by four.

template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

__device__ __forceinline__ void named_sync(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(unsigned id, unsigned threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Describes an operand in shared memory in the 128-byte pattern, whose unit is 8 rows of 128 bytes. Operands with
// contiguous k (queries, keys): `stride` is the distance of two groups of 8 rows; `leading` is not used. Operands with
// contiguous n (values, kTransposeB): `stride` is the distance of two groups of 8 in k, `leading` that of two groups of
// 64 in n.
__device__ __forceinline__ uint64_t shared_descriptor(const void* shared, unsigned leading_bytes,
                                                      unsigned stride_bytes) {
  constexpr uint64_t kPattern128 = 1ULL << 62;
  return kPattern128 | ((shared_address(shared) & 0x3ffffU) >> 4) |
         static_cast<uint64_t>((leading_bytes >> 4) & 0x3fff) << 16 |
         static_cast<uint64_t>((stride_bytes >> 4) & 0x3fff) << 32;
}

// The descriptor of an operand that starts so many bytes later.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, unsigned bytes) { return descriptor + (bytes >> 4); }

// Products are asynchronous: registers and shared memory of a product must not be used until it has been waited for.

__device__ __forceinline__ void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N committed groups of products are pending.
template <int N>
__device__ __forceinline__ void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler moves no access of these registers across this point.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

template <int N>
__device__ __forceinline__ void pin(uint32_t (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(a[i])::"memory");
}

// Operands of the products: the accumulators d and their places in the text, eight by eight.
#define STAR_D8(i)                                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define STAR_D32 STAR_D8(0), STAR_D8(8), STAR_D8(16), STAR_D8(24)
#define STAR_D48 STAR_D32, STAR_D8(32), STAR_D8(40)
#define STAR_D56 STAR_D48, STAR_D8(48)
#define STAR_D64 STAR_D56, STAR_D8(56)
#define STAR_D80 STAR_D64, STAR_D8(64), STAR_D8(72)
#define STAR_D88 STAR_D80, STAR_D8(80)
#define STAR_P8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define STAR_P32                                                                                                   \
  STAR_P8                                                                                                          \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
#define STAR_P48 STAR_P32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define STAR_P56 STAR_P48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define STAR_P64 STAR_P56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define STAR_P80 STAR_P64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define STAR_P88 STAR_P80 ", %80, %81, %82, %83, %84, %85, %86, %87"

// The widths n of a product of 64 × n × 16: accumulators, their places, and the places of what follows them.
#define STAR_WIDTHS(WIDTH, ...)                                                           \
  WIDTH(16, (STAR_D8(0)), STAR_P8, "8", "9", "10", "11", "12", "13", "14", __VA_ARGS__)   \
  WIDTH(64, (STAR_D32), STAR_P32, "32", "33", "34", "35", "36", "37", "38", __VA_ARGS__)  \
  WIDTH(96, (STAR_D48), STAR_P48, "48", "49", "50", "51", "52", "53", "54", __VA_ARGS__)  \
  WIDTH(112, (STAR_D56), STAR_P56, "56", "57", "58", "59", "60", "61", "62", __VA_ARGS__) \
  WIDTH(128, (STAR_D64), STAR_P64, "64", "65", "66", "67", "68", "69", "70", __VA_ARGS__) \
  WIDTH(160, (STAR_D80), STAR_P80, "80", "81", "82", "83", "84", "85", "86", __VA_ARGS__) \
  WIDTH(176, (STAR_D88), STAR_P88, "88", "89", "90", "91", "92", "93", "94", __VA_ARGS__)
#define STAR_OPEN(...) __VA_ARGS__
#define STAR_PRODUCT(n, type, places, condition)                                                                       \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" condition ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type \
  " {" places "}, "
#define STAR_SHARED(n, d, places, p0, p1, p2, p3, p4, p5, p6, type)                                        \
  if constexpr (N == n) {                                                                                  \
    asm volatile(STAR_PRODUCT(n, type, places, p2) "%" p0 ", %" p1 ", p, 1, 1, 0, %" p3 ";\n}"             \
                 : STAR_OPEN d                                                                             \
                 : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeB))); \
  }
#define STAR_REGISTERS(n, d, places, p0, p1, p2, p3, p4, p5, p6, type)                                            \
  if constexpr (N == n) {                                                                                         \
    asm volatile(STAR_PRODUCT(n, type, places, p5) "{%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" p4 ", p, 1, 1, %" p6 \
                                                   ";\n}"                                                         \
                 : STAR_OPEN d                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),         \
                   "n"(static_cast<int>(kTransposeB)));                                                           \
  }

template <int N>
constexpr bool kWidth = N == 16 || N == 64 || N == 96 || N == 112 || N == 128 || N == 160 || N == 176;

// d = a b (+ d), the operands in shared memory: a has 64 rows of queries, b has N keys or, transposed, N head dims.
// Thread t of the group has d[i] of row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2.
template <typename T, int N, bool kTransposeB>
__device__ __forceinline__ void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kWidth<N>, "no product of this width");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    STAR_WIDTHS(STAR_SHARED, "bf16")
  } else {
    STAR_WIDTHS(STAR_SHARED, "f16")
  }
}

// The same with a in registers: thread t has pairs of columns 2 (t % 4) of row t % 32 / 4 in a[0], 8 rows further in
// a[1], and 8 columns further in a[2] and a[3].
template <typename T, int N, bool kTransposeB>
__device__ __forceinline__ void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                                   bool accumulate) {
  static_assert(kWidth<N>, "no product of this width");
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    STAR_WIDTHS(STAR_REGISTERS, "bf16")
  } else {
    STAR_WIDTHS(STAR_REGISTERS, "f16")
  }
}

// 2^x; zero for -inf.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two numbers of a register, the first one in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace cuda
}  // namespace star
