// Runs the CPU kernels on random problems, without Python: for sanitizers, and for counting instructions.
//
//   driver CASES [SEED]   every kernel on CASES problems, with one thread and with several, whose results must be equal
//                         to the last bit. Buffers are exactly as large as the strides reach, and outputs are written
//                         to the last element.
//   driver once KERNEL    one kernel once, on one thread, on a problem of fixed size
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "nft_sums.h"
#include "policy_sums.h"

namespace {

using star::DType;
using star::View;
namespace kernels = star::STAR_ISA;

[[noreturn]] void fail(const std::string& problem) {
  std::fprintf(stderr, "%s\n", problem.c_str());
  std::exit(1);
}

struct Random {
  uint64_t state;
  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool chance(int percent) { return below(100) < percent; }
  float unit() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float centred() { return 2.0f * unit() - 1.0f; }
};

constexpr uint32_t kUnwritten = 0x7fa5a5a5u;  // NaN that arithmetic does not make
constexpr uint16_t kUnwrittenHalf = 0x7fa5u;

// A tensor [B, C, P] or [B, H, S] (of runs of `width` elements) in memory that ends where its strides do.
struct Memory {
  std::vector<uint32_t> words;
  std::vector<uint16_t> halves;
  View view;
  int64_t extent = 0;

  Memory(DType dtype, int64_t batch, int64_t channels, int64_t positions, View strides, int64_t width = 1) {
    view = strides;
    view.dtype = dtype;
    extent = (batch - 1) * view.batch + (channels - 1) * view.channel + (positions - 1) * view.position + width;
    if (dtype == DType::kFloat32) {
      words.assign(static_cast<size_t>(extent), kUnwritten);
      words.shrink_to_fit();
      view.data = words.data();
    } else {
      halves.assign(static_cast<size_t>(extent), kUnwrittenHalf);
      halves.shrink_to_fit();
      view.data = halves.data();
    }
  }

  void set(int64_t at, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (view.dtype == DType::kFloat32) {
      words[static_cast<size_t>(at)] = bits;
    } else if (view.dtype == DType::kBFloat16) {
      halves[static_cast<size_t>(at)] = static_cast<uint16_t>(bits >> 16);
    } else {  // of float16 a number between 2^-14 and 1
      const uint32_t magnitude = 0x400u + (bits >> 5) % (0x3c00u - 0x400u);
      halves[static_cast<size_t>(at)] = static_cast<uint16_t>((bits >> 31 << 15) | magnitude);
    }
  }

  bool written(int64_t at) const {
    if (view.dtype == DType::kFloat32) return words[static_cast<size_t>(at)] != kUnwritten;
    return halves[static_cast<size_t>(at)] != kUnwrittenHalf;
  }
};

struct Shape {
  int64_t batch, channels, positions;
};

enum Layout { kPlanes, kPacked, kBatchInnermost, kGaps, kOneForAll, kLayouts };

View strides_of(Layout layout, const Shape& s) {
  View v;
  v.batch = s.channels * s.positions, v.channel = s.positions, v.position = 1;
  if (layout == kPacked) v.channel = 1, v.position = s.channels;
  if (layout == kBatchInnermost) v.batch = 1, v.position = s.batch, v.channel = s.positions * s.batch;
  if (layout == kGaps) v.batch = 3 * v.batch + 1, v.channel = 3 * v.channel, v.position = 3;
  if (layout == kOneForAll) v.batch = 0;
  return v;
}

DType some_dtype(Random& random) { return static_cast<DType>(random.below(3)); }

Memory input(Random& random, const Shape& s) {
  Memory memory(some_dtype(random), s.batch, s.channels, s.positions,
                strides_of(static_cast<Layout>(random.below(kLayouts)), s));
  for (int64_t i = 0; i < memory.extent; ++i) memory.set(i, random.centred());
  return memory;
}

Memory output(DType dtype, const Shape& s, Layout layout) {
  return Memory(dtype, s.batch, s.channels, s.positions, strides_of(layout, s));
}

std::vector<float> floats(Random& random, int64_t n, float low, float high) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) value = low + (high - low) * random.unit();
  return values;
}

