// The parts of CUDA that csrc/cuda needs to run on a CPU: a fiber for each thread of a block, one block after the other.
//
// A fiber runs until it waits for others, so that a missing barrier shows as data not yet written. Every other block runs
// its threads in reverse order, so that a barrier missing in either direction shows.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/elements.h"  // conversions of 16-bit elements, which are instructions on a GPU

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define kDLCUDA kDLCPU     // tensors come from the host
#define STAR_CUDA_ARCHITECTURES "host"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaSetDevice(int) {}

struct Index {
  unsigned x;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "CUDA emulation: %s\n", problem);
  std::abort();
}

constexpr unsigned kMostThreads = 1024, kStack = 1 << 16, kMostTurns = 10000000;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  jmp_buf scheduler, fibers[kMostThreads];
  std::vector<char> stacks = std::vector<char>(size_t{kMostThreads} * kStack);
  bool started[kMostThreads], done[kMostThreads];
  std::function<void()> kernel;
  unsigned threads = 0;
  Barrier all, warps[kMostThreads / 32];
  char exchanged[2][kMostThreads][8];
  unsigned exchanges[kMostThreads];
};

inline Block block;
inline int64_t wide_loads = 0;  // of 16 bytes, by one thread
inline int64_t launches = 0;

}  // namespace emulation

inline Index threadIdx, blockIdx;

namespace emulation {

inline void enter() {
  block.kernel();
  block.done[threadIdx.x] = true;
  _longjmp(block.scheduler, 1);
}

// Jumps, which unlike swapcontext make no system call; a context only gives a fiber its stack.
inline void start(unsigned t) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = block.stacks.data() + size_t{t} * kStack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  block.started[t] = true;
  setcontext(&context);
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) inline void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(block.scheduler)) return;
  if (block.started[t]) _longjmp(block.fibers[t], 1);
  start(t);
}

__attribute__((noinline)) inline void yield() {
  if (!_setjmp(block.fibers[threadIdx.x])) _longjmp(block.scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  for (unsigned turns = 0; barrier.generation == generation; ++turns) {
    if (turns == kMostTurns) fail("a barrier that some thread does not reach");
    yield();
  }
}

inline void run_block(bool reversed) {
  for (unsigned t = 0; t < block.threads; ++t) {
    block.started[t] = block.done[t] = false;
    block.exchanges[t] = 0;
  }
  for (bool running = true; running;) {
    running = false;
    for (unsigned i = 0; i < block.threads; ++i) {
      const unsigned t = reversed ? block.threads - 1 - i : i;
      if (block.done[t]) continue;
      running = true;
      resume(t);
    }
  }
}

// Another lane's value.
template <typename T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  const unsigned self = threadIdx.x, parity = block.exchanges[self]++ % 2;
  std::memcpy(block.exchanged[parity][self], &value, sizeof value);
  wait(block.warps[self / 32], 32);
  std::memcpy(&value, block.exchanged[parity][source], sizeof value);
  return value;
}

template <typename Kernel>
auto launch(Kernel kernel, unsigned blocks, unsigned threads, int, cudaStream_t) {
  return [=](auto... arguments) {
    if (threads % 32 != 0 || threads > kMostThreads) fail("a block that is no whole number of warps");
    ++launches;
    block.threads = threads;
    block.kernel = [=] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block(blockIdx.x % 2);
  };
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block.all, emulation::block.threads); }
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  const unsigned before = *counter;
  *counter = before >= limit ? 0 : before + 1;
  return before;
}
template <typename T>
T __ldg(const T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) emulation::fail("a misaligned load");
  emulation::wide_loads += sizeof(T) == 16;
  return *pointer;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return emulation::exchange(value, threadIdx.x ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::exchange(value, lane + distance < 32 ? threadIdx.x + distance : threadIdx.x);
}
