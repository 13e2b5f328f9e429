// The attention kernel for Hopper in the shapes that a device is to choose from: tools/hopper_speed.py compares them.
#include "cuda/attention_launch.cuh"

namespace star {
namespace cuda {

const char* attention_variants(const AttentionArguments& a, const AttentionVariant& variant, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (a.query.dtype != DType::kBFloat16) return "the variants of the kernel take bfloat16";
  if (a.head_dim == 128) {
    return launch_variant<Shape<T, 128, 2, 128, 2, false>, Shape<T, 128, 2, 160, 2, true>,
                          Shape<T, 128, 2, 176, 2, true>>(a, variant, stream);
  }
  return launch_variant<Shape<T, 64, 2, 176, 2, false>, Shape<T, 64, 2, 176, 4, true>, Shape<T, 64, 2, 128, 4, true>,
                        Shape<T, 64, 3, 112, 2, true>, Shape<T, 64, 3, 96, 4, true>>(a, variant, stream);
}

}  // namespace cuda
}  // namespace star