std::vector<float> unwritten(int64_t n) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& value : values) std::memcpy(&value, &kUnwritten, sizeof value);
  return values;
}

void check_written(const char* name, const std::vector<float>& values) {
  for (const float& value : values) {
    if (std::memcmp(&value, &kUnwritten, sizeof value) == 0) fail(std::string(name) + " is not written throughout");
  }
}

// Every element is written, and nothing between them.
void check_written(const char* name, const Memory& memory, const Shape& s) {
  int64_t written = 0;
  for (int64_t i = 0; i < memory.extent; ++i) written += memory.written(i);
  if (written != s.batch * s.channels * s.positions) fail(std::string(name) + " is written between its elements");
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t p = 0; p < s.positions; ++p) {
        const int64_t at = b * memory.view.batch + c * memory.view.channel + p * memory.view.position;
        if (!memory.written(at)) fail(std::string(name) + " is not written throughout");
      }
    }
  }
}

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

constexpr int kThreads[] = {1, 2, 3, 5};

// Runs a call with every number of threads; its outputs must not depend on it.
void with_threads(const char* name, const std::function<std::vector<std::string>(int)>& call) {
  const std::vector<std::string> expected = call(1);
  for (int threads : kThreads) {
    if (call(threads) != expected) fail(std::string(name) + " depends on the number of threads");
  }
}

std::string bytes(const std::vector<float>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)};
}

std::string bytes(const Memory& memory) {
  if (memory.view.dtype == DType::kFloat32) {
    return {reinterpret_cast<const char*>(memory.words.data()), memory.words.size() * sizeof(uint32_t)};
  }
  return {reinterpret_cast<const char*>(memory.halves.data()), memory.halves.size() * sizeof(uint16_t)};
}

// What the objectives share: options by chance, and what they are given.
struct ObjectiveInputs {
  Problem problem;
  Memory model_output, reference;
  std::vector<float> advantages, weights, step_weights, upstream;
  std::vector<uint8_t> mask;
  bool has_reference, has_weights, has_steps, has_mask, weighted_kl, per_sample;
  Layout gradient_layout;

  ObjectiveInputs(Random& random, const Problem& p, bool fixed)
      : problem(p),
        model_output(fixed ? planes(random, p) : input(random, p)),
        reference(fixed ? planes(random, p) : input(random, p)),
        advantages(floats(random, p.batch, -2.0f, 2.0f)),
        weights(floats(random, p.batch * p.grid[0] * p.grid[1] * p.grid[2], 0.0f, 2.0f)),
        step_weights(floats(random, p.batch, 0.5f, 1.5f)),
        upstream(floats(random, p.batch, 0.5f, 1.5f)),
        mask(static_cast<size_t>(p.batch * p.positions)) {
    for (uint8_t& kept : mask) kept = random.chance(70);
    has_reference = fixed || random.chance(50), has_weights = fixed || random.chance(50);
    has_steps = !fixed && random.chance(50), has_mask = !fixed && random.chance(40);
    weighted_kl = random.chance(50), per_sample = !fixed && random.chance(50);
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
    if (has_reference) a.reference = reference.view;
    a.advantages = advantages.data();
    a.weights = has_weights ? weights.data() : nullptr;
    a.step_weights = has_steps ? step_weights.data() : nullptr;
    a.mask = has_mask ? mask.data() : nullptr;
    a.weighted_kl = weighted_kl, a.per_sample = per_sample;
    a.advantage_clip = 1.5f, a.kl_coef = 0.1f;
    a.grad_loss = upstream.data();
  }

