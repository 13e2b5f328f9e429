// See cuda_bf16.h.
#pragma once

struct __half {
  unsigned short bits;
};
