// Counters of the emulation, for the tests, and kernels that misuse a cluster.
#include <tvm/ffi/function.h>

#include "cuda/cluster.cuh"

static int64_t wide_loads() { return emulation::wide_loads; }
static int64_t launches() { return emulation::launches; }
static int64_t cluster_size() { return emulation::cluster.size; }  // of the last launch with clusters
static void limit_clusters(int64_t largest) { emulation::largest_cluster = static_cast<unsigned>(largest); }

// What is wrong with a kernel whose blocks read one another's number.
enum Fault : int64_t { kNone, kNoBarrier, kNoLastBarrier, kOneArrives, kEndsEarly, kLateWrite };

// Returns the sum of what all blocks have read: with n blocks, n * n.
static double exchange(int64_t fault, int64_t size) {
  static double result;
  result = 0.0;
  const auto kernel = [](int64_t fault, unsigned size) {
    double* own = reinterpret_cast<double*>(star::cuda::dynamic_shared());
    if (threadIdx.x == 0 && fault != kLateWrite) *own = 1.0;
    if (fault != kNoBarrier && !(fault == kOneArrives && blockIdx.x > 0)) {
      star::cuda::cluster_arrive();
      star::cuda::cluster_wait();
    }
    if (threadIdx.x == 0) *own = 1.0;
    if (fault == kOneArrives) return;
    double sum = 0.0;
    for (unsigned rank = 0; rank < size; ++rank) sum += star::cuda::cluster_read(own, rank);
    if (threadIdx.x == 0) result += sum;
    if (fault != kNoLastBarrier) star::cuda::cluster_arrive();
    if (fault != kNoLastBarrier && fault != kEndsEarly) star::cuda::cluster_wait();
  };
  const unsigned blocks = static_cast<unsigned>(size);
  star::cuda::launch_clusters(kernel, {blocks, blocks, 32, sizeof(double)}, nullptr, fault, blocks);
  return result;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(wide_loads, wide_loads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(launches, launches);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cluster_size, cluster_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(limit_clusters, limit_clusters);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(exchange, exchange);
