// Attention maps to weights of mean one; star_kernels/allocation.py has the definition.
//
// Computed in float64, in which sums of float32 neither overflow nor underflow, and rounded to float32. Sums have a
// fixed order, so that no result depends on the number of threads or on the instruction set.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace star {
namespace STAR_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr int64_t kWidth = 4, kVectors = 4;  // of any instruction set: values that are added up side by side

using Doubles = double __attribute__((vector_size(kWidth * sizeof(double))));
using Integers = int64_t __attribute__((vector_size(kWidth * sizeof(int64_t))));
using Floats = float __attribute__((vector_size(kWidth * sizeof(float))));

// Calls body(values as float64, lane). References, because the ABI of vectors depends on the instruction set.
template <typename Body>
inline __attribute__((always_inline)) void with_vector(const float* p, int64_t lane, Body& body) {
  Floats values;
  std::memcpy(&values, p, sizeof values);
  const Doubles wide = __builtin_convertvector(values, Doubles);
  body(wide, lane);
}

template <typename Vector>
auto add_lanes(const Vector* lanes) {
  const Vector sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// Calls body(vector of values, number of its lane) for n values, and zeros up to a whole block.
template <typename Body>
inline __attribute__((always_inline)) void for_each_vector(const float* values, int64_t n, Body body) {
  constexpr int64_t kBlock = kWidth * kVectors;
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int64_t lane = 0; lane < kVectors; ++lane) with_vector(values + i + lane * kWidth, lane, body);
  }
  float rest[kBlock] = {};
  for (int64_t j = 0; i + j < n; ++j) rest[j] = values[i + j];
  for (int64_t lane = 0; lane < kVectors; ++lane) with_vector(rest + lane * kWidth, lane, body);
}

// The sum of values, and whether they have a mean to divide by: none is negative or not finite, one is positive.
struct Mass {
  double sum = 0.0;
  bool negative = false;

  void add(double value) {
    sum += value;
    negative |= value < 0.0;
  }
  void add(const float* values, int64_t n) {
    Doubles sums[kVectors] = {};
    Integers below[kVectors] = {};
    for_each_vector(values, n, [&](const Doubles& value, int64_t lane) {
      sums[lane] += value;
      below[lane] += value < 0.0;
    });
    sum += add_lanes(sums);
    negative |= add_lanes(below) != 0;
  }
  bool good() const { return !negative && sum > 0.0 && sum < kInfinity; }
};

// The weights of one sample (and phrase): rows of n elements, `stride` apart.
struct Rows {
  int64_t count, n, stride;
};

// How many weights exceed a threshold, and the sum of the others.
struct Split {
  int64_t above = 0;
  double rest = 0.0;

  Split(const float* weights, const Rows& rows, double threshold) {
    for (int64_t row = 0; row < rows.count; ++row) {
      Doubles others[kVectors] = {};
      Integers exceed[kVectors] = {};  // each -1
      for_each_vector(weights + row * rows.stride, rows.n, [&](const Doubles& value, int64_t lane) {
        const Integers higher = value > threshold;
        exceed[lane] += higher;
        others[lane] += higher ? Doubles{} : value;
      });
      above -= add_lanes(exceed);
      rest += add_lanes(others);
    }
  }
};

// min(cap, c * weights), with c such that the mean is one. If k of n weights are at the cap, c = (n - k cap) / (sum of
// the others). From k = 0, each pass counts the weights that the last c raises above the cap: Newton's method on a
// concave, piecewise linear function, which ends at the solution, for most maps after about ten passes.
void apply_cap(float* weights, const Rows& rows, double cap) {
  const double size = static_cast<double>(rows.count * rows.n);
  double threshold = kInfinity, factor = 0.0, zeros = 0.0;
  for (int64_t known = -1;;) {
    const Split split(weights, rows, threshold);
    const double left = size - cap * static_cast<double>(split.above);
    if (!(left > 0.0 && split.rest > 0.0)) {  // all positive weights are at the cap, the rest is spread over the zeros
      const double positive = static_cast<double>(Split(weights, rows, 0.0).above);
      threshold = factor = 0.0;
      zeros = size > cap * positive ? (size - cap * positive) / (size - positive) : 0.0;
      break;
    }
    factor = left / split.rest;
    if (split.above == known) break;
    known = split.above;
    const double next = cap * split.rest / left;
    threshold = next < threshold ? next : threshold;
  }
  for (int64_t row = 0; row < rows.count; ++row) {
    float* values = weights + row * rows.stride;
    for (int64_t i = 0; i < rows.n; ++i) {
      const double value = values[i], scaled = value * factor + zeros;
      values[i] = static_cast<float>(value > threshold || scaled > cap ? cap : scaled);
    }
  }
}

// The weights of sample b and phrase g, over all steps.
void allocate_one(const AllocateArguments& a, int64_t b, int64_t g) {
  const Rows rows{a.steps, a.positions, a.phrases * a.positions};
  const int64_t first = (b * a.steps * a.phrases + g) * a.positions;
  const float* maps = a.maps + first;
  float* weights = a.weights + first;
  const auto signal = [&](int64_t s) {
    return static_cast<double>(a.signal_of_phrases ? a.signal[(b * a.steps + s) * a.phrases + g]
                                                   : a.signal[b * a.steps + s]);
  };
  Mass total;  // of all steps: of the signal if there is one, else of the maps
  for (int64_t s = 0; s < a.steps; ++s) {
    if (a.signal) {
      total.add(signal(s));
    } else {
      total.add(maps + s * rows.stride, rows.n);
    }
  }
  for (int64_t s = 0; s < a.steps; ++s) {
    double share = 1.0, size = static_cast<double>(rows.count * rows.n);
    Mass mass = total;
    if (a.signal) {
      if (total.good()) share = signal(s) * (static_cast<double>(a.steps) / total.sum);
      size = static_cast<double>(rows.n);
      mass = Mass();
      mass.add(maps + s * rows.stride, rows.n);
    }
    const float* values = maps + s * rows.stride;
    float* results = weights + s * rows.stride;
    const double even = 1.0 - a.strength, factor = mass.good() ? a.strength * share * (size / mass.sum) : 0.0;
    if (mass.good()) {
      for (int64_t i = 0; i < rows.n; ++i) results[i] = static_cast<float>(even + factor * values[i]);
    } else {
      for (int64_t i = 0; i < rows.n; ++i) results[i] = static_cast<float>(even + a.strength * share);
    }
  }
  if (a.cap < kInfinity) apply_cap(weights, rows, a.cap);
}

}  // namespace

void allocate(const AllocateArguments& a) {
  parallel_for(a.batch * a.phrases, a.threads, [&](int64_t i, int) { allocate_one(a, i / a.phrases, i % a.phrases); });
}

}  // namespace STAR_ISA
}  // namespace star
