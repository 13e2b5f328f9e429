// The coefficients of a denoising step, in float64; star_kernels/policy/transitions.py has the formulas.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/elements.h"

namespace star {
namespace {

enum class Formula : int64_t { kFlowSde, kDanceSde, kFlowCps, kFlowMatching };

// A number, or the elements of a tensor [] or [B].
struct Values {
  enum class Type { kNumber, kFloat64, kFloat32, kFloat16, kBFloat16 };

  Type type = Type::kNumber;
  double number = 0.0;
  const void* data = nullptr;
  int64_t size = 1, stride = 0;

  double at(int64_t i) const {
    const int64_t offset = size == 1 ? 0 : i * stride;
    switch (type) {
      case Type::kFloat64:
        return static_cast<const double*>(data)[offset];
      case Type::kFloat32:
        return static_cast<const float*>(data)[offset];
      case Type::kFloat16:
        return from_float16(static_cast<const uint16_t*>(data)[offset]);
      case Type::kBFloat16:
        return from_bfloat16(static_cast<const uint16_t*>(data)[offset]);
      default:
        return number;
    }
  }
};

// A value for each row of the table.
struct Column {
  double mean_sample, mean_output, std, scale, offset, kl_scale;
};

inline Column gaussian(double sigma, double sigma_next, double s) {
  const double dt = sigma_next - sigma, std = s * std::sqrt(-dt), drift = s * s / (2.0 * sigma);
  const double log_sqrt_2pi = 0.91893853320467274178;
  return {1.0 + drift * dt,  (1.0 + drift * (1.0 - sigma)) * dt, std,
          0.5 / (std * std), -std::log(std) - log_sqrt_2pi,      0.5 / (s * s)};
}

inline Column flow_sde(double sigma, double sigma_next, double sigma_max, double noise_level) {
  return gaussian(sigma, sigma_next, noise_level * std::sqrt(sigma / (1.0 - (sigma == 1.0 ? sigma_max : sigma))));
}

inline Column flow_cps(double sigma, double sigma_next, double noise_level) {
  const double angle = noise_level * 3.14159265358979323846 / 2.0;
  const double s = sigma_next * std::sin(angle), kept = sigma_next * std::cos(angle);
  return {1.0 - sigma_next + kept, (1.0 - sigma) * kept - sigma * (1.0 - sigma_next), s, 1.0, 0.0, 0.5 / (s * s)};
}

inline Column flow_matching(double weight) { return {0.0, 1.0, 1.0 / std::sqrt(2.0 * weight), weight, 0.0, weight}; }

// Writes table [6, columns]. False if a value is out of range. `other`: sigma_max or the weight; `level`: noise_level
// or eta.
inline bool transition_table(Formula formula, const Values& sigmas, const Values& following, const Values& other,
                             double level, int64_t columns, float* table) {
  for (int64_t i = 0; i < columns; ++i) {
    const double sigma = sigmas.at(i), sigma_next = following.at(i), more = other.at(i);
    bool good = sigma > 0.0 && sigma <= 1.0;
    if (formula == Formula::kFlowMatching) {
      good = good && more > 0.0 && std::isfinite(more);
    } else {
      good = good && sigma_next >= 0.0 && sigma_next < sigma;
    }
    if (formula == Formula::kFlowSde) good = good && more > 0.0 && more < 1.0;
    if (!good) return false;
    const Column c = formula == Formula::kFlowSde    ? flow_sde(sigma, sigma_next, more, level)
                     : formula == Formula::kDanceSde ? gaussian(sigma, sigma_next, level)
                     : formula == Formula::kFlowCps  ? flow_cps(sigma, sigma_next, level)
                                                     : flow_matching(more);
    const double rows[] = {c.mean_sample, c.mean_output, c.std, c.scale, c.offset, c.kl_scale};
    for (int64_t row = 0; row < 6; ++row) table[row * columns + i] = static_cast<float>(rows[row]);
  }
  return true;
}

}  // namespace
}  // namespace star
