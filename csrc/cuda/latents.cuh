// How a kernel reads and writes latents, and which positions each block and thread works on.
//
// Latents [C, P]: a thread owns a run of consecutive positions and loops over the channels. Packed latents [P, C],
// whose channels are innermost: a few lanes of a warp share a position; each reads every n-th run of channels, and
// their sums are combined in a tree of fixed shape. The number of lanes depends only on the number of channels, so the
// sampling step and the loss add in the same order for every dtype and layout.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "arguments.h"
#include "flow_policy.h"

namespace star {
namespace cuda {

constexpr int kThreads = 256;  // the largest block
constexpr int kPackedRun = 8;  // 16 bytes of 16-bit elements; fixed, because the order of the sums depends on it
constexpr unsigned kAllLanes = 0xffffffffu;

struct Half {  // the bits of a float16 or a bfloat16; CUDA's own headers for them slow compilation down
  unsigned short bits;
};

#if defined(__CUDACC__)  // the CUDA emulation of the tests uses the CPU kernels' conversions
__device__ __forceinline__ float from_float16(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ float from_bfloat16(unsigned short bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ __forceinline__ unsigned short to_float16(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ unsigned short to_bfloat16(float x) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

__device__ __forceinline__ float widen(Half x, bool is_bf16) {
  const float float16 = from_float16(x.bits);
  return is_bf16 ? from_bfloat16(x.bits) : float16;
}

// Rounds to nearest, ties to even.
__device__ __forceinline__ Half narrow(float x, bool is_bf16) {
  const unsigned short bfloat16 = to_bfloat16(x), float16 = to_float16(x);
  return {is_bf16 ? bfloat16 : float16};
}

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
struct Word<2> {
  using Type = unsigned short;
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

// Access to latents whose runs are aligned: loads of 16 bytes, or of 8 for the 16-bit tensors beside a float32 one. The
// width of the dtypes is known at compile time; whether 16-bit elements are float16 or bfloat16 is not, because
// selecting between two conversions of a loaded value costs little and a kernel for each would double the build.
template <typename OutputType, typename LatentType, bool kChannelsInnermost, int kElements>
struct Vector {
  using Output = OutputType;
  using Latent = LatentType;
  static constexpr bool kVector = true, kPacked = kChannelsInnermost;
  static constexpr int kRun = kElements, kSlots = kPacked ? 1 : kRun;  // elements and positions of a run
  bool is_bf16;                                                        // 16-bit elements are bfloat16

  __device__ __forceinline__ explicit Vector(const View& model_output)
      : is_bf16(model_output.dtype == DType::kBFloat16) {}

  template <typename T>
  __device__ __forceinline__ Run<T, kRun> load(const View& view, int64_t offset) const {
    return load_run<T, kRun>(static_cast<const T*>(view.data) + offset);
  }

  __device__ __forceinline__ float value(const Run<float, kRun>& run, int i) const { return run.value[i]; }
  __device__ __forceinline__ float value(const Run<Half, kRun>& run, int i) const {
    return widen(run.value[i], is_bf16);
  }

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
  __device__ __forceinline__ void convert(float x, Half& out) const { out = narrow(x, is_bf16); }
};

// Access to every layout and mixture of dtypes, one element at a time. Sums run in the order of Vector's, because a
// latent may be read by one in the sampling step and by the other in the loss.
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
    const bool is_bf16 = view.dtype == DType::kBFloat16;
    const Half half = narrow(values[0], is_bf16);
    static_cast<Half*>(view.data)[offset] = half;
    return {{widen(half, is_bf16)}};
  }
};

template <typename Access>
constexpr bool kAlongPositions = Access::kVector && !Access::kPacked;  // whether a run has several positions

template <typename Access>
using OutputRun = Run<typename Access::Output, Access::kRun>;
template <typename Access>
using LatentRun = Run<typename Access::Latent, Access::kRun>;

struct Tiling {
  unsigned tile;    // positions of a block
  unsigned tiles;   // of a sample
  unsigned blocks;  // samples times tiles
  unsigned threads;
  unsigned lanes;   // of a position; a power of two
  unsigned finish;  // threads that add up the tiles of a sample; a power of two
};

struct Place {             // of a block
  unsigned b, first, end;  // sample; positions
};

__device__ __forceinline__ Place place_of(const Tiling& t, int64_t positions) {
  const unsigned b = blockIdx.x / t.tiles, first = (blockIdx.x - b * t.tiles) * t.tile;
  const unsigned rest = static_cast<unsigned>(positions) - first;
  return {b, first, first + (rest < t.tile ? rest : t.tile)};
}

// Calls body(position, lane, active) for each of this thread's positions of a tile. All threads of the block make
// equally many calls, so that body may combine the lanes of a warp; position is out of range if active is false.
template <typename Access, typename Body>
__device__ __forceinline__ void for_each_position(const Tiling& t, const Place& place, Body body) {
  if constexpr (kAlongPositions<Access>) {
    const unsigned position = place.first + threadIdx.x * Access::kRun;
    body(position, 0u, position < place.end);
  } else {
    const unsigned start = threadIdx.x / t.lanes, step = t.threads / t.lanes;
    for (unsigned base = place.first; base < place.end; base += step) {
      body(base + start, threadIdx.x & (t.lanes - 1), base + start < place.end);
    }
  }
}

// Calls use(c, load(c)) for as many channels from c on as are a multiple of kTogether, whose loads are issued together.
// Returns the channel after them.
template <int kTogether, typename Load, typename Use>
__device__ __forceinline__ int use_runs(int c, int count, Load load, Use use) {
  for (; c + kTogether <= count; c += kTogether) {
    decltype(load(0)) runs[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) runs[i] = load(c + i);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) use(c + i, runs[i]);
  }
  return c;
}

// Channels whose loads a thread issues together, if runs lie along positions: 192 bytes for three float32 tensors.
template <typename Access>
constexpr int kInFlight = 16 / Access::kRun;

// Calls use(c, load(c)) for the runs of channels of a lane.
template <typename Access, int kTogether = kInFlight<Access>, typename Load, typename Use>
__device__ __forceinline__ void for_each_run(const Tiling& t, int64_t channels, unsigned lane, Load load, Use use) {
  const int count = static_cast<int>(channels);
  if constexpr (kAlongPositions<Access>) {
    int c = use_runs<kTogether>(0, count, load, use);
    if constexpr (kTogether > 4) c = use_runs<4>(c, count, load, use);
#pragma unroll 1
    for (; c < count; ++c) use(c, load(c));
  } else {
    const int step = kPackedRun * static_cast<int>(t.lanes);
#pragma unroll 1
    for (int first = kPackedRun * static_cast<int>(lane); first < count; first += step) {
#pragma unroll 1
      for (int c = first; c < first + kPackedRun && c < count; c += Access::kRun) use(c, load(c));
    }
  }
}

__device__ __forceinline__ int64_t offset_of(const View& view, unsigned b, unsigned position, int c) {
  return b * view.batch + position * view.position + c * view.channel;
}

template <typename Access>
__device__ __forceinline__ OutputRun<Access> load_output(const Access& access, const View& view, unsigned b,
                                                         unsigned position, int c) {
  return access.template load<typename Access::Output>(view, offset_of(view, b, position, c));
}

template <typename Access>
__device__ __forceinline__ LatentRun<Access> load_latent(const Access& access, const View& view, unsigned b,
                                                         unsigned position, int c) {
  return access.template load<typename Access::Latent>(view, offset_of(view, b, position, c));
}

template <typename Access>
__device__ __forceinline__ void add_squared_differences(const Access& access, const OutputRun<Access>& x,
                                                        const OutputRun<Access>& y, float (&sums)[Access::kSlots]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) {
    const float difference = access.value(x, i) - access.value(y, i);
    sums[Access::kPacked ? 0 : i] += difference * difference;
  }
}

// Leaves the sum over the lanes that share a position in each of them. Every lane of the warp must call this.
template <typename Access>
__device__ __forceinline__ void add_lanes(const Tiling& t, float (&sums)[Access::kSlots]) {
  if constexpr (!Access::kVector || Access::kPacked) {
    for (unsigned width = t.lanes / 2; width > 0; width /= 2) {
      sums[0] = add(sums[0], __shfl_xor_sync(kAllLanes, sums[0], width));
    }
  }
}

// One number of a row [B, P] for each position of a run.
template <int kSlots>
__device__ __forceinline__ Run<float, kSlots> load_row(const float* row, unsigned b, int64_t positions,
                                                       unsigned position) {
  return load_run<float, kSlots>(row + b * positions + position);
}

template <int kSlots>
__device__ __forceinline__ void load_mask(const Objective& a, unsigned b, unsigned position, bool (&keep)[kSlots]) {
  Run<unsigned char, kSlots> run;
  if (a.mask) run = load_run<unsigned char, kSlots>(a.mask + b * a.positions + position);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) keep[i] = !a.mask || run.value[i] != 0;
}

// The weights of the positions of a run, read from the patch grid that divides the latent's; ones without weights. Row
// b is that of a sample, or of a phrase of it.
template <int kSlots>
__device__ __forceinline__ void load_weights(const Objective& a, unsigned b, unsigned position,
                                             float (&weights)[kSlots]) {
#pragma unroll
  for (int i = 0; i < kSlots; ++i) weights[i] = 1.0f;
  if (!a.weights) return;
  const int64_t cells = a.grid[0] * a.grid[1] * a.grid[2];
  if (cells == a.positions) {
    const Run<float, kSlots> run = load_row<kSlots>(a.weights, b, cells, position);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) weights[i] = run.value[i];
    return;
  }
  const float* grid = a.weights + b * cells;
  const unsigned columns = static_cast<unsigned>(a.location[2]), patch = columns / static_cast<unsigned>(a.grid[2]);
  unsigned column = position % columns, used = column % patch;
  const float* cell = grid + grid_position(a, position);
  const float* below = cell;  // the cell of the run's first position in the next row of the latent
  if (column + kSlots > columns) below = grid + grid_position(a, position - column + columns);
#pragma unroll
  for (int i = 0; i < kSlots; ++i) {
    weights[i] = __ldg(cell);
    if (++column == columns) {
      used = 0;
      cell = below;
    } else if (++used == patch) {
      used = 0;
      ++cell;
    }
  }
}

