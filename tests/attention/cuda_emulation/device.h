// A block of a Hopper GPU on a CPU: its shared memory, the order in which its threads run, and work that goes on beside
// them (bulk copies and matrix products), which ends at once or as late as possible.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulation {

constexpr unsigned kWarpGroup = 128, kLargestShared = 227 * 1024;
constexpr unsigned kFirstAddress = 1024;  // of shared memory; what is below belongs to the system

// How a launch is scheduled. 0: work ends at once, and threads run in ascending order. 1: work ends only when no thread
// can go on, the newest first, and threads run in descending order. Others: all of that by chance.
inline uint64_t seed = 0;
inline uint64_t random_state = 0;

inline unsigned random_below(unsigned limit) {
  uint64_t z = random_state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return static_cast<unsigned>((z ^ z >> 31) >> 32) % limit;
}

inline bool is_postponed() { return seed == 1 || (seed > 1 && random_below(2)); }

alignas(1024) inline char shared_memory[kLargestShared];
inline unsigned shared_bytes = 0;  // of the launch
inline std::vector<std::function<void()>> postponed;

// Threads of a warp group may be at different places: sometimes another thread goes first.
inline void let_others_run() {
  if (seed < 2 || random_below(16)) return;
  ++progress;
  yield();
}

inline void do_work(std::function<void()> work) {
  if (is_postponed()) {
    postponed.push_back(std::move(work));
  } else {
    work();
  }
}

inline unsigned address_of(const void* pointer, size_t bytes = 0) {
  const ptrdiff_t offset = static_cast<const char*>(pointer) - shared_memory;
  if (offset < 0 || offset + bytes > shared_bytes) fail("an address outside the shared memory");
  return kFirstAddress + static_cast<unsigned>(offset);
}

inline char* at_address(unsigned address, unsigned bytes) {
  if (address < kFirstAddress || address - kFirstAddress + bytes > shared_bytes) {
    fail("an address outside the shared memory");
  }
  return shared_memory + (address - kFirstAddress);
}

// Which unit of 16 bytes ordinary threads have written without making it visible to copies and products: the thread
// + 1.
inline uint16_t unfenced[kLargestShared / 16];
inline std::vector<unsigned> own_unfenced[kMostThreads];

// What begins with a block and is checked at the end of a thread and of a block, by the parts of the emulation.
struct Part {
  void (*begin)();
  void (*end_of_thread)();
  void (*end)();
};
inline std::vector<Part> parts;

inline bool add_part(Part part) {
  parts.push_back(part);
  return true;
}

// Threads that wait for the same, in a line each.
inline std::string stuck_threads() {
  std::string report = "no thread can go on:";
  for (unsigned t = 0; t < current->threads;) {
    const unsigned first = t;
    const auto state = [](unsigned i) {
      const auto& v = waits[i].values;
      char line[200];
      std::snprintf(line, sizeof line, current->done[i] ? "ended" : waits[i].format, v[0], v[1], v[2], v[3], v[4]);
      return std::string(line);
    };
    while (t < current->threads && state(t) == state(first)) ++t;
    report += "\n  threads " + std::to_string(first) + " to " + std::to_string(t - 1) + ": " + state(first);
  }
  return report;
}

// Runs one piece of work in the place of a thread, so that a problem ends the launch.
__attribute__((noinline)) inline void run_postponed(size_t index) {
  const std::function<void()> work = std::move(postponed[index]);
  postponed.erase(postponed.begin() + static_cast<ptrdiff_t>(index));
  if (_setjmp(current->scheduler)) return;
  work();
}

__attribute__((noinline)) inline void check(void (*checks)()) {
  if (_setjmp(current->scheduler)) return;
  checks();
}

inline void order_warps(std::vector<unsigned>& warps) {
  std::iota(warps.begin(), warps.end(), 0);
  if (seed == 1) std::reverse(warps.begin(), warps.end());
  for (unsigned i = static_cast<unsigned>(warps.size()); seed > 1 && i > 1; --i) {
    std::swap(warps[i - 1], warps[random_below(i)]);
  }
}

inline void run_block(unsigned index, unsigned threads) {
  prepare(single, index, threads);
  single.all = {};
  std::fill(std::begin(single.warps), std::end(single.warps), Barrier{});
  std::memset(shared_memory, 0xff, shared_bytes);
  std::fill(std::begin(unfenced), std::end(unfenced), uint16_t{0});
  for (auto& units : own_unfenced) units.clear();
  postponed.clear();
  for (const Part& part : parts) part.begin();
  blockIdx.x = index;
  std::vector<unsigned> warps(threads / 32);
  for (;;) {
    const int64_t before = progress;
    unsigned left = 0;
    order_warps(warps);
    for (const unsigned warp : warps) {
      for (unsigned i = 0; i < 32; ++i) {
        const unsigned t = 32 * warp + (seed % 2 ? 31 - i : i);
        if (single.done[t]) continue;
        resume(t);
        if (!problem.empty()) return;
        left += !single.done[t];
        progress += single.done[t];
      }
    }
    if (left == 0) break;
    const bool stuck = progress == before;
    if (stuck && postponed.empty()) check([] { fail(stuck_threads().c_str()); });
    const size_t waiting = postponed.size();
    if (waiting && (stuck || (seed > 1 && random_below(2)))) {
      run_postponed(seed == 1 ? waiting - 1 : random_below(static_cast<unsigned>(waiting)));
    }
    if (!problem.empty()) return;
  }
  for (const Part& part : parts) {
    if (problem.empty()) check(part.end);
  }
}

// A launch whose blocks run one after the other. A problem is an exception.
template <typename Kernel>
auto launch_hopper(Kernel kernel, int blocks, int threads, int bytes, cudaStream_t) {
  return [=](auto... arguments) {
    check_block(static_cast<unsigned>(threads));
    if (bytes > static_cast<int>(kLargestShared)) throw std::runtime_error("more shared memory than a block has");
    current = &single;
    gridDim.x = static_cast<unsigned>(blocks);
    shared_bytes = static_cast<unsigned>(bytes);
    random_state = seed;
    recovers = true;
    problem.clear();
    single.kernel = [&] {
      kernel(arguments...);
      for (const Part& part : parts) part.end_of_thread();
    };
    for (unsigned index = 0; index < gridDim.x && problem.empty(); ++index)
      run_block(index, static_cast<unsigned>(threads));
    recovers = false;
    if (!problem.empty()) throw std::runtime_error("CUDA emulation: " + problem);
  };
}

}  // namespace emulation

enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
struct cudaFuncAttributes {
  int binaryVersion, numRegs;
};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  *attributes = {90, 168};
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = 2;  // multiprocessors: few, so that a block has several tiles
  return cudaSuccess;
}
