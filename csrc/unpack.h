// From the arguments of a call to those of a kernel: their order, which both libraries share, and what a kernel relies
// on.
#pragma once

#include "nft_sums.h"
#include "policy_sums.h"
#include "reader.h"

namespace star {
namespace {

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
  check(t.ndim() == 2 && t.size(0) == kCoefficientRows && (t.size(1) == a.batch || t.size(1) == 1), "transition",
        "have coefficients [6, B]");
  a.columns = t.size(1);
  a.coefficients = floats("transition", t, kCoefficientRows * a.columns);
}

void fill_weights(Objective& a, ffi::TensorView grid, int64_t dimensions) {
  check(grid.ndim() == dimensions - 1, "weights", "have one dimension for each location dimension");
  for (int64_t d = grid.ndim() - 1, slot = 2; d >= 1; --d, --slot) {
    a.grid[slot] = grid.size(d);
    check(grid.size(d) > 0 && a.location[slot] % grid.size(d) == 0, "weights",
          "lie on a grid that divides the latent's");
  }
  a.weights = floats("weights", grid, a.batch * a.grid[0] * a.grid[1] * a.grid[2]);
}

// A call of an objective: its arguments, and what those of the latent's shape are read by.
template <typename Objective>
struct Call {
  Objective arguments{};
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

void fill_objective(Objective& a, ffi::TensorView model_output, int64_t channel_dim, ffi::TensorView advantages,
                    const Options& options, const ffi::Optional<ffi::TensorView>& reference) {
  const LatentShape shape(model_output, channel_dim);
  a.batch = shape.batch;
  a.channels = shape.channels;
  a.positions = shape.positions;
  for (int i = 0; i < 3; ++i) a.location[i] = a.grid[i] = shape.location[i];
  a.model_output = latent_view("model_output", model_output, model_output, channel_dim);
  a.reference = optional_view("ref_model_output", reference, model_output, channel_dim);
  a.advantages = floats("advantages", advantages, a.batch);
  if (options.weights.has_value()) fill_weights(a, options.weights.value(), model_output.ndim());
  if (options.mask.has_value()) {
    a.mask = location_data<uint8_t>("mask", options.mask.value(), model_output, channel_dim, kDLBool, 8);
  }
  if (options.step_weights.has_value()) {
    a.step_weights = floats("step_weights", options.step_weights.value(), a.batch);
  }
}

// model_output, sample, prev_sample, old_log_prob, advantages, coefficients, weights?, mask?, step_weights?,
// old_model_output?, ref_model_output?, channel_dim, per_location, weighted_kl, per_sample, clip_low, clip_high,
// advantage_clip, kl_coef
Call<PolicyArguments> read_policy(Reader& in) {
  Call<PolicyArguments> call{{}, in.tensor("model_output")};
  PolicyArguments& a = call.arguments;
  const ffi::TensorView sample = in.tensor("sample"), prev_sample = in.tensor("prev_sample");
  const ffi::TensorView old_log_prob = in.tensor("old_log_prob"), advantages = in.tensor("advantages");
  const ffi::TensorView coefficients = in.tensor("transition");
  const Options options(in);
  const auto old_output = in.optional("old_model_output"), reference = in.optional("ref_model_output");
  call.channel_dim = in.integer("channel_dim");
  fill_objective(a, call.model_output, call.channel_dim, advantages, options, reference);
  a.sample = call.view("sample", sample);
  a.prev_sample = call.view("prev_sample", prev_sample);
  a.old_output = optional_view("old_model_output", old_output, call.model_output, call.channel_dim);
  fill_coefficients(a, coefficients);
  a.per_location = in.flag("per_location");
  a.weighted_kl = in.flag("weighted_kl");
  a.per_sample = in.flag("per_sample");
  a.clip_low = in.number("clip_low");
  a.clip_high = in.number("clip_high");
  a.advantage_clip = in.number("advantage_clip");
  a.kl_coef = in.number("kl_coef");
  a.old_is_scalar = old_log_prob.ndim() == 1;
  check(!a.old_is_scalar || !(a.per_location || a.weights), "old_log_prob", "be given for every location");
  a.old_log_prob = a.old_is_scalar ? floats("old_log_prob", old_log_prob, a.batch)
                                   : location_data<float>("old_log_prob", old_log_prob, call.model_output,
                                                          call.channel_dim, kDLFloat, 32);
  return call;
}

// model_output, old_model_output, target, advantages, sigma, weights?, mask?, step_weights?, ref_model_output?,
// channel_dim, adaptive, weighted_kl, per_sample, beta, advantage_clip, kl_coef
Call<NftArguments> read_nft(Reader& in) {
  Call<NftArguments> call{{}, in.tensor("model_output")};
  NftArguments& a = call.arguments;
  const ffi::TensorView old_output = in.tensor("old_model_output"), target = in.tensor("target");
  const ffi::TensorView advantages = in.tensor("advantages"), sigma = in.tensor("sigma");
  const Options options(in);
  const auto reference = in.optional("ref_model_output");
  call.channel_dim = in.integer("channel_dim");
  fill_objective(a, call.model_output, call.channel_dim, advantages, options, reference);
  a.old_output = call.view("old_model_output", old_output);
  a.target = call.view("target", target);
  a.sigma = floats("sigma", sigma, a.batch);
  a.adaptive = in.flag("adaptive");
  a.weighted_kl = in.flag("weighted_kl");
  a.per_sample = in.flag("per_sample");
  a.beta = in.number("beta");
  a.advantage_clip = in.number("advantage_clip");
  a.kl_coef = in.number("kl_coef");
  return call;
}

// loss, metrics, statistics: what a forward pass writes. They end its arguments.
template <typename Kind>
void read_forward_results(Reader& in, Call<typename Kind::Arguments>& call) {
  Objective& a = call.arguments;
  a.loss = floats("loss", in.tensor("loss"), a.per_sample ? a.batch : 1);
  a.metrics = floats("metrics", in.tensor("metrics"), Kind::kMetrics);
  a.statistics = floats("statistics", in.tensor("statistics"), Kind::kStatistics * a.batch);
  in.finish();
}

// grad_loss, statistics, gradient: what a backward pass reads and writes. They end its arguments.
template <typename Kind>
void read_backward_results(Reader& in, Call<typename Kind::Arguments>& call) {
  Objective& a = call.arguments;
  a.grad_loss = floats("grad_loss", in.tensor("grad_loss"), a.per_sample ? a.batch : 1);
  a.statistics = floats("statistics", in.tensor("statistics"), Kind::kStatistics * a.batch);
  a.gradient = call.view("gradient", in.tensor("gradient"));
  in.finish();
}

// model_output, sample, noise, coefficients, channel_dim
Call<SampleArguments> read_sample(Reader& in) {
  Call<SampleArguments> call{{}, in.tensor("model_output")};
  SampleArguments& a = call.arguments;
  const ffi::TensorView sample = in.tensor("sample"), noise = in.tensor("noise");
  const ffi::TensorView coefficients = in.tensor("transition");
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

// prev_sample, log_prob: what the sampling step writes. They end its arguments.
void read_sample_results(Reader& in, Call<SampleArguments>& call) {
  SampleArguments& a = call.arguments;
  a.prev_sample = call.view("prev_sample", in.tensor("prev_sample"));
  a.log_prob = floats("log_prob", in.tensor("log_prob"), a.batch * a.positions);
  in.finish();
}

}  // namespace
}  // namespace star
