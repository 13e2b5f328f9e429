// The part of the CUDA driver's interface that csrc/cuda/tensor_map.cuh uses: tensor maps, with the driver's checks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define CUDART_VERSION 12050

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

constexpr uint64_t kTensorMapMark = 0x70616d20726f736e;

struct alignas(64) CUtensorMap {
  uint64_t mark;
  const char* data;
  uint64_t sizes[4], strides[3];  // strides in bytes, of all dimensions but the first
  uint32_t box[4];
};
static_assert(sizeof(CUtensorMap) == 128, "the size of the driver's");

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 4) return CUDA_ERROR_INVALID_VALUE;  // the driver takes 1 to 5, load_tile 4
  bool valid = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int d = 0; d < 4; ++d) {
    valid = valid && sizes[d] > 0 && sizes[d] <= uint64_t{1} << 32 && box[d] > 0 && box[d] <= 256 && steps[d] == 1;
  }
  for (int d = 0; d < 3; ++d) valid = valid && strides[d] % 16 == 0 && strides[d] < uint64_t{1} << 40;
  valid = valid && box[0] * 2 == 128;  // the pattern allows less; a tile then has another layout than copy_tile's
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  *map = {kTensorMapMark, static_cast<const char*>(data), {}, {}, {}};
  for (int d = 0; d < 4; ++d) {
    map->sizes[d] = sizes[d];
    map->box[d] = box[d];
  }
  for (int d = 0; d < 3; ++d) map->strides[d] = strides[d];
  return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
