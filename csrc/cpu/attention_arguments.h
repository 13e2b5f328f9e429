// Reads the arguments of the attention kernels from tensors, with checks.
#pragma once

#include <utility>

#include "binding.h"
#include "cpu/kernels.h"

namespace star {
namespace {

// [B, H, S, D] with unit stride in D.
View heads_view(const char* name, ffi::TensorView t, int64_t batch, int64_t heads, int64_t head_dim) {
  check_memory(name, t);
  check(t.ndim() == 4 && t.size(0) == batch && t.size(1) == heads && t.size(3) == head_dim, name,
        "have the shape [B, H, S, D] of the query");
  check(head_dim == 1 || t.stride(3) == 1, name, "have unit stride in its last dimension");
  return {t.data_ptr(), dtype_of(name, t), t.stride(0), t.stride(1), t.stride(2)};
}

// A mask by query, expanded to [B, H, Sq, Sk].
PairMask pair_mask(ffi::TensorView mask, ffi::TensorView query, ffi::TensorView key) {
  check_memory("attn_mask", mask);
  const DLDataType dtype = mask.dtype();
  check(dtype.code == kDLBool && dtype.bits == 8, "attn_mask", "be bool");
  check(mask.ndim() == 4 && mask.size(0) == query.size(0) && mask.size(1) == query.size(1) &&
            mask.size(2) == query.size(2) && mask.size(3) == key.size(2),
        "attn_mask", "have shape [B, H, Sq, Sk]");
  const auto data = static_cast<const uint8_t*>(mask.data_ptr());
  return {data, mask.stride(0), mask.stride(1), mask.stride(2), mask.stride(3)};
}

MapsArguments maps_arguments(ffi::TensorView query, ffi::TensorView key, ffi::TensorView lse,
                             ffi::Optional<ffi::TensorView> attn_mask, ffi::TensorView index, ffi::TensorView weight,
                             ffi::Optional<ffi::TensorView> key_mask, int64_t start, double scale, bool text_to_image,
                             bool reduce_heads, ffi::TensorView maps) {
  check(query.ndim() == 4 && query.numel() > 0, "query", "have shape [B, H, S, D], none of them 0");
  MapsArguments a{};
  a.batch = query.size(0);
  a.heads = query.size(1);
  a.head_dim = query.size(3);
  check(a.head_dim <= kMaxHeadDim, "query", "have at most 1024 elements a head");
  check(index.ndim() == 2 && index.size(0) == a.batch && index.size(1) > 0, "index", "have shape [B, T], T above 0");
  a.slots = index.size(1);
  check(weight.ndim() == 3 && weight.size(0) == a.batch && weight.size(1) > 0 && weight.size(2) == a.slots, "weight",
        "have shape [B, G, T], G above 0");
  a.phrases = weight.size(1);
  check(maps.ndim() == (reduce_heads ? 3 : 4), "maps", "have shape [B, G, R], or [B, G, H, R] of each head");
  a.n_rows = maps.size(maps.ndim() - 1);
  a.start = start;
  a.scale = static_cast<float>(scale);
  a.text_to_image = text_to_image;
  a.reduce_heads = reduce_heads;
  const View queries = heads_view("query", query, a.batch, a.heads, a.head_dim);
  const View keys = heads_view("key", key, a.batch, a.heads, a.head_dim);
  a.dense = text_to_image ? keys : queries;
  a.gathered = text_to_image ? queries : keys;
  a.dense_length = text_to_image ? key.size(2) : query.size(2);
  a.gathered_length = text_to_image ? query.size(2) : key.size(2);
  check(start >= 0 && a.n_rows > 0 && start <= a.dense_length - a.n_rows, "rows", "lie within the sequence");
  check_memory("lse", lse);
  check(lse.ndim() == 3 && lse.size(0) == a.batch && lse.size(1) == a.heads && lse.size(2) == query.size(2), "lse",
        "have shape [B, H, Sq]");
  check(dtype_of("lse", lse) == DType::kFloat32, "lse", "be float32");
  a.lse = {lse.data_ptr(), DType::kFloat32, lse.stride(0), lse.stride(1), lse.stride(2)};
  a.index = dense_data<int32_t>("index", index, kDLInt, 32, a.batch * a.slots);
  a.weight = floats("weight", weight, a.batch * a.phrases * a.slots);
  for (int64_t i = 0; i < a.batch * a.slots; ++i) {
    if (a.index[i] >= a.gathered_length) {
      TVM_FFI_THROW(ValueError) << "selection.index must be below the length of the sequence, " << a.gathered_length
                                << ", got " << a.index[i];
    }
  }
  if (key_mask.has_value()) {
    const ffi::TensorView mask = key_mask.value();
    check(mask.ndim() == 2 && mask.size(0) == a.batch && mask.size(1) == key.size(2), "key_mask", "have shape [B, Sk]");
    a.key_mask = dense_data<uint8_t>("key_mask", mask, kDLBool, 8, mask.numel());
  }
  if (attn_mask.has_value()) {
    a.pairs = pair_mask(attn_mask.value(), query, key);
    if (text_to_image) std::swap(a.pairs.row, a.pairs.token);
  }
  a.maps = floats("maps", maps, a.batch * a.phrases * (reduce_heads ? 1 : a.heads) * a.n_rows);
  return a;
}

// Without outputs, scratch and threads. `mask` is expanded to [B, H, R, Sk].
StatisticsArguments statistics_arguments(ffi::TensorView query, ffi::TensorView key,
                                         ffi::Optional<ffi::TensorView> mask, double scale) {
  check(query.ndim() == 4 && query.numel() > 0, "query", "have shape [B, H, R, D], none of them 0");
  StatisticsArguments a{};
  a.batch = query.size(0);
  a.heads = query.size(1);
  a.rows = query.size(2);
  a.head_dim = query.size(3);
  check(a.head_dim <= kMaxHeadDim, "query", "have at most 1024 elements a head");
  a.query = heads_view("query", query, a.batch, a.heads, a.head_dim);
  a.key = heads_view("key", key, a.batch, a.heads, a.head_dim);
  a.keys = key.size(2);
  check(a.keys > 0, "key", "have at least one position");
  a.scale = static_cast<float>(scale);
  if (mask.has_value()) a.pairs = pair_mask(mask.value(), query, key);
  return a;
}

}  // namespace
}  // namespace star
