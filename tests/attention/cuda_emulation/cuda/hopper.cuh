// csrc/cuda/hopper.cuh for the emulation. Descriptors are made by the functions of that file: the tests copy them to
// hopper_descriptors.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/tensor_map.cuh"
#include "products.h"

#define STAR_HOPPER 1

namespace star {
namespace cuda {

inline uint32_t shared_address(const void* shared) { return emulation::address_of(shared); }
inline char* aligned_shared() { return emulation::shared_memory; }

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) { emulation::init(barrier, arrivals); }
inline void mbarrier_init_fence() { emulation::fence_init(); }
inline void mbarrier_expect(uint64_t* barrier, unsigned bytes) { emulation::arrive(barrier, bytes); }
inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive(barrier); }
inline bool mbarrier_wait(uint64_t* barrier, unsigned parity) {
  emulation::wait_for_phase(barrier, parity);
  return true;
}
[[noreturn]] inline void stop_kernel() { emulation::fail("the kernel stops itself"); }

inline void prefetch_tensor_map(const TensorMap*) {}
inline void load_tile(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  emulation::load_tile(shared, map, barrier, c0, c1, c2, c3);
}
inline void copy_16(void* shared, const void* global, bool valid) { emulation::copy_16(shared, global, valid); }
inline void copy_wait() { emulation::copy_wait(); }
inline void shared_fence() { emulation::shared_fence(); }

template <int N>
void more_registers() {
  emulation::set_registers(N, true);
}
template <int N>
void fewer_registers() {
  emulation::set_registers(N, false);
}
inline void named_sync(unsigned id, unsigned threads) { emulation::wait_at_named(id, threads); }
inline void named_arrive(unsigned id, unsigned threads) {
  emulation::arrive_at_named(id, threads);
  emulation::let_others_run();
}

#include "hopper_descriptors.h"

inline void multiply_fence() { emulation::multiply_fence(); }
inline void multiply_commit() { emulation::multiply_commit(); }
template <int N>
void multiply_wait() {
  emulation::multiply_wait(N);
}
template <typename T, int N>
void pin(T (&)[N]) {}

template <typename T, int N, bool kTransposeB>
void multiply_shared(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  emulation::start_product({a, b, N, false, kTransposeB, kBfloat16, accumulate}, d, nullptr);
}

template <typename T, int N, bool kTransposeB>
void multiply_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  emulation::start_product({0, b, N, true, kTransposeB, kBfloat16, accumulate}, d, a);
}

// Numbers below the smallest normal one are zero.
inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

template <typename T>
uint32_t pack(float low, float high) {
  constexpr bool kBfloat16 = std::is_same_v<T, __nv_bfloat16>;
  const auto narrow = [](float x) { return uint32_t{kBfloat16 ? to_bfloat16(x) : to_float16(x)}; };
  return narrow(low) | narrow(high) << 16;
}

}  // namespace cuda
}  // namespace star
