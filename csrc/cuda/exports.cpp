// The CUDA library's functions, as star_kernels/native.py loads them: unpack, launch on the current stream.
// Outputs and workspace are allocated by the caller; nothing here knows about torch.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/string.h>

#include <string>

#include "cuda/kernels.h"
#define STAR_DEVICE kDLCUDA
#include "unpack.h"

#if !defined(STAR_CUDA_ARCHITECTURES)
#error "setup.py names the architectures"
#endif

namespace star {
namespace {

cudaStream_t current_stream(ffi::TensorView tensor) {
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

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << kernel << ": " << cudaGetErrorString(error);
}

void check_grid(int64_t batch) {
  if (batch > 65535) TVM_FFI_THROW(ValueError) << "model_output must have a batch of at most 65535, got " << batch;
}

// `partial` is workspace: policy_workspace_bytes(...) bytes, of which nothing is read that was not written.
void policy_forward(ffi::TensorView model_output, ffi::TensorView sample, ffi::TensorView prev_sample,
                    ffi::TensorView old_log_prob, ffi::TensorView advantages, ffi::TensorView coefficients,
                    ffi::Optional<ffi::TensorView> weights, ffi::Optional<ffi::TensorView> reference,
                    int64_t channel_dim, bool per_location, double clip_low, double clip_high, double advantage_clip,
                    double kl_coef, ffi::TensorView partial, ffi::TensorView counter, ffi::TensorView loss,
                    ffi::TensorView metrics, ffi::TensorView slope) {
  PolicyArguments a =
      policy_arguments(model_output, sample, prev_sample, old_log_prob, advantages, coefficients, weights, reference,
                       channel_dim, per_location, clip_low, clip_high, advantage_clip, kl_coef);
  check_grid(a.batch);
  a.loss = floats("loss", loss, 1);
  a.metrics = floats("metrics", metrics, 6);
  a.slope = floats("slope", slope, a.batch);
  const int64_t sums = a.batch * cuda::tiles_of(a.positions);
  a.partial = dense_data<Sums>("partial", partial, kDLUInt, 8, sums * static_cast<int64_t>(sizeof(Sums)));
  const DeviceGuard guard(model_output);
  unsigned* zero = dense_data<unsigned>("counter", counter, kDLInt, 32, 1);
  cuda::policy_forward(a, zero, current_stream(model_output));
  check_launch("policy_forward");
}

void policy_backward(ffi::TensorView model_output, ffi::TensorView sample, ffi::TensorView prev_sample,
                     ffi::TensorView old_log_prob, ffi::TensorView advantages, ffi::TensorView coefficients,
                     ffi::Optional<ffi::TensorView> weights, ffi::Optional<ffi::TensorView> reference,
                     int64_t channel_dim, bool per_location, double clip_low, double clip_high, double advantage_clip,
                     double kl_coef, ffi::TensorView grad_loss, ffi::TensorView slope, ffi::TensorView gradient) {
  PolicyArguments a =
      policy_arguments(model_output, sample, prev_sample, old_log_prob, advantages, coefficients, weights, reference,
                       channel_dim, per_location, clip_low, clip_high, advantage_clip, kl_coef);
  check_grid(a.batch);
  a.grad_loss = floats("grad_loss", grad_loss, 1);
  a.slope = floats("slope", slope, a.batch);
  a.gradient = latent_view("gradient", gradient, model_output, channel_dim);
  const DeviceGuard guard(model_output);
  cuda::policy_backward(a, current_stream(model_output));
  check_launch("policy_backward");
}

void sample_transition(ffi::TensorView model_output, ffi::TensorView sample, ffi::TensorView noise,
                       ffi::TensorView coefficients, int64_t channel_dim, ffi::TensorView prev_sample,
                       ffi::TensorView log_prob) {
  const SampleArguments a =
      sample_arguments(model_output, sample, noise, coefficients, channel_dim, prev_sample, log_prob);
  check_grid(a.batch);
  const DeviceGuard guard(model_output);
  cuda::sample_transition(a, current_stream(model_output));
  check_launch("sample_transition");
}

int64_t policy_workspace_bytes(int64_t batch, int64_t positions) {
  return batch * cuda::tiles_of(positions) * static_cast<int64_t>(sizeof(Sums));
}

ffi::String architectures() { return STAR_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace star

TVM_FFI_DLL_EXPORT_TYPED_FUNC(policy_forward, star::policy_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(policy_backward, star::policy_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample_transition, star::sample_transition);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(policy_workspace_bytes, star::policy_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, star::architectures);
