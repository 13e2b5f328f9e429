// Counters of the emulation, for the tests.
#include <tvm/ffi/function.h>

#include "cuda_runtime.h"

static int64_t wide_loads() { return emulation::wide_loads; }
static int64_t launches() { return emulation::launches; }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(wide_loads, wide_loads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(launches, launches);
