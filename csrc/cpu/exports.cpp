// The CPU library's functions, as star_kernels/native.py loads them: read the arguments, select the instruction set,
// call. The caller allocates outputs; this library does not depend on torch.
#include <tvm/ffi/string.h>

#include <cstdlib>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#define STAR_DEVICE kDLCPU
#include "cpu/attention_arguments.h"
#include "cpu/transitions.h"

namespace star {
namespace {

struct Kernels {
  const char* isa;
  int64_t (*maps_scratch_floats)(const MapsArguments&);
  void (*attention_maps)(const MapsArguments&);
  int64_t (*statistics_scratch_floats)(const StatisticsArguments&);
  void (*attention_rows)(const StatisticsArguments&);
  void (*attention_columns)(const StatisticsArguments&);
  void (*allocate)(const AllocateArguments&);
  void (*policy_forward)(const PolicyArguments&);
  void (*policy_backward)(const PolicyArguments&);
  void (*nft_forward)(const NftArguments&);
  void (*nft_backward)(const NftArguments&);
  void (*sample_transition)(const SampleArguments&);
};

#define STAR_KERNELS_OF(isa)                                                                                  \
  Kernels {                                                                                                   \
    #isa, isa::maps_scratch_floats, isa::attention_maps, isa::statistics_scratch_floats, isa::attention_rows, \
        isa::attention_columns, isa::allocate, isa::policy_forward, isa::policy_backward, isa::nft_forward,   \
        isa::nft_backward, isa::sample_transition                                                             \
  }

// The compiled instruction sets that this processor can run, best first.
std::vector<Kernels> runnable() {
  std::vector<Kernels> list;
#if defined(STAR_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) list.push_back(STAR_KERNELS_OF(avx512));
  if (avx2) list.push_back(STAR_KERNELS_OF(avx2));
#endif
  list.push_back(STAR_KERNELS_OF(baseline));
  return list;
}

// The best instruction set, or the one named by STAR_KERNELS_ISA, for tests and comparisons.
Kernels choose() {
  const std::vector<Kernels> list = runnable();
  const char* wanted = std::getenv("STAR_KERNELS_ISA");
  if (!wanted || !*wanted) return list.front();
  std::string names;
  for (const Kernels& kernels : list) {
    if (std::string(wanted) == kernels.isa) return kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels.isa;
  }
  TVM_FFI_THROW(ValueError) << "STAR_KERNELS_ISA must be one of " << names << ", got " << wanted;
  return list.front();
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

// One thread for each `grain` of work: starting a thread costs about as much as a small call.
int threads_for(int64_t work, int64_t grain, int64_t threads) {
  check(threads >= 1 && threads <= 2147483647, "threads", "be at least 1");
  const int64_t useful = (work + grain - 1) / grain;
  return static_cast<int>(useful < threads ? useful : threads);
}

constexpr float kLargest = 3.402823466e38f;
constexpr int64_t kMapsGrain = int64_t{1} << 19;    // multiply-adds, about 30 microseconds
constexpr int64_t kLatentGrain = int64_t{1} << 15;  // elements, about 30 microseconds

// Whether no two elements share memory, as they do after expand or in overlapping windows.
bool distinct(ffi::TensorView t) {
  int64_t sizes[4], strides[4];
  int count = 0;
  for (int64_t d = 0; d < 4; ++d) {
    if (t.size(d) == 1) continue;
    int at = count++;
    for (; at > 0 && strides[at - 1] > t.stride(d); --at) {
      strides[at] = strides[at - 1];
      sizes[at] = sizes[at - 1];
    }
    strides[at] = t.stride(d);
    sizes[at] = t.size(d);
  }
  int64_t reach = 1;  // the first offset past the elements of the smaller strides
  for (int i = 0; i < count; ++i) {
    if (strides[i] < reach) return false;
    reach += strides[i] * (sizes[i] - 1);
  }
  return true;
}

// Whether [B, H, S, D] is in a layout that every kernel reads as it is: distinct rows of unit stride, which on a GPU
// start at multiples of 16 bytes.
bool ordinary_layout(ffi::TensorView t) {
  if (t.ndim() != 4 || t.numel() == 0 || !t.data_ptr() || t.stride(3) != 1 || !distinct(t)) return false;
  if (t.device().device_type == kDLCPU) return true;
  const int64_t size = t.dtype().bits / 8;
  for (int64_t d = 0; d < 3; ++d) {
    if (t.size(d) != 1 && t.stride(d) * size % 16 != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
}

bool is(ffi::TensorView t, uint8_t code, uint8_t bits, int32_t ndim, DLDevice device) {
  return t.dtype().code == code && t.dtype().bits == bits && t.ndim() == ndim && t.IsContiguous() && t.data_ptr() &&
         t.device().device_type == device.device_type && t.device().device_id == device.device_id;
}

// What star_kernels/attention/direct.py asks of the arguments of attention, in one call.
constexpr int64_t kOrdinary = 1, kOnCuda = 2, kNarrow = 4;

// 0 unless the arguments of attention are valid and in layouts that every kernel reads as they are; then flags.
// `sequence_axis` is 2, or 1 for [B, S, H, D]; `last` is the largest selected position. Reads no values, so tensors may
// be on any device. If the result is 0, the caller finds out what is wrong, or copies.
int64_t attention_kind(ffi::TensorView query, ffi::TensorView key, ffi::TensorView value, ffi::TensorView index,
                       ffi::TensorView weight, ffi::Optional<ffi::TensorView> key_mask, int64_t sequence_axis,
                       int64_t last, int64_t start, int64_t n_rows) {
  const DLDevice device = query.device();
  const DLDataType dtype = query.dtype();
  const int64_t heads_axis = 3 - sequence_axis;
  const bool wide = dtype.code == kDLFloat && dtype.bits == 32;
  if (device.device_type != kDLCPU && device.device_type != kDLCUDA) return 0;
  if (!(wide || ((dtype.code == kDLFloat || dtype.code == kDLBfloat) && dtype.bits == 16))) return 0;
  for (const ffi::TensorView& t : {query, key, value}) {
    if (t.device().device_type != device.device_type || t.device().device_id != device.device_id) return 0;
    if (t.dtype().code != dtype.code || t.dtype().bits != dtype.bits || !ordinary_layout(t)) return 0;
    if (t.size(0) != query.size(0) || t.size(heads_axis) != query.size(heads_axis) || t.size(3) != query.size(3))
      return 0;
  }
  const int64_t batch = query.size(0), queries = query.size(sequence_axis), keys = key.size(sequence_axis);
  if (value.size(sequence_axis) != keys || query.size(3) > kMaxHeadDim) return 0;
  if (!is(index, kDLInt, 32, 2, device) || !is(weight, kDLFloat, 32, 3, device)) return 0;
  if (index.size(0) != batch || weight.size(0) != batch || weight.size(2) != index.size(1)) return 0;
  if (weight.numel() == 0 || last >= keys || start < 0 || n_rows <= 0 || start > queries - n_rows) return 0;
  const int64_t found = kOrdinary | (device.device_type == kDLCUDA ? kOnCuda : 0) | (wide ? 0 : kNarrow);
  if (!key_mask.has_value()) return found;
  const ffi::TensorView mask = key_mask.value();
  return is(mask, kDLBool, 8, 2, device) && mask.size(0) == batch && mask.size(1) == keys ? found : 0;
}

void run_maps(MapsArguments a, int64_t threads) {
  a.threads = threads_for(a.batch * a.heads * a.n_rows * a.slots * a.head_dim, kMapsGrain, threads);
  float few[4096];  // enough for a small call
  std::unique_ptr<float[]> many;
  const auto floats = static_cast<size_t>(kernels().maps_scratch_floats(a));
  if (floats > std::size(few)) many.reset(new float[floats]);
  a.scratch = many ? many.get() : few;
  kernels().attention_maps(a);
}

void attention_maps(ffi::TensorView query, ffi::TensorView key, ffi::TensorView lse, ffi::TensorView index,
                    ffi::TensorView weight, ffi::Optional<ffi::TensorView> key_mask, int64_t start, double scale,
                    bool text_to_image, bool reduce_heads, int64_t threads, ffi::TensorView maps) {
  run_maps(
      maps_arguments(query, key, lse, {}, index, weight, key_mask, start, scale, text_to_image, reduce_heads, maps),
      threads);
}

void masked_attention_maps(ffi::TensorView query, ffi::TensorView key, ffi::TensorView lse, ffi::TensorView attn_mask,
                           ffi::TensorView index, ffi::TensorView weight, ffi::Optional<ffi::TensorView> key_mask,
                           int64_t start, double scale, bool text_to_image, bool reduce_heads, int64_t threads,
                           ffi::TensorView maps) {
  run_maps(maps_arguments(query, key, lse, attn_mask, index, weight, key_mask, start, scale, text_to_image,
                          reduce_heads, maps),
           threads);
}

void run_statistics(StatisticsArguments a, void (*kernel)(const StatisticsArguments&), int64_t threads) {
  a.threads = threads_for(a.batch * a.heads * a.rows * a.keys * a.head_dim, kMapsGrain, threads);
  const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(kernels().statistics_scratch_floats(a))]);
  a.scratch = scratch.get();
  kernel(a);
}

// Log-sum-exp and entropy, [B, H, R], of the rows of query.
void attention_rows(ffi::TensorView query, ffi::TensorView key, ffi::Optional<ffi::TensorView> mask, double scale,
                    int64_t threads, ffi::TensorView lse, ffi::TensorView entropy) {
  StatisticsArguments a = statistics_arguments(query, key, mask, scale);
  a.lse = floats("lse", lse, a.batch * a.heads * a.rows);
  a.entropy = floats("entropy", entropy, a.batch * a.heads * a.rows);
  run_statistics(a, kernels().attention_rows, threads);
}

// Sums [B, H, Sk] of probabilities over the rows of query, whose log-sum-exp is given.
void attention_columns(ffi::TensorView query, ffi::TensorView key, ffi::TensorView lse,
                       ffi::Optional<ffi::TensorView> mask, double scale, int64_t threads, ffi::TensorView sums) {
  StatisticsArguments a = statistics_arguments(query, key, mask, scale);
  a.lse = floats("lse", lse, a.batch * a.heads * a.rows);
  a.sums = floats("sums", sums, a.batch * a.heads * a.keys);
  run_statistics(a, kernels().attention_columns, threads);
}

// The weights of contiguous maps, of the layout that `has_steps` and `has_phrases` describe.
void allocate(ffi::TensorView maps, ffi::Optional<ffi::TensorView> signal, bool has_steps, bool has_phrases,
              bool over_trajectory, double strength, ffi::Optional<double> cap, int64_t threads,
              ffi::TensorView weights) {
  const int64_t leading = 1 + has_steps + has_phrases;
  check(maps.ndim() > leading && maps.numel() > 0, "maps",
        "have elements in a dimension for each letter of the layout");
  AllocateArguments a{};
  a.batch = maps.size(0);
  a.steps = has_steps ? maps.size(1) : 1;
  a.phrases = has_phrases ? maps.size(leading - 1) : 1;
  a.positions = maps.numel() / (a.batch * a.steps * a.phrases);
  if (signal.has_value()) {
    check(over_trajectory && signal.value().ndim() <= leading, "step_signal", "have shape [B, Steps] or [B, Steps, G]");
    a.signal_of_phrases = signal.value().ndim() == 3;
    a.signal = floats("step_signal", signal.value(), a.batch * a.steps * (a.signal_of_phrases ? a.phrases : 1));
  }
  if (!over_trajectory) {
    a.batch *= a.steps * a.phrases;
    a.steps = a.phrases = 1;
  }
  a.maps = floats("maps", maps, maps.numel());
  a.weights = floats("weights", weights, maps.numel());
  a.strength = strength;
  a.cap = cap.has_value() ? cap.value() : std::numeric_limits<double>::infinity();
  a.threads = threads_for(maps.numel(), kLatentGrain, threads);
  kernels().allocate(a);
}

void check_weights(const Objective& a) {
  const int64_t count = a.weights ? a.batch * a.phrases * a.grid[0] * a.grid[1] * a.grid[2] : 0;
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= a.weights[i] >= 0.0f && a.weights[i] <= kLargest;
  for (int64_t i = 0; i < count && !good; ++i) {
    if (!(a.weights[i] >= 0.0f && a.weights[i] <= kLargest)) {
      TVM_FFI_THROW(ValueError) << "weights must be finite and not negative, got " << a.weights[i];
    }
  }
}

template <typename Arguments>
void read_threads(Reader& in, Call<Arguments>& call) {
  call.arguments.threads = threads_for(call.model_output.numel(), kLatentGrain, in.integer("threads"));
}

bool is_ones(const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (values[i] != 1.0f) return false;
  }
  return true;
}

template <typename Kind>
void run_forward(Reader& in, Call<typename Kind::Arguments> call, void (*kernel)(const typename Kind::Arguments&)) {
  auto& a = call.arguments;
  read_threads(in, call);
  read_forward_results<Kind>(in, call);
  check_weights(a);
  const int64_t tiles = (a.positions + kTilePositions - 1) / kTilePositions;
  std::vector<double> partial(static_cast<size_t>(a.batch * tiles * (Kind::kSums + Kind::more_sums(a))));
  a.partial = partial.data();
  kernel(a);
}

template <typename Kind>
void run_backward(Reader& in, Call<typename Kind::Arguments> call, void (*kernel)(const typename Kind::Arguments&)) {
  read_threads(in, call);
  read_backward_results<Kind>(in, call);
  const auto& a = call.arguments;
  if (a.written && is_ones(a.grad_loss, a.unreduced ? a.batch : 1)) return;
  kernel(a);
}

void policy_forward(Reader& in) { run_forward<Policy>(in, read_policy(in), kernels().policy_forward); }
void policy_backward(Reader& in) { run_backward<Policy>(in, read_policy(in), kernels().policy_backward); }
void nft_forward(Reader& in) { run_forward<Nft>(in, read_nft(in), kernels().nft_forward); }
void nft_backward(Reader& in) { run_backward<Nft>(in, read_nft(in), kernels().nft_backward); }

void sample_transition(Reader& in) {
  Call<SampleArguments> call = read_sample(in);
  read_threads(in, call);
  read_sample_results(in, call);
  kernels().sample_transition(call.arguments);
}

// False unless the value is a number, or a tensor of `columns` elements or one, in memory of a CPU and of a known
// dtype.
bool read_values(ffi::AnyView value, int64_t columns, Values& values) {
  const std::optional<ffi::TensorView> tensor = value.try_cast<ffi::TensorView>();
  if (!tensor) {
    const std::optional<double> number = value.try_cast<double>();
    values.number = number.value_or(0.0);
    return number.has_value();
  }
  const DLDataType type = tensor->dtype();
  const bool is_bf16 = type.code == kDLBfloat, known = type.lanes == 1 && (type.code == kDLFloat || is_bf16);
  values.type = type.bits == 64   ? Values::Type::kFloat64
                : type.bits == 32 ? Values::Type::kFloat32
                : is_bf16         ? Values::Type::kBFloat16
                                  : Values::Type::kFloat16;
  values.data = tensor->data_ptr();
  values.size = tensor->numel();
  values.stride = tensor->ndim() == 1 ? tensor->stride(0) : 0;
  return known && type.bits >= 16 && tensor->ndim() <= 1 && tensor->device().device_type == kDLCPU && values.data &&
         (values.size == 1 || values.size == columns);
}

// The coefficients of a step, see cpu/transitions.h. False if an argument is not accepted.
bool transition(int64_t formula, ffi::AnyView sigma, ffi::AnyView sigma_next, ffi::AnyView other, double level,
                ffi::TensorView table) {
  check(table.ndim() == 2 && table.size(0) == kCoefficientRows, "table", "have shape [6, B]");
  const int64_t columns = table.size(1);
  Values values[3];
  return read_values(sigma, columns, values[0]) && read_values(sigma_next, columns, values[1]) &&
         read_values(other, columns, values[2]) &&
         transition_table(static_cast<Formula>(formula), values[0], values[1], values[2], level, columns,
                          floats("table", table, kCoefficientRows * columns));
}

ffi::String isa() { return kernels().isa; }

ffi::String runnable_isas() {
  std::string names;
  for (const Kernels& kernels : runnable()) names += std::string(names.empty() ? "" : " ") + kernels.isa;
  return names;
}

}  // namespace
}  // namespace star

STAR_EXPORT(policy_forward)
STAR_EXPORT(policy_backward)
STAR_EXPORT(nft_forward)
STAR_EXPORT(nft_backward)
STAR_EXPORT(sample_transition)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_kind, star::attention_kind);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_maps, star::attention_maps);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(masked_attention_maps, star::masked_attention_maps);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_rows, star::attention_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attention_columns, star::attention_columns);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(allocate, star::allocate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(transition, star::transition);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(isa, star::isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(runnable_isas, star::runnable_isas);
