// The attention kernel for Hopper as a function of the CUDA library: reads its arguments and launches it on the current
// stream. The caller allocates the results.
#include "cuda/attention_arguments.h"
#include "cuda/on_device.h"

namespace star {
namespace {

int narrow(const char* name, int64_t value) {
  check(value <= 2147483647, name, "have sizes of 32 bits");
  return static_cast<int>(value);
}

// [B, H, S, D] of 16 bits; rows start at multiples of 16 bytes and do not share memory.
View rows_view(const char* name, ffi::TensorView t, const cuda::AttentionArguments& a, int64_t length, DType dtype) {
  constexpr int64_t kUnit = 8;
  check(t.ndim() == 4 && t.size(0) == a.batch && t.size(1) == a.heads && t.size(2) == length && t.size(3) == a.head_dim,
        name, "have the shape [B, H, S, D] of the query");
  check(dtype_of(name, t) == dtype, name, "have the dtype of the query");
  bool aligned = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && (t.size(d) == 1 || (t.stride(d) > 0 && t.stride(d) % kUnit == 0));
  check(aligned, name, "have contiguous rows that start at multiples of 16 bytes");
  return {t.data_ptr(), dtype, t.stride(0), t.stride(1), t.stride(2)};
}

// query, key, value, index?, weight?, key_mask?, out, lse, maps?, start, scale, consumers, keys, stages, overlap,
// status. The last one is an address that the device can write, see AttentionArguments, or 0.
void attention_forward(Reader& in) {
  const ffi::TensorView query = in.tensor("query"), key = in.tensor("key"), value = in.tensor("value");
  const auto index = in.optional("index"), weight = in.optional("weight"), key_mask = in.optional("key_mask");
  const ffi::TensorView out = in.tensor("out"), lse = in.tensor("lse");
  const auto maps = in.optional("maps");
  const int64_t start = in.integer("start");
  const float scale = in.number("scale");
  cuda::AttentionVariant variant{};
  for (int* field : {&variant.consumers, &variant.keys, &variant.stages, &variant.overlap}) {
    *field = narrow("variant", in.integer("variant"));
  }
  const int64_t status = in.integer("status");

  check(query.ndim() == 4 && query.numel() > 0, "query", "have shape [B, H, S, D], none of them 0");
  check(key.ndim() == 4 && key.numel() > 0, "key", "have shape [B, H, S, D], none of them 0");
  check(scale > 0.0f, "scale", "be positive");
  const DType dtype = dtype_of("query", query);
  check(dtype != DType::kFloat32, "query", "be float16 or bfloat16");
  cuda::AttentionArguments a{};
  a.batch = narrow("query", query.size(0));
  a.heads = narrow("query", query.size(1));
  a.queries = narrow("query", query.size(2));
  a.head_dim = narrow("query", query.size(3));
  a.keys = narrow("key", key.size(2));
  a.query = rows_view("query", query, a, a.queries, dtype);
  a.key = rows_view("key", key, a, a.keys, dtype);
  a.value = rows_view("value", value, a, a.keys, dtype);
  a.out = rows_view("out", out, a, a.queries, dtype);
  a.lse = floats("lse", lse, static_cast<int64_t>(a.batch) * a.heads * a.queries);
  constexpr float kLog2E = 1.4426950408889634f;
  a.scale_log2 = scale * kLog2E;
  if (key_mask.has_value()) {
    a.key_mask = dense_data<uint8_t>("key_mask", key_mask.value(), kDLBool, 8, static_cast<int64_t>(a.batch) * a.keys);
  }
  if (maps.has_value()) {
    check(index.has_value() && weight.has_value(), "index and weight", "be given with maps");
    const ffi::TensorView tokens = index.value(), weights = weight.value(), result = maps.value();
    check(tokens.ndim() == 2 && tokens.size(0) == a.batch && tokens.size(1) > 0, "index",
          "have shape [B, T], T above 0");
    a.slots = narrow("index", tokens.size(1));
    check(weights.ndim() == 3 && weights.size(0) == a.batch && weights.size(1) > 0 && weights.size(2) == a.slots,
          "weight", "have shape [B, G, T], G above 0");
    a.phrases = narrow("weight", weights.size(1));
    check(result.ndim() == 4 && result.size(3) > 0, "maps", "have shape [B, G, H, R], R above 0");
    a.n_rows = narrow("maps", result.size(3));
    check(start >= 0 && start <= static_cast<int64_t>(a.queries) - a.n_rows, "rows", "lie within the sequence");
    a.row_start = static_cast<int>(start);
    a.index = dense_data<int32_t>("index", tokens, kDLInt, 32, static_cast<int64_t>(a.batch) * a.slots);
    a.weight = floats("weight", weights, static_cast<int64_t>(a.batch) * a.phrases * a.slots);
    a.maps = floats("maps", result, static_cast<int64_t>(a.batch) * a.phrases * a.heads * a.n_rows);
  }
  a.status = reinterpret_cast<unsigned*>(status);
  const DeviceGuard guard(query);
  const char* problem = cuda::attention_forward(a, variant, current_stream(query));
  if (problem) TVM_FFI_THROW(RuntimeError) << "attention_forward: " << problem;
  check_launch("attention_forward");
}

}  // namespace
}  // namespace star

STAR_EXPORT(attention_forward)
