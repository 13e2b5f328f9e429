// As much of CUDA as csrc/cuda needs to run on a CPU: a thread of the host for each thread of a block, blocks in turn.
#pragma once

#include <pthread.h>

#include <atomic>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static  // one block runs at a time
#define kDLCUDA kDLCPU     // tensors come from the host
#define STAR_CUDA_ARCHITECTURES "host"

struct dim3 {
  unsigned x, y;
  explicit dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaSetDevice(int) {}

inline thread_local dim3 threadIdx{0}, blockIdx{0}, gridDim{0};
inline pthread_barrier_t block_barrier;

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicInc(unsigned* counter, unsigned limit) {
  const unsigned before = *counter;
  *counter = before >= limit ? 0 : before + 1;
  return before;
}

template <typename Kernel>
auto emulate(Kernel kernel, dim3 grid, unsigned threads, int, cudaStream_t) {
  return [=](auto... arguments) {
    pthread_barrier_init(&block_barrier, nullptr, threads);
    std::vector<std::thread> block;
    for (unsigned t = 0; t < threads; ++t) {
      block.emplace_back([=] {
        threadIdx = dim3(t);
        gridDim = grid;
        for (unsigned i = 0; i < grid.x * grid.y; ++i) {
          blockIdx = dim3(i % grid.x, i / grid.x);
          kernel(arguments...);
          __syncthreads();  // the next block uses the same shared memory
        }
      });
    }
    for (std::thread& thread : block) thread.join();
    pthread_barrier_destroy(&block_barrier);
  };
}
