// Runs the CPU kernels on random problems, without Python: for sanitizers, and for counting instructions.
//
//   driver CASES [SEED [FILE]]   every kernel on CASES problems, with one thread and with several: the results must be
//                                equal bit for bit. Buffers are exactly as large as the strides reach, and every
//                                element of an output must be written. FILE receives the results.
//   driver once KERNEL           one kernel once, on one thread, on a problem of fixed size
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "memory.h"
#include "objectives.h"

namespace {

struct MapsInputs {
  int64_t batch, heads, dense_length, gathered_length, width, slots, phrases, start, rows;
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
        phrases(fixed ? 2 : random.between(1, 4)),
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
    weight = floats(random, batch * phrases * slots, 0.0f, 1.0f);
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
    std::vector<float> maps = unwritten(batch * phrases * (reduce_heads ? 1 : heads) * rows);
    star::MapsArguments a{};
    a.batch = batch, a.heads = heads, a.n_rows = rows, a.head_dim = width, a.slots = slots, a.phrases = phrases;
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

struct AllocateInputs {
  int64_t batch, steps, phrases, positions;
  double strength, cap;
  std::vector<float> maps, signal;
  bool signal_of_phrases;

  AllocateInputs(Random& random, bool fixed)
      : batch(fixed ? 4 : random.between(1, 3)),
        steps(fixed ? 3 : random.between(1, 3)),
        phrases(fixed ? 2 : random.between(1, 3)),
        positions(fixed ? 1024 : random.between(1, random.chance(30) ? 300 : 40)),
        strength(random.unit()),
        cap(fixed || random.chance(50) ? 1.5 : std::numeric_limits<double>::infinity()),
        maps(floats(random, batch * steps * phrases * positions, random.chance(20) ? -0.01f : 0.0f, 1.0f)),
        signal_of_phrases(random.chance(50)) {
    if (!fixed && random.chance(50))
      signal = floats(random, batch * steps * (signal_of_phrases ? phrases : 1), 0.0f, 1.0f);
    for (float& value : maps) value *= value * value;
  }

  std::vector<std::string> run(int threads) const {
    std::vector<float> weights = unwritten(batch * steps * phrases * positions);
    star::AllocateArguments a{};
    a.batch = batch, a.steps = steps, a.phrases = phrases, a.positions = positions;
    a.maps = maps.data(), a.signal = signal.empty() ? nullptr : signal.data(), a.signal_of_phrases = signal_of_phrases;
    a.strength = strength, a.cap = cap;
    a.weights = weights.data();
    a.threads = threads;
    kernels::allocate(a);
    check_written("weights", weights);
    return {bytes(weights)};
  }
};

// Two passes, and one that also writes the gradient, which must be that of two for an upstream gradient of ones.
template <typename Kind, typename Inputs>
void check_passes(const char* name, const Inputs& in, void (*forward)(const typename Kind::Arguments&),
                  void (*backward)(const typename Kind::Arguments&)) {
  with_threads(name, [&](int threads) { return in.template run<Kind>(in.arguments, threads, forward, backward); });
  const auto at_once = [&](int threads) {
    return in.template run<Kind>(in.arguments, threads, forward, backward, true);
  };
  with_threads(name, at_once);
  Inputs ones = in;
  std::fill(ones.upstream.begin(), ones.upstream.end(), 1.0f);
  if (at_once(1) != ones.template run<Kind>(in.arguments, 1, forward, backward)) {
    fail(std::string(name) + ": one pass differs from two");
  }
}

void run_cases(int64_t cases, uint64_t seed) {
  for (int64_t i = 0; i < cases; ++i) {
    Random random{seed * 1000003u + static_cast<uint64_t>(i)};
    const Problem problem(random);
    const PolicyInputs policy(random, problem, false);
    check_passes<star::Policy>("policy", policy, kernels::policy_forward, kernels::policy_backward);
    const NftInputs nft(random, problem, false);
    check_passes<star::Nft>("nft", nft, kernels::nft_forward, kernels::nft_backward);
    const SampleInputs sampling(random, problem, false);
    with_threads("sample_transition", [&](int threads) { return sampling.run(threads); });
    const MapsInputs maps(random, false);
    with_threads("attention_maps", [&](int threads) { return maps.run(threads); });
    const AllocateInputs allocation(random, false);
    with_threads("allocate", [&](int threads) { return allocation.run(threads); });
  }
  std::printf("%lld cases of each kernel\n", static_cast<long long>(cases));
}

// The pass that the name of the kernel ends with: forward, backward, or both, the forward pass with the gradient.
template <typename Kind, typename Inputs>
void run_passes(const std::string& kernel, const Inputs& in, void (*forward)(const typename Kind::Arguments&),
                void (*backward)(const typename Kind::Arguments&)) {
  const bool both = kernel.find("both") != std::string::npos, first = kernel.find("forward") != std::string::npos;
  in.template run<Kind>(in.arguments, 1, both || first ? forward : nullptr, both || first ? nullptr : backward, both);
}

void run_once(const std::string& kernel) {
  Random random{1};
  const Problem problem(16, 32, 32);
  if (kernel.rfind("policy", 0) == 0) {
    PolicyInputs in(random, problem, true);
    in.arguments.per_location = kernel.find("location") != std::string::npos;
    run_passes<star::Policy>(kernel, in, kernels::policy_forward, kernels::policy_backward);
  } else if (kernel.rfind("nft", 0) == 0) {
    run_passes<star::Nft>(kernel, NftInputs(random, problem, true), kernels::nft_forward, kernels::nft_backward);
  } else if (kernel == "sample_transition") {
    SampleInputs(random, problem, true).run(1);
  } else if (kernel == "attention_maps") {
    MapsInputs(random, true).run(1);
  } else if (kernel == "allocate") {
    AllocateInputs(random, true).run(1);
  } else {
    fail("no kernel " + kernel);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 3 && std::string(arguments[1]) == "once") {
    run_once(arguments[2]);
  } else if (count >= 2 && count <= 4) {
    if (count == 4 && (results = std::fopen(arguments[3], "wb")) == nullptr)
      fail("cannot write " + std::string(arguments[3]));
    run_cases(std::atoll(arguments[1]), count >= 3 ? static_cast<uint64_t>(std::atoll(arguments[2])) : 0u);
    if (results != nullptr && std::fclose(results) != 0) fail("cannot write the results");
  } else {
    fail("usage: driver CASES [SEED [FILE]] | driver once KERNEL");
  }
  return 0;
}
