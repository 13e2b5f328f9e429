// From tensor views (DLPack) to the kernels' arguments: the checks that a kernel relies on, for both devices.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "arguments.h"
#include "flow_policy.h"

#if !defined(STAR_DEVICE)
#error "define STAR_DEVICE, the DLPack device type that the library serves"
#endif

namespace star {
namespace {

namespace ffi = tvm::ffi;

DType dtype_of(const char* name, ffi::TensorView t) {
  const DLDataType type = t.dtype();
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  TVM_FFI_THROW(TypeError) << name << " must be float32, float16 or bfloat16";
  return DType::kFloat32;
}

void check(bool condition, const char* name, const char* requirement) {
  if (!condition) TVM_FFI_THROW(ValueError) << name << " must " << requirement;
}

void check_device(const char* name, ffi::TensorView t) {
  check(t.device().device_type == STAR_DEVICE, name, "be on the device of this library");
}

// The data of a contiguous tensor of `code`/`bits` with `count` elements.
template <typename T>
T* dense_data(const char* name, ffi::TensorView t, uint8_t code, uint8_t bits, int64_t count) {
  check_device(name, t);
  check(t.dtype().code == code && t.dtype().bits == bits, name, "have the expected dtype");
  check(t.IsContiguous(), name, "be contiguous");
  check(t.numel() == count, name, "have the expected number of elements");
  return static_cast<T*>(t.data_ptr());
}

float* floats(const char* name, ffi::TensorView t, int64_t count) {
  return dense_data<float>(name, t, kDLFloat, 32, count);
}

// A latent [B, ..., C, ...] as batch, channel and one position stride; `channel_dim` counts from the front.
View latent_view(const char* name, ffi::TensorView t, ffi::TensorView like, int64_t channel_dim) {
  check_device(name, t);
  check(t.ndim() == like.ndim(), name, "have the shape of model_output");
  int64_t position = 1, expected = 0;
  bool first = true;
  for (int64_t d = t.ndim() - 1; d >= 0; --d) {
    check(t.size(d) == like.size(d), name, "have the shape of model_output");
    if (d == 0 || d == channel_dim || t.size(d) == 1) continue;
    if (first) position = t.stride(d);
    check(first || t.stride(d) == expected, name, "have location dimensions that collapse into one");
    first = false;
    expected = t.stride(d) * t.size(d);
  }
  return {t.data_ptr(), dtype_of(name, t), t.stride(0), t.stride(channel_dim), position};
}

struct LatentShape {
  int64_t batch, channels, positions;
  int64_t location[3];

  LatentShape(ffi::TensorView t, int64_t channel_dim) : location{1, 1, 1} {
    check(t.ndim() >= 3 && t.ndim() <= 5, "model_output", "have 3 to 5 dimensions");
    check(channel_dim >= 1 && channel_dim < t.ndim(), "channel_dim", "name a dimension after the first");
    batch = t.size(0);
    channels = t.size(channel_dim);
    positions = t.numel() / (batch * channels);
    int64_t slot = 2;
    for (int64_t d = t.ndim() - 1; d >= 1; --d) {
      if (d != channel_dim) location[slot--] = t.size(d);
    }
  }
};

const float* coefficient_table(ffi::TensorView t, int64_t batch, int64_t* columns) {
  check(t.ndim() == 2 && t.size(0) == kCoefficientRows && (t.size(1) == batch || t.size(1) == 1), "transition",
        "have coefficients [6, B]");
  *columns = t.size(1);
  return floats("transition", t, kCoefficientRows * t.size(1));
}

PolicyArguments policy_arguments(ffi::TensorView model_output, ffi::TensorView sample, ffi::TensorView prev_sample,
                                 ffi::TensorView old_log_prob, ffi::TensorView advantages, ffi::TensorView coefficients,
                                 ffi::Optional<ffi::TensorView> weights, ffi::Optional<ffi::TensorView> reference,
                                 int64_t channel_dim, bool per_location, double clip_low, double clip_high,
                                 double advantage_clip, double kl_coef) {
  const LatentShape shape(model_output, channel_dim);
  PolicyArguments a{};
  a.batch = shape.batch;
  a.channels = shape.channels;
  a.positions = shape.positions;
  for (int i = 0; i < 3; ++i) a.location[i] = a.grid[i] = shape.location[i];
  a.model_output = latent_view("model_output", model_output, model_output, channel_dim);
  a.sample = latent_view("sample", sample, model_output, channel_dim);
  a.prev_sample = latent_view("prev_sample", prev_sample, model_output, channel_dim);
  if (reference.has_value()) {
    a.reference = latent_view("ref_model_output", reference.value(), model_output, channel_dim);
  }
  a.coefficients = coefficient_table(coefficients, a.batch, &a.columns);
  a.old_is_scalar = old_log_prob.ndim() == 1;
  check(!a.old_is_scalar || !(per_location || weights.has_value()), "old_log_prob", "be given for every location");
  a.old_log_prob = floats("old_log_prob", old_log_prob, a.old_is_scalar ? a.batch : a.batch * a.positions);
  a.advantages = floats("advantages", advantages, a.batch);
  if (weights.has_value()) {
    const ffi::TensorView grid = weights.value();
    check(grid.ndim() == model_output.ndim() - 1, "weights", "have one dimension for each location dimension");
    for (int64_t d = grid.ndim() - 1, slot = 2; d >= 1; --d, --slot) {
      a.grid[slot] = grid.size(d);
      check(grid.size(d) > 0 && a.location[slot] % grid.size(d) == 0, "weights",
            "lie on a grid that divides the latent's");
    }
    a.weights = floats("weights", grid, a.batch * a.grid[0] * a.grid[1] * a.grid[2]);
  }
  a.per_location = per_location;
  a.clip_low = static_cast<float>(clip_low);
  a.clip_high = static_cast<float>(clip_high);
  a.advantage_clip = static_cast<float>(advantage_clip);
  a.kl_coef = static_cast<float>(kl_coef);
  return a;
}

SampleArguments sample_arguments(ffi::TensorView model_output, ffi::TensorView sample, ffi::TensorView noise,
                                 ffi::TensorView coefficients, int64_t channel_dim, ffi::TensorView prev_sample,
                                 ffi::TensorView log_prob) {
  const LatentShape shape(model_output, channel_dim);
  SampleArguments a{};
  a.batch = shape.batch;
  a.channels = shape.channels;
  a.positions = shape.positions;
  a.model_output = latent_view("model_output", model_output, model_output, channel_dim);
  a.sample = latent_view("sample", sample, model_output, channel_dim);
  a.noise = latent_view("noise", noise, model_output, channel_dim);
  a.prev_sample = latent_view("prev_sample", prev_sample, model_output, channel_dim);
  a.coefficients = coefficient_table(coefficients, a.batch, &a.columns);
  a.log_prob = floats("log_prob", log_prob, a.batch * a.positions);
  return a;
}

}  // namespace
}  // namespace star