  // Forward and backward of one objective with a number of threads: every output.
  template <typename Kind>
  std::vector<std::string> run(typename Kind::Arguments a, int threads,
                               void (*forward)(const typename Kind::Arguments&),
                               void (*backward)(const typename Kind::Arguments&)) const {
    const int64_t tiles = (problem.positions + star::kTilePositions - 1) / star::kTilePositions;
    std::vector<double> partial(static_cast<size_t>(problem.batch * tiles * Kind::kSums));
    std::vector<float> loss = unwritten(per_sample ? problem.batch : 1), metrics = unwritten(Kind::kMetrics);
    std::vector<float> statistics = unwritten(Kind::kStatistics * problem.batch);
    Memory gradient = output(model_output.view.dtype, problem, gradient_layout);
    fill(a);
    a.threads = threads;
    a.partial = partial.data(), a.loss = loss.data(), a.metrics = metrics.data(), a.statistics = statistics.data();
    a.gradient = gradient.view;
    if (forward) forward(a);
    if (backward) backward(a);
    if (forward && backward) {
      check_written("loss", loss), check_written("metrics", metrics), check_written("statistics", statistics);
      check_written("gradient", gradient, problem);
    }
    return {bytes(loss), bytes(metrics), bytes(statistics), bytes(gradient)};
  }
};

struct PolicyInputs : ObjectiveInputs {
  Memory sample, prev_sample, old_output;
  std::vector<float> coefficients, old_log_prob;
  star::PolicyArguments arguments{};

  PolicyInputs(Random& random, const Problem& p, bool fixed)
      : ObjectiveInputs(random, p, fixed),
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
    arguments.per_location = !fixed && random.chance(50);
    if (!fixed && !arguments.per_location && !has_weights && random.chance(50)) {
      old_log_prob.resize(static_cast<size_t>(p.batch));
      old_log_prob.shrink_to_fit();
      arguments.old_is_scalar = true;
    }
    arguments.old_log_prob = old_log_prob.data();
    arguments.clip_low = 0.9f, arguments.clip_high = 1.1f;
  }
};

struct NftInputs : ObjectiveInputs {
  Memory old_output, target;
  std::vector<float> sigma;
  star::NftArguments arguments{};

  NftInputs(Random& random, const Problem& p, bool fixed)
      : ObjectiveInputs(random, p, fixed),
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

struct MapsInputs {
  int64_t batch, heads, dense_length, gathered_length, width, slots, groups, start, rows;
  bool text_to_image, reduce_heads, masked;
  Memory dense, gathered, lse;
  std::vector<int32_t> index;
  std::vector<float> weight;
  std::vector<uint8_t> key_mask;

  MapsInputs(Random& random, bool fixed)
      : batch(fixed ? 2 : random.between(1, 3)),
        heads(fixed ? 4 : random.between(1, 3)),
        dense_length(fixed ? 256 : random.between(1, random.chance(30) ? 200 : 20)),
        gathered_length(fixed ? 77 : random.between(1, 40)),
        width(fixed ? 64 : (random.chance(5) ? star::kMaxHeadDim : random.between(1, 70))),
        slots(fixed ? 8 : random.between(1, 20)),
        groups(fixed ? 2 : random.between(1, 4)),
        start(fixed ? 0 : random.below(dense_length)),
        rows(fixed ? dense_length : random.between(1, dense_length - start)),
        text_to_image(!fixed && random.chance(50)),
        reduce_heads(fixed || random.chance(50)),
        masked(!fixed && random.chance(40)),
        dense(heads_of(random, dense_length, fixed)),
        gathered(heads_of(random, gathered_length, fixed)),
        lse(DType::kFloat32, batch, heads, text_to_image ? gathered_length : dense_length, View{}) {
    const int64_t queries = text_to_image ? gathered_length : dense_length;
    View strides;
    strides.batch = heads * queries, strides.channel = queries, strides.position = 1;
    if (!fixed && random.chance(50)) strides.channel = 1, strides.position = heads;
    lse = Memory(DType::kFloat32, batch, heads, queries, strides);
    for (int64_t i = 0; i < lse.extent; ++i) lse.set(i, 3.0f + random.unit());
    for (int64_t i = 0; i < batch * slots; ++i) {
      index.push_back(static_cast<int32_t>(random.between(fixed ? 0 : -1, gathered_length - 1)));
    }
    if (!fixed && random.chance(20)) std::fill(index.begin(), index.begin() + slots, -1);
    weight = floats(random, batch * groups * slots, 0.0f, 1.0f);
    for (int64_t i = 0; i < batch * (text_to_image ? dense_length : gathered_length); ++i) {
      key_mask.push_back(random.chance(70));
    }
  }

