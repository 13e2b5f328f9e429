// Launches a shape of the attention kernel for Hopper.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/attention.cuh"

namespace star {
namespace cuda {
namespace {

// Of a kernel on a device: the number of multiprocessors, or 0 if the kernel cannot run there.
template <typename S>
int prepared_blocks() {
  struct Answer {
    int device, blocks;
  };
  static thread_local Answer known{-1, 0};
  int device = 0;
  cudaGetDevice(&device);
  if (known.device == device) return known.blocks;
  const auto kernel = attention_kernel<S>;
  cudaFuncAttributes compiled{};
  int blocks = 0;
  // Without Hopper's own instructions (sm_90 instead of sm_90a) the compiled kernel is empty and has few registers.
  const bool fits =
      cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.binaryVersion == 90 &&
      compiled.numRegs >= 64 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Memory<S>::kBytes) == cudaSuccess &&
      cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  if (!fits) cudaGetLastError();  // a refusal is no error of the launch
  known = {device, fits ? blocks : 0};
  return known.blocks;
}

inline TileSource source_of(const AttentionArguments& a, const View& tensor, int length) {
  const int64_t sizes[4] = {a.head_dim, length, a.heads, a.batch};
  const int64_t strides[3] = {tensor.position, tensor.channel, tensor.batch};
  TileSource source{tensor.data, {}, {}, tensor.dtype == DType::kBFloat16};
  int64_t dense = 2;  // bytes; the stride of a dimension of one element, which may be anything
  for (int i = 0; i < 4; i++) {
    source.sizes[i] = sizes[i];
    if (i > 0) source.strides[i - 1] = sizes[i] == 1 ? dense : 2 * strides[i - 1];
    dense = (i > 0 ? source.strides[i - 1] : dense) * sizes[i];
  }
  return source;
}

template <typename S>
const char* launch_attention(AttentionArguments a, cudaStream_t stream) {
  const int blocks = prepared_blocks<S>();
  if (blocks == 0) return "the kernel is not compiled for this device";
  a.row_tiles = (a.queries + S::kRows - 1) / S::kRows;
  a.key_tiles = (a.keys + S::kKeys - 1) / S::kKeys;
  const int64_t tiles = static_cast<int64_t>(a.row_tiles) * a.heads * a.batch;
  if (tiles > INT_MAX - blocks) return "the tensors have too many rows";
  a.tiles = static_cast<int>(tiles);
  TensorMap query, key, value;
  const char* problem = encode_tile(&query, source_of(a, a.query, a.queries), 64);
  if (!problem) problem = encode_tile(&key, source_of(a, a.key, a.keys), S::kKeys);
  if (!problem) problem = encode_tile(&value, source_of(a, a.value, a.keys), S::kKeys);
  if (problem) return problem;
  attention_kernel<S><<<std::min(a.tiles, blocks), S::kThreads, Memory<S>::kBytes, stream>>>(query, key, value, a);
  return nullptr;
}

template <typename S>
constexpr AttentionVariant variant_of{S::kConsumers, S::kKeys, S::kStages, S::kOverlap};

// Launches the shape that is the variant.
template <typename First, typename... Others>
const char* launch_variant(const AttentionArguments& a, const AttentionVariant& variant, cudaStream_t stream) {
  if (variant == variant_of<First>) return launch_attention<First>(a, stream);
  if constexpr (sizeof...(Others) > 0) {
    return launch_variant<Others...>(a, variant, stream);
  } else {
    return "the kernel has no such variant";
  }
}

}  // namespace
}  // namespace cuda
}  // namespace star
