// Random problems of the policy's kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "memory.h"
#include "nft_sums.h"
#include "policy_sums.h"

namespace {

namespace kernels = star::STAR_ISA;

// A latent's shape, and the grid of its weights.
struct Problem : Shape {
  int64_t location[3], grid[3];

  explicit Problem(Random& random) {
    batch = random.between(1, 4);
    channels = random.chance(10) ? random.between(1020, 1030) : random.between(1, 17);
    const int64_t most[] = {2, channels > 1000 ? 2 : 9, channels > 1000 ? 3 : 70};
    for (int i = 0; i < 3; ++i) {
      grid[i] = random.between(1, most[i]);
      location[i] = grid[i] * (random.chance(50) ? 1 : random.between(1, 3));
    }
    finish();
  }
  Problem(int64_t channels_, int64_t rows, int64_t columns)
      : location{1, rows, columns}, grid{1, rows / 2, columns / 2} {
    batch = 2, channels = channels_;
    finish();
  }
  void finish() { positions = location[0] * location[1] * location[2]; }
};

// The arguments that the objectives share; options are on or off at random.
struct ObjectiveInputs {
  Problem problem;
  int64_t phrases;
  bool dense;
  Memory model_output, ref_output;
  std::vector<float> advantages, weights, step_weights, upstream;
  std::vector<uint8_t> mask;
  bool has_ref, has_weights, has_steps, has_mask, weighted_kl, unreduced;
  Layout gradient_layout;

  // With `credit` advantages may be those of several phrases or of locations.
  ObjectiveInputs(Random& random, const Problem& p, bool fixed, bool credit)
      : problem(p),
        phrases(credit && !fixed && random.chance(40) ? random.between(1, 4) : 1),
        dense(credit && !fixed && phrases == 1 && random.chance(40)),
        model_output(fixed ? planes(random, p) : input(random, p)),
        ref_output(fixed ? planes(random, p) : input(random, p)),
        advantages(floats(random, p.batch * (dense ? p.positions : phrases), -2.0f, 2.0f)),
        weights(floats(random, p.batch * phrases * p.grid[0] * p.grid[1] * p.grid[2], 0.0f, 2.0f)),
        step_weights(floats(random, p.batch, 0.5f, 1.5f)),
        upstream(floats(random, p.batch, 0.5f, 1.5f)),
        mask(static_cast<size_t>(p.batch * p.positions)) {
    for (uint8_t& kept : mask) kept = random.chance(70);
    has_ref = fixed || random.chance(50), has_weights = fixed || phrases > 1 || random.chance(50);
    has_steps = !fixed && random.chance(50), has_mask = !fixed && random.chance(40);
    weighted_kl = phrases == 1 && random.chance(50), unreduced = !fixed && random.chance(50);
    gradient_layout = fixed ? kPlanes : static_cast<Layout>(random.below(kOneForAll));
  }

  static Memory planes(Random& random, const Shape& s) {
    Memory memory = output(DType::kFloat32, s, kPlanes);
    for (int64_t i = 0; i < memory.extent; ++i) memory.set(i, random.centred());
    return memory;
  }

  void fill(star::Objective& a) const {
    a.batch = problem.batch, a.channels = problem.channels, a.positions = problem.positions;
    for (int i = 0; i < 3; ++i) a.location[i] = problem.location[i], a.grid[i] = problem.grid[i];
    a.model_output = model_output.view;
    if (has_ref) a.ref_output = ref_output.view;
    a.phrases = phrases;
    a.advantages = advantages.data();
    a.weights = has_weights ? weights.data() : nullptr;
    a.step_weights = has_steps ? step_weights.data() : nullptr;
    a.mask = has_mask ? mask.data() : nullptr;
    a.weighted_kl = weighted_kl, a.unreduced = unreduced;
    a.advantage_clip = 1.5f, a.kl_coef = 0.1f;
    a.grad_loss = upstream.data();
  }