  // [B, H, S, D] with unit stride in D: heads outside or inside the sequence.
  Memory heads_of(Random& random, int64_t length, bool fixed) const {
    View strides;
    strides.batch = heads * length * width, strides.channel = length * width, strides.position = width;
    if (!fixed && random.chance(50)) strides.channel = width, strides.position = heads * width;
    Memory memory(fixed ? DType::kFloat32 : some_dtype(random), batch, heads, length, strides, width);
    for (int64_t i = 0; i < memory.extent; ++i) memory.set(i, random.centred());
    return memory;
  }

  std::vector<std::string> run(int threads) const {
    std::vector<float> maps = unwritten(batch * groups * (reduce_heads ? 1 : heads) * rows);
    star::MapsArguments a{};
    a.batch = batch, a.heads = heads, a.n_rows = rows, a.head_dim = width, a.slots = slots, a.phrases = groups;
    a.dense_length = dense_length, a.gathered_length = gathered_length;
    a.dense = dense.view, a.gathered = gathered.view, a.lse = lse.view;
    a.start = start;
    a.scale = 0.3f;
    a.text_to_image = text_to_image, a.reduce_heads = reduce_heads;
    a.index = index.data(), a.weight = weight.data(), a.key_mask = masked ? key_mask.data() : nullptr;
    a.maps = maps.data();
    a.threads = threads;
    std::vector<float> scratch(static_cast<size_t>(kernels::maps_scratch_floats(a)));
    a.scratch = scratch.data();
    kernels::attention_maps(a);
    check_written("maps", maps);
    return {bytes(maps)};
  }
};

void run_cases(int64_t cases, uint64_t seed) {
  for (int64_t i = 0; i < cases; ++i) {
    Random random{seed * 1000003u + static_cast<uint64_t>(i)};
    const Problem problem(random);
    const PolicyInputs policy(random, problem, false);
    with_threads("policy", [&](int threads) {
      return policy.run<star::Policy>(policy.arguments, threads, kernels::policy_forward, kernels::policy_backward);
    });
    const NftInputs nft(random, problem, false);
    with_threads("nft", [&](int threads) {
      return nft.run<star::Nft>(nft.arguments, threads, kernels::nft_forward, kernels::nft_backward);
    });
    const SampleInputs sampling(random, problem, false);
    with_threads("sample_transition", [&](int threads) { return sampling.run(threads); });
    const MapsInputs maps(random, false);
    with_threads("attention_maps", [&](int threads) { return maps.run(threads); });
  }
  std::printf("%lld cases of each kernel\n", static_cast<long long>(cases));
}

void run_once(const std::string& kernel) {
  Random random{1};
  const Problem problem(16, 32, 32);
  if (kernel.rfind("policy", 0) == 0) {
    PolicyInputs in(random, problem, true);
    in.arguments.per_location = kernel.find("location") != std::string::npos;
    const bool forward = kernel.find("forward") != std::string::npos;
    in.run<star::Policy>(in.arguments, 1, forward ? kernels::policy_forward : nullptr,
                         forward ? nullptr : kernels::policy_backward);
  } else if (kernel.rfind("nft", 0) == 0) {
    const NftInputs in(random, problem, true);
    const bool forward = kernel == "nft_forward";
    in.run<star::Nft>(in.arguments, 1, forward ? kernels::nft_forward : nullptr,
                      forward ? nullptr : kernels::nft_backward);
  } else if (kernel == "sample_transition") {
    SampleInputs(random, problem, true).run(1);
  } else if (kernel == "attention_maps") {
    MapsInputs(random, true).run(1);
  } else {
    fail("no kernel " + kernel);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "once") {
    run_once(arguments[2]);
  } else if (count == 2 || count == 3) {
    run_cases(std::atoll(arguments[1]), count == 3 ? static_cast<uint64_t>(std::atoll(arguments[2])) : 0u);
  } else {
    fail("usage: driver CASES [SEED] | driver once KERNEL");
  }
  return 0;
}
