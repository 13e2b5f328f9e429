// Reading the arguments of a call from Python: in order, by kind, with the checks that name an argument.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <optional>
#include <utility>

#include "arguments.h"

#if !defined(STAR_DEVICE)
#error "define STAR_DEVICE, the DLPack device type that the library serves"
#endif

namespace star {
namespace {

namespace ffi = tvm::ffi;

void check(bool condition, const char* name, const char* requirement) {
  if (!condition) TVM_FFI_THROW(ValueError) << name << " must " << requirement;
}

void check_memory(const char* name, ffi::TensorView t) {
  check(t.device().device_type == STAR_DEVICE, name, "be on the device of this library");
  check(t.data_ptr() != nullptr || t.numel() == 0, name, "have memory");
}

class Reader {
 public:
  Reader(const TVMFFIAny* arguments, int32_t count)
      : arguments_(reinterpret_cast<const ffi::AnyView*>(arguments), count) {}

  // Tensors lie in memory of the library's device, all in that of the first.
  ffi::TensorView tensor(const char* name) {
    const auto t = next<ffi::TensorView>(name, "a tensor");
    check_memory(name, t);
    if (device_ < 0) device_ = t.device().device_id;
    check(t.device().device_id == device_, name, "be on the device of the first tensor");
    return t;
  }
  ffi::Optional<ffi::TensorView> optional(const char* name) {
    if (read_ < arguments_.size() && arguments_[read_].type_index() == ffi::TypeIndex::kTVMFFINone) {
      ++read_;
      return {};
    }
    return tensor(name);
  }
  bool flag(const char* name) { return next<bool>(name, "a bool"); }
  int64_t integer(const char* name) { return next<int64_t>(name, "an integer"); }
  float number(const char* name) { return static_cast<float>(next<double>(name, "a number")); }

  void finish() const {
    if (read_ != arguments_.size()) {
      TVM_FFI_THROW(TypeError) << "expected " << read_ << " arguments, got " << arguments_.size();
    }
  }

 private:
  template <typename T>
  T next(const char* name, const char* kind) {
    if (read_ >= arguments_.size()) TVM_FFI_THROW(TypeError) << name << " is missing";
    std::optional<T> value = arguments_[read_++].try_cast<T>();
    if (!value) TVM_FFI_THROW(TypeError) << name << " must be " << kind;
    return *std::move(value);
  }

  ffi::PackedArgs arguments_;
  int read_ = 0, device_ = -1;
};

// Exports star::name(Reader&) as the library's function `name`.
#define STAR_EXPORT(name)                                                                                            \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* arguments, int32_t count, TVMFFIAny*) { \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                       \
    star::Reader in(arguments, count);                                                                               \
    star::name(in);                                                                                                  \
    TVM_FFI_SAFE_CALL_END();                                                                                         \
  }

DType dtype_of(const char* name, ffi::TensorView t) {
  const DLDataType type = t.dtype();
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.lanes == 1 && type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.lanes == 1 && type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  TVM_FFI_THROW(TypeError) << name << " must be float32, float16 or bfloat16";
  return DType::kFloat32;
}

// The data of a contiguous tensor of `code`/`bits` with `count` elements.
template <typename T>
T* dense_data(const char* name, ffi::TensorView t, uint8_t code, uint8_t bits, int64_t count) {
  check_memory(name, t);
  check(t.dtype().code == code && t.dtype().bits == bits, name, "have the expected dtype");
  check(t.IsContiguous(), name, "be contiguous");
  check(t.numel() == count, name, "have the expected number of elements");
  return static_cast<T*>(t.data_ptr());
}

float* floats(const char* name, ffi::TensorView t, int64_t count) {
  return dense_data<float>(name, t, kDLFloat, 32, count);
}

}  // namespace
}  // namespace star
