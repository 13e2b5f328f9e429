// From a call of Python to the arguments of a kernel: reads values in the order that star_kernels/policy/arguments.py
// declares, and checks what a kernel relies on. Errors name the argument.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "nft_sums.h"
#include "policy_sums.h"

#if !defined(STAR_DEVICE)
#error "define STAR_DEVICE, the DLPack device type of the library"
#endif

namespace star {
namespace {

namespace ffi = tvm::ffi;

void check(bool condition, const char* name, const char* requirement) {
  if (!condition) TVM_FFI_THROW(ValueError) << name << " must " << requirement;
}

void check_memory(const char* name, ffi::TensorView t) {
  check(t.device().device_type == STAR_DEVICE, name, "be on the device of this library");
  check(t.data_ptr() != nullptr || t.numel() == 0, name, "have memory");
}

class Reader {
 public:
  Reader(const TVMFFIAny* arguments, int32_t count)
      : arguments_(reinterpret_cast<const ffi::AnyView*>(arguments), count) {}

  // Tensors are in memory of the library's device, all on the device of the first.
  ffi::TensorView tensor(const char* name) {
    const auto t = next<ffi::TensorView>(name, "a tensor");
    check_memory(name, t);
    if (device_ < 0) device_ = t.device().device_id;
    check(t.device().device_id == device_, name, "be on the device of the first tensor");
    return t;
  }
  ffi::Optional<ffi::TensorView> optional(const char* name) {
    if (read_ < arguments_.size() && arguments_[read_].type_index() == ffi::TypeIndex::kTVMFFINone) {
      ++read_;
      return {};
    }
    return tensor(name);
  }
  bool flag(const char* name) { return next<bool>(name, "a bool"); }
  int64_t integer(const char* name) { return next<int64_t>(name, "an integer"); }
  float number(const char* name) { return static_cast<float>(next<double>(name, "a number")); }

  void finish() const {
    if (read_ != arguments_.size()) {
      TVM_FFI_THROW(TypeError) << "expected " << read_ << " arguments, got " << arguments_.size();
    }
  }

 private:
  template <typename T>
  T next(const char* name, const char* kind) {
    if (read_ >= arguments_.size()) TVM_FFI_THROW(TypeError) << name << " is missing";
    std::optional<T> value = arguments_[read_++].try_cast<T>();
    if (!value) TVM_FFI_THROW(TypeError) << name << " must be " << kind;
    return *std::move(value);
  }

