// Copies to shared memory on a CPU: bulk copies of tiles (PTX ISA, "cp.async.bulk.tensor"; CUDA driver API,
// "cuTensorMapEncodeTiled"), and copies of 16 bytes by ordinary threads ("cp.async").
//
// The place of a copy is NaN from its start to its end.
#pragma once

#include <cuda.h>

#include "barriers.h"

namespace emulation {

// The 128-byte pattern: bits 4 to 6 of an address in shared memory, a unit of 16 bytes among the eight of 128, are
// exclusive-ored with bits 7 to 9 (PTX ISA, "Swizzling modes" of tensors; Swizzle<3, 4, 3> of 16-byte units).
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline void poison(void* place, unsigned bytes) { std::memset(place, 0xff, bytes); }

inline unsigned pending_tiles = 0;

inline void copy_tile(unsigned to, const CUtensorMap& map, const int (&first)[4]) {
  const unsigned row_bytes = map.box[0] * 2;
  unsigned at = to;
  for (unsigned i3 = 0; i3 < map.box[3]; ++i3) {
    for (unsigned i2 = 0; i2 < map.box[2]; ++i2) {
      for (unsigned i1 = 0; i1 < map.box[1]; ++i1, at += row_bytes) {
        const int64_t place[3] = {first[1] + int64_t{i1}, first[2] + int64_t{i2}, first[3] + int64_t{i3}};
        const char* row = map.data;
        bool inside = true;
        for (int d = 0; d < 3; ++d) {
          inside = inside && place[d] >= 0 && place[d] < static_cast<int64_t>(map.sizes[d + 1]);
          row += place[d] * static_cast<int64_t>(map.strides[d]);
        }
        for (unsigned i0 = 0; i0 < map.box[0]; ++i0) {
          const int64_t column = first[0] + int64_t{i0};
          const bool counts = inside && column >= 0 && column < static_cast<int64_t>(map.sizes[0]);
          uint16_t element = 0;
          if (counts) std::memcpy(&element, row + 2 * column, 2);
          std::memcpy(at_address(swizzled(at + 2 * i0), 2), &element, 2);
        }
      }
    }
  }
}

inline void load_tile(void* shared, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  if (map->mark != kTensorMapMark) fail("a tensor map that is not encoded");
  const unsigned bytes = 2 * map->box[0] * map->box[1] * map->box[2] * map->box[3];
  const unsigned to = address_of(shared, bytes);
  if (to % 1024 != 0) fail("a tile in the 128-byte pattern must start at a multiple of 1024 bytes");
  if (!mbarriers[index_of(barrier)].fenced) fail("a bulk copy uses a barrier that mbarrier_init_fence does not follow");
  poison(shared, bytes);
  ++pending_tiles;
  const CUtensorMap copied = *map;
  do_work([=] {
    --pending_tiles;
    copy_tile(to, copied, {c0, c1, c2, c3});
    bytes_came(barrier, bytes);
  });
}

struct Copy {
  unsigned to;
  const void* from;
  bool valid;
};
inline std::vector<Copy> own_copies[kMostThreads];

inline void copy_16(void* shared, const void* global, bool valid) {
  const unsigned to = address_of(shared, 16);
  if (to % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a misaligned copy of 16 bytes");
  poison(shared, 16);
  own_copies[threadIdx.x].push_back({to, global, valid});
  const unsigned unit = (to - kFirstAddress) / 16;
  unfenced[unit] = static_cast<uint16_t>(threadIdx.x + 1);
}

inline void copy_wait() {
  const unsigned t = threadIdx.x;
  for (const Copy& copy : own_copies[t]) {
    char* to = at_address(copy.to, 16);
    std::memset(to, 0, 16);
    if (copy.valid) std::memcpy(to, copy.from, 16);
    own_unfenced[t].push_back((copy.to - kFirstAddress) / 16);
  }
  own_copies[t].clear();
}

// Only what has been waited for becomes visible.
inline void shared_fence() {
  for (const unsigned unit : own_unfenced[threadIdx.x]) {
    if (unfenced[unit] == threadIdx.x + 1) unfenced[unit] = 0;
  }
  own_unfenced[threadIdx.x].clear();
}

inline const bool copies_are_part = add_part({[] {
                                                pending_tiles = 0;
                                                for (auto& copies : own_copies) copies.clear();
                                              },
                                              [] {
                                                if (!own_copies[threadIdx.x].empty())
                                                  fail("a thread ends before its copies");
                                              },
                                              [] {
                                                if (pending_tiles > 0) fail("a block ends before its bulk copies");
                                              }});

}  // namespace emulation
