// The parts of CUDA that csrc/cuda needs to run on a CPU: a fiber for each thread of a block, one block after the
// other.
//
// A fiber runs until it waits for others, so that a missing barrier shows as data not yet written. Every other block
// runs its threads in reverse order, so that a barrier missing in either direction shows.
//
// The blocks of a cluster run on a host thread each, which gives them shared memory of their own. They take turns: a
// block runs until all its threads have ended or wait for the cluster. Shared memory whose size is given at the launch
// is NaN until it is written, and it is an error to read that of a block before a barrier of the cluster or after the
// block's end.
#pragma once

#include <dlpack/dlpack.h>  // before a name of it is replaced
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cpu/elements.h"  // conversions of 16-bit elements, which are instructions on a GPU

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local  // a block of a cluster has a host thread
#define kDLCUDA kDLCPU                  // tensors come from the host
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
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulation {

[[noreturn]] void fail(const char* problem);

constexpr unsigned kMostThreads = 1024, kStack = 1 << 16, kMostTurns = 10000000;

// What a thread waits for: a format of printf and its values.
struct Wait {
  const char* format = "";
  long long values[5] = {};
};

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Block {
  jmp_buf scheduler, fibers[kMostThreads];
  std::unique_ptr<char[]> stacks;
  size_t stack_bytes = 0;
  bool started[kMostThreads], done[kMostThreads];
  std::function<void()> kernel;
  unsigned threads = 0, index = 0;
  Barrier all, warps[kMostThreads / 32];
  char exchanged[2][kMostThreads][8];
  unsigned exchanges[kMostThreads];
  // In a cluster:
  std::vector<char> shared;
  bool ended = false;
  unsigned waiting = 0;            // fibers that found the cluster's barrier incomplete in this turn of theirs
  unsigned awaited[kMostThreads];  // generation of the cluster's barrier that a thread has arrived at
  bool arrived[kMostThreads];
  unsigned passed[kMostThreads];  // barriers of the cluster
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned size = 0, turn = 0, stuck = 0;
  Barrier barrier;
  std::mutex mutex;
  std::condition_variable turns;
};

inline Block single;              // the block that runs if there is no cluster
inline Block* current = &single;  // the block that runs
inline Cluster cluster;
inline int64_t wide_loads = 0;  // of 16 bytes, by one thread
inline int64_t launches = 0;
inline unsigned largest_cluster = 16;  // that the emulated device runs
inline int64_t progress = 0;           // arrivals at barriers and ends of waits
inline Wait waits[kMostThreads];       // of threads that have not ended, for reports
inline bool recovers = false;          // whether a problem ends the launch, not the process
inline std::string problem;            // that has ended a launch

}  // namespace emulation

inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

inline void fail(const char* what) {
  if (recovers) {
    problem = what;
    _longjmp(current->scheduler, 1);
  }
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

inline void enter() {
  current->kernel();
  if (current->arrived[threadIdx.x]) fail("a thread ends without waiting for its cluster");
  current->done[threadIdx.x] = true;
  _longjmp(current->scheduler, 1);
}

// Jumps, which unlike swapcontext make no system call; a context only gives a fiber its stack.
inline void start(unsigned t) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = current->stacks.get() + size_t{t} * kStack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, enter, 0);
  current->started[t] = true;
  setcontext(&context);
}

// Runs a fiber until it waits or ends.
__attribute__((noinline)) inline void resume(unsigned t) {
  threadIdx.x = t;
  if (_setjmp(current->scheduler)) return;
  if (current->started[t]) _longjmp(current->fibers[t], 1);
  start(t);
}

__attribute__((noinline)) inline void yield() {
  if (!_setjmp(current->fibers[threadIdx.x])) _longjmp(current->scheduler, 1);
}

// Returns whether the barrier is complete.
inline bool arrive(Barrier& barrier, unsigned count) {
  ++progress;
  if (++barrier.arrived < count) return false;
  barrier.arrived = 0;
  ++barrier.generation;
  return true;
}

inline void wait(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (arrive(barrier, count)) return;
  waits[threadIdx.x] = {"a barrier of its block or warp"};
  for (unsigned turns = 0; barrier.generation == generation; ++turns) {
    if (turns == kMostTurns) fail("a barrier that some thread does not reach");
    yield();
  }
  ++progress;
}

inline void arrive_at_cluster() {
  bool& arrived = current->arrived[threadIdx.x];
  if (arrived) fail("a thread arrives twice at a barrier of its cluster");
  arrived = true;
  current->awaited[threadIdx.x] = cluster.barrier.generation;
  if (arrive(cluster.barrier, cluster.size * current->threads)) cluster.stuck = 0;
}

inline void wait_for_cluster() {
  const unsigned t = threadIdx.x;
  if (!current->arrived[t]) fail("a thread waits for its cluster without arriving");
  while (cluster.barrier.generation == current->awaited[t]) {
    ++current->waiting;
    yield();
  }
  current->arrived[t] = false;
  ++current->passed[t];
}

// The address that `own` is in the shared memory of the block of that rank.
template <typename T>
const T* remote(const T* own, unsigned rank) {
  if (rank >= cluster.size) fail("a rank outside the cluster");
  const ptrdiff_t offset = reinterpret_cast<const char*>(own) - current->shared.data();
  if (offset < 0 || offset + sizeof(T) > current->shared.size()) fail("an address outside the shared memory");
  if (current->passed[threadIdx.x] == 0) fail("a read of a block's shared memory before a barrier of the cluster");
  const Block& other = *cluster.blocks[rank];
  if (other.ended) fail("a read of the shared memory of a block that has ended");
  return reinterpret_cast<const T*>(other.shared.data() + offset);
}

