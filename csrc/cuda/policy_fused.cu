// The policy loss, its metrics and its gradient in one launch, without a threshold of the divergence; see fused.cuh.
#include <cstdint>

#include "cuda/fused.cuh"
#include "cuda/kernels.h"
#include "cuda/policy.cuh"

namespace star {
namespace cuda {
namespace {

template <typename Access, Credit kCredit>
__global__ void __launch_bounds__(kFusedThreads, 1)
    policy_fused_kernel(const __grid_constant__ PolicyArguments a, const __grid_constant__ Fused f, unsigned* counter) {
#if STAR_CLUSTERS
  constexpr int kRun = Access::kRun, kSlots = Access::kSlots;
  constexpr bool kPlain = kCredit == Credit::kPlain;
  const Place place = place_of(f, a.positions);
  const unsigned b = place.b;
  const Coefficients k = coefficients_of(a.coefficients, a.columns, b);
  const Access access(a.model_output);
  const Room room(f);
  const TileRatios tile{room.ratios, room.cells};
  const bool has_ratios = a.per_location || (!kPlain && has_phrase_ratios(a));
  Kept<kRun> residuals(room.kept, f.threads);
  const auto keep = [&](const float (&values)[kRun]) { residuals.put(values); };
  const bool more = !kPlain && a.dense;
  const ThreadSums<Policy, kTerms<kCredit>> thread_sums(room.scratch, f.threads, policy_sums(a), more);
  for_each_kept_position<Access>(f, place, [&](unsigned position, unsigned lane, bool active) {
    const Rows<Access> rows(a, b, active ? position : place.first, !a.old_is_scalar);
    Sums<Access> sums = channel_sums<kCredit>(access, a, k, f, b, position, lane, active, a.ref_output, keep);
    if (!active || lane != 0) return;
    float log_ratio[kSlots];
    log_ratios<kCredit>(a, k, rows, sums, log_ratio);
    if (has_ratios) store_ratios(a, place, position, rows, log_ratio, tile);
    float terms[kTerms<kCredit>] = {};
    add_terms<Access, kCredit>(a, b, position, rows, sums, log_ratio, terms);
    thread_sums.add(terms);
  });
  const auto store = [&](int64_t sum, double value) { room.own[sum] = value; };
  if (!kPlain && has_phrase_ratios(a)) add_phrases(a, f, place, tile, store);
  add_threads<Policy, kTerms<kCredit>>(f, room.scratch, policy_sums(a), more, store);
  finish_sums<Policy>(f, a, b, policy_sums(a), counter);

  Kept<kRun> again(room.kept, f.threads);
  for_each_kept_position<Access>(f, place, [&](unsigned position, unsigned lane, bool active) {
    if (!active) return;
    const Rows<Access> rows(a, b, position, false);
    float log_ratio[kSlots] = {};
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      if (a.per_location) log_ratio[i] = tile.log_ratio[position - place.first + i];
    }
    const Saved saved{room.saved, 1};
    const Factors<Access> factors = factors_of<Access, kCredit>(a, k, b, position, rows, log_ratio, log_ratio, saved);
    struct Runs {
      OutputRun<Access> output, ref;
    };
    const auto load = [&](int c) {
      Runs runs;
      if (a.ref_output.data) {
        runs.output = load_output(access, a.model_output, b, position, c);
        runs.ref = load_output(access, a.ref_output, b, position, c);
      }
      return runs;
    };
    const auto use = [&](int c, const Runs& runs) {
      float gradient[kRun];
      again.take(gradient);
#pragma unroll
      for (int i = 0; i < kRun; ++i) gradient[i] *= factors.residual[Access::kPacked ? 0 : i];
      if (a.ref_output.data) add_kl_gradient(access, runs.output, runs.ref, factors.kl, gradient);
      store_gradient(access, a, b, position, c, factors.keep, gradient);
    };
    for_each_run<Access, 4>(f, a.channels, lane, load, use);
  });
  cluster_wait();
#else
  __trap();
#endif
}

}  // namespace

bool policy_fused(const PolicyArguments& a, unsigned* counter, cudaStream_t stream) {
  if (masks_divergence(a)) return false;  // would need too many registers
  const Latents latents = policy_latents(a, true);
  const bool phrases = !a.per_location && a.phrases > 1;
  return with_credit(a, [&](auto credit) {
    const Demand demand{Policy::kSums + Policy::more_sums(a),
                        Policy::saved_rows(a),
                        kTerms<credit>,
                        1,
                        a.per_location || phrases,
                        phrases};
    constexpr Credit kCredit = credit == Credit::kPlain ? Credit::kPlain : Credit::kClipped;
    return with_fused_access(latents, [&](auto type) {
      using Access = typename decltype(type)::type;
      return launch_fused<Access>(policy_fused_kernel<Access, kCredit>, latents, demand, a, counter, stream);
    });
  });
}

}  // namespace cuda
}  // namespace star
