// The attention kernel for Hopper in the shapes that are the defaults.
#include "cuda/attention_launch.cuh"

namespace star {
namespace cuda {
namespace {

template <typename T>
using Wide = Shape<T, 128, 2, 128, 2, true>;
template <typename T>
using Narrow = Shape<T, 64, 2, 176, 2, true>;

template <typename T>
const char* launch_default(const AttentionArguments& a, cudaStream_t stream) {
  return a.head_dim == 128 ? launch_attention<Wide<T>>(a, stream) : launch_attention<Narrow<T>>(a, stream);
}

}  // namespace

const char* attention_forward(const AttentionArguments& a, const AttentionVariant& variant, cudaStream_t stream) {
  using Bf16 = __nv_bfloat16;
  if (a.head_dim != 64 && a.head_dim != 128) return "the head dimension must be 64 or 128";
  const AttentionVariant& shape = a.head_dim == 128 ? variant_of<Wide<Bf16>> : variant_of<Narrow<Bf16>>;
  if (!(variant == AttentionVariant{} || variant == shape)) return attention_variants(a, variant, stream);
  return a.query.dtype == DType::kBFloat16 ? launch_default<Bf16>(a, stream) : launch_default<__half>(a, stream);
}

}  // namespace cuda
}  // namespace star
