// The host code of a launch: which access the latents allow, and the number and size of the blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/latents.cuh"

namespace star {
namespace cuda {
namespace {

constexpr int64_t kEnoughBlocks = 2 * 132;  // two for each multiprocessor of an H100

// Positions of a tile: enough to keep a block of 256 threads busy, fewer if the batch would not fill the device. Tiles
// of packed latents are never larger than the others, which most_tiles relies on.
unsigned tile_positions(int64_t batch, int64_t positions, bool packed, unsigned largest) {
  const unsigned smallest = packed ? 32 : 256;
  unsigned tile = packed ? 256 : largest;
  while (tile > smallest && batch * ((positions + tile - 1) / tile) < kEnoughBlocks) tile /= 2;
  return tile;
}

// The tensors of a kernel, seen as runs of elements.
struct Latents {
  int64_t batch, channels, positions;
  bool packed, narrow;
  DType output, latent;
  bool aligned = true;

  // `narrow`: runs along positions have 4 bytes of the narrowest dtype, as those of the fused kernels.
  template <typename Arguments>
  explicit Latents(const Arguments& a, bool narrow = false)
      : batch(a.batch), channels(a.channels), positions(a.positions), narrow(narrow), output(a.model_output.dtype) {
    packed = channels > 1 && a.model_output.channel < a.model_output.position;
  }

  // Else the longest run that every tensor can read 16 bytes at a time.
  int run() const {
    const bool wide = output == DType::kFloat32;
    if (packed) return kPackedRun;
    return narrow ? (wide ? 1 : 2) : (!wide && latent == output ? 8 : 4);
  }

  void read(const View& view, DType dtype) {
    if (!view.data) return;
    const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    const int64_t access = run() * size < 16 ? run() * size : 16;
    const auto fits = [&](int64_t stride, int64_t count) { return count == 1 || stride * size % access == 0; };
    const int64_t unit = packed ? view.channel : view.position, other = packed ? view.position : view.channel;
    const int64_t run_length = packed ? channels : positions, others = packed ? positions : channels;
    aligned &= view.dtype == dtype && reinterpret_cast<uintptr_t>(view.data) % access == 0;
    aligned &= unit == 1 && run_length % run() == 0 && fits(other, others) && fits(view.batch, batch);
  }

  // A tensor [B, P] or null, read as many elements at a time as a run has positions.
  void read_row(const void* row, int64_t size) {
    if (!packed) aligned &= reinterpret_cast<uintptr_t>(row) % (run() * size < 16 ? run() * size : 16) == 0;
  }

  // A run of positions reads a row of the weights, or crosses at most two rows of the patch grid.
  void read_weights(const Objective& a) {
    if (a.grid[0] * a.grid[1] * a.grid[2] == a.positions) return read_row(a.weights, 4);
    if (!packed) aligned &= a.location[2] >= run();
  }

  void read_objective(const Objective& a) {
    read(a.model_output, output);
    read(a.ref_output, output);
    read(a.gradient, output);
    if (a.weights) read_weights(a);
    read_row(a.mask, 1);
  }
};

// The lanes that share a position.
unsigned lanes_of(const Latents& l) {
  unsigned lanes = 1;
  while (l.packed && lanes < 32 && 2 * lanes * kPackedRun <= l.channels) lanes *= 2;
  return lanes;
}

// `largest` tile of latents [C, P].
template <typename Access>
Tiling tiling_of(const Latents& l, unsigned largest = 4 * kThreads) {
  Tiling t{};
  t.tile = tile_positions(l.batch, l.positions, l.packed, largest);
  t.tiles = static_cast<unsigned>((l.positions + t.tile - 1) / t.tile);
  t.blocks = static_cast<unsigned>(l.batch * t.tiles);
  t.lanes = lanes_of(l);
  t.threads = l.packed ? t.tile * t.lanes : t.tile / (Access::kVector ? Access::kRun : 4);
  if (t.threads > kThreads) t.threads = kThreads;
  t.finish = 32;
  while (t.finish > 1 && l.batch * t.finish > t.threads) t.finish /= 2;
  return t;
}

template <typename Kernel, typename Arguments, typename... Rest>
void launch(Kernel kernel, const Tiling& t, cudaStream_t stream, const Arguments& arguments, Rest... rest) {
  kernel<<<t.blocks, t.threads, 0, stream>>>(arguments, t, rest...);
}

// Calls run(type) with the Access that fits, as a Type<Access>; runs along positions have at most kLongest.
template <typename Access>
struct Type {
  using type = Access;
};

template <bool kPacked, int kLongest, typename Run>
void with_types(const Latents& l, Run run) {
  constexpr int kShort = kPacked ? kPackedRun : 4, kLong = kPacked ? kPackedRun : kLongest;
  const bool wide = l.latent == DType::kFloat32;
  if (!l.aligned || !(wide || l.latent == l.output)) return run(Type<Scalar>{});
  if (l.output == DType::kFloat32) return run(Type<Vector<float, float, kPacked, kShort>>{});
  if (wide) return run(Type<Vector<Half, float, kPacked, kShort>>{});
  return run(Type<Vector<Half, Half, kPacked, kLong>>{});
}

template <int kLongest, typename Run>
void with_access(const Latents& l, Run run) {
  if (l.packed) return with_types<true, kLongest>(l, run);
  return with_types<false, kLongest>(l, run);
}

}  // namespace
}  // namespace cuda
}  // namespace star
