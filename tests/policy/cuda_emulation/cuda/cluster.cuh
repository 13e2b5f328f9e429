// csrc/cuda/cluster.cuh for the emulation: see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define STAR_CLUSTERS 1

namespace star {
namespace cuda {

constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;
constexpr int64_t kSharedBytes = 227 * 1024;

inline char* dynamic_shared() { return emulation::current->shared.data(); }
inline void cluster_arrive() { emulation::arrive_at_cluster(); }
inline void cluster_wait() { emulation::wait_for_cluster(); }
inline double cluster_read(const double* own, unsigned rank) { return *emulation::remote(own, rank); }

struct ClusterShape {
  unsigned blocks, cluster, threads, bytes;
};

template <typename Kernel, typename... Arguments>
bool launch_clusters(Kernel kernel, const ClusterShape& shape, cudaStream_t, const Arguments&... arguments) {
  if (shape.cluster > emulation::largest_cluster) return false;
  if (shape.cluster > kLargestCluster || shape.blocks % shape.cluster != 0 || shape.bytes > kSharedBytes) {
    emulation::fail("a cluster that no device can run");
  }
  emulation::launch_clusters([=] { kernel(arguments...); }, shape.blocks, shape.cluster, shape.threads, shape.bytes);
  return true;
}

}  // namespace cuda
}  // namespace star