inline void prepare(Block& block, unsigned index, unsigned threads) {
  block.index = index;
  block.threads = threads;
  if (block.stack_bytes < size_t{threads} * kStack) {
    block.stack_bytes = size_t{threads} * kStack;
    block.stacks.reset(new char[block.stack_bytes]);
  }
  for (unsigned t = 0; t < threads; ++t) {
    block.started[t] = block.done[t] = block.arrived[t] = false;
    block.exchanges[t] = block.passed[t] = 0;
  }
}

// Runs each fiber once. Returns how many have not ended.
inline unsigned run_fibers() {
  Block& block = *current;
  unsigned left = 0;
  blockIdx.x = block.index;
  for (unsigned i = 0; i < block.threads; ++i) {
    const unsigned t = block.index % 2 ? block.threads - 1 - i : i;
    if (block.done[t]) continue;
    resume(t);
    left += !block.done[t];
  }
  return left;
}

// Gives the turn to the next block of the cluster that has not ended.
inline void pass_turn(std::unique_lock<std::mutex>& lock, unsigned rank) {
  if (++cluster.stuck > cluster.size) fail("a barrier of a cluster that some thread does not reach");
  for (unsigned i = 1; i <= cluster.size; ++i) {
    cluster.turn = (rank + i) % cluster.size;
    if (!cluster.blocks[cluster.turn]->ended) break;
  }
  cluster.turns.notify_all();
  if (!cluster.blocks[rank]->ended) cluster.turns.wait(lock, [&] { return cluster.turn == rank; });
  current = cluster.blocks[cluster.turn].get();
}

// The host thread of a block.
inline void run_in_cluster(unsigned rank) {
  std::unique_lock<std::mutex> lock(cluster.mutex);
  cluster.turns.wait(lock, [&] { return cluster.turn == rank; });
  Block& block = *cluster.blocks[rank];
  current = &block;
  for (;;) {
    block.waiting = 0;
    const unsigned left = run_fibers();
    if (left == 0) break;
    if (block.waiting == left) pass_turn(lock, rank);
  }
  block.ended = true;
  cluster.stuck = 0;
  pass_turn(lock, rank);
}

// Another lane's value.
template <typename T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  const unsigned self = threadIdx.x, parity = current->exchanges[self]++ % 2;
  std::memcpy(current->exchanged[parity][self], &value, sizeof value);
  wait(current->warps[self / 32], 32);
  std::memcpy(&value, current->exchanged[parity][source], sizeof value);
  return value;
}

// A bit for each lane of the warp.
inline unsigned ballot(bool vote) {
  const unsigned self = threadIdx.x, parity = current->exchanges[self]++ % 2;
  current->exchanged[parity][self][0] = vote;
  wait(current->warps[self / 32], 32);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    votes |= unsigned{current->exchanged[parity][self / 32 * 32 + lane][0] != 0} << lane;
  return votes;
}

inline void check_block(unsigned threads) {
  if (threads % 32 != 0 || threads > kMostThreads) fail("a block that is no whole number of warps");
  ++launches;
}

template <typename Kernel>
auto launch(Kernel kernel, unsigned blocks, unsigned threads, int, cudaStream_t) {
  return [=](auto... arguments) {
    check_block(threads);
    current = &single;
    single.kernel = [=] { kernel(arguments...); };
    for (unsigned index = 0; index < blocks; ++index) {
      prepare(single, index, threads);
      while (run_fibers() > 0) {
      }
    }
  };
}

// One cluster after the other.
inline void launch_clusters(std::function<void()> kernel, unsigned blocks, unsigned size, unsigned threads,
                            unsigned bytes) {
  check_block(threads);
  while (cluster.blocks.size() < size) cluster.blocks.push_back(std::make_unique<Block>());
  for (unsigned first = 0; first < blocks; first += size) {
    std::vector<std::thread> hosts;
    cluster.size = size;
    cluster.turn = first / size % 2 ? size - 1 : 0;
    cluster.stuck = 0;
    cluster.barrier = {};
    for (unsigned rank = 0; rank < size; ++rank) {
      Block& block = *cluster.blocks[rank];
      prepare(block, first + rank, threads);
      block.shared.assign(bytes, static_cast<char>(0xff));
      block.ended = false;
      block.kernel = kernel;
    }
    for (unsigned rank = 0; rank < size; ++rank) hosts.emplace_back(run_in_cluster, rank);
    for (std::thread& host : hosts) host.join();
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::current->all, emulation::current->threads); }
inline void __syncwarp() { emulation::wait(emulation::current->warps[threadIdx.x / 32], 32); }
inline unsigned __ballot_sync(unsigned, bool vote) { return emulation::ballot(vote); }
inline void __threadfence() {}
inline void __threadfence_system() {}
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
T __shfl_sync(unsigned, T value, unsigned lane) {
  return emulation::exchange(value, threadIdx.x / 32 * 32 + lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  const unsigned lane = threadIdx.x % 32;
  return emulation::exchange(value, lane + distance < 32 ? threadIdx.x + distance : threadIdx.x);
}
