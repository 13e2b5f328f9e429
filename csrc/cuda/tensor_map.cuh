// Tensor maps: how bulk copies of Hopper find a tile of a tensor.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace star {
namespace cuda {

using TensorMap = CUtensorMap;

// A tensor of four dimensions of elements of 16 bits, the innermost one first and contiguous.
struct TileSource {
  const void* data;
  int64_t sizes[4];
  int64_t strides[3];  // bytes of the other dimensions, multiples of 16
  bool bfloat16;
};

namespace {

// Fills the map for tiles of 64 elements (128 bytes) by `rows` of the second dimension, in the 128-byte pattern.
// Elements outside the tensor are zeros. Returns null, or the name of what went wrong.
inline const char* encode_tile(TensorMap* map, const TileSource& source, unsigned rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<Encode>(error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; i++) sizes[i] = static_cast<cuuint64_t>(source.sizes[i]);
  for (int i = 0; i < 3; i++) strides[i] = static_cast<cuuint64_t>(source.strides[i]);
  const cuuint32_t box[4] = {64, rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(map, source.bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
             const_cast<void*>(source.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the tensor";
}

}  // namespace
}  // namespace cuda
}  // namespace star
