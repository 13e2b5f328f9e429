// Thread-block clusters: blocks that run at the same time and read one another's shared memory. Devices from sm_90 on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

namespace star {
namespace cuda {

constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;  // blocks; any device has clusters of the first size
constexpr int64_t kSharedBytes = 227 * 1024;                    // of a block

// Whether this code is compiled for devices that have clusters.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define STAR_CLUSTERS 1
#else
#define STAR_CLUSTERS 0
#endif

// The shared memory whose size is given at the launch. Blocks of a cluster have the same addresses in it.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(16) char star_dynamic_shared[];
  return star_dynamic_shared;
}

// A barrier of the cluster in two halves: what threads write before they arrive is visible to those that have waited.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The value that the block of a rank has at the address that `own` has in this block's shared memory.
__device__ __forceinline__ double cluster_read(const double* own, unsigned rank) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  unsigned remote;
  double value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(remote) : "memory");
  return value;
}

namespace {

struct ClusterShape {
  unsigned blocks, cluster, threads, bytes;
};

// Whether the device can run a cluster of this kernel. Each thread remembers the answers, which take microseconds.
inline bool cluster_fits(const void* kernel, const ClusterShape& shape, const cudaLaunchConfig_t& config) {
  struct Answer {
    const void* kernel;
    int device;
    ClusterShape shape;
    bool fits;
  };
  constexpr size_t kMost = 64;
  static thread_local std::vector<Answer> answers;
  int device = 0;
  cudaGetDevice(&device);
  for (const Answer& known : answers) {
    const ClusterShape& s = known.shape;
    if (known.kernel == kernel && known.device == device && s.cluster == shape.cluster && s.threads == shape.threads &&
        s.bytes == shape.bytes) {
      return known.fits;
    }
  }
  cudaFuncAttributes compiled;
  int clusters = 0, most_bytes = 0;
  cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  // On devices newer than the library the driver compiles the PTX of sm_80, which has no clusters.
  bool fits = cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90;
  fits = fits && static_cast<int64_t>(shape.bytes + compiled.sharedSizeBytes) <= most_bytes;
  fits = fits && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      most_bytes - static_cast<int>(compiled.sharedSizeBytes)) == cudaSuccess;
  fits = fits && cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  fits = fits && cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess && clusters > 0;
  if (!fits) cudaGetLastError();  // a refusal is no error of the launch
  if (answers.size() == kMost) answers.clear();
  answers.push_back({kernel, device, shape, fits});
  return fits;
}

// Launches the kernel with clusters of consecutive blocks. Returns false, without a launch, where the device cannot.
template <typename Kernel, typename... Arguments>
bool launch_clusters(Kernel kernel, const ClusterShape& shape, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = shape.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (!cluster_fits(reinterpret_cast<const void*>(kernel), shape, config)) return false;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return true;
}

}  // namespace
}  // namespace cuda
}  // namespace star