  // Forward and backward of one objective with a number of threads: every output. With `at_once` the forward pass also
  // writes the gradient, and `backward` is not called.
  template <typename Kind>
  std::vector<std::string> run(typename Kind::Arguments a, int threads,
                               void (*forward)(const typename Kind::Arguments&),
                               void (*backward)(const typename Kind::Arguments&), bool at_once = false) const {
    const int64_t tiles = (problem.positions + star::kTilePositions - 1) / star::kTilePositions;
    fill(a);
    std::vector<double> partial(static_cast<size_t>(problem.batch * tiles * (Kind::kSums + Kind::more_sums(a))));
    std::vector<float> loss = unwritten(unreduced ? problem.batch : 1), metrics = unwritten(Kind::kMetrics);
    std::vector<float> saved = unwritten(Kind::saved_rows(a) * problem.batch);
    Memory gradient = output(model_output.view.dtype, problem, gradient_layout);
    a.threads = threads;
    a.partial = partial.data(), a.loss = loss.data(), a.metrics = metrics.data(), a.saved = saved.data();
    if (at_once) a.gradient = gradient.view, a.grad_loss = nullptr;
    if (forward) forward(a);
    a.gradient = gradient.view;
    if (backward && !at_once) backward(a);
    if (forward && (backward || at_once)) {
      check_written("loss", loss), check_written("metrics", metrics), check_written("saved", saved);
      check_written("gradient", gradient, problem);
    }
    return {bytes(loss), bytes(metrics), bytes(saved), bytes(gradient)};
  }
};

struct PolicyInputs : ObjectiveInputs {
  Memory sample, prev_sample, old_output;
  std::vector<float> coefficients, old_log_prob;
  star::PolicyArguments arguments{};

  PolicyInputs(Random& random, const Problem& p, bool fixed)
      : ObjectiveInputs(random, p, fixed, true),
        sample(fixed ? planes(random, p) : input(random, p)),
        prev_sample(fixed ? planes(random, p) : input(random, p)),
        old_output(fixed ? planes(random, p) : input(random, p)),
        coefficients(floats(random, star::kCoefficientRows * p.batch, 0.5f, 1.0f)),
        old_log_prob(floats(random, p.batch * p.positions, -0.5f, 0.5f)) {
    arguments.sample = sample.view, arguments.prev_sample = prev_sample.view;
    if (!fixed && random.chance(40)) arguments.old_output = old_output.view;
    arguments.coefficients = coefficients.data();
    arguments.columns = p.batch;
    if (!fixed && random.chance(30)) {
      coefficients.resize(star::kCoefficientRows);
      coefficients.shrink_to_fit();
      arguments.coefficients = coefficients.data(), arguments.columns = 1;
    }
    arguments.dense = dense;
    arguments.per_location = !fixed && random.chance(50);
    if (!fixed && !arguments.per_location && !has_weights && random.chance(50)) {
      old_log_prob.resize(static_cast<size_t>(p.batch));
      old_log_prob.shrink_to_fit();
      arguments.old_is_scalar = true;
    }
    arguments.old_log_prob = old_log_prob.data();
    arguments.clip_low = 0.9f, arguments.clip_high = 1.1f;
    if (arguments.old_output.data && random.chance(50)) arguments.kl_mask_threshold = 1e-3f;
    arguments.guarded = arguments.old_output.data && arguments.kl_mask_threshold == 0.0f;
  }
};

struct NftInputs : ObjectiveInputs {
  Memory old_output, target;
  std::vector<float> sigma;
  star::NftArguments arguments{};

  NftInputs(Random& random, const Problem& p, bool fixed)
      : ObjectiveInputs(random, p, fixed, false),
        old_output(fixed ? planes(random, p) : input(random, p)),
        target(fixed ? planes(random, p) : input(random, p)),
        sigma(floats(random, p.batch, 0.1f, 1.0f)) {
    arguments.old_output = old_output.view, arguments.target = target.view;
    arguments.sigma = sigma.data();
    arguments.adaptive = fixed || random.chance(50);
    arguments.beta = 0.7f;
  }
};

struct SampleInputs {
  Problem problem;
  Memory model_output, sample, noise;
  std::vector<float> coefficients;
  DType dtype;
  Layout layout;

  SampleInputs(Random& random, const Problem& p, bool fixed)
      : problem(p),
        model_output(fixed ? ObjectiveInputs::planes(random, p) : input(random, p)),
        sample(fixed ? ObjectiveInputs::planes(random, p) : input(random, p)),
        noise(fixed ? ObjectiveInputs::planes(random, p) : input(random, p)),
        coefficients(floats(random, star::kCoefficientRows * p.batch, 0.5f, 1.0f)),
        dtype(fixed ? DType::kFloat32 : some_dtype(random)),
        layout(fixed ? kPlanes : static_cast<Layout>(random.below(kOneForAll))) {}

  std::vector<std::string> run(int threads) const {
    Memory prev = output(dtype, problem, layout);
    std::vector<float> log_prob = unwritten(problem.batch * problem.positions);
    star::SampleArguments a{};
    a.batch = problem.batch, a.channels = problem.channels, a.positions = problem.positions;
    a.model_output = model_output.view, a.sample = sample.view, a.noise = noise.view, a.prev_sample = prev.view;
    a.coefficients = coefficients.data(), a.columns = problem.batch;
    a.log_prob = log_prob.data();
    a.threads = threads;
    kernels::sample_transition(a);
    check_written("prev_sample", prev, problem), check_written("log_prob", log_prob);
    return {bytes(prev), bytes(log_prob)};
  }
};

}  // namespace
