// DiffusionNFT (arXiv 2509.16117): the error of one element, and how errors add up to the loss and its metrics, for
// host and device code alike.
//
// With D = old - target and d = output - old, the implicit policies' errors are D + beta d and D - beta d. The loss of
// a sample is clip / beta * (r S+ f+ + (1 - r) S- f-), S the weighted mean squares and f = 1, or, with the adaptive
// weighting, sigma^2 / max(sigma mean |error|, 1e-5), which has no gradient. Its gradient is a combination of D and d.
#pragma once

#include "flow_policy.h"

namespace star {

struct Nft {
  using Arguments = NftArguments;
  // Squares of both errors, weighted; the KL penalty's squares, weighted as it is; plain sums of absolute errors, of
  // the squared change d, and of the locations that count.
  enum Sum {
    kPositive,
    kNegative,
    kSquaredDifference,
    kPositiveAbsolute,
    kNegativeAbsolute,
    kDeviation,
    kCount,
    kSums
  };
  enum Metric { kPositiveLoss, kNegativeLoss, kMeanDeviation, kPolicyLoss, kKlLoss, kMetrics };
  static constexpr int kLargestSum = -1, kLargestMetric = -1;

  STAR_INLINE int64_t more_sums(const NftArguments&) { return 0; }
  // Rows of what is saved for the backward pass: the factors of D and of d in the gradient; one over the count.
  STAR_INLINE int64_t saved_rows(const NftArguments&) { return 3; }
};

constexpr double kLeastError = 1e-5;  // lower bound of the mean absolute error that is divided by

struct NftErrors {
  float positive, negative;
};

STAR_INLINE NftErrors nft_errors(float old_error, float change, float beta) {
  return {old_error + beta * change, old_error - beta * change};
}

// Turns the sums of a sample into its part of the metrics and what is saved of it.
template <typename Sums>
STAR_INLINE void evaluate_sample(const NftArguments& a, int64_t b, const double (&sums)[Nft::kSums], const Sums&,
                                 const Saved& saved, double (&metrics)[Nft::kMetrics]) {
  const double inverse = inverse_count(a, sums[Nft::kCount]);
  const double inverse_elements = inverse / static_cast<double>(a.channels);
  double positive = 1.0, negative = 1.0;
  if (a.adaptive) {
    const double sigma = a.sigma[b];
    positive = sigma * sigma / maximum(sigma * sums[Nft::kPositiveAbsolute] * inverse_elements, kLeastError);
    negative = sigma * sigma / maximum(sigma * sums[Nft::kNegativeAbsolute] * inverse_elements, kLeastError);
  }
  const double clip = a.advantage_clip;
  const double likely = 0.5 * clamp_advantage(a.advantages[b], a.advantage_clip) / clip + 0.5;
  const double factor = clip * step_weight(a, b);
  metrics[Nft::kPositiveLoss] = positive * sums[Nft::kPositive] * inverse_elements;
  metrics[Nft::kNegativeLoss] = negative * sums[Nft::kNegative] * inverse_elements;
  metrics[Nft::kMeanDeviation] = sums[Nft::kDeviation] * inverse_elements;
  metrics[Nft::kPolicyLoss] =
      factor / a.beta * (likely * metrics[Nft::kPositiveLoss] + (1.0 - likely) * metrics[Nft::kNegativeLoss]);
  metrics[Nft::kKlLoss] = a.ref_output.data ? sums[Nft::kSquaredDifference] * inverse_elements : 0.0;
  const double scale = 2.0 * factor * inverse_elements * share_of_sample(a);
  saved[0] = static_cast<float>(scale * (likely * positive - (1.0 - likely) * negative));
  saved[1] = static_cast<float>(scale * (likely * positive + (1.0 - likely) * negative) * a.beta);
  saved[2] = static_cast<float>(inverse);
}

// d loss / d output = weight * (old_error * D + change * d) + kl * (output - ref_output), kl times the weight if that
// acts on the penalty.
struct NftFactors {
  float old_error, change, kl;
};

STAR_INLINE NftFactors gradient_factors(const NftArguments& a, int64_t b, const Saved& saved) {
  const float upstream = upstream_gradient(a, b);
  const float mean = upstream * saved[2] / static_cast<float>(a.channels);
  const float kl = mean * static_cast<float>(share_of_sample(a)) * a.kl_coef * 2.0f;
  return {upstream * saved[0], upstream * saved[1], kl};
}

STAR_INLINE NftFactors gradient_factors(const NftArguments& a, int64_t b) {
  return gradient_factors(a, b, saved_of(a, b));
}

}  // namespace star
