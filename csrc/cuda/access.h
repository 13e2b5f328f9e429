// How a kernel reads and writes latents: in runs of kRun elements that follow one another, along positions or, where
// channels are innermost ("packed"), along channels.
//
// Vector is for latents whose runs are aligned: loads of 16 bytes, or of 8 for the 16-bit tensors beside a float32 one.
// The width of the dtypes is known at compile time. Which of the two 16-bit dtypes it is selects between two
// conversions of a value already loaded: that is free beside the loads, and a kernel for each dtype would double the
// build. Scalar takes every layout and mixture of dtypes, one element at a time, and sums in the same order, so that a
// latent may take one in the sampling step and the other in the loss.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "cuda/half.h"

namespace star {
namespace cuda {

constexpr int kPackedRun = 8;  // 16 bytes of 16-bit elements; fixed, because the order of sums depends on it

template <typename T, int kElements>
struct Run {
  T value[kElements];
};

template <int kBytes>
struct Word {
  using Type = uint4;
  static constexpr int kCount = kBytes / 16;
};
template <>
struct Word<8> {
  using Type = uint2;
  static constexpr int kCount = 1;
};
template <>
struct Word<4> {
  using Type = unsigned;
  static constexpr int kCount = 1;
};
template <>
struct Word<1> {
  using Type = unsigned char;
  static constexpr int kCount = 1;
};

// Reads from memory that the kernel does not write.
template <typename T, int kElements>
__device__ __forceinline__ Run<T, kElements> load_run(const T* source) {
  using Words = Word<kElements * sizeof(T)>;
  Run<T, kElements> run;
#pragma unroll
  for (int i = 0; i < Words::kCount; ++i) {
    const typename Words::Type word = __ldg(reinterpret_cast<const typename Words::Type*>(source) + i);
    memcpy(reinterpret_cast<char*>(&run) + i * sizeof word, &word, sizeof word);
  }
  return run;
}

template <typename T, int kElements>
__device__ __forceinline__ void store_run(T* target, const Run<T, kElements>& run) {
  using Words = Word<kElements * sizeof(T)>;
#pragma unroll
  for (int i = 0; i < Words::kCount; ++i) {
    typename Words::Type word;
    memcpy(&word, reinterpret_cast<const char*>(&run) + i * sizeof word, sizeof word);
    reinterpret_cast<typename Words::Type*>(target)[i] = word;
  }
}

template <typename OutputType, typename LatentType, bool kChannelsInnermost, int kElements>
struct Vector {
  using Output = OutputType;
  using Latent = LatentType;
  static constexpr bool kVector = true, kPacked = kChannelsInnermost;
  static constexpr int kRun = kElements, kSlots = kPacked ? 1 : kRun;  // elements, and positions, of a run
  bool brain;                                                          // 16-bit elements are bfloat16

  __device__ __forceinline__ explicit Vector(const View& model_output)
      : brain(model_output.dtype == DType::kBFloat16) {}

  template <typename T>
  __device__ __forceinline__ Run<T, kRun> load(const View& view, int64_t offset) const {
    return load_run<T, kRun>(static_cast<const T*>(view.data) + offset);
  }

  __device__ __forceinline__ float value(const Run<float, kRun>& run, int i) const { return run.value[i]; }
  __device__ __forceinline__ float value(const Run<Half, kRun>& run, int i) const { return widen(run.value[i], brain); }

  // Stores values in the view's dtype and returns what was stored.
  template <typename T>
  __device__ __forceinline__ Run<T, kRun> store(const View& view, int64_t offset, const float (&values)[kRun]) const {
    Run<T, kRun> run;
#pragma unroll
    for (int i = 0; i < kRun; ++i) convert(values[i], run.value[i]);
    store_run<T, kRun>(static_cast<T*>(view.data) + offset, run);
    return run;
  }

 private:
  __device__ __forceinline__ void convert(float x, float& out) const { out = x; }
  __device__ __forceinline__ void convert(float x, Half& out) const { out = narrow(x, brain); }
};

struct Scalar {
  using Output = float;  // after the load
  using Latent = float;
  static constexpr bool kVector = false, kPacked = false;
  static constexpr int kRun = 1, kSlots = 1;

  __device__ __forceinline__ explicit Scalar(const View&) {}

  template <typename T>
  __device__ __forceinline__ Run<float, 1> load(const View& view, int64_t offset) const {
    if (view.dtype == DType::kFloat32) return {{static_cast<const float*>(view.data)[offset]}};
    return {{widen(static_cast<const Half*>(view.data)[offset], view.dtype == DType::kBFloat16)}};
  }

  __device__ __forceinline__ float value(const Run<float, 1>& run, int) const { return run.value[0]; }

  template <typename T>
  __device__ __forceinline__ Run<float, 1> store(const View& view, int64_t offset, const float (&values)[1]) const {
    if (view.dtype == DType::kFloat32) {
      static_cast<float*>(view.data)[offset] = values[0];
      return {{values[0]}};
    }
    const bool brain = view.dtype == DType::kBFloat16;
    const Half half = narrow(values[0], brain);
    static_cast<Half*>(view.data)[offset] = half;
    return {{widen(half, brain)}};
  }
};

template <typename Access>
using OutputRun = Run<typename Access::Output, Access::kRun>;
template <typename Access>
using LatentRun = Run<typename Access::Latent, Access::kRun>;

}  // namespace cuda
}  // namespace star
