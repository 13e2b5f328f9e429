// Barriers of Hopper on a CPU: those in shared memory with phases (PTX ISA, "mbarrier"), those of numbered groups of
// warps ("bar, barrier"), and the registers that warp groups hand over ("setmaxnreg").
#pragma once

#include "device.h"

namespace emulation {

struct MBarrier {
  unsigned arrivals, pending;
  int64_t bytes;  // expected and not yet come
  int64_t phase;  // how many have ended
  unsigned initialiser;
  bool fenced;  // visible to bulk copies
};

constexpr unsigned kMostBarriers = 64;
constexpr int64_t kNever = -2, kMostBytes = (1 << 20) - 1;
constexpr uint64_t kMark = 0x5354415242415200;  // in the memory of a barrier
inline std::vector<MBarrier> mbarriers;
inline int16_t mbarrier_index[kLargestShared / 8];   // at an address, or -1
inline int64_t waited[kMostThreads][kMostBarriers];  // the last phase that a thread has waited for

inline unsigned index_of(const uint64_t* barrier) {
  const unsigned offset = address_of(barrier, 8) - kFirstAddress;
  const int index = offset % 8 == 0 ? mbarrier_index[offset / 8] : -1;
  if (index < 0) fail("a barrier in shared memory that is not initialised");
  if (*barrier != kMark + static_cast<unsigned>(index)) fail("a barrier in shared memory was overwritten");
  return static_cast<unsigned>(index);
}

inline void init(uint64_t* barrier, unsigned arrivals) {
  const unsigned offset = address_of(barrier, 8) - kFirstAddress;
  if (offset % 8 != 0 || mbarrier_index[offset / 8] >= 0) fail("a barrier in shared memory is initialised twice");
  if (arrivals == 0 || arrivals > kMostBytes) fail("a barrier in shared memory without arrivals");
  if (mbarriers.size() == kMostBarriers) fail("too many barriers for the emulation");
  *barrier = kMark + mbarriers.size();
  mbarrier_index[offset / 8] = static_cast<int16_t>(mbarriers.size());
  mbarriers.push_back({arrivals, arrivals, 0, 0, threadIdx.x, false});
}

inline void fence_init() {
  for (MBarrier& barrier : mbarriers) barrier.fenced |= barrier.initialiser == threadIdx.x;
}

inline void end_phase(MBarrier& barrier) {
  ++progress;
  if (barrier.bytes > kMostBytes || barrier.bytes < -kMostBytes) fail("a barrier expects more bytes than it can count");
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
}

inline void arrive(uint64_t* address, int64_t bytes = 0) {
  MBarrier& barrier = mbarriers[index_of(address)];
  if (barrier.pending == 0) fail("more arrivals at a barrier in shared memory than it was initialised for");
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase(barrier);
  let_others_run();
}

inline void bytes_came(uint64_t* address, int64_t bytes) {
  MBarrier& barrier = mbarriers[index_of(address)];
  barrier.bytes -= bytes;
  end_phase(barrier);
}

// A thread waits for one phase after the other, from 0 or, if its first parity is 1, from the one before that. The
// hardware knows the parity only: it takes a phase that is two further for the one waited for.
inline void wait_for_phase(uint64_t* address, unsigned parity) {
  const unsigned index = index_of(address);
  int64_t& last = waited[threadIdx.x][index];
  const int64_t phase = last == kNever ? (parity ? -1 : 0) : last + 1;
  if ((phase & 1) != static_cast<int64_t>(parity)) fail("a thread waits twice for the same phase, or skips one");
  while (mbarriers[index].phase <= phase) {
    const MBarrier& barrier = mbarriers[index];
    waits[threadIdx.x] = {
        "barrier %lld in shared memory, the end of phase %lld; %lld have ended, %lld arrivals and "
        "%lld bytes are missing",
        {index, phase, barrier.phase, barrier.pending, barrier.bytes}};
    yield();
  }
  if (mbarriers[index].phase > phase + 1) fail("a thread waits for a phase that ended before the last one");
  last = phase;
  ++progress;
}

struct NamedBarrier {
  unsigned threads = 0;
  Barrier barrier;
};
inline NamedBarrier named[16];
inline unsigned named_arrivals[kMostThreads][16];  // the generation + 1 in which a thread arrived last

// Returns the generation in which this thread arrives.
inline unsigned arrive_at_named(unsigned id, unsigned threads) {
  if (id == 0 || id > 15) fail("a named barrier must have a number from 1 to 15");
  if (threads == 0 || threads % 32 != 0 || threads > current->threads) {
    fail("a named barrier for no whole number of the block's warps");
  }
  NamedBarrier& at = named[id];
  if (at.barrier.arrived == 0) at.threads = threads;
  if (at.threads != threads) fail("threads arrive at a named barrier with different counts");
  const unsigned generation = at.barrier.generation;
  unsigned& last = named_arrivals[threadIdx.x][id];
  if (last == generation + 1) fail("a thread arrives twice at a named barrier");
  last = generation + 1;
  arrive(at.barrier, threads);
  return generation;
}

inline void wait_at_named(unsigned id, unsigned threads) {
  const unsigned generation = arrive_at_named(id, threads);
  while (named[id].barrier.generation == generation) {
    waits[threadIdx.x] = {"named barrier %lld; %lld of %lld threads are there",
                          {id, named[id].barrier.arrived, named[id].threads}};
    yield();
  }
  ++progress;
}

// Registers of a thread, by warp group, and those that groups have given back.
inline int registers[kMostThreads], free_registers;

inline int launched_registers() { return std::min(255, 65536 / static_cast<int>(current->threads)) / 8 * 8; }

inline void set_registers(int count, bool more) {
  const unsigned t = threadIdx.x;
  if (count % 8 != 0 || count < 24 || count > 256) fail("a thread cannot have that many registers");
  if (more ? count < registers[t] : count > registers[t])
    fail("a warp group asks for registers in the wrong direction");
  while (more && free_registers < count - registers[t]) {
    waits[t] = {"%lld registers", {count}};
    yield();
  }
  free_registers -= count - registers[t];
  registers[t] = count;
  ++progress;
}

inline const bool barriers_are_part =
    add_part({[] {
                mbarriers.clear();
                std::fill(std::begin(mbarrier_index), std::end(mbarrier_index), int16_t{-1});
                for (auto& phases : waited) std::fill(std::begin(phases), std::end(phases), kNever);
                std::fill(std::begin(named), std::end(named), NamedBarrier{});
                std::memset(named_arrivals, 0, sizeof named_arrivals);
                std::fill(std::begin(registers), std::end(registers), launched_registers());
                free_registers = 0;
              },
              [] {},
              [] {
                for (const MBarrier& barrier : mbarriers) {
                  if (barrier.bytes != 0) fail("a block ends while a barrier expects bytes");
                }
                for (const NamedBarrier& each : named) {
                  if (each.barrier.arrived != 0) fail("a block ends while threads have arrived at a named barrier");
                }
                for (unsigned t = 0; t < current->threads; ++t) {
                  if (registers[t] != registers[t / kWarpGroup * kWarpGroup])
                    fail("threads of a warp group differ in registers");
                }
              }});

}  // namespace emulation