  ffi::PackedArgs arguments_;
  int read_ = 0, device_ = -1;
};

// Exports star::name(Reader&) as the library's function `name`.
#define STAR_EXPORT(name)                                                                                            \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) { \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                       \
    star::Reader in(arguments, count);                                                                               \
    star::name(in);                                                                                                  \
    TVM_FFI_SAFE_CALL_END();                                                                                         \
  }

DType dtype_of(const char* name, ffi::TensorView t) {
  const DLDataType type = t.dtype();
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  TVM_FFI_THROW(TypeError) << name << " must be float32, float16 or bfloat16";
  return DType::kFloat32;
}

// The data of a contiguous tensor of `code`/`bits` with `count` elements.
template <typename T>
T* dense_data(const char* name, ffi::TensorView t, uint8_t code, uint8_t bits, int64_t count) {
  check_memory(name, t);
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

View optional_view(const char* name, const ffi::Optional<ffi::TensorView>& t, ffi::TensorView like,
                   int64_t channel_dim) {
  return t.has_value() ? latent_view(name, t.value(), like, channel_dim) : View{};
}

// A tensor [B].
float* per_sample(const char* name, ffi::TensorView t, int64_t batch) {
  check(t.ndim() == 1, name, "have shape [B]");
  return floats(name, t, batch);
}

struct LatentShape {
  int64_t batch, channels, positions;
  int64_t location[3];

  LatentShape(ffi::TensorView t, int64_t channel_dim) : location{1, 1, 1} {
    check(t.ndim() >= 3 && t.ndim() <= 5, "model_output", "have 3 to 5 dimensions");
    check(channel_dim >= 1 && channel_dim < t.ndim(), "channel_dim", "name a dimension after the first");
    check(t.numel() > 0, "model_output", "have elements");
    batch = t.size(0);
    channels = t.size(channel_dim);
    positions = t.numel() / (batch * channels);
    int64_t slot = 2;
    for (int64_t d = t.ndim() - 1; d >= 1; --d) {
      if (d != channel_dim) location[slot--] = t.size(d);
    }
  }
};

// A tensor [B, *locations].
template <typename T>
T* location_data(const char* name, ffi::TensorView t, ffi::TensorView like, int64_t channel_dim, uint8_t code,
                 uint8_t bits) {
  bool same = t.ndim() == like.ndim() - 1;
  for (int64_t d = 0; same && d < t.ndim(); ++d) same = t.size(d) == like.size(d < channel_dim ? d : d + 1);
  check(same, name, "have shape [B, *locations]");
  return dense_data<T>(name, t, code, bits, t.numel());
}

// The table of the transition's coefficients, [6, B] or [6, 1].
template <typename Arguments>
void fill_coefficients(Arguments& a, ffi::TensorView t) {
  check(t.ndim() == 2 && t.size(0) == kCoefficientRows && (t.size(1) == a.batch || t.size(1) == 1), "coefficients",
        "have shape [6, B]");
  a.columns = t.size(1);
  a.coefficients = floats("coefficients", t, kCoefficientRows * a.columns);
}

// Weights [B, *grid], or of phrases [B, G, *grid].
void fill_weights(Objective& a, ffi::TensorView weights, int64_t dimensions) {
  const bool phrases = weights.ndim() == dimensions;
  check(phrases || weights.ndim() == dimensions - 1, "weights", "have one dimension for each location dimension");
  if (phrases) a.phrases = weights.size(1);
  check(a.phrases > 0, "weights", "have phrases");
  for (int64_t d = weights.ndim() - 1, slot = 2; d > phrases; --d, --slot) {
    a.grid[slot] = weights.size(d);
    check(weights.size(d) > 0 && a.location[slot] % weights.size(d) == 0, "weights",
          "lie on a grid that divides the latent's");
  }
  check(dimensions > 3 || a.grid[2] == a.location[2], "weights", "have the length of the only location dimension");
  a.weights = floats("weights", weights, a.batch * a.phrases * a.grid[0] * a.grid[1] * a.grid[2]);
}

// A call: its arguments, and by what tensors of the latent's shape are read.
template <typename Arguments>
struct Call {
  Arguments arguments{};
  ffi::TensorView model_output;
  int64_t channel_dim = 0;

  View view(const char* name, ffi::TensorView t) const { return latent_view(name, t, model_output, channel_dim); }
};

// weights?, mask?, step_weights?: the options that every objective takes after its own tensors.
struct Options {
  ffi::Optional<ffi::TensorView> weights, mask, step_weights;

  explicit Options(Reader& in)
      : weights(in.optional("weights")), mask(in.optional("mask")), step_weights(in.optional("step_weights")) {}
};

void fill_objective(Objective& a, ffi::TensorView model_output, int64_t channel_dim, const Options& options,
                    const ffi::Optional<ffi::TensorView>& ref_output) {
  const LatentShape shape(model_output, channel_dim);
  a.batch = shape.batch;
  a.channels = shape.channels;
  a.positions = shape.positions;
  for (int i = 0; i < 3; ++i) a.location[i] = a.grid[i] = shape.location[i];
  a.model_output = latent_view("model_output", model_output, model_output, channel_dim);
  a.ref_output = optional_view("ref_model_output", ref_output, model_output, channel_dim);
  a.phrases = 1;
  if (options.weights.has_value()) fill_weights(a, options.weights.value(), model_output.ndim());
  if (options.mask.has_value()) {
    a.mask = location_data<uint8_t>("mask", options.mask.value(), model_output, channel_dim, kDLBool, 8);
  }
  if (options.step_weights.has_value()) {
    a.step_weights = per_sample("step_weights", options.step_weights.value(), a.batch);
  }
}

// Advantages [B], [B, G] with weights of phrases, or else [B, *locations].
void fill_advantages(PolicyArguments& a, ffi::TensorView advantages, const Call<PolicyArguments>& call,
                     const Options& options) {
  const bool phrases = options.weights.has_value() && options.weights.value().ndim() == call.model_output.ndim();
  a.dense = advantages.ndim() > 1 && !phrases;
  if (a.dense) {
    a.advantages = location_data<float>("advantages", advantages, call.model_output, call.channel_dim, kDLFloat, 32);
    return;
  }
  check(!(phrases && a.weighted_kl), "weighted_kl", "be false with weights of phrases");
  if (!phrases) {
    a.advantages = per_sample("advantages", advantages, a.batch);
    return;
  }
  check(advantages.ndim() == 2 && advantages.size(0) == a.batch, "advantages",
        "have shape [B, G] with weights of phrases");
  a.advantages = floats("advantages", advantages, a.batch * a.phrases);
}

// star_kernels.policy.arguments.PolicyArguments
inline Call<PolicyArguments> read_policy(Reader& in) {
  Call<PolicyArguments> call{{}, in.tensor("model_output")};
  PolicyArguments& a = call.arguments;
  const ffi::TensorView sample = in.tensor("sample"), prev_sample = in.tensor("prev_sample");
  const ffi::TensorView old_log_prob = in.tensor("old_log_prob"), advantages = in.tensor("advantages");
  const ffi::TensorView coefficients = in.tensor("coefficients");
  const Options options(in);
  const auto old_output = in.optional("old_model_output"), ref_output = in.optional("ref_model_output");
  call.channel_dim = in.integer("channel_dim");
  fill_objective(a, call.model_output, call.channel_dim, options, ref_output);
  a.sample = call.view("sample", sample);
  a.prev_sample = call.view("prev_sample", prev_sample);
  a.old_output = optional_view("old_model_output", old_output, call.model_output, call.channel_dim);
  fill_coefficients(a, coefficients);
  a.per_location = in.flag("per_location");
  a.weighted_kl = in.flag("weighted_kl");
  a.unreduced = in.flag("unreduced");
  a.clip_low = in.number("clip_low");
  a.clip_high = in.number("clip_high");
  a.advantage_clip = in.number("advantage_clip");
  a.kl_coef = in.number("kl_coef");
  a.kl_mask_threshold = in.number("kl_mask_threshold");
  check(a.kl_mask_threshold <= 0.0f || a.old_output.data, "old_model_output", "be given with kl_mask_threshold");
  a.guarded = a.old_output.data && !(a.kl_mask_threshold > 0.0f);
  fill_advantages(a, advantages, call, options);
  a.old_is_scalar = old_log_prob.ndim() == 1;
  check(!a.old_is_scalar || !(a.per_location || a.weights), "old_log_prob", "be given for every location");
  a.old_log_prob = a.old_is_scalar ? floats("old_log_prob", old_log_prob, a.batch)
                                   : location_data<float>("old_log_prob", old_log_prob, call.model_output,
                                                          call.channel_dim, kDLFloat, 32);
  return call;
}

// star_kernels.policy.arguments.NftArguments
inline Call<NftArguments> read_nft(Reader& in) {
  Call<NftArguments> call{{}, in.tensor("model_output")};
  NftArguments& a = call.arguments;
  const ffi::TensorView old_output = in.tensor("old_model_output"), target = in.tensor("target");
  const ffi::TensorView advantages = in.tensor("advantages"), sigma = in.tensor("sigma");
  const Options options(in);
  const auto ref_output = in.optional("ref_model_output");
  call.channel_dim = in.integer("channel_dim");
  fill_objective(a, call.model_output, call.channel_dim, options, ref_output);
  a.old_output = call.view("old_model_output", old_output);
  a.target = call.view("target", target);
  check(!options.weights.has_value() || options.weights.value().ndim() < call.model_output.ndim(), "weights",
        "have shape [B, *grid]");
  a.advantages = per_sample("advantages", advantages, a.batch);
  a.sigma = per_sample("sigma", sigma, a.batch);
  a.adaptive = in.flag("adaptive");
  a.weighted_kl = in.flag("weighted_kl");
  a.unreduced = in.flag("unreduced");
  a.beta = in.number("beta");
  a.advantage_clip = in.number("advantage_clip");
  a.kl_coef = in.number("kl_coef");
  return call;
}

// star_kernels.policy.arguments.Forward, the last arguments of a forward pass. If the gradient is given, the kernel
// also writes that of model_output for an upstream gradient of one, or of ones for the losses of samples.
template <typename Kind>
void read_forward_results(Reader& in, Call<typename Kind::Arguments>& call) {
  Objective& a = call.arguments;
  a.loss = floats("loss", in.tensor("loss"), a.unreduced ? a.batch : 1);
  a.metrics = floats("metrics", in.tensor("metrics"), Kind::kMetrics);
  a.saved = floats("saved", in.tensor("saved"), Kind::saved_rows(call.arguments) * a.batch);
  a.gradient = optional_view("gradient", in.optional("gradient"), call.model_output, call.channel_dim);
  in.finish();
}

// star_kernels.policy.arguments.Backward, the last arguments of a backward pass. With `written` the gradient is that of
// the forward pass: it is computed again, from the inputs, unless every element of grad_loss is one.
template <typename Kind>
void read_backward_results(Reader& in, Call<typename Kind::Arguments>& call) {
  Objective& a = call.arguments;
  a.grad_loss = floats("grad_loss", in.tensor("grad_loss"), a.unreduced ? a.batch : 1);
  a.saved = floats("saved", in.tensor("saved"), Kind::saved_rows(call.arguments) * a.batch);
  a.gradient = call.view("gradient", in.tensor("gradient"));
  a.written = in.flag("written");
  in.finish();
}

// star_kernels.policy.arguments.SampleArguments
inline Call<SampleArguments> read_sample(Reader& in) {
  Call<SampleArguments> call{{}, in.tensor("model_output")};
  SampleArguments& a = call.arguments;
  const ffi::TensorView sample = in.tensor("sample"), noise = in.tensor("noise");
  const ffi::TensorView coefficients = in.tensor("coefficients");
  call.channel_dim = in.integer("channel_dim");
  const LatentShape shape(call.model_output, call.channel_dim);
  a.batch = shape.batch;
  a.channels = shape.channels;
  a.positions = shape.positions;
  a.model_output = call.view("model_output", call.model_output);
  a.sample = call.view("sample", sample);
  a.noise = call.view("noise", noise);
  fill_coefficients(a, coefficients);
  return call;
}

// prev_sample and log_prob, the last arguments of the sampling step
inline void read_sample_results(Reader& in, Call<SampleArguments>& call) {
  SampleArguments& a = call.arguments;
  a.prev_sample = call.view("prev_sample", in.tensor("prev_sample"));
  a.log_prob = floats("log_prob", in.tensor("log_prob"), a.batch * a.positions);
  in.finish();
}

}  // namespace
}  // namespace star
