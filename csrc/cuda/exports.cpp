// The CUDA library's functions, loaded by star_kernels/native.py: each reads its arguments and launches a kernel on the
// current stream. The caller allocates outputs and workspace; this file does not depend on torch.
#include <tvm/ffi/string.h>

#include <string>
#include <type_traits>
#include <utility>

#include "cuda/kernels.h"
#include "cuda/on_device.h"

#if !defined(STAR_CUDA_ARCHITECTURES)
#error "setup.py names the architectures"
#endif

namespace star {
namespace {

// A block's index and a position have 32 bits.
template <typename Arguments>
void check_size(const Arguments& a) {
  constexpr int64_t kMost = 2147483647;
  check(a.channels <= kMost && a.positions <= kMost && cuda::most_tiles(a.batch, a.positions) <= kMost, "model_output",
        "have fewer elements");
  if constexpr (std::is_base_of_v<Objective, Arguments>) {
    check(a.batch * a.phrases <= kMost, "weights", "have fewer phrases");
  }
}

template <typename Arguments>
void run(const char* name, const Call<Arguments>& call, void (*kernel)(const Arguments&, cudaStream_t)) {
  check_size(call.arguments);
  const DeviceGuard guard(call.model_output);
  kernel(call.arguments, current_stream(call.model_output));
  check_launch(name);
}

int64_t workspace_bytes(int64_t batch, int64_t positions, int64_t sums) {
  constexpr int64_t kMost = 2147483647;
  check(batch > 0 && batch <= kMost && positions > 0 && positions <= kMost, "batch and positions", "have 32 bits");
  return cuda::most_tiles(batch, positions) * sums * static_cast<int64_t>(sizeof(double));
}

int64_t policy_workspace_bytes(int64_t batch, int64_t positions, int64_t phrases) {
  const int64_t more = phrases > 3 ? phrases - 1 : 2;  // Policy::more_sums, at most
  return workspace_bytes(batch, positions, Policy::kSums + more);
}

int64_t nft_workspace_bytes(int64_t batch, int64_t positions) { return workspace_bytes(batch, positions, Nft::kSums); }

// `partial` is workspace of `bytes`, which need not be initialised. A gradient that is wanted is written by the fused
// kernel, or else by the backward kernel after the forward kernel.
template <typename Kind>
void run_forward(const char* name, Reader& in, Call<typename Kind::Arguments> call, int64_t bytes,
                 bool (*fused)(const typename Kind::Arguments&, unsigned*, cudaStream_t),
                 void (*forward)(const typename Kind::Arguments&, unsigned*, cudaStream_t),
                 void (*backward)(const typename Kind::Arguments&, cudaStream_t)) {
  auto& a = call.arguments;
  a.partial = reinterpret_cast<double*>(dense_data<uint8_t>("partial", in.tensor("partial"), kDLUInt, 8, bytes));
  unsigned* counter = dense_data<unsigned>("counter", in.tensor("counter"), kDLInt, 32, 1);
  read_forward_results<Kind>(in, call);
  check_size(a);
  const DeviceGuard guard(call.model_output);
  const cudaStream_t stream = current_stream(call.model_output);
  if (a.gradient.data && fused(a, counter, stream)) return check_launch(name);
  const View gradient = std::exchange(a.gradient, View{});
  forward(a, counter, stream);
  check_launch(name);
  if (!gradient.data) return;
  a.gradient = gradient;
  backward(a, stream);
  check_launch(name);
}

template <typename Kind>
void run_backward(const char* name, Reader& in, Call<typename Kind::Arguments> call,
                  void (*kernel)(const typename Kind::Arguments&, cudaStream_t)) {
  read_backward_results<Kind>(in, call);
  run(name, call, kernel);
}

void policy_forward(Reader& in) {
  const Call<PolicyArguments> call = read_policy(in);
  const PolicyArguments& a = call.arguments;
  const int64_t bytes = policy_workspace_bytes(a.batch, a.positions, a.phrases);
  run_forward<Policy>("policy_forward", in, call, bytes, cuda::policy_fused, cuda::policy_forward,
                      cuda::policy_backward);
}

void policy_backward(Reader& in) {
  run_backward<Policy>("policy_backward", in, read_policy(in), cuda::policy_backward);
}

void nft_forward(Reader& in) {
  const Call<NftArguments> call = read_nft(in);
  const int64_t bytes = nft_workspace_bytes(call.arguments.batch, call.arguments.positions);
  run_forward<Nft>("nft_forward", in, call, bytes, cuda::nft_fused, cuda::nft_forward, cuda::nft_backward);
}

void nft_backward(Reader& in) { run_backward<Nft>("nft_backward", in, read_nft(in), cuda::nft_backward); }

void sample_transition(Reader& in) {
  Call<SampleArguments> call = read_sample(in);
  read_sample_results(in, call);
  run("sample_transition", call, cuda::sample_transition);
}

ffi::String architectures() { return STAR_CUDA_ARCHITECTURES; }

}  // namespace
}  // namespace star

STAR_EXPORT(policy_forward)
STAR_EXPORT(policy_backward)
STAR_EXPORT(nft_forward)
STAR_EXPORT(nft_backward)
STAR_EXPORT(sample_transition)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(policy_workspace_bytes, star::policy_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(nft_workspace_bytes, star::nft_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, star::architectures);