// Adds the gradient of the KL penalty, factors[position] * (output - reference output).
template <typename Access>
__device__ __forceinline__ void add_kl_gradient(const Access& access, const OutputRun<Access>& output,
                                                const OutputRun<Access>& ref_output,
                                                const float (&factors)[Access::kSlots],
                                                float (&gradient)[Access::kRun]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) {
    gradient[i] += factors[Access::kPacked ? 0 : i] * (access.value(output, i) - access.value(ref_output, i));
  }
}

// Whether the forward pass has written the gradient of a sample, for an upstream gradient of one, and one it is.
__device__ __forceinline__ bool is_written(const Objective& a, unsigned b) {
  return a.written && upstream_gradient(a, b) == 1.0f;
}

// Stores a run of the gradient: zero for positions that the mask drops, whose inputs may be anything.
template <typename Access>
__device__ __forceinline__ void store_gradient(const Access& access, const Objective& a, unsigned b, unsigned position,
                                               int c, const bool (&keep)[Access::kSlots],
                                               float (&gradient)[Access::kRun]) {
#pragma unroll
  for (int i = 0; i < Access::kRun; ++i) gradient[i] = keep[Access::kPacked ? 0 : i] ? gradient[i] : 0.0f;
  access.template store<typename Access::Output>(a.gradient, offset_of(a.gradient, b, position, c), gradient);
}

}  // namespace cuda
}  // namespace star
