// What the exports of the CUDA library share: the stream and the device of a call, and errors of a launch.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/extra/c_env_api.h>

#define STAR_DEVICE kDLCUDA
#include "binding.h"

namespace star {
namespace {

inline cudaStream_t current_stream(ffi::TensorView tensor) {
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, tensor.device().device_id));
}

// Makes the tensor's device the current one until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(ffi::TensorView tensor) {
    cudaGetDevice(&before_);
    device_ = tensor.device().device_id;
    if (device_ != before_) cudaSetDevice(device_);
  }
  ~DeviceGuard() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0, device_ = 0;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << kernel << ": " << cudaGetErrorString(error);
}

}  // namespace
}  // namespace star
